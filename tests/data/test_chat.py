"""Conversations are checked whole, and are the same from JSONL and from Parquet."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from medft.data.chat import image_source, load_rows, messages_of, write_chat
from medft.data.images import open_image
from medft.data.pairs import read_pairs
from medft.data.prepare import prepare
from medft.errors import DataError, RecipeError, RunError


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
    assert messages_of(rows[0]) == GOOD["messages"]
    assert messages_of(rows[1])[0] == turn("user", "Why?", images=2)
    assert messages_of(rows[2])[0] == turn("user", "Why?")
    assert [len(images) for images in rows["images"]] == [1, 2, 0]
    assert rows["group_id"] == ["r1", "line 2", "line 3"]
    named = write({**GOOD, "images": [], "image": "a.png", "group_id": None, "id": None})
    row = load_rows(named, split="train")[0]
    assert (row["id"], row["group_id"], len(row["images"])) == ("line 1", "line 1", 1)
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
            assert messages_of(left) == messages_of(right)
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


def test_sharegpt_holds_the_same_conversations_with_placeholders(data, tmp_path):
    write_chat(data / "pairs.parquet", tmp_path / "chat", format="sharegpt")
    lines = (tmp_path / "chat" / "train.jsonl").read_text().splitlines()
    expected = [row for row in read_pairs(data / "pairs.parquet") if row["split"] == "train"]
    assert len(lines) == len(expected)
    row = json.loads(lines[0])
    assert row["messages"][0]["content"].startswith("<image>")
    assert row["messages"][1] == {"role": "assistant", "content": expected[0]["text"]}
    assert (tmp_path / "chat" / row["images"][0]).is_file()


def test_questions_about_one_image_can_be_joined(tmp_path):
    for name, colour in (("a.jpg", "red"), ("b.png", "blue")):
        Image.new("RGB", (16, 16), colour).save(tmp_path / name)
    rows = ["a.jpg,Q1,A1", "b.png,Q2,A2", "a.jpg,Q3,A3"]
    (tmp_path / "t.csv").write_text("\n".join(["f,q,a", *rows]))
    (tmp_path / "SOURCES.yaml").write_text(
        "sources:\n  - {name: s, kind: csv, path: t.csv, image: f, text: a, question: q}\n"
        "split: {validation: 0.0}\n"
    )
    prepare(tmp_path / "SOURCES.yaml", tmp_path / "out")
    assert write_chat(tmp_path / "out" / "pairs.parquet", tmp_path / "plain")["train"] == 3
    write_chat(tmp_path / "out" / "pairs.parquet", tmp_path / "joined", join_questions=True)
    rows = load_rows(tmp_path / "joined" / "train.jsonl", split="train")
    told = [
        [part.get("text", "<image>") for message in messages_of(row) for part in message["content"]]
        for row in rows
    ]
    assert told == [["<image>", "Q1", "A1", "Q3", "A3"], ["<image>", "Q2", "A2"]]
    written = Image.open(rows[0]["images"][0]["path"])
    assert written.format == "PNG"
    assert written.tobytes() == open_image(tmp_path / "a.jpg").tobytes()


def test_the_prompt_is_chosen_by_the_id_and_questions_stay(data):
    prompts = {messages_of(row)[0]["content"][1]["text"] for row in load_rows(
        data / "chat" / "train.jsonl", split="train")}  # fmt: skip
    assert prompts == {"Describe this medical image.", "What does the image show?"}


def test_a_folder_of_somebody_else_is_not_overwritten(data, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(RunError, match="to be empty"):
        write_chat(data / "pairs.parquet", tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"
    own = tmp_path / "own"
    write_chat(data / "pairs.parquet", own)
    write_chat(data / "pairs.parquet", own)
    (own / "images" / "precious.png").touch()
    with pytest.raises(RunError, match="to be empty"):
        write_chat(data / "pairs.parquet", own)
    with pytest.raises(RunError, match="is a file"):
        write_chat(data / "pairs.parquet", data / "pairs.parquet")
    assert (own / "images" / "precious.png").exists()


def test_a_template_needs_its_names():
    from medft.data.template import fill_template

    assert fill_template("{a} {b}", {"a": "x", "b": None}) == "x"
    assert fill_template("{a}{b}", {"a": None, "b": float("nan")}) == ""
    with pytest.raises(RecipeError):
        fill_template("{a.b}", {"a": 1})
