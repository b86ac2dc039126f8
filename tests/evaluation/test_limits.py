"""What figures do not say by themselves stands beside them."""

import json
import shutil

from datasets import Dataset
from hand_made import predictions

from medft.evaluation.evaluate import read_predictions
from medft.evaluation.limits import limits_of_model, limits_of_rows
from medft.evaluation.rows import run_of
from medft.metrics.predictions import RetrievalPrediction
from medft.metrics.retrieval import WAYS
from medft.metrics.scores import score
from medft.models.saved import find_saved_model


def test_the_systems_that_are_not_what_their_names_say_are_described(runs, tmp_path):
    run = shutil.copytree(runs / "nf4", tmp_path / "run")
    saved = find_saved_model(run)
    groups = ["p1", *["row/1"] * 10_000]
    train = Dataset.from_dict({"id": [str(n) for n in range(10_001)], "group_id": groups})
    limits = limits_of_model(saved, run_of(saved), train, against_base=True)
    assert len(limits) == 4
    assert limits[0].startswith("This is adapter/")
    assert limits[1].startswith("Base: in 4 bits")
    assert "among 10,000 of 10,001 training rows" in limits[2]
    assert limits[3].startswith("10,000 of 10,001 training rows have no group: whether training")
    saved = find_saved_model(run / "best_model")
    assert limits_of_model(saved, run_of(saved), train.select([0]), against_base=False) == []
    record = json.loads((run / "run.json").read_text())
    record["init_from"] = {"path": "~/runs/first/adapter", "sha256": "0"}
    (run / "run.json").write_text(json.dumps(record))
    base = shutil.copytree(saved.base.base, tmp_path / "base")
    shutil.copy(run / "adapter" / "medft.json", base)
    other = json.loads((run / "best_model" / "medft.json").read_text())
    other |= {"cross_attention_fix": True, "quantization": None, "base": str(base)}
    (run / "best_model" / "medft.json").write_text(json.dumps(other))
    saved = find_saved_model(run / "best_model")
    fix, nearest, began, trained = limits_of_model(saved, run_of(saved), None, against_base=True)
    assert fix.startswith("Base: without cross_attention_fix")
    assert nearest.startswith("No nearest training text")
    assert "~/runs/first/adapter" in began
    assert trained.startswith("The base was trained by medft")


def test_rows_that_are_scored_apart_or_have_no_group_are_counted():
    made = predictions({"tuned": lambda i, reference: reference})
    rows = Dataset.from_dict({"group_id": ["row/1", "p1", "row/row/3"]})
    limits = limits_of_rows(made, {"without_other_image": 3}, rows)
    assert f"scored on {len(made) - 3} of {len(made)}" in limits[0]
    assert "2 of 3 rows have no group" in limits[1]
    assert limits_of_rows(made, {"without_other_image": 0}, rows.select([1])) == []


def test_answers_and_captions_that_are_cut_stand_on_the_page(runs, data, tmp_path, medft):
    lines = (data / "chat" / "validation.jsonl").read_text().splitlines(keepends=True)[:2]
    given = data / "chat" / "two.jsonl"
    given.write_text("".join(lines))
    for kind, key, value in (("decoder", "longest_answer", 2), ("siglip", "max_length", 3)):
        adapter = shutil.copytree(runs / kind / "adapter", tmp_path / kind)
        record = json.loads((adapter / "medft.json").read_text()) | {key: value}
        (adapter / "medft.json").write_text(json.dumps(record))
        out = tmp_path / f"{kind}_out"
        assert medft("evaluate", adapter, "--data", given, "--out", out) == 0
        metrics = json.loads((out / "metrics.json").read_text())
        page = (out / "report.html").read_text()
        count = len(read_predictions(out / "predictions.jsonl"))
        expected = {
            "decoder": f"tuned: {count} of {count} answers truncated at 3 tokens.",
            "siglip": f"{count} of {count} captions are cut at 3 tokens.",
        }[kind]
        assert expected in metrics["notes"]
        assert expected in page


def test_ranks_without_any_other_image_are_null_with_the_reason():
    found = score(
        [
            RetrievalPrediction(
                id=name,
                group_id="one",
                source="s",
                reference=name,
                ranks={s: dict.fromkeys(WAYS, 1.0) for s in ("tuned", "shuffled")},
                retrieved={},
                shuffled_with=None,
            )
            for name in "ab"
        ]
    )
    systems = found["systems"]
    assert systems["shuffled"].keys() == systems["tuned"].keys()
    assert found["differences"]["shuffled"].keys() == systems["tuned"].keys()
    assert all(figure["value"] is None for figure in systems["shuffled"].values())
    assert "two groups" in systems["shuffled"]["image_to_text_recall@1"]["reason"]
    assert systems["tuned"]["image_to_text_recall@1"]["value"] == 1
