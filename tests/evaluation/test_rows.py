"""Which rows are evaluated, and whether they chose the checkpoint."""

import json
import os
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from medft.errors import DataError, RunError
from medft.evaluation.rows import rows_that_chose, rows_to_evaluate, run_of, run_rows
from medft.files import file_sha256
from medft.models.saved import RunLayout, find_saved_model


def write_rows(path, names, *, answer="Yes, {}.", group="p{}"):
    lines = []
    for name in names:
        turns = [("user", "What?"), ("assistant", answer.format(name))]
        messages = [{"role": role, "content": text} for role, text in turns]
        row = {"id": name, "group_id": group.format(name), "messages": messages}
        lines.append(json.dumps(row) + "\n")
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(lines))
    return path


def run_with(folder, **files):
    """A run directory that says which files it has read."""
    folder.mkdir(parents=True)
    record = {
        "status": "completed",
        "recipe": {},
        "base": {"base": "x"},
        "data": {name: {"path": str(p), "sha256": file_sha256(p)} for name, p in files.items()},
        "batch": {"steps": 1, "effective": 1},
        "started": "now",
    }
    (folder / "run.json").write_text(json.dumps(record))
    return RunLayout(folder)


@pytest.fixture
def run(tmp_path):
    """A run on chat JSONL that has test rows beside it."""
    chat = tmp_path / "chat"
    files = {
        split: write_rows(chat / f"{split}.jsonl", names)
        for split, names in (("train", "abcd"), ("validation", "ef"), ("test", "ghi"))
    }
    return run_with(tmp_path / "run", train=files["train"], validation=files["validation"])


@pytest.fixture
def pairs(data, tmp_path):
    """Writes a pairs.parquet whose rows are of these splits, in turn."""

    def write(*splits):
        table = pq.read_table(data / "pairs.parquet").slice(0, 12)
        values = [splits[index % len(splits)] for index in range(len(table))]
        place = table.schema.get_field_index("split")
        path = tmp_path / "pairs.parquet"
        pq.write_table(table.set_column(place, table.schema.field(place), pa.array(values)), path)
        return path

    return write


def chosen(run, data=None, split=None):
    found = rows_to_evaluate(run, data, split)
    return found.split, found.rows["id"], rows_that_chose(run, found)


def test_the_test_rows_beside_the_train_file_are_evaluated(run):
    assert chosen(run) == ("test", [*"ghi"], 0)
    assert chosen(run, split="validation") == ("validation", [*"ef"], 2)
    assert chosen(run, split="train") == ("train", [*"abcd"], 0)
    assert rows_to_evaluate(run, None, "validation").without_test is None


@pytest.mark.parametrize("why", ["is empty", "there is no"])
def test_without_test_rows_validation_rows_are_and_the_reason_is_given(run, tmp_path, why):
    file = tmp_path / "chat" / "test.jsonl"
    file.write_text("") if why == "is empty" else file.unlink()
    assert chosen(run) == ("validation", [*"ef"], 2)
    assert why in rows_to_evaluate(run, None, None).without_test


def test_bad_test_rows_are_an_error_and_validation_rows_no_substitute(run, tmp_path):
    (tmp_path / "chat" / "test.jsonl").write_text("{")
    with pytest.raises(DataError, match=r"test.jsonl:1: expected a JSON object"):
        rows_to_evaluate(run, None, None)


def test_a_pairs_file_gives_its_test_rows(pairs, tmp_path):
    path = pairs("train", "validation", "test")
    run = run_with(tmp_path / "run", train=path, validation=path)
    everything = pq.read_table(path, columns=["id", "split"]).to_pylist()
    ids = {s: [r["id"] for r in everything if r["split"] == s] for s in ("test", "validation")}
    assert chosen(run) == ("test", ids["test"], 0)
    assert chosen(run, data=path) == ("test", ids["test"], 0)
    assert chosen(run, data=path, split="validation") == ("validation", ids["validation"], 4)
    jsonl = write_rows(tmp_path / "chat" / "validation.jsonl", "ef")
    mixed = run_with(tmp_path / "mixed", train=path, validation=jsonl)
    assert chosen(mixed) == ("test", ids["test"], 0)
    assert chosen(mixed, split="validation") == ("validation", [*"ef"], 2)


def test_a_pairs_file_without_test_rows_gives_its_validation_rows(pairs, tmp_path):
    path = pairs("train", "validation")
    run = run_with(tmp_path / "run", train=path, validation=path)
    split, ids, chose = chosen(run)
    assert (split, len(ids), chose) == ("validation", 6, 6)
    assert "has no rows of split test" in rows_to_evaluate(run, None, None).without_test
    path = pairs("train")
    with pytest.raises(DataError, match=r"test or validation in .*: name another one with --split"):
        rows_to_evaluate(None, path, None)
    assert len(rows_to_evaluate(None, path, "train").rows) == 12


@pytest.mark.parametrize(
    ("names", "changes", "expected"),
    [
        ("ef", {}, 2),  # the file itself, elsewhere
        ("gefh", {}, 2),
        ("ghe", {}, 1),
        ("eg", {"group": "q{}"}, 1),  # the texts alone
        ("eg", {"answer": "No, {}."}, 1),  # corrected references: id and group
        ("eg", {"answer": "No, {}.", "group": "q{}"}, 0),
        ("eg", {"answer": "No, {}.", "group": ""}, 0),
        ("ghi", {}, 0),
    ],
)
def test_validation_rows_that_are_given_by_hand_are_found_by_their_content(
    run, tmp_path, names, changes, expected
):
    given = write_rows(tmp_path / "other" / "held_out.jsonl", names, **changes)
    assert chosen(run, data=given) == (None, [*names], expected)


def test_the_validation_file_is_known_by_its_hash_where_the_runs_own_is_gone(run, tmp_path):
    given = shutil.copy(tmp_path / "chat" / "validation.jsonl", tmp_path / "held_out.jsonl")
    other = write_rows(tmp_path / "other.jsonl", "e")
    assert chosen(run, data=other)[2] == 1
    (tmp_path / "chat" / "validation.jsonl").unlink()
    assert chosen(run, data=tmp_path / given)[2] == 2
    assert chosen(run, data=other)[2] is None
    assert chosen(None, data=other)[2] is None
    assert chosen(run)[::2] == ("test", None)


def test_validation_rows_in_a_file_called_test_are_no_test_rows(tmp_path):
    chat = tmp_path / "chat"
    train = write_rows(chat / "train.jsonl", "ab")
    run = run_with(tmp_path / "run", train=train, validation=write_rows(chat / "test.jsonl", "ef"))
    assert chosen(run) == ("test", [*"ef"], 2)


def test_a_file_that_was_replaced_under_the_same_time_has_changed(run, tmp_path):
    train = tmp_path / "chat" / "train.jsonl"
    before = train.stat()
    os.utime(train, ns=(0, 0))
    rows_to_evaluate(run, None, None)
    train.write_text(train.read_text().replace('"a"', '"g"'))
    os.utime(train, ns=(0, 0))
    assert train.stat().st_size == before.st_size
    with pytest.raises(DataError, match="the file has changed"):
        rows_to_evaluate(run, None, None)


def test_a_run_without_validation_rows_has_none_that_chose(tmp_path):
    train = write_rows(tmp_path / "chat" / "train.jsonl", "ab")
    write_rows(tmp_path / "chat" / "validation.jsonl", "ef")
    assert chosen(run_with(tmp_path / "run", train=train)) == ("validation", [*"ef"], 0)


@pytest.mark.parametrize("name", ["train", "validation"])
def test_test_rows_beside_files_that_changed_since_the_run_are_refused(run, tmp_path, name):
    """They may be of another split, in which they were trained on."""
    file = tmp_path / "chat" / f"{name}.jsonl"
    write_rows(file, "gx")
    for split in (None, "test"):
        with pytest.raises(DataError, match=f"expected the {name} rows .* the file has changed"):
            rows_to_evaluate(run, None, split)
    if name == "train":
        file.unlink()
        with pytest.raises(DataError, match="there is no such file: restore it, or name the rows"):
            rows_to_evaluate(run, None, None)
        assert run_rows(run, "train") is None
        assert chosen(run, split="validation")[0] == "validation"
    else:
        with pytest.raises(DataError, match="has changed"):
            rows_to_evaluate(run, None, "validation")


def test_what_names_no_rows_is_refused(run, tmp_path):
    with pytest.raises(RunError, match="expected --data for a model that is no run"):
        rows_to_evaluate(None, None, None)
    with pytest.raises(DataError, match=r"expected --split with a pairs.parquet"):
        rows_to_evaluate(run, tmp_path / "chat" / "test.jsonl", "test")


def test_a_model_inside_a_run_is_of_that_run_and_its_copy_is_of_none(runs, tmp_path):
    run = runs / "siglip"
    (tmp_path / "link").symlink_to(run / "best_model")
    inside = [run / name for name in ("", "adapter", "best_model", "checkpoint-8")]
    for source in (*inside, tmp_path / "link"):
        assert run_of(find_saved_model(source)).read_record()["status"] == "completed"
    copy = shutil.copytree(run / "adapter", tmp_path / "adapter")
    assert run_of(find_saved_model(copy)) is None
    other = shutil.copytree(run / "adapter", tmp_path / "run" / "mine")
    shutil.copy(run / "run.json", tmp_path / "run")
    assert run_of(find_saved_model(other)) is None
