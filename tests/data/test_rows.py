"""Rows are the same whatever file they came from; bad ones are named."""

import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from medft.data import rows as rows_module
from medft.data.images import open_image
from medft.data.rows import Row, fingerprint, image_source, load_rows
from medft.errors import DataError
from medft.files import file_sha256


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
    groups = {"a": "", "b": "", "c": 0, "d": 0}
    grouped = [{**GOOD, "id": name, "group_id": g} for name, g in groups.items()]
    found = load_rows(write(*grouped), split="train")["group_id"][:]
    assert found == ["row/a", "row/b", "0", "0"]
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
            assert Row.of(left).fields == Row.of(right).fields
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


def said(row):
    """The parts of a loaded row's turns, an image as None."""
    turns = Row.of(row).messages
    return [[part.get("text") for part in message["content"]] for message in turns]


def chat(*texts):
    roles = ("user", "assistant") * len(texts)
    return [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]


def test_the_messages_of_plain_rows_are_these_and_no_others(write):
    """What is trained hangs on them; runs begun before resume on the same."""
    system = {"role": "system", "content": [{"type": "text", "text": "Be brief."}]}
    rows = load_rows(
        write(
            {"images": ["a.png"], "messages": chat("Why?\n", "So.")},
            {"messages": [system, *chat("Why < image > ?", "So.", "And?", "No.")]},
            {"image": "a.png", "messages": [turn("user", "One ", "text", images=1),
                                            turn("assistant", "So", ".")]},
        ),
        split="train",
    )  # fmt: skip
    assert rows["messages"][:] == [
        '[{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Why?\\n"}]}, '
        '{"role": "assistant", "content": [{"type": "text", "text": "So."}]}]',
        '[{"role": "system", "content": [{"type": "text", "text": "Be brief."}]}, '
        '{"role": "user", "content": [{"type": "text", "text": "Why < image > ?"}]}, '
        '{"role": "assistant", "content": [{"type": "text", "text": "So."}]}, '
        '{"role": "user", "content": [{"type": "text", "text": "And?"}]}, '
        '{"role": "assistant", "content": [{"type": "text", "text": "No."}]}]',
        '[{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "One text"}]}, '
        '{"role": "assistant", "content": [{"type": "text", "text": "So."}]}]',
    ]


def test_placeholders_become_images_in_their_place(write):
    two = ["a.png", "a.png"]
    rows = load_rows(
        write(
            {"images": two, "messages": chat("<image>\nBefore, <image>after?", "A")},
            {"images": two, "messages": chat("First.\n<image>", "A", "<image>Then?", "B")},
            {"images": two, "messages": chat("<image><image>Same?", "A")},
            {"images": two, "messages": chat(" <image>\n<image>\n\nSame?", "A")},
            {"images": two[:1], "messages": [turn("user", "<im", "age>W"), turn("assistant", "A")]},
        ),
        split="train",
    )
    assert [said(row) for row in rows] == [
        [[None, "\nBefore, ", None, "after?"], ["A"]],
        [["First.\n", None], ["A"], [None, "Then?"], ["B"]],
        [[None, None, "Same?"], ["A"]],
        [[" ", None, "\n", None, "\n\nSame?"], ["A"]],
        [[None, "W"], ["A"]],
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"messages": chat("<image><image>Q", "A")}, "<image> in its user turns as images, got 2"),
        ({"images": [], "messages": chat("<image>Q", "A")}, "got 1 and 0: write one for each"),
        ({"images": ["a.png"] * 2, "messages": chat("<image>Q", "A")}, "got 1 and 2"),
        ({"messages": chat("Q", "A <image>")}, "a turn of the assistant holds it"),
        ({"messages": [{"role": "system", "content": "<image>"}, *chat("<image>", "A")]},
         "a turn of the system holds it"),
        ({"messages": [turn("user", "<image>Q", images=1), turn("assistant", "A")]}, "got both"),
        ({"messages": [turn("system", "S", images=1), *chat("Q", "A")]}, "in user turns only"),
    ],
)  # fmt: skip
def test_a_placeholder_that_stands_for_no_image_is_refused(write, change, message):
    with pytest.raises(DataError, match=r"rows\.jsonl:2: row r1: expected") as caught:
        load_rows(write(GOOD, {**GOOD, **change}), split="train")
    assert message in str(caught.value)


FOREIGN = {
    "weight": 0, "train": False, "loss": 1.0, "tools": [{}], "tool_calls": "[]", "system": "Lie.",
    "rejected": "No", "chosen": "Yes", "objects": {"bbox": [1]}, "videos": ["v"], "audios": ["a"],
    "conversations": [{"from": "human", "value": "Q"}],
}  # fmt: skip


@pytest.mark.parametrize(("key", "value"), FOREIGN.items())
def test_a_key_that_other_tools_obey_is_refused_unless_it_is_empty(write, key, value):
    with pytest.raises(DataError, match=f"row r1: expected no key {key}, "):
        load_rows(write({**GOOD, key: value}), split="train")
    for nothing in (None, [], "", {}):
        [row] = load_rows(write({**GOOD, key: nothing}), split="train")
        assert Row.of(row).messages == GOOD["messages"]
    [row] = load_rows(write({**GOOD, "fields": {key: value}}), split="train")
    assert Row.of(row).fields == {key: value}


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([GOOD["messages"][0], {**GOOD["messages"][1], "weight": 0}],
         "expected only content and role in message 2, got weight, which medft would ignore"),
        ([{**GOOD["messages"][0], "loss": False}, GOOD["messages"][1]], "message 1, got loss"),
        ([{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}],
         "expected role and content in message 1, got from: rename from to role and value to"),
        ([{"role": "user", "content": [{"type": "image", "resized_height": 9}]}],
         "in a part of type image, got resized_height"),
        ([{"role": "user", "content": [{"type": "text", "text": "Q", "image": "a.png"}]}],
         "in a part of type text, got image"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": "a.png"}]}],
         "expected image and text parts, got type image_url"),
        ([{"role": "user", "content": [{"type": "text"}]}], "part of type text, got nothing"),
    ],
)  # fmt: skip
def test_an_unknown_key_of_a_message_or_a_part_is_refused_by_name(write, messages, message):
    messages = [*messages, turn("assistant", "A")][:2]
    with pytest.raises(DataError, match=r"rows\.jsonl:1: row r1: ") as caught:
        load_rows(write({**GOOD, "messages": messages}), split="train")
    assert message in str(caught.value)


def test_keys_without_a_value_in_messages_and_parts_say_nothing(write):
    """As datasets writes them, whose columns are those of all rows."""
    part = {"type": "text", "text": "Why?", "image": None, "index": None}
    shown = {"type": "image", "text": None, "image": None, "path": ""}
    asked = {"role": "user", "content": [shown, part], "name": None, "tool_calls": []}
    [row] = load_rows(write({**GOOD, "messages": [asked, GOOD["messages"][1]]}), split="train")
    assert Row.of(row).messages == GOOD["messages"]


def shown(*parts):
    content = [{"type": "image", **part} for part in parts]
    return [
        {"role": "user", "content": [*content, {"type": "text", "text": "Q"}]},
        turn("assistant", "A"),
    ]


def test_the_paths_of_parts_decide_the_order_of_images(write, tmp_path):
    Image.new("RGB", (9, 9), "blue").save(tmp_path / "b.png")
    own = shown({"image": "b.png"}, {"path": "./a.png"}, {"url": str(tmp_path / "b.png")})
    rows = load_rows(
        write({"messages": own}, {"images": ["a.png", "b.png"], "messages": own},
              {"images": ["a.png", "b.png"], "messages": shown({}, {})}),
        split="train",
    )  # fmt: skip
    sizes = [[open_image(source).size[0] for source in Row.of(row).images] for row in rows]
    assert sizes == [[9, 8, 9], [9, 8, 9], [8, 9]]
    assert [len(said(row)[0]) for row in rows] == [4, 4, 3]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": shown({"image": "a.png"}, {})}, "in every image part or in none"),
        ({"messages": shown({"image": "a.png", "path": "a.png"})}, "expected one path as text"),
        ({"messages": shown({"image": {"bytes": "x"}})}, "expected one path as text"),
        ({"images": ["b.png"], "messages": shown({"image": "a.png"})}, "got b.png and a.png"),
        ({"images": ["a.png"] * 2, "messages": shown({"image": "a.png"})}, "the parts decide"),
        ({"images": ["a.png"], "messages": shown({"image": "a.png"}, {"image": "c.png"})},
         "the parts decide"),
        ({"messages": shown({"image": "c.png"})}, "c.png, there is no file"),
        ({"messages": shown({"url": "https://a.b/c.png"})}, "image file, got 'https://a.b/c.png'"),
        ({"images": ["HTTP://a.b/c.png"], "messages": chat("Q", "A")}, "got 'HTTP://a.b/c.png'"),
        ({"messages": shown({"image": "data:image/png;base64," + "A" * 999})}, "got 'data:image"),
        ({"images": ["a.png"], "image": "a.png", "messages": chat("Q", "A")}, "images or image"),
    ],
)  # fmt: skip
def test_paths_that_contradict_each_other_or_are_no_files_are_refused(write, row, message):
    with pytest.raises(DataError, match=r"rows\.jsonl:1: row line 1: ") as caught:
        load_rows(write(row), split="train")
    assert message in str(caught.value)
    assert len(str(caught.value)) < 400


def test_fields_are_columns_and_never_keys_of_the_row(write):
    kept = {"messages": "many", "id": "7", "image": "b.png", "age": "61", "image_path": "x"}
    [row] = load_rows(write({**GOOD, "fields": kept, "extra": 3}), split="train")
    row = Row.of(row)
    assert row.fields == {**kept, "extra": 3}
    assert (row.id, row.messages, len(row.images)) == ("r1", GOOD["messages"], 1)
    [row] = load_rows(write({**GOOD, "fields": None}), split="train")
    assert Row.of(row).fields == {}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fields": [1]}, "row r1: expected fields to be an object, got list"),
        ({"fields": "x"}, "got str"),
        ({"fields": {"age": 1}, "age": 1}, "expected each column once, age stands in the row and"),
    ],
)
def test_fields_that_are_no_columns_are_refused(write, change, message):
    with pytest.raises(DataError) as caught:
        load_rows(write({**GOOD, **change}), split="train")
    assert message in str(caught.value)


def write_plain(table, path):
    """Every cell as it is, so that texts of equal length give files of equal size."""
    options = {"compression": "none", "use_dictionary": False, "write_statistics": False}
    pq.write_table(table, path, **options)


def with_other_text(table):
    """The table and the text of its first training row, which differs in nothing but its words."""
    texts = table.column("text").to_pylist()
    number = table.column("split").to_pylist().index("train")
    texts[number] = "x" * len(texts[number])
    return table.set_column(table.schema.get_field_index("text"), "text", [texts]), texts[number]


def test_rows_of_a_file_that_was_replaced_under_the_same_time_are_the_new_ones(data, tmp_path):
    path, other = tmp_path / "pairs.parquet", tmp_path / "other.parquet"
    table = pq.read_table(data / "pairs.parquet")
    changed, text = with_other_text(table)
    write_plain(table, path)
    write_plain(changed, other)
    before, state = load_rows(path, split="train"), path.stat()
    path.write_bytes(other.read_bytes())
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (state.st_size, state.st_mtime_ns)
    after = load_rows(path, split="train")
    assert said(after[0]) == [said(before[0])[0], [text]] != said(before[0])
    assert fingerprint(path, after)["sha256"] == file_sha256(path) == file_sha256(other)
    assert fingerprint(path, before)["sha256"] != file_sha256(path)
    os.utime(path)
    again = load_rows(path, split="train")
    assert again["messages"][:] == after["messages"][:]
    assert fingerprint(path, again) == fingerprint(path, after)


@pytest.mark.parametrize("name", ["pairs.parquet", "rows.jsonl"])
def test_a_file_that_changes_while_it_is_read_is_refused(data, write, tmp_path, monkeypatch, name):
    path = write(GOOD)
    if name == "pairs.parquet":
        path = tmp_path / name
        path.write_bytes((data / name).read_bytes())
    content, state = path.read_bytes(), path.stat()

    def changed_after(path):
        digest = file_sha256(path)
        path.write_bytes(content)
        os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
        return digest

    monkeypatch.setattr(rows_module, "file_sha256", changed_after)
    with pytest.raises(DataError, match="it was changed meanwhile: start again"):
        load_rows(path, split="train")
    monkeypatch.undo()
    assert len(load_rows(path, split="train")) > 0
