"""The page shows what was said, and only shows it."""

from hand_made import predictions

from medft.evaluation.labels import interval
from medft.evaluation.report import SHOWN_CASES, evaluation_sections, shown_cases
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


def test_an_interval_says_why_there_is_none():
    assert interval({"value": None, "reason": "no row"}) == "none: no row"
    value = {"value": 0.5, "low": None, "high": None, "reason": "one group"}
    assert interval(value) == "0.5 (no interval: one group)"
