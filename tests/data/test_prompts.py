"""Declared prompts are those that rows were asked, as templates."""

import json

import pytest

from medft.data.chat import write_chat
from medft.data.prepare import prepare
from medft.data.prompts import asked_prompts, choose_prompt
from medft.data.rows import load_rows
from medft.errors import RecipeError


@pytest.fixture
def prepared(tmp_path, images):
    """A folder with pairs.parquet and chat/ of two sources, one of them with questions."""
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(images[number].read_bytes())
    (tmp_path / "plain.csv").write_text("f,side,a\n0.png,left,A1\n1.png,right,A2\n")
    (tmp_path / "own.csv").write_text("f,side,a,q\n2.png,right,A3,Whose knee?\n")
    columns = "kind: csv, image: f, text: a, keep: [side]"
    (tmp_path / "SOURCES.yaml").write_text(
        "sources:\n"
        f"  - {{name: plain, path: plain.csv, {columns}}}\n"
        f"  - {{name: own, path: own.csv, question: q, {columns}}}\n"
        'prompts: ["Describe the {side} knee."]\n'
        "split: {validation: 0.0}\n"
    )
    prepare(tmp_path / "SOURCES.yaml", tmp_path / "out")
    write_chat(tmp_path / "out" / "pairs.parquet", tmp_path / "out" / "chat")
    return tmp_path / "out"


def asked(path):
    return asked_prompts(path, load_rows(path, split="train"))


def test_templates_are_declared_for_sources_without_questions(prepared):
    declared = json.loads((prepared / "chat" / "chat.json").read_text())
    assert declared == {"prompts": {"plain": ["Describe the {side} knee."]}}
    for path in (prepared / "pairs.parquet", prepared / "chat" / "train.jsonl"):
        assert asked(path) == ["Describe the {side} knee."]


def test_a_declared_prompt_that_no_row_was_asked_is_left_out(prepared):
    file = prepared / "chat" / "train.jsonl"
    text = file.read_text()
    file.write_text(text.replace("Describe the", "How is Ms Doe's"))
    assert asked(file) == []
    file.write_text(text)
    chat = prepared / "chat" / "chat.json"
    chat.write_text(json.dumps({"prompts": {"plain": ["Never.", "Describe the {side} knee."]}}))
    assert asked(file) == ["Describe the {side} knee."]


@pytest.mark.parametrize("content", [None, "[1]", '{"prompts": ["A"]}', "{}", "{"])
def test_without_medfts_own_chat_file_nothing_is_declared(prepared, content):
    file = prepared / "chat" / "chat.json"
    file.unlink()
    if content is not None:
        file.write_text(content)
    assert asked(prepared / "chat" / "train.jsonl") == []


def test_a_declared_prompt_that_is_no_template_is_refused(prepared):
    (prepared / "chat" / "chat.json").write_text('{"prompts": {"plain": ["Side {side"]}}')
    with pytest.raises(RecipeError, match="expected a template"):
        asked(prepared / "chat" / "train.jsonl")


def test_the_prompt_chosen_is_the_first_whose_fields_are_there():
    templates = ["The {view} of the {side} knee.", "The {side} knee.", "Describe it."]
    assert choose_prompt(templates, {}) == "Describe it."
    assert choose_prompt(templates, {"side": "left", "age": 4}) == "The left knee."
    assert choose_prompt(templates, {"side": "left", "view": "lateral"}) == (
        "The lateral of the left knee."
    )
    assert choose_prompt(["Its {side} side."], {"side": None}) is None
    assert choose_prompt(["Its {side} side."], {}) is None
    assert choose_prompt([], {"side": "left"}) is None


def test_chat_files_of_an_older_medft_are_written_anew(prepared):
    (prepared / "chat" / "chat.json").unlink()
    write_chat(prepared / "pairs.parquet", prepared / "chat")
    assert (prepared / "chat" / "chat.json").is_file()
