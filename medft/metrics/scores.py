"""All figures of a predictions.jsonl: every metric of every system, and paired differences."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from medft.metrics.bootstrap import Estimate, Scorer, difference, estimate
from medft.metrics.findings import finding_f1, load_lexicon
from medft.metrics.retrieval import WAYS, chance_recalls, retrieval_scorers
from medft.metrics.text import (
    bleu,
    bleu_signature,
    closed_accuracy,
    exact_match,
    rouge_l,
    token_f1,
)

Line = Mapping[str, Any]
"""A line of predictions.jsonl."""


def score(lines: Sequence[Line]) -> dict[str, Any]:
    """All figures of predictions.jsonl, with 95 % intervals over draws of whole groups.

    Returns:
        kind, rows, groups, systems (metric by metric), differences (tuned minus each other
        system, paired), rows left out of the control of shuffled images, and what the figures need
        to be read: BLEU's signature, or pool and chance.
    """
    is_encoder = "ranks" in lines[0]
    names = list(lines[0]["ranks" if is_encoder else "predictions"])
    scorers = _encoder_scorers if is_encoder else _decoder_scorers
    whole = scorers(lines, "tuned")
    systems, differences = {}, {}
    for name in names:
        kept = [line for line in lines if name != "shuffled" or line["shuffled_with"] is not None]
        groups = [line["group_id"] for line in kept]
        tuned = whole if len(kept) == len(lines) else scorers(kept, "tuned")
        own = tuned if name == "tuned" else scorers(kept, name)
        systems[name] = {metric: _figure(one, groups) for metric, one in own.items()}
        if name != "tuned":
            differences[name] = {
                metric: _figure(difference(tuned[metric], other), groups)
                for metric, other in own.items()
            }
    result = {
        "kind": "siglip" if is_encoder else "decoder",
        "rows": len(lines),
        "groups": len({line["group_id"] for line in lines}),
        "systems": systems,
        "differences": differences,
        "without_other_image": sum(line["shuffled_with"] is None for line in lines),
    }
    return {**result, **(_chance(lines) if is_encoder else {"bleu_signature": bleu_signature()})}


def _figure(scorer: Scorer, groups: Sequence[str]) -> dict[str, Any]:
    if groups:
        return asdict(estimate(scorer, groups))
    nothing = "no source has rows of two groups to exchange images"
    return asdict(Estimate(value=None, low=None, high=None, n=0, groups=0, reason=nothing))


def _decoder_scorers(lines: Sequence[Line], system: str) -> dict[str, Scorer]:
    predictions = [line["predictions"][system] for line in lines]
    references = [line["reference"] for line in lines]
    metrics: dict[str, Callable[[list[str | None], list[str]], Scorer]] = {
        "exact_match": exact_match,
        "token_f1": token_f1,
        "rouge_l": rouge_l,
        "bleu": bleu,
        "closed_accuracy": closed_accuracy,
    }
    return {
        "finding_f1": finding_f1(predictions, references, load_lexicon()),
        **{name: metric(predictions, references) for name, metric in metrics.items()},
    }


def _encoder_scorers(lines: Sequence[Line], system: str) -> dict[str, Scorer]:
    return retrieval_scorers(
        {way: np.array([line["ranks"][system][way] for line in lines]) for way in WAYS}
    )


def _chance(lines: Sequence[Line]) -> dict[str, Any]:
    counts = Counter(line["reference"] for line in lines)
    positives = np.array([counts[line["reference"]] for line in lines])
    chance = chance_recalls(positives, len(lines))
    return {"pool": len(lines), "texts": len(counts), "chance": chance}
