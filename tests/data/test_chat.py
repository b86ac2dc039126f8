"""Chat files are what pairs.parquet holds, for medft and for other tools."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from datasets import load_dataset
from PIL import Image

from medft.data.chat import write_chat
from medft.data.images import open_image
from medft.data.pairs import read_pairs
from medft.data.prepare import prepare
from medft.data.rows import Row, load_rows
from medft.errors import DataError, RecipeError, RunError
from medft.siglip.collator import caption_of


def test_sharegpt_holds_the_same_conversations_with_placeholders(data, tmp_path):
    write_chat(data / "pairs.parquet", tmp_path / "chat", format="sharegpt")
    lines = (tmp_path / "chat" / "train.jsonl").read_text().splitlines()
    expected = [row for row in read_pairs(data / "pairs.parquet") if row["split"] == "train"]
    assert len(lines) == len(expected)
    row = json.loads(lines[0])
    assert row["messages"][0]["content"].startswith("<image>")
    assert row["messages"][1] == {"role": "assistant", "content": expected[0]["text"]}
    assert (tmp_path / "chat" / row["images"][0]).is_file()


@pytest.fixture
def prepared(tmp_path, images):
    """pairs.parquet of questions about one or two images, with kept columns and a language."""
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.png").write_bytes(images["abc".index(name)].read_bytes())
    rows = [
        "a.png,b.png,Q1,A1,left,x",
        "b.png,c.png,Q2 <b>?,A2,right,y",
        "a.png,b.png,Q3,A3,left,z",
    ]
    (tmp_path / "t.csv").write_text("\n".join(["f,g,q,a,messages,image", *rows]))
    (tmp_path / "SOURCES.yaml").write_text(
        "sources:\n  - {name: s, kind: csv, path: t.csv, image: [f, g], text: a, question: q, "
        "keep: [messages, image], language: en}\nsplit: {validation: 0.0}\n"
    )
    prepare(tmp_path / "SOURCES.yaml", tmp_path / "out")
    return tmp_path / "out" / "pairs.parquet"


@pytest.mark.parametrize("joined", [False, True])
def test_both_formats_are_read_as_the_same_conversations(prepared, tmp_path, joined):
    loaded = {}
    for form in ("trl", "sharegpt"):
        write_chat(prepared, tmp_path / form, format=form, join_questions=joined)
        loaded[form] = load_rows(tmp_path / form / "train.jsonl", split="train")
    assert loaded["trl"]["messages"][:] == loaded["sharegpt"]["messages"][:]
    names = {form: [[Path(i["path"]).name for i in row] for row in rows["images"]]
             for form, rows in loaded.items()}  # fmt: skip
    assert names["trl"] == names["sharegpt"]
    kinds = [part["type"] for part in Row.of(loaded["sharegpt"][0]).messages[0]["content"]]
    assert kinds == ["image", "image", "text"]
    assert len(loaded["trl"]) == (2 if joined else 3)


def test_kept_columns_travel_under_fields_and_captions_use_them(prepared, tmp_path):
    write_chat(prepared, tmp_path / "chat")
    file = tmp_path / "chat" / "train.jsonl"
    line = json.loads(file.read_text().splitlines()[0])
    assert list(line) == ["id", "group_id", "source", "images", "fields", "messages"]
    assert line["fields"] == {"messages": "left", "image": "x", "language": "en"}
    captions = [
        [caption_of(Row.of(row), "{messages} {image} ({language}): {answer}") for row in rows]
        for rows in (load_rows(file, split="train"), load_rows(prepared, split="train"))
    ]
    assert captions[0] == captions[1] == ["left x (en): A1", "right y (en): A2", "left z (en): A3"]
    with pytest.raises(RecipeError, match="age is none in row"):
        caption_of(Row.of(load_rows(file, split="train")[0]), "{age}")
    read = load_dataset("json", data_files=str(file), split="train", cache_dir=str(tmp_path / "hf"))
    assert read[1]["fields"] == {"messages": "right", "image": "y", "language": "en"}


def test_a_joined_row_has_the_fields_that_its_questions_share(prepared, tmp_path):
    write_chat(prepared, tmp_path / "chat", join_questions=True)
    rows = load_rows(tmp_path / "chat" / "train.jsonl", split="train")
    assert [Row.of(row).fields for row in rows] == [
        {"messages": "left", "language": "en"},
        {"messages": "right", "image": "y", "language": "en"},
    ]


def test_a_text_with_a_placeholder_is_rejected_and_never_becomes_an_image(tmp_path, images):
    (tmp_path / "a.png").write_bytes(images[0].read_bytes())
    rows = ["a.png,<image>Q1,A1", "a.png,Q2,A <image>", "a.png,Q3 <img>,A3"]
    (tmp_path / "t.csv").write_text("\n".join(["f,q,a", *rows]))
    yaml = tmp_path / "SOURCES.yaml"
    source = "sources:\n  - {name: s, kind: csv, path: t.csv, image: f, text: a%s}\n"
    yaml.write_text(source % ", question: q" + "split: {validation: 0.0}\n")
    summary = prepare(yaml, tmp_path / "out", max_rejects=0.7)
    assert summary["sources"]["s"]["reasons"] == {"image_placeholder": 2}
    assert [row["question"] for row in read_pairs(tmp_path / "out" / "pairs.parquet")] == [
        "Q3 <img>"
    ]
    yaml.write_text(source % "" + 'prompts: ["<image>Describe."]\n')
    with pytest.raises(RecipeError, match="of source s without <image>: remove it"):
        prepare(yaml, tmp_path / "out")


def test_a_placeholder_in_an_older_pairs_file_stops_what_reads_it(prepared, tmp_path):
    table = pq.read_table(prepared)
    questions = ["<image>Q1", *table.column("question").to_pylist()[1:]]
    old = tmp_path / "old.parquet"
    column = table.schema.get_field_index("question")
    pq.write_table(table.set_column(column, "question", [questions]), old)
    for read in (lambda: load_rows(old, split="train"), lambda: write_chat(old, tmp_path / "no")):
        with pytest.raises(DataError, match="expected question and text without <image>"):
            read()
    assert not (tmp_path / "no").exists()


def test_a_check_shows_both_images_of_a_sharegpt_row(
    prepared, tmp_path, sections, write_recipe, medft, capsys
):
    write_chat(prepared, tmp_path / "chat", format="sharegpt")
    recipe = sections("decoder")
    file = tmp_path / "chat" / "train.jsonl"
    recipe["data"] |= {"train": str(file), "validation": None}
    assert medft("check", write_recipe(recipe)) == 0
    assert "<|image|><|image|>Q1<|eot_id|>" in capsys.readouterr().out
    text = file.read_text().replace("<image><image>Q1", "<image>Q1\\n<image>")
    file.write_text(text)
    assert medft("check", write_recipe(recipe)) == 0
    assert "<|image|>Q1\\n<|image|><|eot_id|>" in capsys.readouterr().out
    file.write_text(text.replace("<image>Q1", "Q1"))
    assert medft("check", write_recipe(recipe)) == 2
    assert "got 1 and 2: write one for each" in capsys.readouterr().err


def test_questions_about_one_image_can_be_joined(tmp_path):
    for name, color in (("a.jpg", "red"), ("b.png", "blue")):
        Image.new("RGB", (16, 16), color).save(tmp_path / name)
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
        [
            part.get("text", "<image>")
            for message in Row.of(row).messages
            for part in message["content"]
        ]
        for row in rows
    ]
    assert told == [["<image>", "Q1", "A1", "Q3", "A3"], ["<image>", "Q2", "A2"]]
    written = Image.open(rows[0]["images"][0]["path"])
    assert written.format == "PNG"
    assert written.tobytes() == open_image(tmp_path / "a.jpg").tobytes()


def test_the_prompt_is_chosen_by_the_id_and_questions_stay(data):
    prompts = {Row.of(row).messages[0]["content"][1]["text"] for row in load_rows(
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
