"""Rows are the same whatever file they came from; bad ones are named."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from medft.data.images import open_image
from medft.data.rows import Row, image_source, load_rows
from medft.errors import DataError


@pytest.fixture
def write(tmp_path):
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png")

    def write(*rows):
        path = tmp_path / "rows.jsonl"
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        path.write_text("\n".join(lines) + "\n")
        return path

    return write


def turn(role, *texts, images=0):
    parts = [{"type": "image"}] * images + [{"type": "text", "text": text} for text in texts]
    return {"role": role, "content": parts}


GOOD = {
    "id": "r1",
    "images": ["a.png"],
    "messages": [turn("user", "Why?", images=1), turn("assistant", "So.")],
}


def test_rows_from_elsewhere_train_as_they_are(write, tmp_path):
    plain = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
    rows = load_rows(
        write(GOOD, {"images": ["a.png", str(tmp_path / "a.png")], "messages": plain},
              {"messages": plain, "extra": 3}),
        split="train",
    )  # fmt: skip
    assert Row.of(rows[0]).messages == GOOD["messages"]
    assert Row.of(rows[1]).messages[0] == turn("user", "Why?", images=2)
    assert Row.of(rows[2]).messages[0] == turn("user", "Why?")
    assert [len(images) for images in rows["images"]] == [1, 2, 0]
    assert rows["group_id"] == ["row/r1", "row/line 2", "row/line 3"]
    named = write({**GOOD, "images": [], "image": "a.png", "group_id": None, "id": None})
    row = load_rows(named, split="train")[0]
    assert (row["id"], row["group_id"], len(row["images"])) == ("line 1", "row/line 1", 1)
    assert rows["id"][1:] == ["line 2", "line 3"]
    assert open_image(image_source(rows[1]["images"][1])).size == (8, 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_path": "b.png"}, "expected the key images, got image_path"),
        ({"messages": None}, "row r1: expected a list of messages, got nothing"),
        ({"messages": []}, "expected a list of messages"),
        ({"messages": [turn("user", "a", images=1)]}, "the last by the assistant, got user"),
        ({"messages": [turn("assistant", "a")]}, "expected turns of user and assistant"),
        ({"messages": GOOD["messages"] + [turn("user", "b")]}, "expected turns"),
        ({"images": []}, "got 1 and 0"),
        ({"images": ["b.png"]}, "there is no file"),
        ({"images": "a.png"}, "a list of paths"),
        ({"messages": [turn("user", "a", images=1), turn("assistant", " ")]}, "one is empty"),
        ({"messages": [turn("user", "a"), turn("assistant", "b", images=1)]}, "user turns only"),
        ({"messages": [{"role": "user", "content": 3}, turn("assistant", "b")]}, "got int"),
        ({"messages": [{"role": "user", "content": [{"type": "audio"}]}, turn("assistant", "b")]},
         "image and text parts"),
    ],
)  # fmt: skip
def test_a_bad_row_is_named_with_its_line(write, change, message):
    with pytest.raises(DataError) as caught:
        load_rows(write(GOOD, {**GOOD, **change}), split="train")
    [problem] = caught.value.problems
    assert "rows.jsonl:2: row r1" in problem
    assert message in problem


def test_lines_that_are_no_objects_are_named_and_many_are_counted(write):
    with pytest.raises(DataError) as caught:
        load_rows(write(GOOD, "{broken", "[1]", *["x"] * 30), split="train")
    problems = caught.value.problems
    assert "rows.jsonl:2: expected a JSON object, could not parse" in problems[0]
    assert "got list" in problems[1]
    assert len(problems) == 11
    assert "22 more rows" in problems[-1]


def test_missing_and_empty_files_are_errors(tmp_path):
    with pytest.raises(DataError, match="there is none"):
        load_rows(tmp_path / "none.jsonl", split="train")
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(DataError, match="empty"):
        load_rows(tmp_path / "empty.jsonl", split="train")
    (tmp_path / "blank.jsonl").write_text("\n\n")
    with pytest.raises(DataError, match="found none"):
        load_rows(tmp_path / "blank.jsonl", split="train")
    (tmp_path / "x.parquet").write_text("no parquet")
    with pytest.raises(DataError, match="Parquet"):
        load_rows(tmp_path / "x.parquet", split="train")


def test_parquet_and_jsonl_give_the_same_rows(data):
    for split in ("train", "validation"):
        from_parquet = load_rows(data / "pairs.parquet", split=split)
        from_jsonl = load_rows(data / "chat" / f"{split}.jsonl", split=split)
        assert len(from_parquet) == len(from_jsonl) > 0
        for left, right in zip(from_parquet, from_jsonl, strict=True):
            assert (left["id"], left["group_id"]) == (right["id"], right["group_id"])
            assert Row.of(left).messages == Row.of(right).messages
            images = [open_image(image_source(row["images"][0])) for row in (left, right)]
            assert images[0].tobytes() == images[1].tobytes()


def test_a_split_without_rows_is_an_error(data):
    with pytest.raises(DataError, match="rows of split test"):
        load_rows(data / "pairs.parquet", split="test")


def test_a_path_inside_parquet_is_never_opened(data, tmp_path):
    table = pq.read_table(data / "pairs.parquet").slice(0, 1)
    field = table.schema.field("images")
    images = pa.array([[{"bytes": None, "path": "/etc/passwd"}]], type=field.type)
    column = table.schema.get_field_index("images")
    table = table.set_column(column, field, images)
    pq.write_table(table, tmp_path / "evil.parquet")
    with pytest.raises(DataError, match="expected the bytes of every image"):
        load_rows(tmp_path / "evil.parquet", split=table.column("split")[0].as_py())
