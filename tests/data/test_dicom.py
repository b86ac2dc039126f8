"""DICOM files as a viewer shows them, joined to their reports; pydicom's own test files."""

import json
from pathlib import Path

import numpy as np
import pydicom.data
import pytest
from made_dicom import RAMP, write
from PIL import Image
from pydicom import dcmread
from pydicom.data import get_testdata_file

from medft.data.dicom_image import dicom_images, frame_count
from medft.data.pairs import read_pairs
from medft.data.prepare import prepare
from medft.data.tables import Rejected
from medft.errors import DataError

LIMIT = 64_000_000


def shown(path, **options):
    return [np.asarray(image) for image in dicom_images(path, max_pixels=LIMIT, **options)]


def test_a_window_is_shown_as_the_standard_says(tmp_path):
    write(
        tmp_path / "a.dcm", RAMP, RescaleSlope=2, RescaleIntercept=-1000, WindowCenter=500,
        WindowWidth=800,
    )  # fmt: skip
    units = RAMP * 2.0 - 1000
    expected = np.clip(((units - 499.5) / 799 + 0.5) * 255, 0, 255)  # PS3.3 C.11.2.1.2.1
    assert np.abs(shown(tmp_path / "a.dcm")[0] - expected).max() <= 0.5 + 1e-6


def test_monochrome1_is_inverted_and_no_window_shows_the_whole_range(tmp_path):
    half = RAMP // 2 + 100
    write(tmp_path / "two.dcm", half)
    write(tmp_path / "one.dcm", half, PhotometricInterpretation="MONOCHROME1")
    two, one = shown(tmp_path / "two.dcm")[0], shown(tmp_path / "one.dcm")[0]
    assert (two.min(), two.max()) == (0, 255)
    assert np.abs(two.astype(int) + one - 255).max() <= 1
    assert two[0, 0] == 0
    assert one[0, 0] == 255


def test_of_many_frames_the_middle_one_or_every_one(tmp_path):
    write(tmp_path / "a.dcm", np.stack([RAMP * 0, RAMP, RAMP[::-1]]))
    middle = shown(tmp_path / "a.dcm")
    every = shown(
        tmp_path / "a.dcm", frames=range(frame_count(tmp_path / "a.dcm", max_pixels=LIMIT))
    )
    assert (len(middle), len(every)) == (1, 3)
    assert np.array_equal(middle[0], every[1])
    assert not np.array_equal(every[1], every[2])


def test_burned_in_annotation_and_missing_pixels_are_refused(tmp_path):
    write(tmp_path / "a.dcm", RAMP, BurnedInAnnotation="YES")
    with pytest.raises(Rejected) as caught:
        next(dicom_images(tmp_path / "a.dcm", max_pixels=LIMIT))
    assert caught.value.reason == "burned_in_annotation"
    write(tmp_path / "b.dcm", RAMP)
    with pytest.raises(Rejected) as caught:
        next(dicom_images(tmp_path / "b.dcm", max_pixels=4095))
    assert caught.value.reason == "bad_image"


def test_pydicoms_own_files_decode_or_say_why_not():
    folder = Path(pydicom.data.__file__).parent / "test_files"
    files = sorted(folder.glob("*.dcm"))
    assert len(files) > 60
    outcomes, details = {}, {}
    for path in files:
        try:
            images = dicom_images(path, max_pixels=LIMIT)
            outcomes[path.name] = [image.mode for image in images]
        except Rejected as verdict:
            outcomes[path.name] = verdict.reason
            details[path.name] = verdict.detail
    decoded = [name for name, found in outcomes.items() if found in (["L"], ["RGB"])]
    assert {"CT_small.dcm", "MR_small.dcm", "SC_rgb_rle.dcm", "examples_palette.dcm"} <= set(
        decoded
    )
    assert (outcomes["CT_small.dcm"], outcomes["SC_rgb_rle.dcm"]) == (["L"], ["RGB"])
    assert len(decoded) == 59
    assert all(len(detail) > len(name) + 5 for name, detail in details.items())
    assert outcomes["rtplan.dcm"] == "no_pixels"
    assert set(map(str, outcomes.values())) == {"['L']", "['RGB']", "no_pixels", "bad_dicom"}


@pytest.mark.parametrize("name", ["CT_small.dcm", "MR_small.dcm", "SC_rgb_rle.dcm"])
def test_three_of_them_against_an_independent_rendering(name):
    path = Path(get_testdata_file(name))
    data = dcmread(path)
    pixels = data.pixel_array.astype(float)
    if pixels.ndim == 2:
        pixels = pixels * float(data.get("RescaleSlope", 1)) + float(
            data.get("RescaleIntercept", 0)
        )
        if "WindowWidth" in data:
            centre, width = float(data.WindowCenter), float(data.WindowWidth)
            pixels = ((pixels - (centre - 0.5)) / (width - 1) + 0.5).clip(0, 1)
        else:
            pixels = (pixels - pixels.min()) / (pixels.max() - pixels.min())
        pixels = pixels * 255
    [image] = dicom_images(path, max_pixels=LIMIT)
    assert np.abs(np.asarray(image) - pixels).max() <= 0.51
    assert np.asarray(image).std() > 10


SOURCES = """\
sources:
  - name: chest
    kind: dicom
    path: files
    %s
    where: {ViewPosition: PA}
    text: report
    group: patient
split: {validation: 0.0}
"""


def test_a_folder_joins_its_reports_by_accession_number(tmp_path):
    random = np.random.default_rng(2)
    for index, view in enumerate(["PA", "LATERAL", "PA", "PA"]):
        pixels = random.integers(0, 4095, (32, 32))
        write(tmp_path / "files" / f"s{index % 2}" / f"{index}.dcm", pixels,
              AccessionNumber=f"A{index}", ViewPosition=view)  # fmt: skip
    (tmp_path / "files" / "torn.dcm").write_bytes(b"torn")
    table = (
        "accession;report;patient\nA0;Clear lungs.;p1\nA1;Side.;p1\nA2;Effusion.;p2\nA9;Lost.;p3\n"
    )
    (tmp_path / "reports.csv").write_text(table)
    join = "table: reports.csv\n    join: {tag: AccessionNumber, column: accession}"
    sources = tmp_path / "SOURCES.yaml"
    sources.write_text(SOURCES % join)
    summary = prepare(sources, tmp_path / "out", max_rejects=1.0)
    rows = list(read_pairs(tmp_path / "out" / "pairs.parquet"))
    assert [(row["text"], row["group_id"]) for row in rows] == [
        ("Clear lungs.", "group/p1"),
        ("Effusion.", "group/p2"),
    ]
    lines = [json.loads(x) for x in (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()]
    assert sorted(line["reason"] for line in lines) == ["bad_dicom", "no_image", "no_report"]
    counts = summary["sources"]["chest"]
    assert counts["read"] == counts["accepted"] + counts["rejected"] == 5
    content = (tmp_path / "out" / "pairs.parquet").read_bytes()
    assert b"Doe" not in content


def test_sidecar_texts_and_wrong_keywords(tmp_path):
    write(tmp_path / "files" / "a.dcm", RAMP, ViewPosition="PA", PatientID="p7")
    (tmp_path / "files" / "a.txt").write_text("Normal chest.")
    sources = tmp_path / "SOURCES.yaml"
    text = (SOURCES % "").replace("report", "text").replace("group: patient", "group: PatientID")
    sources.write_text(text)
    prepare(sources, tmp_path / "out")
    [row] = read_pairs(tmp_path / "out" / "pairs.parquet")
    assert (row["text"], row["group_id"]) == ("Normal chest.", "group/p7")
    sources.write_text(text.replace("ViewPosition", "ViewPosition2"))
    with pytest.raises(DataError, match="ViewPosition2 is none"):
        prepare(sources, tmp_path / "out2")


def test_a_split_of_ones_own_may_stand_in_a_tag(tmp_path):
    for index in range(4):
        split = "hold out" if index == 3 else "learn"
        pixels = np.random.default_rng(index).integers(0, 4095, (32, 32))
        write(tmp_path / "files" / f"{index}.dcm", pixels, ViewPosition="PA",
              PatientID=f"p{index}", StudyDescription=split)  # fmt: skip
        (tmp_path / "files" / f"{index}.txt").write_text(f"Film {index}.")
    text = (SOURCES % "").replace("report", "text").replace("group: patient", "group: PatientID")
    own = "split: {column: StudyDescription, train: [learn], validation: [hold out]}\n"
    sources = tmp_path / "SOURCES.yaml"
    lines = [line for line in text.splitlines(keepends=True) if not line.startswith("split")]
    sources.write_text("".join(lines) + own)
    summary = prepare(sources, tmp_path / "out")
    assert summary["splits"] == {"train": 3, "validation": 1}
    sources.write_text("".join(lines) + own.replace("StudyDescription", "NoSuchTag"))
    with pytest.raises(DataError, match="NoSuchTag"):
        prepare(sources, tmp_path / "out2")


def prepared_files(tmp_path, accessions, extra, where=""):
    """A summary, texts and rejects of DICOM files with the given accession numbers."""
    random = np.random.default_rng(3)
    for index, accession in enumerate(accessions):
        write(tmp_path / "files" / f"{index}.dcm", random.integers(0, 4095, (32, 32)),
              AccessionNumber=accession, ViewPosition="PA")  # fmt: skip
    text = "sources:\n  - {name: a, kind: dicom, path: files, text: %s}\nsplit: {validation: 0.0}\n"
    (tmp_path / "SOURCES.yaml").write_text(text % (extra + where))
    out = tmp_path / "out"
    summary = prepare(tmp_path / "SOURCES.yaml", out, max_rejects=1.0)["sources"]["a"]
    rejects = [json.loads(line) for line in (out / "rejects.jsonl").read_text().splitlines()]
    return summary, [row["text"] for row in read_pairs(out / "pairs.parquet")], rejects


JOINED = "report, table: r.csv, join: {tag: AccessionNumber, column: accession}"


def test_a_text_beside_a_file_is_read_in_the_encoding_of_the_source(tmp_path):
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "0.txt").write_bytes(b"gr\xf6\xdfer")
    (tmp_path / "files" / "1.txt").write_bytes("\ufeffgr\u00f6\u00dfer\r\nals".encode())
    (tmp_path / "files" / "2.txt").write_bytes(b" NULL ")
    summary, texts, rejects = prepared_files(tmp_path, ["A", "B", "C"], "text")
    assert texts == ["gr\u00f6\u00dfer\nals"]
    assert [line["reason"] for line in rejects] == ["bad_encoding", "empty_text"]
    assert "line 1, byte 3" in rejects[0]["detail"]
    assert summary["na_cells"] == 1
    (tmp_path / "files" / "1.txt").write_bytes(b"\xe4")
    _, texts, rejects = prepared_files(tmp_path, ["A", "B"], "text, encoding: cp1252")
    assert texts == ["gr\u00f6\u00dfer", "\u00e4"]


def test_a_table_of_reports_is_read_in_the_encoding_of_the_source(tmp_path):
    (tmp_path / "r.csv").write_bytes(b"accession,report\nA,gr\xf6\xdfer\n")
    with pytest.raises(DataError, match=r"r\.csv, line 2, byte 5"):
        prepared_files(tmp_path, ["A"], JOINED)
    summary, texts, _ = prepared_files(tmp_path, ["A"], JOINED + ", encoding: cp1252")
    assert texts == ["gr\u00f6\u00dfer"]
    assert (summary["lines"], summary["records"]) == (2, 2)


def test_no_report_is_chosen_among_several_and_no_row_of_the_table_is_lost(tmp_path):
    (tmp_path / "r.csv").write_text(
        "accession,report,part\nA,one,x\nA,two,y\nB,same,x\nB,same,x\n,empty,x\n-,dash,x\nC,short\n"
    )
    _, texts, rejects = prepared_files(tmp_path, ["A", "B", "-"], JOINED)
    assert texts == ["same"]
    assert sorted(line["reason"] for line in rejects) == [
        "no_join_value", "no_join_value", "no_report", "several_reports", "wrong_cell_count",
    ]  # fmt: skip
    _, texts, _ = prepared_files(tmp_path, ["A", "B"], JOINED, ", where: {part: x}")
    assert texts == ["one", "same"]


def test_a_report_within_a_quoted_cell_of_another_is_an_error(tmp_path):
    (tmp_path / "r.csv").write_text('accession,report\nA,"open\nB,two\nC,three"\n')
    with pytest.raises(DataError, match="the row that ends on line 4 holds") as caught:
        prepared_files(tmp_path, ["A", "B"], JOINED)
    assert "'B'" not in str(caught.value)
    (tmp_path / "r.csv").write_text('accession,report\nA,"one\nD, not a file"\nB,two\n')
    assert prepared_files(tmp_path, ["A", "B"], JOINED)[1] == ["one\nD, not a file", "two"]
    (tmp_path / "r.csv").write_text('accession,report\nA,"as\nC\n-, the one before\n, and so on"\n')
    _, texts, rejects = prepared_files(tmp_path, ["A", "", "C", "-"], JOINED)
    assert texts == ["as\nC\n-, the one before\n, and so on"]
    assert [line["reason"] for line in rejects] == ["no_report"] * 3


def test_tags_that_a_source_names_as_identifiers_are_searched_for(tmp_path, caplog):
    texts = ["Frau Meier.", "Normal chest.", "geb. 7.3.50", "Nr. A 1799"]
    for index, text in enumerate(texts):
        write(tmp_path / "files" / f"{index}.dcm", RAMP + index, PatientName="Meier^Anna",
              PatientBirthDate="19500307", AccessionNumber="A1799", PatientID="p7",
              StudyInstanceUID="1.2.meier")  # fmt: skip
        (tmp_path / "files" / f"{index}.txt").write_text(text)
    (tmp_path / "files" / "meier.dcm").write_bytes(b"corrupt")
    sources = tmp_path / "SOURCES.yaml"
    sources.write_text(
        "sources:\n  - name: d\n    kind: dicom\n    path: files\n    text: text\n"
        "    identifiers: [PatientName, PatientBirthDate, AccessionNumber, StudyInstanceUID]\n"
    )
    caplog.clear()
    prepare(sources, tmp_path / "out", max_rejects=1.0)
    assert "meier" not in caplog.text
    rejects = (tmp_path / "out" / "rejects.jsonl").read_text()
    lines = [json.loads(line) for line in rejects.splitlines()]
    assert [(line["row"], line["reason"]) for line in lines] == [
        (1, "identifier"), (3, "identifier"), (4, "identifier"), (5, "bad_dicom"),
    ]  # fmt: skip
    assert [line["detail"] for line in lines[:3]] == [
        "PatientName in text",
        "PatientBirthDate in text",
        "AccessionNumber in text",
    ]
    assert "meier" not in rejects.lower()
    [row] = read_pairs(tmp_path / "out" / "pairs.parquet")
    assert (row["text"], row["images"][0]["path"]) == ("Normal chest.", "1.dcm")


def test_patient_ids_of_headers_are_compared_with_those_of_tables(tmp_path):
    for index, patient in enumerate(["00007", "00008"]):
        write(tmp_path / "files" / f"{index}.dcm", RAMP * (index + 1), PatientID=patient)
        (tmp_path / "files" / f"{index}.txt").write_text(f"Report {index}.")
    noise = np.random.default_rng(5).integers(0, 255, (64, 64), np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png")
    (tmp_path / "t.csv").write_text("file,report,patient\na.png,Text.,7\n")

    def both(form):
        (tmp_path / "SOURCES.yaml").write_text(
            "sources:\n  - {name: t, kind: csv, path: t.csv, image: file, text: report, "
            f"group: patient{form}}}\n"
            "  - {name: d, kind: dicom, path: files, text: text, group: PatientID}\n"
        )
        return prepare(tmp_path / "SOURCES.yaml", tmp_path / "out")

    with pytest.raises(DataError, match=r"'7' \(t\) and '00007' \(d\)"):
        both("")
    assert not (tmp_path / "out").exists()
    assert both(", group_form: loose")["shared_by_sources"] == {"t, d": 1}
    assert both(", group_form: as_written")["shared_by_sources"] == {}
