"""Predictions come first and scores from them; controls are what they say; pages show it all."""

import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from datasets import Dataset

from medft.data.chat import load_rows
from medft.errors import DataError, MedftError, RunError
from medft.evaluation.evaluate import (
    Item,
    evaluate,
    items_of,
    nearest_texts,
    partners,
    read_lines,
    rows_to_evaluate,
)
from medft.evaluation.report import SHOWN_CASES, evaluation_sections, interval, shown_cases
from medft.metrics.scores import score


def item(name, group, source="a", images=1, reference="", question="What?"):
    prompt = [{"role": "user", "content": [{"type": "text", "text": question}]}]
    return Item(
        id=name,
        group_id=group,
        source=source,
        prompt=prompt,
        row=0,
        images=range(images),
        reference=reference,
    )


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


def test_a_partner_is_of_the_same_source_and_count_and_of_another_group():
    items = [item(f"{s}{g}{i}", f"{s}{g}", s) for s in "ab" for g in range(5) for i in range(3)]
    items += [item("two", "x", images=2), item("other two", "x", images=2)]
    found = partners(items)
    for one, other in zip(items[:-2], found[:-2], strict=True):
        assert items[other].source == one.source
        assert items[other].group_id != one.group_id
        assert len(items[other].images) == len(one.images)
    assert found[-2:] == [None, None]
    assert len(set(found[:-2])) > 15  # not one picture for all
    assert partners([item("x", "g", images=0), item("y", "h", images=0)]) == [None, None]


def test_the_nearest_text_is_that_of_the_nearest_picture_of_the_source(data):
    train = load_rows(data / "chat" / "train.jsonl", split="train")
    references = [one.reference for one in items_of(train)]
    few = train.select(range(5))
    assert nearest_texts(few, train) == references[:5]

    def moved(rows):
        return Dataset.from_list([{**row, "source": "somewhere"} for row in rows], train.features)

    assert nearest_texts(moved(few), train) == references[:5]
    both = Dataset.from_list([*train, *moved(train.select([7, 9]))], train.features)
    assert set(nearest_texts(moved(few), both)) <= {references[7], references[9]}


def test_rows_without_another_picture_are_left_out_of_the_control():
    """A model that does not look loses nothing by other pictures, whatever rows have none."""
    made = lines(
        {"tuned": lambda i, reference: reference, "shuffled": lambda i, reference: reference}
    )
    for line in made[:6]:
        line["predictions"]["shuffled"] = None
        line["shuffled_with"] = None
    result = score(made)
    difference = result["differences"]["shuffled"]["exact_match"]
    assert (difference["value"], difference["n"]) == (0, 10)
    assert result["systems"]["tuned"]["exact_match"]["n"] == 16
    assert result["without_other_image"] == 6
    for line in made:
        line["shuffled_with"] = None
    alone = score(made)["differences"]["shuffled"]["exact_match"]
    assert alone["value"] is None
    assert "two groups" in alone["reason"]


def lines(answers):
    """Hand-made predictions: 8 patients, two rows each."""
    return [
        {
            "id": f"r{i}",
            "group_id": f"p{i // 2}",
            "source": "s",
            "question": "What?",
            "shuffled_with": "another",
            "reference": "Small left pleural effusion is seen."
            if i % 4
            else "No pleural effusion is seen.",
            "predictions": {
                name: answer(
                    i,
                    "Small left pleural effusion is seen."
                    if i % 4
                    else "No pleural effusion is seen.",
                )
                for name, answer in answers.items()
            },
        }
        for i in range(16)
    ]


def test_scores_are_pure_functions_of_predictions():
    made = lines(
        {
            "tuned": lambda i, reference: (
                reference if i < 12 else "Small right pleural effusion is seen."
            ),
            "base": lambda i, reference: None,
            "shuffled": lambda i, reference: "Small left pleural effusion is seen.",
        }
    )
    result = score(made)
    tuned, base = result["systems"]["tuned"], result["systems"]["base"]
    assert (result["rows"], result["groups"]) == (16, 8)
    assert tuned["exact_match"]["value"] == 12 / 16
    assert tuned["exact_match"]["low"] < 12 / 16 < tuned["exact_match"]["high"]
    assert tuned["finding_f1"]["value"] == 12 / 16
    assert tuned["bleu"]["value"] > 70
    assert base["exact_match"]["value"] == base["finding_f1"]["value"] == 0
    assert tuned["closed_accuracy"]["value"] is None
    assert "yes or no" in tuned["closed_accuracy"]["reason"]
    paired = result["differences"]["shuffled"]["finding_f1"]
    assert paired["value"] == pytest.approx(12 / 16 - 12 / 16)
    assert result["differences"]["base"]["finding_f1"]["low"] > 0
    again = score(made[::-1])["systems"]["tuned"]["token_f1"]
    assert again["low"] == pytest.approx(tuned["token_f1"]["low"])
    assert "smooth" in result["bleu_signature"]


def test_the_page_escapes_what_models_write_and_marks_what_differs():
    made = lines(
        {
            "tuned": lambda i, reference: "<script>alert(1)</script> pleural effusion is seen.",
            "shuffled": lambda i, reference: "x",
        }
    )
    page = "".join(evaluation_sections(made, score(made), {}))
    assert "<script>" not in page
    assert "<ins>&lt;script&gt;" in page
    assert "<del>Small left" in page
    assert page.count('class="case"') == SHOWN_CASES == len(shown_cases(made))


def test_an_interval_says_why_there_is_none():
    assert interval({"value": None, "reason": "no row"}) == "none: no row"
    value = {"value": 0.5, "low": None, "high": None, "reason": "one group"}
    assert interval(value) == "0.5 (no interval: one group)"


@pytest.fixture(scope="module")
def evaluated(runs, tmp_path_factory):
    out = tmp_path_factory.mktemp("evaluations")
    for kind in ("nf4", "siglip"):
        evaluate(runs / kind, out / kind, data=None, split="validation", against_base=True)
    return out


def test_a_decoder_run_is_evaluated_on_its_own_validation_rows(evaluated, data):
    out = evaluated / "nf4"
    found = read_lines(out / "predictions.jsonl")
    rows = load_rows(data / "chat" / "validation.jsonl", split="validation")
    assert [line["id"] for line in found] == rows["id"]
    assert set(found[0]["predictions"]) == {"tuned", "base", "shuffled", "nearest"}
    assert any(line["predictions"]["tuned"] != line["predictions"]["base"] for line in found)
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["systems"] == score(found)["systems"]
    page = (out / "report.html").read_text()
    assert "http" not in page.replace("http-equiv", "")
    assert page.count("data:image/jpeg") == min(SHOWN_CASES, len(rows))
    assert "run.json" in page


def test_ranks_of_a_siglip_run_are_those_of_its_embeddings(evaluated, runs, data):
    from medft.data.images import open_image
    from medft.trained import Encoder

    found = read_lines(evaluated / "siglip" / "predictions.jsonl")
    rows = load_rows(data / "chat" / "validation.jsonl", split="validation")
    texts = [line["reference"] for line in found]
    encoder = Encoder.load(runs / "siglip")
    images = encoder.embed_images([open_image(row["images"][0]["path"]) for row in rows])
    similarity = images.astype(float) @ encoder.embed_texts(texts).astype(float).T
    for place, line in enumerate(found):
        own = [i for i, text in enumerate(texts) if text == line["reference"]]
        best = max(similarity[place, i] for i in own)
        above = sum(similarity[place, i] > best + 1e-6 for i in range(len(texts)) if i not in own)
        assert line["ranks"]["tuned"]["image_to_text"] == above + 1
        assert line["retrieved"]["tuned"][0]["text"] in texts
    assert any(line["ranks"]["tuned"] != line["ranks"]["shuffled"] for line in found)
    metrics = json.loads((evaluated / "siglip" / "metrics.json").read_text())
    hits = np.mean([line["ranks"]["tuned"]["image_to_text"] <= 1 for line in found])
    assert metrics["systems"]["tuned"]["image_to_text_recall@1"]["value"] == pytest.approx(hits)
    assert metrics["pool"] == len(found)
    assert 0 < metrics["chance"]["recall@1"] < 1


def test_the_command_prints_figures_and_refuses_what_cannot_be_evaluated(runs, data, tmp_path):
    command = [sys.executable, "-m", "medft.cli", "evaluate", str(runs / "siglip")]
    command += ["--data", str(data / "pairs.parquet"), "--out", str(tmp_path / "a")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert re.search(r"image to text recall@1 \(n \d+\): tuned [\d.]+ \[", done.stdout)
    assert done.stdout.splitlines()[-1] == str(tmp_path / "a" / "report.html")
    for source, out, split, message in (
        (runs / "siglip", "a", "validation", "to be empty"),
        (data, "b", "validation", "expected a run or an adapter folder"),
        (runs / "siglip" / "adapter", "b", "validation", "expected --data"),
        (runs / "siglip", "b", "test", "is empty"),
    ):
        with pytest.raises(MedftError, match=message):
            evaluate(source, tmp_path / out, data=None, split=split, against_base=False)
        assert not (tmp_path / "b").exists()


def test_validation_rows_that_changed_since_the_run_are_refused(runs, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(runs / "decoder", run)
    record = json.loads((run / "run.json").read_text())
    record["data"]["validation"]["sha256"] = "0" * 64
    (run / "run.json").write_text(json.dumps(record))
    with pytest.raises(DataError, match="has changed"):
        rows_to_evaluate(run, None, "validation")
    with pytest.raises(RunError, match="expected an adapter for --against base"):
        evaluate(
            _whole(tmp_path), tmp_path / "out", data=None, split="validation", against_base=True
        )


def _whole(folder):
    model = folder / "whole"
    model.mkdir()
    (model / "config.json").write_text('{"model_type": "siglip"}')
    return model
