"""Chat files are what pairs.parquet holds, for medft and for other tools."""

import json

import pytest
from PIL import Image

from medft.data.chat import write_chat
from medft.data.images import open_image
from medft.data.pairs import read_pairs
from medft.data.prepare import prepare
from medft.data.rows import Row, load_rows
from medft.errors import RunError


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
