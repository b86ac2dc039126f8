"""pairs.parquet and chat JSONL of somebody who means harm: one sentence, and nothing written."""

import hashlib
import io
import json
import os
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hostile import run_hostile
from PIL import Image, PngImagePlugin

from medft.data.chat import write_chat
from medft.data.pairs import SCHEMA
from medft.data.rows import load_rows
from medft.errors import DataError


def png(color, **text):
    """A PNG of one color, with text chunks and bytes after its end."""
    info = PngImagePlugin.PngInfo()
    for name, value in text.items():
        info.add_text(name, value)
    stream = io.BytesIO()
    Image.new("RGB", (8, 8), color).save(stream, format="PNG", pnginfo=info)
    return stream.getvalue() + (b"after the end" if text else b"")


def pair(number, **changes):
    content = png((number, 7, 7))
    row = {
        "id": f"row {number}",
        "images": [{"bytes": content, "path": None}],
        "width": [8],
        "height": [8],
        "sha256": [hashlib.sha256(content).hexdigest()],
        "phash": ["0" * 16],
        "text": f"Finding {number}.",
        "question": "What?",
        "fields": "{}",
        "source": "s",
        "group_id": f"g{number}",
        "license": None,
        "split": "train",
    }
    return row | changes


@pytest.fixture
def pairs(tmp_path):
    """Write rows as a pairs.parquet without medft's metadata; gives its path."""

    def write(*rows, metadata=None, schema=SCHEMA, **options):
        path = tmp_path / "pairs.parquet"
        table = pa.Table.from_pylist(list(rows), schema=schema.with_metadata(metadata))
        pq.write_table(table, path, **options)
        return path

    return write


def refused(path, tmp_path):
    """The one sentence with which chat and training refuse a file; nothing is written."""
    problems = []
    for read in (
        lambda: write_chat(path, tmp_path / "chat"),
        lambda: load_rows(path, split="train"),
    ):
        with pytest.raises(DataError) as caught:
            read()
        problems.append(caught.value.problems)
    assert not (tmp_path / "chat").exists()
    [sentence], other = problems
    assert other == [sentence]
    assert len(sentence) < 1000
    return sentence


def test_pairs_of_somebody_else_are_read_where_nothing_is_wrong(pairs, tmp_path):
    path = pairs(pair(1), pair(2, question=None, fields=None), pair(3, split="test"))
    assert write_chat(path, tmp_path / "chat") == {"train": 2, "validation": 0, "test": 1}
    rows = load_rows(path, split="train")
    assert rows["id"][:] == ["row 1", "row 2"]
    assert rows["images"][0][0]["bytes"] == png((1, 7, 7))


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"sha256": ["../../../x"]}, "row row 2: expected the SHA-256 of its images in sha256"),
        ({"sha256": [hashlib.sha256(png((1, 7, 7))).hexdigest()]}, "image 1 has another"),
        ({"split": "dev"}, "expected one of train, validation, test as its split, got 'dev'"),
        ({"split": "../x"}, "expected one of train, validation, test as its split"),
        ({"split": None}, "expected text as its split, got nothing"),
        ({"sha256": None}, "expected a list of sha256 without gaps"),
        ({"sha256": [None]}, "expected a list of sha256 without gaps"),
        ({"id": None}, "row number 2: expected text as its id, got nothing"),
        ({"text": None}, "expected text as its text, got nothing"),
        ({"group_id": None}, "expected text as its group_id, got nothing"),
        ({"images": None}, "expected a list of images without gaps"),
        ({"images": [None]}, "expected a list of images without gaps"),
        ({"width": [8, 8]}, "got 1 images, 2 width, 1 height, 1 sha256, 1 phash"),
        ({"images": [{"bytes": None, "path": "/etc/passwd"}]}, "one is a path or nothing"),
        ({"fields": "[1]"}, "expected its fields to be a JSON object"),
        ({"fields": '{"a": Infinity}'}, "expected its fields to be a JSON object"),
        ({"fields": '{"a": 1, "a": 2}'}, "expected its fields to be a JSON object"),
        ({"fields": "{"}, "expected its fields to be a JSON object"),
        ({"fields": "[" * 100_000}, "expected its fields to be a JSON object"),
    ],
)
def test_a_row_that_is_none_is_named(pairs, tmp_path, changes, problem):
    assert problem in refused(pairs(pair(1), pair(2, **changes)), tmp_path)


def test_a_hash_cannot_lead_out_of_the_folder(pairs, tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    path = pairs(pair(1, sha256=["../../x"]))
    with pytest.raises(DataError):
        write_chat(path, tmp_path / "a" / "b" / "chat")
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["a", "b", "pairs.parquet"]


@pytest.mark.parametrize(
    ("name", "type_", "values"),
    [
        ("images", pa.string(), ["x.png"]),
        ("images", pa.list_(pa.string()), [["x.png"]]),
        ("images", pa.list_(pa.struct([("path", pa.string())])), [[{"path": "x.png"}]]),
        ("text", pa.int64(), [7]),
        ("text", pa.list_(pa.string()), [["a"]]),
        ("sha256", pa.string(), ["0" * 64]),
        ("split", pa.bool_(), [True]),
    ],
)
def test_a_column_of_another_type_is_an_error_before_rows_are_read(
    pairs, tmp_path, name, type_, values
):
    schema = pa.schema([pa.field(name, type_) if f.name == name else f for f in SCHEMA])
    path = pairs(pair(1, **{name: values[0]}), schema=schema)
    assert f"{name} is of type" in refused(path, tmp_path)


def test_a_missing_column_and_one_that_stands_twice_are_errors(pairs, tmp_path):
    table = pq.read_table(pairs(pair(1)))
    pq.write_table(table.drop_columns(["sha256"]), tmp_path / "pairs.parquet")
    assert "sha256 are missing" in refused(tmp_path / "pairs.parquet", tmp_path)
    pq.write_table(table.append_column("text", table["text"]), tmp_path / "pairs.parquet")
    assert "text stands twice" in refused(tmp_path / "pairs.parquet", tmp_path)


def test_wider_types_of_other_tools_are_read(pairs, tmp_path):
    wide = {"text": pa.large_string(), "width": pa.large_list(pa.int64()), "license": pa.null()}
    wide["source"] = pa.dictionary(pa.int32(), pa.string())
    schema = pa.schema([pa.field(f.name, wide.get(f.name, f.type)) for f in SCHEMA])
    path = pairs(pair(1), pair(2), schema=schema)
    assert write_chat(path, tmp_path / "chat")["train"] == 2
    assert load_rows(path, split="train")["source"][:] == ["s", "s"]


@pytest.mark.parametrize(
    "metadata",
    [b"{", b"[]", b'{"prompts": 7}', b'{"prompts": {"s": []}}', b"\xff", b"[" * 100_000],
)
def test_damaged_prompts_are_one_sentence(pairs, tmp_path, metadata):
    path = pairs(pair(1, question=None), metadata={"medft": metadata})
    assert "expected prompts in the metadata" in refused(path, tmp_path)


def test_a_prompt_over_fields_that_are_not_there_is_one_sentence(pairs, tmp_path):
    prompts = {"medft": json.dumps({"prompts": {"s": ["Describe {view}."]}})}
    sentence = refused(pairs(pair(1, question=None), metadata=prompts), tmp_path)
    assert "expected the fields that its prompt 'Describe {view}.' names" in sentence
    path = pairs(pair(1, question=None, fields='{"view": "AP"}'), metadata=prompts)
    assert write_chat(path, tmp_path / "chat")["train"] == 1


def test_metadata_of_datasets_decides_nothing(pairs, tmp_path):
    lie = {"huggingface": json.dumps({"info": {"features": {"id": {"_type": "Image"}}}})}
    path = pairs(pair(1), metadata=lie)
    assert load_rows(path, split="train")["id"][:] == ["row 1"]
    assert write_chat(path, tmp_path / "chat")["train"] == 1


def test_no_rows_and_a_file_that_ends_early_are_one_sentence(pairs, tmp_path):
    path = pairs()
    with pytest.raises(DataError, match="expected rows of split train"):
        load_rows(path, split="train")
    path = pairs(*map(pair, range(200)), row_group_size=50)
    content = path.read_bytes()
    path.write_bytes(content[:-20])
    assert "could not read it" in refused(path, tmp_path)
    path.write_bytes(content[:4000] + bytes(4000) + content[8000:])
    assert path.name in refused(path, tmp_path)


def make_pipe(path):
    os.mkfifo(path)


def make_folder(path):
    path.mkdir()


def make_sparse(path):
    with path.open("wb") as file:
        file.truncate(5 * 2**40)


def make_dangling_link(path):
    path.symlink_to("nothing")


@pytest.mark.parametrize("name", ["pairs.parquet", "train.jsonl"])
@pytest.mark.parametrize("make", [make_pipe, make_folder, make_sparse, make_dangling_link])
def test_what_is_no_data_file_is_one_sentence_at_once(tmp_path, make, name):
    make(tmp_path / name)
    with pytest.raises(DataError) as caught:
        load_rows(tmp_path / name, split="train")
    assert str(tmp_path / name) in str(caught.value)
    if name == "pairs.parquet":
        refused(tmp_path / name, tmp_path)


def bomb(path, column, value, rows):
    """A file of a few kilobytes whose rows all hold one long value."""
    row = pair(1)
    arrays = []
    for field in SCHEMA:
        given = pa.array([value if field.name == column else row[field.name]], field.type)
        index = pa.array([0] * rows, pa.int32())
        is_text = field.type == pa.string() and given.null_count == 0
        arrays.append(pa.DictionaryArray.from_arrays(index, given) if is_text
                      else given.take(index))  # fmt: skip
    table = pa.table(arrays, names=SCHEMA.names)
    pq.write_table(table, path, compression="zstd", dictionary_pagesize_limit=2**30)
    return path


@pytest.mark.slow
def test_a_long_text_that_stands_in_every_row_is_refused_in_little_memory(tmp_path):
    path = bomb(tmp_path / "pairs.parquet", "text", "a" * 100_000_000, 1000)
    assert path.stat().st_size < 200_000
    outcome = run_hostile(["data", "chat", path, "--out", tmp_path / "chat"])
    assert outcome.code == 2
    [sentence] = outcome.sentences
    assert "row row 1: expected a text of at most 67108864 characters" in sentence
    assert outcome.peak < 1.5 * 2**30


@pytest.mark.slow
def test_many_rows_that_stand_for_far_more_than_the_file_are_refused(tmp_path):
    path = bomb(tmp_path / "pairs.parquet", "text", "a" * 2**23, 1000)
    outcome = run_hostile(["data", "chat", path, "--out", tmp_path / "chat"])
    assert outcome.code == 2
    [sentence] = outcome.sentences
    assert "expected a file that holds at most 32 times its size" in sentence
    assert outcome.peak < 1.5 * 2**30
    assert not (tmp_path / "chat").exists()


def test_images_keep_their_pixels_and_nothing_else(pairs, tmp_path):
    content = png((9, 9, 9), Patient="Doe^Jane")
    changes = {"images": [{"bytes": content, "path": None}]}
    path = pairs(pair(1, sha256=[hashlib.sha256(content).hexdigest()], **changes))
    write_chat(path, tmp_path / "chat")
    [written] = (tmp_path / "chat" / "images").iterdir()
    assert b"Doe" not in written.read_bytes()
    assert b"after the end" not in written.read_bytes()
    with Image.open(written) as image:
        assert image.convert("RGB").getpixel((0, 0)) == (9, 9, 9)


@pytest.mark.parametrize(
    "content", [b"no image", png((1, 2, 3))[:45], b"\x89PNG\r\n\x1a\n" + bytes(100)]
)
def test_an_image_that_cannot_be_decoded_is_never_written(pairs, tmp_path, content):
    changes = {"images": [{"bytes": content, "path": None}]}
    path = pairs(pair(1), pair(2, sha256=[hashlib.sha256(content).hexdigest()], **changes))
    with pytest.raises(DataError, match="row row 2: expected a complete image"):
        write_chat(path, tmp_path / "chat")
    assert not (tmp_path / "chat").exists()


def test_headers_of_images_are_read_unless_prepare_has_decoded_them(pairs, tmp_path):
    content = b"no image"
    changes = {"images": [{"bytes": content, "path": None}]}
    rows = [pair(n, sha256=[hashlib.sha256(content).hexdigest()], **changes) for n in range(12)]
    path = pairs(pair(99), *rows)
    with pytest.raises(DataError) as caught:
        load_rows(path, split="train")
    assert len(caught.value.problems) == 11
    assert "row row 0: expected a complete image" in caught.value.problems[0]
    assert caught.value.problems[-1].endswith("2 more rows are bad: correct them too")
    prompts = json.dumps({"prompts": {"s": ["?"]}, "images": "decoded"})
    assert len(load_rows(pairs(*rows, metadata={"medft": prompts}), split="train")) == 12


@pytest.fixture
def chat(tmp_path):
    """Write lines of a chat JSONL beside an image; gives its path."""
    (tmp_path / "a.png").write_bytes(png((1, 1, 1)))

    def write(*lines):
        path = tmp_path / "chat.jsonl"
        path.write_bytes(b"\n".join(x if isinstance(x, bytes) else x.encode() for x in lines))
        return path

    return write


def line(image="a.png", **changes):
    turns = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    return json.dumps({"images": [image], "messages": turns} | changes)


@pytest.mark.parametrize(
    ("bad", "problem"),
    [
        (line().replace('"images"', '"images": ["b.png"], "images"', 1), "'images' stands twice"),
        (line(fields={"a": 1}).replace('"a"', '"b": 0, "b"'), "'b' stands twice"),
        ("[" * 100_000, "could not parse it"),
        ('{"a":' * 100_000, "could not parse it"),
        (line("a\0.png"), "there is no file"),
        (line("dangling.png"), "there is no file"),
        (line("pipe.png"), "it is a folder, a pipe or a device"),
        (line("/dev/zero"), "it is a folder, a pipe or a device"),
        (line("."), "it is a folder, a pipe or a device"),
        (line("text.png"), "expected a complete image"),
        (line("wide.png"), "expected an image of at most 64000000 pixels"),
        (b'{"id": "\xff"}', "expected UTF-8 text"),
        (line(id="\ud800"), "could not parse it"),
        (line(fields={"a": float("inf")}), "Infinity is no JSON"),
    ],
)
def test_a_bad_line_of_a_chat_file_is_named(chat, tmp_path, bad, problem):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "dangling.png").symlink_to("nothing")
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "wide.png").write_bytes(b"P6 9000 9000 255\n")
    path = chat(line(), bad)
    with pytest.raises(DataError) as caught:
        load_rows(path, split="train")
    [sentence] = caught.value.problems
    assert f"{path}:2: " in sentence
    assert problem in sentence
    assert len(load_rows(chat(line(), line(str(tmp_path / "a.png"))),
                         split="train")) == 2  # fmt: skip


def test_links_and_absolute_paths_in_a_chat_file_are_its_owners(chat, tmp_path):
    (tmp_path / "link.png").symlink_to(tmp_path / "a.png")
    path = chat(line("link.png"), line(str(tmp_path / "a.png")))
    assert len(load_rows(path, split="train")) == 2


@pytest.mark.slow
def test_a_line_of_a_gigabyte_is_refused_in_little_memory(tmp_path):
    path = tmp_path / "chat.jsonl"
    with path.open("wb") as file:
        file.write(b'{"id": "')
        file.truncate(2**30)
    code = "import sys\nfrom medft.data.rows import load_rows\nfrom medft.errors import run_command"
    code += "\nfrom pathlib import Path\nread = lambda w: load_rows(Path(w[0]), split='train')"
    code += "\nsys.exit(run_command(read, sys.argv[1:]))"
    outcome = run_hostile([path], command=[sys.executable, "-c", code])
    assert outcome.code == 2
    [sentence] = outcome.sentences
    assert f"{path}:1: expected a JSON object, the line has more than 268435456 bytes" in sentence
    assert outcome.peak < 2 * 2**30


def test_an_image_that_many_rows_show_is_opened_once(chat, tmp_path, monkeypatch):
    from medft.data import chat_rows

    seen = []
    real = chat_rows.problem_of_header
    monkeypatch.setattr(chat_rows, "problem_of_header", lambda p: seen.append(p) or real(p))
    assert len(load_rows(chat(*[line()] * 50), split="train")) == 50
    assert seen == [tmp_path / "a.png"]
