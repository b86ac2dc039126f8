"""Every row of a table ends in pairs.parquet or, with its reason, in rejects.jsonl."""

import contextlib
import hashlib
import io
import json
import os
import signal

import numpy as np
import psutil
import pytest
from datasets import load_dataset
from PIL import Image

from medft.data.accounting import accepted_pairs
from medft.data.pairing import Maker
from medft.data.pairs import read_pairs
from medft.data.prepare import prepare
from medft.data.rows import load_rows
from medft.data.sources import load_sources
from medft.data.splits import join_groups
from medft.data.stored_image import perceptual_hash
from medft.errors import DataError, RecipeError, RunError


def image(folder, name, seed):
    values = np.random.default_rng(seed).integers(0, 255, (30, 40), dtype=np.uint8)
    folder.mkdir(exist_ok=True)
    Image.fromarray(values).save(folder / name)


@pytest.fixture
def export(tmp_path):
    """A folder with images and a way to write a table and its SOURCES.yaml."""
    for seed in range(6):
        image(tmp_path / "images", f"{seed}.png", seed)

    def write(table: bytes, yaml: str, name: str = "table.csv"):
        (tmp_path / name).write_bytes(table)
        sources = tmp_path / "SOURCES.yaml"
        sources.write_text(yaml)
        return sources

    return write


YAML = """\
sources:
  - {name: a, kind: csv, path: table.csv, images: images, image: file, text: report%s}
split: {validation: 0.0}
"""


def rejects(out):
    return [json.loads(line) for line in (out / "rejects.jsonl").read_text().splitlines()]


def test_a_messy_csv_is_read_and_every_row_accounted_for(export, tmp_path):
    table = (
        " file ; report;age \r\n0.png;Herz größer als üblich;61\r\n1.png; ;40\r\n"
        "9.png;Lost;1\r\n../secret.png;Out;2\r\n2.png;CLOSED ;3\r\n2.png;CLOSED;3\r\n;x;1\r\n"
    ).encode("latin-1")
    sources = export(table, YAML % ", keep: [age], encoding: latin-1")
    (tmp_path / "secret.png").write_bytes((tmp_path / "images" / "0.png").read_bytes())
    out = tmp_path / "out"
    summary = prepare(sources, out, max_rejects=0.9)
    counts = summary["sources"]["a"]
    assert (counts["read"], counts["accepted"], counts["rejected"]) == (7, 2, 5)
    assert [(line["row"], line["reason"]) for line in rejects(out)] == [
        (2, "empty_text"),
        (3, "missing_image"),
        (4, "outside_root"),
        (6, "duplicate"),
        (7, "no_image"),
    ]
    rows = list(read_pairs(out / "pairs.parquet"))
    assert [row["text"] for row in rows] == ["Herz größer als üblich", "CLOSED"]
    assert json.loads(rows[0]["fields"]) == {"age": "61"}
    assert json.loads((out / "summary.json").read_text()) == summary


def test_cells_are_neither_cut_nor_truncated(export, tmp_path):
    table = (
        'file,report\n0.png,"Line one.\x0cLine two,\u2028 and three\x85"\n'
        '1.png,Normal chest, no effusion. Fracture of rib 5\n2.png\n3.png,"a\nb",\n'
    ).encode()
    prepare(export(table, YAML % ""), tmp_path / "out", max_rejects=0.9)
    assert [(line["row"], line["reason"]) for line in rejects(tmp_path / "out")] == [
        (2, "wrong_cell_count"),
        (3, "wrong_cell_count"),
    ]
    texts = [row["text"] for row in read_pairs(tmp_path / "out" / "pairs.parquet")]
    assert texts == ["Line one.\x0cLine two,\u2028 and three", "a\nb"]


@pytest.mark.parametrize(
    ("kind", "content"),
    [
        ("json", b"null"),
        ("json", b"[1]"),
        ("json", b"[" * 100_000),
        ("json", b'[{"file": ' + b"9" * 5000 + b"}]"),
        ("jsonl", b"{torn\n"),
        ("jsonl", b"[]\n"),
        ("json", b"[]"),
        ("csv", b""),
        ("csv", b"file,file\n0.png,x\n"),
    ],
)
def test_a_broken_table_is_one_sentence(export, tmp_path, kind, content):
    sources = export(content, YAML.replace("kind: csv", f"kind: {kind}") % "")
    with pytest.raises(DataError, match="expected"):
        prepare(sources, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_is_stored_is_what_datasets_reads(export, tmp_path):
    sources = export(b"file,report\n0.png,first\n1.png,second\n", YAML % "")
    out = tmp_path / "out"
    prepare(sources, out)
    loaded = load_dataset("parquet", data_files=str(out / "pairs.parquet"), split="train")
    for row, raw in zip(loaded, read_pairs(out / "pairs.parquet"), strict=True):
        content = raw["images"][0]["bytes"]
        assert hashlib.sha256(content).hexdigest() == row["sha256"][0]
        assert (row["width"], row["height"]) == ([40], [30])
        image = row["images"][0]
        assert np.array_equal(np.asarray(image), np.asarray(Image.open(io.BytesIO(content))))
        gray = image.convert("L").resize((32, 32), Image.Resampling.HAMMING, reducing_gap=3.0)
        assert perceptual_hash(gray) == row["phash"][0]
        assert raw["images"][0]["path"] in ("0.png", "1.png")


def test_templates_questions_and_where(export, tmp_path):
    rows = [
        {"file": "0.png", "findings": "Clear.", "impression": None, "view": "PA", "q": "Clear?"},
        {"file": "1.png", "findings": "Opaque.", "impression": "Ill.", "view": "AP", "q": "Ill?"},
        {"file": "2.png", "findings": "x", "impression": "y", "view": "LAT", "q": "z"},
    ]
    yaml = """\
sources:
  - name: a
    kind: json
    path: table.json
    images: images
    image: file
    text: "{findings} {impression}"
    question: q
    where: {view: [PA, AP]}
"""
    sources = export(json.dumps(rows).encode(), yaml, "table.json")
    prepare(sources, tmp_path / "out")
    got = list(read_pairs(tmp_path / "out" / "pairs.parquet"))
    assert [(row["text"], row["question"]) for row in got] == [
        ("Clear.", "Clear?"),
        ("Opaque. Ill.", "Ill?"),
    ]


def test_groups_stay_together_and_equal_images_join_them(export, tmp_path):
    lines = ["file,report,patient"]
    for index in range(60):
        image(tmp_path / "images", f"v{index}.png", 100 + index)
        lines.append(f"v{index}.png,text {index},p{index // 3}")
    lines.append("v0.png,another text,p19")  # the image of p0 under p19
    yaml = YAML.replace("0.0", "0.2") % ", group: patient"
    sources = export("\n".join(lines).encode(), yaml)
    summary = prepare(sources, tmp_path / "out")
    splits = {}
    for row in read_pairs(tmp_path / "out" / "pairs.parquet"):
        splits.setdefault(row["group_id"], set()).add(row["split"])
        splits.setdefault(row["sha256"][0], set()).add(row["split"])
    assert all(len(found) == 1 for found in splits.values())
    assert summary["groups"] == 19
    assert summary["splits"]["validation"] == 12  # floor(0.2 * 61 + 0.5), in groups of three


OWN = "split: {column: fold, train: [tr], validation: [va], test: [te]}\n"


def test_a_split_that_the_table_brings_along_is_taken_over(export, tmp_path):
    yaml = YAML.replace("split: {validation: 0.0}\n", OWN) % ", group: p"
    rows = ["0.png,a,p1,tr", "1.png,b,p2,va", "2.png,c,p3,te", "3.png,d,p4,other", "4.png,e,p1,tr"]
    sources = export("\n".join(["file,report,p,fold", *rows]).encode(), yaml)
    prepare(sources, tmp_path / "out", max_rejects=0.5)
    got = {r["text"]: r["split"] for r in read_pairs(tmp_path / "out" / "pairs.parquet")}
    assert got == {"a": "train", "b": "validation", "c": "test", "e": "train"}
    assert [line["reason"] for line in rejects(tmp_path / "out")] == ["no_split"]


def test_a_split_of_the_table_that_tears_a_group_is_an_error(export, tmp_path):
    yaml = YAML.replace("split: {validation: 0.0}\n", OWN) % ""
    rows = ["0.png,a,tr", "0.png,b,te", "1.png,c,tr"]
    sources = export("\n".join(["file,report,fold", *rows]).encode(), yaml)
    with pytest.raises(DataError, match="1 of 2 stand in several, first image/"):
        prepare(sources, tmp_path / "out")
    assert not (tmp_path / "out" / "pairs.parquet").exists()
    with pytest.raises(DataError, match="the columns fold in"):
        prepare(export(b"file,report\n0.png,a\n", yaml), tmp_path / "out")


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (", group: patient", "the columns patient in"),
        (", keep: [age]", "it has file, report"),
        (', question: "{a} {report}"', "the columns a in"),
    ],
)
def test_a_column_that_does_not_exist_is_an_error_that_lists_those_that_do(
    export, tmp_path, extra, message
):
    sources = export(b"file,report\n0.png,x\n", YAML % extra)
    with pytest.raises(DataError, match=message):
        prepare(sources, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_too_many_rejects_stop_with_their_reasons_and_leave_the_earlier_files(export, tmp_path):
    out = tmp_path / "out"
    prepare(export(b"file,report\n0.png,x\n", YAML % ""), out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    sources = export(b"file,report\n0.png,x\n8.png,y\n9.png,z\n", YAML % "")
    with pytest.raises(DataError, match=r"2 of 3 were \(missing_image 2, row 2: no file 8.png\)"):
        prepare(sources, out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert set(before) == {"pairs.parquet", "report.html", "rejects.jsonl", "summary.json"}
    prepare(sources, out, max_rejects=1.0)
    assert len(rejects(out)) == 2


SPLIT = "sources:\n  - {name: a, kind: csv, path: t, image: i, text: t}\nsplit: %s\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sources: []\n", "sources: expected"),
        ("sources:\n  - {name: a, kind: xml, path: t, image: i, text: t}\n", ":2: sources.0.kind"),
        ("sources:\n  - {name: a, kind: csv, paht: t, image: i, text: t}\n", "did you mean path"),
        ("split: {validation: 0.1}\n", "sources is required"),
        (YAML.replace("0.0", "0.6, test: 0.5") % "", "validation and test together below 1"),
        (YAML.replace("image: file", "image: []") % "", "sources.0.image"),
        (YAML.replace("csv, path: table.csv", "imagefolder, path: 'x*'") % "", "a path without *"),
        ("sources: [{name: a, kind: dicom, path: x/*, text: t}]", "since dicom is one folder"),
        (SPLIT % "{validtion: 0.1}", "unknown key split.validtion: did you mean validation?"),
        (SPLIT % "{validation: 2}", ":3: split.validation: expected less than 1, got 2"),
        (SPLIT % "{column: x}", "split.train is required and missing"),
        (SPLIT % "{train: [x]}", "split.column is required and missing"),
        (SPLIT % "{column: x, train: [x], keep: y}", "unknown key split.keep: known here are"),
        (SPLIT % "{shared_groups: report}", "unknown key split.shared_groups: known here are"),
        (SPLIT % "3", "split: expected a valid dictionary"),
    ],
)
def test_a_wrong_sources_file_names_the_place(tmp_path, text, message):
    path = tmp_path / "SOURCES.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError) as caught:
        load_sources(path)
    assert any(message in problem for problem in caught.value.problems)
    assert "Section" not in str(caught.value).replace("instance of SplitSection", "")
    assert "split by" not in str(caught.value)


def test_prompts_may_only_use_kept_columns(export, tmp_path):
    yaml = YAML % "" + 'prompts: ["Describe this {modality}."]\n'
    sources = export(b"file,report,modality\n0.png,x,CT\n", yaml)
    with pytest.raises(RecipeError, match="add it to keep"):
        prepare(sources, tmp_path / "out")


@pytest.mark.parametrize("template", ["{report.__class__}", "{report!r}", "{0}{", "{report:>9}"])
def test_templates_take_names_only(export, tmp_path, template):
    sources = export(
        b"file,report\n0.png,x\n", YAML.replace("text: report", f"text: '{template}'") % ""
    )
    with pytest.raises((RecipeError, DataError)):
        prepare(sources, tmp_path / "out")


def test_a_image_that_changes_while_it_is_prepared_is_an_error(export, tmp_path, monkeypatch):
    """Images that are stored as they came are read twice; they must be what was hashed."""
    from medft.data import assign

    sources = export(b"file,report\n0.png,first\n1.png,second\n", YAML % "")

    def join_late(*arguments):
        (tmp_path / "images" / "1.png").write_bytes((tmp_path / "images" / "2.png").read_bytes())
        return join_groups(*arguments)

    monkeypatch.setattr(assign, "join_groups", join_late)
    with pytest.raises(DataError, match=r"1\.png was changed meanwhile"):
        prepare(sources, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    assert prepare(sources, tmp_path / "out")["pairs"] == 2


HALF_A_CHARACTER = b'{"file": "1.png", "report": "A cut emoji \\ud83d"}\n'


def test_half_a_character_is_rejected_with_its_reason(export, tmp_path):
    rows = b'{"file": "0.png", "report": "first"}\n' + HALF_A_CHARACTER
    yaml = (YAML % "").replace("csv", "jsonl")
    prepare(export(rows, yaml, "table.jsonl"), tmp_path / "out", max_rejects=0.5)
    assert [line["reason"] for line in rejects(tmp_path / "out")] == ["bad_text"]


def test_a_full_disk_ends_the_command_with_a_sentence_and_leaves_nothing(
    export, tmp_path, monkeypatch
):
    """Many rows wait for room when the writing side fails; the workers must not wait for ever."""
    from medft.data import prepare as prepare_module

    rows = b"file,report\n" + b"".join(f"0.png,report {i}\n".encode() for i in range(3000))
    sources = export(rows, YAML % "")

    class Unwritable:
        images = ()

        def record(self):
            raise OSError(28, "No space left on device")

    def broken(*arguments, **options):
        next(accepted_pairs(*arguments, **options))
        yield Unwritable()

    monkeypatch.setattr(prepare_module, "accepted_pairs", broken)
    with pytest.raises(RunError, match="its disk is full"):
        prepare(sources, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("pattern", ["{}/t-*.csv", "../*/t-*.csv", "**/t-*.csv", "t-**.csv"])
def test_tables_of_a_pattern_of_any_form_are_read(export, tmp_path, pattern):
    sources = export(b"", (YAML % "").replace("table.csv", f"'{pattern.format(tmp_path)}'"))
    for number in range(2):
        (tmp_path / f"t-{number}.csv").write_text(f"file,report\n0.png,text {number}\n")
    summary = prepare(sources, tmp_path / "out")
    assert summary["pairs"] == 2


@pytest.mark.parametrize("pattern", ["{}/no-*.csv", "no/**/t.csv", "no-**.csv"])
def test_a_pattern_that_matches_no_file_is_one_sentence(export, tmp_path, pattern):
    sources = export(b"", (YAML % "").replace("table.csv", f"'{pattern.format(tmp_path)}'"))
    with pytest.raises(DataError, match="expected files that match"):
        prepare(sources, tmp_path / "out")


def test_a_worker_that_is_killed_ends_the_command_with_a_sentence(export, tmp_path, monkeypatch):
    """As the kernel does it where memory is short; a pool that waits for it waits for ever."""
    rows = b"file,report\n" + b"".join(f"0.png,report {i}\n".encode() for i in range(500))
    sources = export(rows, YAML % "")
    whole = Maker.result

    def killed(self, task):
        [(number, _)] = task.rows
        if number == 200:
            os.kill(os.getpid(), signal.SIGKILL)
        return whole(self, task)

    monkeypatch.setattr(Maker, "result", killed)
    with pytest.raises(
        RunError, match="stopped while it read row 200 of source a, as for lack of memory"
    ):
        prepare(sources, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    assert prepare(sources, tmp_path / "out")["pairs"] == 500


def test_files_without_a_pair_are_written_where_that_is_allowed_and_never_trained(export, tmp_path):
    sources = export(b"file,report\n0.png,\n1.png,NULL\n", YAML % "")
    with pytest.raises(DataError, match=r"2 of 2 were \(empty_text 2"):
        prepare(sources, tmp_path / "out")
    counts = prepare(sources, tmp_path / "out", max_rejects=1.0)["sources"]["a"]
    assert (counts["read"], counts["accepted"], counts["rejected"]) == (2, 0, 2)
    assert len(rejects(tmp_path / "out")) == 2
    with pytest.raises(DataError, match="expected rows of split train"):
        load_rows(tmp_path / "out" / "pairs.parquet", split="train")


def test_a_bad_row_of_several_tables_is_named_with_its_table(export, tmp_path):
    sources = export(b"", (YAML % "").replace("table.csv", "'t-*.csv'"))
    (tmp_path / "t-1.csv").write_text("file,report\n0.png,one\n1.png\n")
    (tmp_path / "t-2.csv").write_text("file,report\n2.png,two\n3.png\n")
    prepare(sources, tmp_path / "out", max_rejects=0.5)
    found = [(line["row"], line["detail"]) for line in rejects(tmp_path / "out")]
    assert found == [
        (2, "t-1.csv, line 3: 1 cells for 2 columns"),
        (4, "t-2.csv, line 3: 1 cells for 2 columns"),
    ]


@pytest.mark.parametrize("kind", ["csv", "json", "jsonl"])
def test_a_pipe_in_place_of_a_table_is_not_waited_for(export, tmp_path, kind):
    sources = export(b"", (YAML % "").replace("csv", kind), f"table.{kind}")
    (tmp_path / f"table.{kind}").unlink()
    os.mkfifo(tmp_path / f"table.{kind}")
    with pytest.raises(DataError, match="a pipe or a device"):
        prepare(sources, tmp_path / "out")


def test_pairs_whose_swap_was_interrupted_are_the_new_ones(export, tmp_path):
    out = tmp_path / "out"
    prepare(export(b"file,report\n0.png,old\n", YAML % ""), out)
    prepare(export(b"file,report\n0.png,new\n", YAML % ""), tmp_path / "new")
    (tmp_path / "new").rename(out / ".complete")  # as a kill between two renames leaves it
    assert [row["text"] for row in read_pairs(out / "pairs.parquet")] == ["new"]
    assert not (out / ".complete").exists()


@pytest.mark.parametrize("fails", [True, False])
def test_no_worker_outlives_a_preparation(export, tmp_path, fails):
    """One that starts late would write into a draft that is gone, and keep the folder's lock."""
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    rows = b"file,report\n" + b"".join(
        f"{'lost' if fails else 0}.png,report {i}\n".encode() for i in range(40)
    )
    sources = export(rows, YAML % "")
    with contextlib.suppress(DataError):
        prepare(sources, tmp_path / "out")
    assert (tmp_path / "out").exists() != fails
    assert {child.pid for child in psutil.Process().children(recursive=True)} <= before
