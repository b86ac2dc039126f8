"""The page shows what was said, and only shows it."""

from dataclasses import replace

from hand_made import predictions

from medft.evaluation.labels import interval
from medft.evaluation.report import SHOWN_CASES, describe, evaluation_sections, shown_cases
from medft.metrics.scores import score


def test_the_page_escapes_what_models_write_and_marks_what_differs():
    made = predictions(
        {
            "tuned": lambda i, reference: "<script>alert(1)</script> pleural effusion is seen.",
            "shuffled": lambda i, reference: "x",
        }
    )
    metrics = {**score(made), "overlap": None, "unseen": None}
    page = "".join(evaluation_sections(made, metrics, {}))
    assert "<script>" not in page
    assert "<ins>&lt;script&gt;" in page
    assert "<del>Small left" in page
    assert page.count('class="case"') == SHOWN_CASES == len(shown_cases(made))


def test_the_headline_is_another_metric_where_finding_f1_has_no_value():
    made = predictions({"tuned": lambda i, reference: reference})
    rest = {"overlap": None, "unseen": None, "notes": [], "data": "rows.jsonl"}
    rest |= {"data_rows": len(made), "split": None, "rows_chose_checkpoint": False}
    english = {**score(made), **rest}
    page = "".join(evaluation_sections(made, english, {}))
    assert "<br><span>finding F1 (keywords), 95 % interval" in page
    assert "reads 100% of the references" in page
    german = [
        replace(one, reference="Kein Erguss.", predictions={"tuned": "Kein Erguss."})
        for one in made
    ]
    metrics = {**english, **score(german)}
    page = "".join(evaluation_sections(german, metrics, {}))
    assert "<br><span>token F1, 95 % interval" in page
    assert "<br><span>finding F1" not in page
    assert "reads 0% of the references and leaves out the rows of the others, 16" in page
    assert "none: the lexicon reads 0 of 16 references, fewer than 30%" in page
    assert "reads 0% of the references" in describe(metrics)


def test_an_interval_says_why_there_is_none():
    assert interval({"value": None, "reason": "no row"}) == "none: no row"
    value = {"value": 0.5, "low": None, "high": None, "reason": "one group"}
    assert interval(value) == "0.5 (no interval: one group)"
