"""What is to be answered."""

import json

import pytest

from medft.data.rows import load_rows
from medft.errors import DataError
from medft.evaluation.items import items_of


def test_every_assistant_turn_is_an_item_with_the_turns_before_it(tmp_path):
    turns = []
    for question, answer in (("Where?", "Left."), ("Size?", "Small.")):
        turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    row = {"id": "r", "group_id": "g", "source": "s", "images": [], "messages": turns}
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
    first, second = items_of(load_rows(tmp_path / "a.jsonl", split="test"))
    assert (first.id, first.question, first.reference) == ("r#1", "Where?", "Left.")
    assert (second.id, second.question, second.reference) == ("r#2", "Size?", "Small.")
    assert [m["role"] for m in second.prompt] == ["user", "assistant", "user"]
    assert (second.group_id, second.source) == ("g", "s")


def test_an_answer_that_is_longer_than_any_report_is_refused(tmp_path):
    for length, is_refused in ((2**15, False), (2**15 + 1, True)):
        turns = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "a" * length}]
        (tmp_path / "a.jsonl").write_text(json.dumps({"id": "r", "messages": turns}) + "\n")
        rows = load_rows(tmp_path / "a.jsonl", split="test")
        if is_refused:
            with pytest.raises(DataError, match="row r: expected an answer of at most 32768 char"):
                items_of(rows)
        else:
            assert len(items_of(rows)) == 1
