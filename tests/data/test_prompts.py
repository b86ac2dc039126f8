"""Declared prompts are those that rows were asked, as templates."""

import json

import pyarrow.parquet as pq
import pytest

from medft.data.chat import write_chat
from medft.data.messages import first_texts
from medft.data.pairs import declared_by_source
from medft.data.prepare import prepare
from medft.data.prompts import asked_prompts, choose_prompt
from medft.data.rows import Row, load_rows
from medft.errors import DataError, RecipeError


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


COMMON = ["Describe it.", "Report it.", "So?"]

EN_DRAWN = ["Describe it.", "So?", "Report it.", "Describe it."]
"""Of COMMON, those of the rows en-r0 to en-r3."""

SOURCES = """\
sources:
  - {name: de, path: de.csv, COLUMNS, language: de,
     prompts: ["Beschreibe das Knie ({side}, {language}).", "Was ist zu sehen?"]}
  - {name: en, path: en.csv, COLUMNS, language: {column: lang}}
  - {name: own, path: own.csv, COLUMNS, question: q}
prompts: ["Describe it.", "Report it.", "So?"]
split: {validation: 0.0}
"""


@pytest.fixture
def by_source(tmp_path, images):
    """A folder with SOURCES.yaml, whose sources have prompts of their own, common ones, or none."""
    for number in range(4):
        (tmp_path / f"{number}.png").write_bytes(images[number].read_bytes())
    for name in ("de", "en", "own"):
        rows = [f"{n}.png,left,{name} A{n},Q{n},{name}-r{n},l{n % 2}" for n in range(4)]
        (tmp_path / f"{name}.csv").write_text("\n".join(["f,side,a,q,i,lang", *rows]))
    columns = "kind: csv, image: f, text: a, id: i, keep: [side]"
    (tmp_path / "SOURCES.yaml").write_text(SOURCES.replace("COLUMNS", columns))
    return tmp_path


def asked_by_source(path):
    rows = map(Row.of, load_rows(path, split="train"))
    return [(row.source, first_texts(row.messages)["question"], row.fields) for row in rows]


def test_a_source_may_have_prompts_and_a_language_of_its_own(by_source):
    prepare(by_source / "SOURCES.yaml", by_source / "out")
    pairs = by_source / "out" / "pairs.parquet"
    write_chat(pairs, by_source / "chat")
    for path in (pairs, by_source / "chat" / "train.jsonl"):
        found = asked_by_source(path)
        assert {question for source, question, _ in found if source == "de"} == {
            "Beschreibe das Knie (left, de).",
            "Was ist zu sehen?",
        }
        common = {question for source, question, _ in found if source == "en"}
        assert common == set(EN_DRAWN)
        assert [question for source, question, _ in found if source == "own"] == [
            "Q0", "Q1", "Q2", "Q3"]  # fmt: skip
        assert [(source, fields.get("language")) for source, _, fields in found] == [
            *[("de", "de")] * 4,
            *[("en", "l0"), ("en", "l1")] * 2,
            *[("own", None)] * 4,
        ]
    declared = json.loads((by_source / "chat" / "chat.json").read_text())
    assert declared == {
        "prompts": {
            "de": ["Beschreibe das Knie ({side}, {language}).", "Was ist zu sehen?"],
            "en": COMMON,
        }
    }
    assert asked(pairs)[:2] == declared["prompts"]["de"]


def test_the_prompt_of_a_row_is_that_of_its_id_with_or_without_prompts_of_other_sources(by_source):
    """Pinned: rows must be asked the same by each version, or runs resume on other data."""
    prepare(by_source / "SOURCES.yaml", by_source / "out")
    found = asked_by_source(by_source / "out" / "pairs.parquet")
    assert [question for source, question, _ in found if source == "en"] == EN_DRAWN
    yaml = by_source / "SOURCES.yaml"
    text = yaml.read_text()
    yaml.write_text(text[: text.index(",\n     prompts")] + text[text.index("}\n  - {name: en") :])
    prepare(yaml, by_source / "out")
    alone = asked_by_source(by_source / "out" / "pairs.parquet")
    assert [question for source, question, _ in alone if source == "en"] == EN_DRAWN
    assert {question for source, question, _ in alone if source == "de"} <= set(COMMON)


def with_metadata(path, content):
    """A copy of a pairs.parquet with other metadata under medft's key, or without any."""
    table = pq.read_table(path)
    other = path.with_name("other.parquet")
    pq.write_table(table.replace_schema_metadata(content and {"medft": content}), other)
    return other


def test_files_of_an_older_medft_have_one_list_for_all_sources(by_source):
    prepare(by_source / "SOURCES.yaml", by_source / "out")
    pairs = by_source / "out" / "pairs.parquet"
    old = with_metadata(pairs, json.dumps({"prompts": COMMON}))
    found = asked_by_source(old)
    assert [question for source, question, _ in found if source == "en"] == EN_DRAWN
    assert declared_by_source(old) == {"de": COMMON, "en": COMMON}
    bare = with_metadata(pairs, None)
    assert {question for source, question, _ in asked_by_source(bare) if source != "own"} == {
        "Describe this medical image."}  # fmt: skip


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1]", "expected prompts in the metadata of"),
        ("{", "expected prompts in the metadata of"),
        ('{"prompts": []}', "expected prompts in the metadata of"),
        ('{"prompts": {"de": []}}', "expected prompts in the metadata of"),
        ('{"prompts": {"de": ["A"]}}', "row en-r0: expected prompts for its source 'en' in the"),
    ],
)
def test_metadata_without_the_prompts_of_a_source_is_refused(by_source, content, message):
    prepare(by_source / "SOURCES.yaml", by_source / "out")
    pairs = with_metadata(by_source / "out" / "pairs.parquet", content)
    with pytest.raises(DataError, match=message):
        load_rows(pairs, split="train")
    with pytest.raises(DataError, match=message):
        write_chat(pairs, by_source / "chat")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("keep: [side], language: de", "keep: [side, language], language: de"),
         "the key language or a column of that name in keep, not both"),
        (("language: de", "language: ''"), "sources.0.language"),
        (("{column: lang}", "{col: lang}"), "sources.1.language"),
        (("{column: lang}", "{}"), "sources.1.language"),
        (("{column: lang}", "{column: none}"), "the columns none in"),
        (('["Beschreibe das Knie ({side}, {language}).", "Was ist zu sehen?"]', "[]"),
         "sources.0.prompts"),
        (("({side}, {language})", "({lang})"), "in keep of source de, lang is missing"),
        (("language: {column: lang}", "prompts: ['{language}?']"), "en, language is missing"),
        (("Was ist zu sehen?", "Was ist das }?"), "write a literal brace twice"),
        (("question: q", "question: q, prompts: [A]"), "prompts or question, since every row has"),
    ],
)  # fmt: skip
def test_prompts_and_languages_that_contradict_are_refused(by_source, change, message):
    yaml = by_source / "SOURCES.yaml"
    text = yaml.read_text()
    assert change[0] in text
    yaml.write_text(text.replace(*change))
    with pytest.raises((RecipeError, DataError)) as caught:
        prepare(yaml, by_source / "out")
    assert message in str(caught.value)
    assert not (by_source / "out").exists()
