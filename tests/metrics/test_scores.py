"""All figures of hand-made predictions."""

from dataclasses import replace

import pytest
from hand_made import predictions

from medft.metrics.scores import score


def test_rows_without_another_image_are_left_out_of_the_control():
    """A model that does not look loses nothing by other images, whatever rows have none."""

    def unchanged(i, reference):
        return reference

    made = predictions({"tuned": unchanged, "shuffled": unchanged})
    made[:6] = [
        replace(one, shuffled_with=None, predictions={**one.predictions, "shuffled": None})
        for one in made[:6]
    ]
    result = score(made)
    difference = result["differences"]["shuffled"]["exact_match"]
    assert (difference["value"], difference["n"]) == (0, 10)
    assert result["systems"]["tuned"]["exact_match"]["n"] == 16
    assert result["without_other_image"] == 6
    nobody = [replace(one, shuffled_with=None) for one in made]
    alone = score(nobody)["differences"]["shuffled"]["exact_match"]
    assert alone["value"] is None
    assert "two groups" in alone["reason"]


def test_scores_are_pure_functions_of_predictions():
    made = predictions(
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


def test_every_system_is_scored_on_the_rows_whose_reference_is_read():
    made = predictions(
        {
            "tuned": lambda i, reference: reference if i % 2 else None,
            "nearest": lambda i, reference: "The cat sat." if i < 9 else "Normal.",
        }
    )
    made[3:7] = [replace(one, reference="Kein Erguss.") for one in made[3:7]]
    found = score(made)
    for name in ("tuned", "nearest"):
        estimate = found["systems"][name]["finding_f1"]
        assert (estimate["n"], estimate["groups"]) == (12, 7)
        assert found["systems"][name]["exact_match"]["n"] == 16
    assert found["differences"]["nearest"]["finding_f1"]["n"] == 12
    read = found["read"]
    assert (read["references"], read["left_out"]) == (12 / 16, 4)
    assert read["answers"] == read["systems"]["tuned"] == 8 / 16
    assert read["systems"]["nearest"] == 7 / 16


def test_the_share_that_is_read_is_of_answers_that_were_given():
    made = predictions(
        {"tuned": lambda i, reference: reference, "shuffled": lambda i, reference: reference}
    )
    made[:8] = [
        replace(one, shuffled_with=None, predictions={**one.predictions, "shuffled": None})
        for one in made[:8]
    ]
    assert score(made)["read"]["systems"] == {"tuned": 1, "shuffled": 1}
