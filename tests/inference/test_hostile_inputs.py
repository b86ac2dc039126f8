"""Folders, names and cut files that would stop predict, and cells that a spreadsheet would run."""

import csv
import json
import os
import shutil
import socket

import pytest

from medft.errors import DataError, RunError
from medft.inference.files import predict_files
from medft.inference.inputs import Entry, entries_of
from medft.inference.predictor import open_image_file
from medft.inference.records import COLUMNS, CSV_COLUMNS, kept_rows, record_writer, rewrite

NASTY = [
    "=1+1",
    "+1",
    "-2+3",
    "@SUM(A1)",
    "\tx",
    "\rx",
    "'=1+1",
    "''-1",
    "'quoted'",
    "-",
    "\uff1d1",
]


def record(**changes):
    row = dict.fromkeys(("image", "prompt", "model", "siglip", "text"), "x") | {"weights": "w"}
    row |= {"truncated": False, "nearest": [], "embedding": None, "error": None} | changes
    return {name: row[name] for name in COLUMNS}


def written(out, *rows):
    rewrite(out, [])
    with out.open("a", encoding="utf-8", newline="") as file:
        write = record_writer(out, file)
        for row in rows:
            write(row)
    return out


@pytest.fixture
def folder(images, tmp_path):
    """A folder of one image, and the path of another image outside."""
    inside = tmp_path / "folder"
    inside.mkdir()
    shutil.copyfile(images[0], inside / "a.png")
    shutil.copyfile(images[1], tmp_path / "outside.png")
    return inside


def names_in(folder):
    return [entry.image.name for entry in entries_of([folder], lambda row: "What?")]


def test_what_is_no_regular_file_of_the_folder_is_skipped_and_counted(folder, caplog):
    os.mkfifo(folder / "pipe.png")
    with socket.socket(socket.AF_UNIX) as unix:
        unix.bind(str(folder / "socket.png"))
    (folder / "dangling.png").symlink_to("nothing")
    (folder / "loop.png").symlink_to("loop.png")
    (folder / "out.png").symlink_to(folder.parent / "outside.png")
    (folder / "same.png").symlink_to("a.png")
    (folder / "up").symlink_to(folder.parent)
    (folder / "again").symlink_to(".")
    (folder / "._a.png").write_bytes(b"\0\5\x16\7" + bytes(100))
    (folder / "notes.txt").write_text("notes")
    assert names_in(folder) == ["a.png", "same.png"]
    assert caplog.messages == [
        f"skipped in {folder}: 2 dangling links, 1 files of macOS beside others (._*), 2 links out "
        "of the folder, 1 links to folders, 1 other files, 2 pipes, sockets or devices"
    ]


def test_a_folder_of_nothing_else_says_what_it_holds(folder):
    (folder / "a.png").unlink()
    (folder / "out.png").symlink_to(folder.parent / "outside.png")
    with pytest.raises(DataError, match=r"found none that .*, but 1 links out of the folder"):
        names_in(folder)
    # the link itself may be named
    assert entries_of([folder / "out.png"], lambda row: "") == [Entry(folder / "out.png", "")]


def test_a_pipe_in_a_table_is_a_row_with_its_error(folder):
    os.mkfifo(folder / "pipe.png")
    for name in ("pipe.png", ".", "a\0.png", "none.png"):
        with pytest.raises(DataError, match=r"expected an? (complete )?image"):
            open_image_file(folder / name)
    assert open_image_file(folder / "a.png").mode == "RGB"


def test_a_dicom_file_is_known_by_its_preamble(folder):
    pydicom = pytest.importorskip("pydicom")
    example = pydicom.data.get_testdata_file("CT_small.dcm")
    shutil.copyfile(example, folder / "IM000000")
    shutil.copyfile(example, folder / "DICOMDIR")
    shutil.copyfile(example, folder / "b.png")
    shutil.copyfile(folder / "a.png", folder / "c.dcm")
    assert names_in(folder) == ["IM000000", "a.png", "b.png", "c.dcm"]
    for name in ("IM000000", "b.png"):
        assert open_image_file(folder / name).size == (128, 128)
    assert (
        open_image_file(folder / "c.dcm").tobytes() == open_image_file(folder / "a.png").tobytes()
    )


def test_names_that_are_the_same_as_text_are_refused(folder):
    shutil.copyfile(folder / "a.png", os.fsencode(folder) + b"/x\xff.png")
    assert len(names_in(folder)) == 2
    shutil.copyfile(folder / "a.png", folder / "x\\udcff.png")
    with pytest.raises(DataError, match="stands for two files: rename one"):
        names_in(folder)


def test_half_a_character_in_a_prompt_is_one_sentence(folder):
    with pytest.raises(DataError, match=r"expected text as the prompt of .*, it holds half a"):
        entries_of([folder], lambda row: "a\ud800")


@pytest.mark.parametrize("ending", ["jsonl", "csv"])
def test_a_file_that_was_cut_at_any_byte_goes_on(tmp_path, ending):
    rows = [record(image="1\u00e9\n.png"), record(image="2", text="\U0001f9b4\u00e9\u4e2d")]
    out = written(tmp_path / f"p.{ending}", *rows)
    content = out.read_bytes()
    first = len(written(tmp_path / f"q.{ending}", rows[0]).read_bytes())
    for end in range(first, len(content)):
        out.write_bytes(content[:end])
        assert [row["image"] for row in kept_rows(out, "w")] == ["1\u00e9\n.png"], content[:end]
    out.write_bytes(content)
    assert len(kept_rows(out, "w")) == 2


def test_other_bytes_within_a_file_are_not_taken_for_a_cut(tmp_path):
    out = written(tmp_path / "p.jsonl", record(), record())
    out.write_bytes(out.read_bytes().replace(b'"x"', b'"\xff"', 1))
    with pytest.raises(RunError, match="holds something else"):
        kept_rows(out, "w")


@pytest.mark.parametrize("ending", ["jsonl", "csv"])
def test_a_file_with_a_prompt_of_any_length_goes_on(tmp_path, ending):
    out = written(tmp_path / f"p.{ending}", record(prompt="why " * 100_000))
    assert [row["prompt"] for row in kept_rows(out, "w")] == ["why " * 100_000]


def test_a_spreadsheet_runs_no_cell_and_the_file_goes_on_as_it_was(tmp_path):
    rows = [
        record(image=f"{n}{text}" if n else text, prompt=text, text=text,
               nearest=[{"id": text, "text": text, "similarity": -0.25}])
        for n, text in enumerate(NASTY)
    ]  # fmt: skip
    out = written(tmp_path / "p.csv", *rows)
    with out.open(newline="", encoding="utf-8") as file:
        cells = list(csv.DictReader(file))
    for row in cells:
        texts = [row[name] for name in CSV_COLUMNS if name != "nearest_similarity"]
        assert not [text for text in texts if text[:1] in tuple("=+-@\t\r\n\uff1d")], row
        assert row["nearest_similarity"] == "-0.25"
    assert cells[8]["prompt"] == "'quoted'"
    kept = kept_rows(out, "w")
    for name, other in (("prompt", "prompt"), ("text", "text"), ("nearest_id", "prompt")):
        assert [row[name] for row in kept] == [row[other] for row in rows]
    content = out.read_bytes()
    rewrite(out, kept)
    assert out.read_bytes() == content


@pytest.mark.parametrize(
    "line",
    [
        json.dumps(record(image=["a"])),
        json.dumps(record(weights=None)),
        "[" * 100_000,
        "[]",
        '{"image": 1}',
        json.dumps(record(text="\ud801")),
        json.dumps(record(nearest=[{"id": "\ud801"}])),
    ],
)
def test_a_record_of_another_form_is_one_sentence(tmp_path, line):
    (tmp_path / "p.jsonl").write_text(line + "\n")
    with pytest.raises(RunError, match="holds something else"):
        kept_rows(tmp_path / "p.jsonl", "w")
    assert [path.name for path in tmp_path.iterdir()] == ["p.jsonl"]


@pytest.mark.parametrize(
    ("out", "sentence"),
    [
        ("a.png/x.jsonl", "a.png is a file"),
        ("a.png/deep/x.jsonl", "a.png is a file"),
        (f"{'n' * 248}.jsonl", "at most 255"),
        (f"{'n/' * 2500}x.jsonl", "at most 4095"),
        ("/proc/x.jsonl", "/proc cannot be"),
        ("/proc/deep/x.jsonl", "/proc cannot be"),
    ],
)
def test_a_place_that_cannot_be_written_is_refused_before_anything_is_loaded(folder, out, sentence):
    with pytest.raises(RunError, match=sentence):
        predict_files(folder / "no run", [folder], folder / out)
    assert [path.name for path in folder.iterdir()] == ["a.png"]


def test_the_longest_name_is_predicted_into(runs, folder, tmp_path):
    out = tmp_path / "new" / f"{'n' * 242}.jsonl"
    assert predict_files(runs / "siglip", [folder], out)["written"] == 1
    assert [path.name for path in out.parent.iterdir()] == [out.name]


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_a_place_that_holds_no_file_is_one_sentence(tmp_path, make):
    make(tmp_path / "p.jsonl")
    with pytest.raises(RunError, match="holds something else"):
        kept_rows(tmp_path / "p.jsonl", "w")


def test_odd_names_are_predicted_once(runs, folder, tmp_path):
    image = folder / "a.png"
    for name in (b"new\nline.png", b'quo"te,.png', b"=1+1.png", b"byte\xff.png", b"'=x.png"):
        shutil.copyfile(image, os.fsencode(folder) + b"/" + name)
    (folder / os.fsdecode(b"bad\xff.png")).write_text("no image")
    for out in (tmp_path / "o.csv", tmp_path / "o.jsonl"):
        counts = predict_files(runs / "siglip", [folder], out)
        assert (counts["written"], counts["failed"]) == (7, 1)
        content = out.read_bytes()
        counts = predict_files(runs / "siglip", [folder], out)
        assert (counts["written"], counts["kept"], counts["failed"]) == (1, 6, 1)
        assert sorted(out.read_bytes().splitlines()) == sorted(content.splitlines())


def test_the_command_exits_with_1_where_every_row_failed(medft, capsys, runs, folder, tmp_path):
    (folder / "bad.png").write_text("no image")
    assert medft("predict", runs / "siglip", folder, "--out", tmp_path / "some.jsonl") == 0
    capsys.readouterr()
    (folder / "a.png").unlink()
    assert medft("predict", runs / "siglip", folder, "--out", tmp_path / "none.jsonl") == 1
    captured = capsys.readouterr()
    [sentence] = [x for x in captured.err.splitlines() if x.startswith("medft: error: ")]
    assert "expected a prediction for one image at least, all 1 failed: see error" in sentence
    assert json.loads((tmp_path / "none.jsonl").read_text())["error"]
