"""A medium of a PACS: files without suffix in a tree, viewers, links and pipes beside them."""

import os
import shutil
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import pydicom.data
import pytest
from made_dicom import RAMP, prepare_folder, write
from PIL import Image
from pydicom.data import get_testdata_file

from medft import cli
from medft.data.dicom_files import dicom_folder
from medft.data.sentences import file_sentences
from medft.errors import DataError

TEST_FILES = Path(pydicom.data.__file__).parent / "test_files"


def starts_as_dicom(path):
    return path.read_bytes()[128:132] == b"DICM"


def make_medium(root):
    """Pydicom's files as IM000000 and so on in a tree, with all that a medium has beside them."""
    files = [path for path in sorted(TEST_FILES.glob("*.dcm")) if starts_as_dicom(path)]
    for index, path in enumerate(files):
        place = root / "DICOM" / f"PA{index % 3}" / f"ST{index % 5}" / f"IM{index:06}"
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, place)
        if index % 2:
            place.with_name(place.name + (".txt" if index % 4 == 1 else ".TXT")).write_text(
                f"Report {index}."
            )
    shutil.copy(TEST_FILES / "dicomdirtests" / "DICOMDIR", root / "DICOMDIR")
    shutil.copy(TEST_FILES / "dicomdirtests" / "DICOMDIR", root / "DICOM" / "INDEX")
    for name in ("README.TXT", "VIEWER/viewer.exe", "VIEWER/autorun.inf", "VIEWER/LICENSE"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text("no image")
    for index in range(3):
        Image.new("L", (9, 9), index).save(root / f"preview{index}.JPG")
    (root / "Doe.Jane").write_text("no image")
    os.mkfifo(root / "pipe")
    os.mkfifo(root / "DICOM" / "IM999999.txt")
    (root / "._IM000000").write_bytes(b"\x00\x05\x16\x07" + bytes(300))
    (root / "._a.dcm").write_bytes(b"\x00\x05\x16\x07" + bytes(300))
    return files


def test_a_medium_without_suffixes_is_read_and_all_else_is_counted_by_kind(
    tmp_path, capsys, monkeypatch
):
    root = tmp_path / "files"
    files = make_medium(root)
    assert len(files) == 74
    (tmp_path / "elsewhere").mkdir()
    (root / "loop").symlink_to(root)
    (root / "out").symlink_to(tmp_path / "elsewhere")
    summary, pairs, rejects = prepare_folder(tmp_path)
    assert summary["read"] == summary["accepted"] + summary["rejected"] == len(files)
    assert summary["other_files"] == {
        ".exe": 1, ".inf": 1, ".jpg": 3, ".txt": 1, "AppleDouble": 2, "DICOMDIR": 2,
        "linked folder": 2, "no suffix": 1, "not regular": 2, "other suffix": 1,
    }  # fmt: skip
    reasons = Counter(line["reason"] for line in rejects)
    assert reasons["empty_text"] > 20
    assert len(pairs) > 20
    assert {pair["text"] for pair in pairs} <= {f"Report {i}." for i in range(1, 74, 2)}
    line = "pacs: 16 files of its folder are no DICOM images: .jpg 3, AppleDouble 2, DICOMDIR 2"
    capsys.readouterr()
    sources = str(tmp_path / "SOURCES.yaml")
    again = ["data", "prepare", sources, "--out", str(tmp_path / "two"), "--max-rejects", "1"]
    monkeypatch.setattr("sys.argv", ["medft", *again])
    assert cli.main() == 0
    captured = capsys.readouterr()
    assert line in captured.out + captured.err
    assert line in (tmp_path / "two" / "report.html").read_text()


def test_names_of_any_form_have_the_text_of_their_own(tmp_path):
    names = ["A.dcm", "B.DCM", "1.2.840.1", "1.2.840.2", ".hidden/IM1", "IM2"]
    for index, name in enumerate(names):
        write(tmp_path / "files" / name, RAMP + index)
    texts = ["A.txt", "B.TXT", "1.2.840.1.txt", "1.2.840.2.txt", ".hidden/IM1.txt", "IM2.TXT"]
    for name in texts:
        (tmp_path / "files" / name).write_text(f"Text of {name}")
    (tmp_path / "files" / "1.2.840.txt").write_text("of another")
    summary, pairs, _ = prepare_folder(tmp_path)
    found = {pair["images"][0]["path"]: pair["text"] for pair in pairs}
    expected = {Path(n).name: f"Text of {t}" for n, t in zip(names, texts, strict=True)}
    assert found == expected
    assert summary["other_files"] == {".txt": 1}


def test_texts_are_other_files_where_a_table_has_the_reports(tmp_path):
    write(tmp_path / "files" / "A.dcm", RAMP, AccessionNumber="1")
    (tmp_path / "files" / "A.txt").write_text("beside")
    (tmp_path / "r.csv").write_text("a,report\n1,joined\n")
    join = ", table: r.csv, join: {tag: AccessionNumber, column: a}"
    summary, [pair], _ = prepare_folder(tmp_path, join, text="report")
    assert summary["other_files"] == {".txt": 1}
    assert pair["text"] == "joined"


def test_a_dcm_file_without_preamble_is_a_rejected_row_and_never_vanishes(tmp_path):
    (tmp_path / "files").mkdir()
    shutil.copy(TEST_FILES / "no_meta.dcm", tmp_path / "files" / "old.DCM")
    (tmp_path / "files" / "half.dcm").write_bytes(bytes(128) + b"DI")
    (tmp_path / "files" / "empty.dcm").write_bytes(b"")
    write(tmp_path / "files" / "good.dcm", RAMP)
    (tmp_path / "files" / "good.txt").write_text("Good.")
    summary, pairs, rejects = prepare_folder(tmp_path)
    assert [line["reason"] for line in rejects] == ["bad_dicom"] * 3
    assert "old.DCM: no DICM after 128 bytes" in rejects[2]["detail"]
    assert (summary["read"], len(pairs), summary["other_files"]) == (4, 1, {})


def test_links_that_leave_the_folder_are_rejected_and_those_inside_are_read(tmp_path):
    root = tmp_path / "files"
    write(root / "deep" / "A.dcm", RAMP)
    write(tmp_path / "secret.dcm", RAMP + 1)
    (tmp_path / "secret.txt").write_text("Secret.")
    (root / "inside.dcm").symlink_to(root / "deep" / "A.dcm")
    (root / "inside.txt").write_text("Inside.")
    (root / "IM1").symlink_to(tmp_path / "secret.dcm")
    (root / "IM2.dcm").symlink_to(tmp_path / "secret.dcm")
    (root / "IM3").symlink_to(root / "IM3")
    (root / "lost.dcm").symlink_to(tmp_path / "nothing")
    (root / "viewer.exe").symlink_to(tmp_path / "secret.txt")
    write(root / "B.dcm", RAMP + 2)
    (root / "B.txt").symlink_to(tmp_path / "secret.txt")
    summary, pairs, rejects = prepare_folder(tmp_path)
    assert [pair["text"] for pair in pairs] == ["Inside."]
    assert b"Secret" not in (tmp_path / "out" / "pairs.parquet").read_bytes()
    found = {line["detail"].split()[0].rstrip(":"): line["reason"] for line in rejects}
    assert found == {
        "B.txt": "outside_root", "IM1": "outside_root", "IM2.dcm": "outside_root",
        "IM3": "unreadable", "lost.dcm": "outside_root",
        "text": "empty_text",
    }  # fmt: skip
    assert summary["other_files"] == {".exe": 1}


def test_pipes_do_not_hang_whatever_their_names(tmp_path):
    root = tmp_path / "files"
    write(root / "A.dcm", RAMP)
    for name in ("A.txt", "B.dcm", "IM1", "x.jpg"):
        os.mkfifo(root / name)
    summary, pairs, rejects = prepare_folder(tmp_path)
    assert [line["reason"] for line in rejects] == ["no_regular_file"] * 2
    assert [line["detail"].split()[0] for line in rejects] == ["A.txt", "B.dcm"]
    assert (pairs, summary["other_files"]) == ([], {"not regular": 2})


def test_sparse_files_and_texts_of_any_length_are_refused_by_their_size(tmp_path):
    root = tmp_path / "files"
    write(root / "A.dcm", RAMP)
    for name, size in (("A.txt", 2**34), ("IM1", 2**41), ("x.zip", 2**41)):
        with (root / name).open("wb") as file:
            file.truncate(size)
    summary, _, rejects = prepare_folder(tmp_path)
    assert [(x["reason"], x["detail"].split()[0]) for x in rejects] == [
        ("too_large", "A.txt"), ("too_large", "IM1"),
    ]  # fmt: skip
    assert summary["other_files"] == {".zip": 1}


@pytest.mark.skipif(os.geteuid() != 0, reason="gives up rights that only root can take back")
def test_files_that_may_not_be_read_are_rejected_and_folders_end_the_command():
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        root.chmod(0o755)
        write(root / "A.dcm", RAMP)
        shutil.copy(root / "A.dcm", root / "IM1")
        shutil.copy(root / "A.dcm", root / "good.dcm")
        for closed in ("A.dcm", "IM1"):
            (root / closed).chmod(0)
        (root / "deep").mkdir(mode=0o000)
        os.seteuid(65534)
        try:
            with pytest.raises(DataError, match=r"Permission denied.*check its permissions"):
                dicom_folder(root, with_texts=True)
            os.seteuid(0)
            (root / "deep").rmdir()
            os.seteuid(65534)
            found = dicom_folder(root, with_texts=True).files
        finally:
            os.seteuid(0)
        problems = [file.problem and file.problem.reason for file in found]
        assert problems == ["unreadable", "unreadable", None]


def test_a_tree_deeper_than_the_stack_of_python_is_read_to_its_end(tmp_path):
    place = tmp_path / "files"
    place.mkdir()
    descriptor = os.open(place, os.O_RDONLY)
    for _ in range(1200):  # 2,400 characters, and more levels than Python calls
        os.mkdir("d", dir_fd=descriptor)
        inner = os.open("d", os.O_RDONLY, dir_fd=descriptor)
        os.close(descriptor)
        descriptor = inner
    content = Path(get_testdata_file("CT_small.dcm")).read_bytes()
    file = os.open("IM1", os.O_WRONLY | os.O_CREAT, dir_fd=descriptor)
    os.write(file, content)
    os.close(file)
    os.close(descriptor)
    found = dicom_folder(place, with_texts=True)
    assert [file.path.name for file in found.files] == ["IM1"]
    while place.exists():  # as shutil.rmtree would end at Python's stack
        levels = [place]
        while (levels[-1] / "d").exists() and len(levels) < 1201:
            levels.append(levels[-1] / "d")
        (levels[-1] / "IM1").unlink(missing_ok=True)
        for level in reversed(levels):
            level.rmdir()


def test_a_file_without_an_image_is_a_rejected_row(tmp_path):
    (tmp_path / "files").mkdir()
    for name in ("test-SR.dcm", "rtplan.dcm", "reportsi.dcm"):
        shutil.copy(TEST_FILES / name, tmp_path / "files" / name[:-4])
        (tmp_path / "files" / f"{name[:-4]}.txt").write_text("A text.")
    summary, pairs, rejects = prepare_folder(tmp_path)
    assert [line["reason"] for line in rejects] == ["no_pixels"] * 3
    assert (summary["read"], pairs) == (3, [])


def test_the_sentence_on_other_files_is_there_only_where_there_are_some():
    summary = {"sources": {"a": {"other_files": {}}, "b": {}}}
    assert file_sentences(summary) == []
    summary["sources"]["a"]["other_files"] = {".txt": 2}
    [sentence] = file_sentences(summary)
    assert sentence.text == "a: 2 files of its folder are no DICOM images: .txt 2."


def test_pixels_are_equal_however_the_file_is_named(tmp_path):
    write(tmp_path / "files" / "A.dcm", RAMP, StudyInstanceUID="1.2")
    (tmp_path / "files" / "A.txt").write_text("One.")
    _, [named], _ = prepare_folder(tmp_path)
    (tmp_path / "files" / "A.dcm").rename(tmp_path / "files" / "A")
    _, [bare], _ = prepare_folder(tmp_path)
    assert named["sha256"] == bare["sha256"]
    assert np.array_equal(named["images"][0]["bytes"], bare["images"][0]["bytes"])
