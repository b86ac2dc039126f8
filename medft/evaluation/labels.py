"""How metrics, systems and estimates are shown, on the page and on the terminal."""

from collections.abc import Mapping
from typing import Any

LABELS = {
    "finding_f1": "finding F1 (keywords)",
    "exact_match": "exact match",
    "token_f1": "token F1",
    "rouge_l": "ROUGE-L",
    "bleu": "BLEU",
    "closed_accuracy": "yes/no accuracy",
    "tuned": "tuned",
    "base": "base",
    "shuffled": "tuned, other image",
    "nearest": "nearest training text",
}
"""Display names of metrics and systems."""

COLORS = {"tuned": "#0b6bcb", "base": "#7a8794", "shuffled": "#d98324", "nearest": "#7b5bb5"}
"""Colors of systems on the page."""


def label(name: str) -> str:
    """The display name of a metric or system."""
    return LABELS.get(name, name.replace("_", " "))


def interval(estimate: Mapping[str, Any]) -> str:
    """A value with its interval, such as "0.71 [0.64, 0.78]", or why there is none."""
    if estimate["value"] is None:
        return f"none: {estimate['reason']}"
    if estimate["low"] is None:
        return f"{estimate['value']:.3g} (no interval: {estimate['reason']})"
    return f"{estimate['value']:.3g} [{estimate['low']:.3g}, {estimate['high']:.3g}]"


def read_line(metrics: Mapping[str, Any]) -> str:
    """A sentence on how much finding F1 reads; empty for metrics of ranks.

    Args:
        metrics: content of metrics.json, or of its unseen part.
    """
    if "read" not in metrics:
        return ""
    read = metrics["read"]
    answers = ", ".join(f"{label(name)} {share:.0%}" for name, share in read["systems"].items())
    return (
        f"Finding F1 reads {read['references']:.0%} of the references and leaves out the rows of "
        f"the others, {read['left_out']:,}; of the answers it reads {answers}, and those that it "
        f"does not read are wrong."
    )
