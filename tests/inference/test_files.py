"""Predictions for files, folders and tables; a stopped run goes on; a bad image is a row."""

import csv
import json
import shutil

import pytest

from medft.errors import DataError, RunError
from medft.inference.files import predict_files
from medft.inference.inputs import entries_of
from medft.inference.records import CSV_COLUMNS


@pytest.fixture(scope="module")
def knees(data):
    return data / "raw" / "knee" / "images"


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_files_folders_and_tables_name_each_image_once(knees, tmp_path):
    table = tmp_path / "cases.csv"
    table.write_text(f"image,question\n{knees / '0001.png'},Left?\n{knees / '0002.png'},\n")
    found = entries_of([knees / "0000.png", table, knees], lambda row: row.get("question") or "So?")
    asked = {(entry.image.name, entry.prompt) for entry in found}
    assert ("0001.png", "Left?") in asked
    assert ("0002.png", "So?") in asked
    assert len(found) == len(asked) == len(list(knees.iterdir())) + 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder / "none.png", "expected an image, folder or table"),
        (lambda folder: folder / "empty", "found none"),
        (lambda folder: folder / "other.csv", "expected a column image"),
    ],
)
def test_inputs_that_name_no_image_are_refused(make, message, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "other.csv").write_text("file\na.png\n")
    with pytest.raises(DataError, match=message):
        entries_of([make(tmp_path)], lambda row: "What?")


def test_a_stopped_run_goes_on_and_ends_as_a_whole_one(runs, knees, tmp_path):
    inputs = sorted(knees.glob("000*.png"))
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    counts = predict_files(runs / "decoder", inputs, whole, siglip=runs / "siglip")
    cut = sum(row["truncated"] for row in read(whole))
    assert counts == {"written": len(inputs), "kept": 0, "failed": 0, "truncated": cut}
    lines = whole.read_text().splitlines(keepends=True)
    out.write_text("".join(lines[:4]) + lines[4][:50])  # killed while it wrote
    counts = predict_files(runs / "decoder", inputs, out, siglip=runs / "siglip")
    assert (counts["written"], counts["kept"], counts["failed"]) == (len(inputs) - 4, 4, 0)
    texts = [{**row, "embedding": None} for row in read(out)]
    assert texts == [{**row, "embedding": None} for row in read(whole)]
    first = read(whole)[0]
    assert first["image"] == str(inputs[0])
    assert isinstance(first["text"], str)
    assert len(first["embedding"]) == 64
    assert len(first["nearest"]) == 5
    with pytest.raises(RunError, match="expected predictions of the same models"):
        predict_files(runs / "siglip", inputs, out)
    assert len(read(out)) == len(inputs)


def test_a_image_that_cannot_be_read_is_a_row_with_its_error(runs, knees, tmp_path):
    out = tmp_path / "out.csv"
    inputs = [knees / "0000.png", knees / "truncated.png", knees / "0001.png"]
    counts = predict_files(runs / "siglip", inputs, out)
    assert counts == {"written": 3, "kept": 0, "failed": 1, "truncated": 0}
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == CSV_COLUMNS
    assert [bool(row["error"]) for row in rows] == [False, True, False]
    assert "truncated.png" in rows[1]["error"]
    assert float(rows[0]["nearest_similarity"]) > 0
    content = out.read_bytes()
    out.write_bytes(content[: content.rfind(b"0001.png") + 20])
    counts = predict_files(runs / "siglip", inputs, out)
    assert counts == {
        "written": 2,
        "kept": 1,
        "failed": 1,
        "truncated": 0,
    }  # what failed is tried again
    assert sorted(out.read_bytes().splitlines()) == sorted(content.splitlines())


def test_only_truncated_images_give_only_errors(runs, knees, tmp_path):
    counts = predict_files(runs / "siglip", [knees / "truncated.png"], tmp_path / "o.jsonl")
    assert counts == {"written": 1, "kept": 0, "failed": 1, "truncated": 0}


def test_wrong_input_is_one_sentence(medft, capsys, runs, knees, tmp_path):
    (tmp_path / "mine.jsonl").write_text('{"my": "notes"}\n')
    for words, message in (
        ((runs / "siglip", knees, "--out", tmp_path / "a.txt"), "to end in .jsonl or .csv"),
        ((runs / "siglip", knees, "--out", tmp_path / "mine.jsonl"), "holds something else"),
        ((tmp_path, knees, "--out", tmp_path / "a.csv"), "expected a run or an adapter folder"),
    ):
        assert medft("predict", *words) == 2
        [sentence] = capsys.readouterr().err.splitlines()
        assert message in sentence
    assert (tmp_path / "mine.jsonl").read_text() == '{"my": "notes"}\n'
    assert not (tmp_path / "a.csv").exists()


def test_line_breaks_of_other_scripts_stay_inside_a_row(runs, knees, tmp_path):
    table = tmp_path / "cases.jsonl"
    image = str(knees / "0000.png")
    table.write_text(json.dumps({"image": image, "question": "Why\u2028\u0085this?"}) + "\n")
    for name in ("out.jsonl", "out.csv"):
        for kept in (0, 1):
            counts = predict_files(runs / "siglip", [table], tmp_path / name)
            assert counts["kept"] == kept


def test_a_file_of_somebody_else_is_never_replaced(runs, knees, tmp_path):
    for name, content in (
        ("a.csv", "patient,outcome\r\n1,dead"),
        ("b.jsonl", '{"patient": 1}'),
        ("c.jsonl", '{"patient": 1}\n'),
        ("d.csv", "image,prompt\r\n"),
    ):
        (tmp_path / name).write_text(content, newline="")
        with pytest.raises(RunError, match="holds something else"):
            predict_files(runs / "siglip", [knees], tmp_path / name)
        assert (tmp_path / name).read_bytes() == content.encode()


def test_a_table_that_a_spreadsheet_saved_is_gone_on_with(runs, knees, tmp_path):
    out = tmp_path / "out.csv"
    inputs = [knees / "0000.png", knees / "0001.png"]
    predict_files(runs / "siglip", inputs[:1], out)
    out.write_bytes(b"\xef\xbb\xbf" + out.read_bytes())
    counts = predict_files(runs / "siglip", inputs, out)
    assert counts == {"written": 1, "kept": 1, "failed": 0, "truncated": 0}


def test_retrained_weights_under_the_same_name_are_other_models(runs, knees, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(runs / "siglip", run)
    out = tmp_path / "out.jsonl"
    predict_files(run, [knees / "0000.png"], out)
    weights = run / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b" ")
    with pytest.raises(RunError, match="as they were then"):
        predict_files(run, [knees / "0001.png"], out)
