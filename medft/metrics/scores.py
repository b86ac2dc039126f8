"""Scores of a predictions.jsonl: every metric of every system, and paired differences."""

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from medft.metrics.bootstrap import Estimate, Scorer, difference, estimate
from medft.metrics.findings import finding_f1, read_share
from medft.metrics.lexicon import Lexicon, load_lexicon
from medft.metrics.predictions import AnswerPrediction, Prediction, RetrievalPrediction
from medft.metrics.retrieval import WAYS, chance_recalls, retrieval_scorers
from medft.metrics.text import (
    bleu,
    bleu_signature,
    closed_accuracy,
    exact_match,
    rouge_l,
    token_f1,
)


def score(predictions: Sequence[Prediction]) -> dict[str, Any]:
    """All metrics of predictions.jsonl, with 95 % intervals over resampled groups.

    Args:
        predictions: at least one, all of one class.

    Returns:
        kind, rows, groups, systems (estimates by metric), differences (tuned minus each other
        system, paired), without_other_image (rows without a shuffled-image control), and the
        context of the metrics: BLEU's signature and read, or pool, texts and chance.
        read: fractions of the references and of the tuned model's answers in which the lexicon
        reads an assertion, those of every system, and left_out, the number of rows without a
        finding F1 for that reason.
    """
    first = predictions[0]
    lexicon = load_lexicon()
    is_retrieval = isinstance(first, RetrievalPrediction)
    names = list(first.ranks if isinstance(first, RetrievalPrediction) else first.predictions)
    whole = _scorers(predictions, "tuned", lexicon)
    systems, differences = {}, {}
    for name in names:
        kept = [one for one in predictions if name != "shuffled" or one.shuffled_with is not None]
        groups = [one.group_id for one in kept]
        is_whole = len(kept) in (0, len(predictions))
        tuned = whole if is_whole else _scorers(kept, "tuned", lexicon)
        own = tuned  # null without rows
        if name != "tuned" and kept:
            own = _scorers(kept, name, lexicon)
        systems[name] = {metric: _figure(one, groups) for metric, one in own.items()}
        if name != "tuned":
            differences[name] = {
                metric: _figure(difference(tuned[metric], other), groups)
                for metric, other in own.items()
            }
    result = {
        "kind": "siglip" if is_retrieval else "decoder",
        "rows": len(predictions),
        "groups": len({one.group_id for one in predictions}),
        "systems": systems,
        "differences": differences,
        "without_other_image": sum(one.shuffled_with is None for one in predictions),
    }
    if is_retrieval:
        return result | _chance(predictions)
    return result | {"bleu_signature": bleu_signature(), "read": _read(predictions, lexicon)}


def _figure(scorer: Scorer, groups: Sequence[str]) -> dict[str, Any]:
    if groups:
        return asdict(estimate(scorer, groups))
    nothing = "no source has rows of two groups to exchange images"
    return asdict(Estimate(value=None, low=None, high=None, n=0, groups=0, reason=nothing))


def _scorers(predictions: Sequence[Prediction], system: str, lexicon: Lexicon) -> dict[str, Scorer]:
    ranked = [one.ranks[system] for one in predictions if isinstance(one, RetrievalPrediction)]
    if ranked:
        return retrieval_scorers({way: np.array([ranks[way] for ranks in ranked]) for way in WAYS})
    answers = [one.predictions[system] for one in predictions if isinstance(one, AnswerPrediction)]
    return _answer_scorers(answers, [one.reference for one in predictions], lexicon)


def _answer_scorers(
    answers: list[str | None], references: list[str], lexicon: Lexicon
) -> dict[str, Scorer]:
    metrics: dict[str, Callable[[list[str | None], list[str]], Scorer]] = {
        "exact_match": exact_match,
        "token_f1": token_f1,
        "rouge_l": rouge_l,
        "bleu": bleu,
        "closed_accuracy": closed_accuracy,
    }
    return {
        "finding_f1": finding_f1(answers, references, lexicon),
        **{name: metric(answers, references) for name, metric in metrics.items()},
    }


def _read(predictions: Sequence[Prediction], lexicon: Lexicon) -> dict[str, Any]:
    """What the lexicon reads of the references, and of each system's answers to all its rows."""
    references = read_share([one.reference for one in predictions], lexicon)
    answers: dict[str, list[str | None]] = defaultdict(list)
    for one in predictions:
        if isinstance(one, AnswerPrediction):
            for name, text in one.predictions.items():
                if name != "shuffled" or one.shuffled_with is not None:
                    answers[name].append(text)
    shares = {name: read_share(texts, lexicon) for name, texts in answers.items()}
    return {
        "references": references,
        "left_out": round((1 - references) * len(predictions)),
        "answers": shares["tuned"],
        "systems": shares,
    }


def _chance(predictions: Sequence[Prediction]) -> dict[str, Any]:
    counts = Counter(one.reference for one in predictions)
    positives = np.array([counts[one.reference] for one in predictions])
    chance = chance_recalls(positives, len(predictions))
    return {"pool": len(predictions), "texts": len(counts), "chance": chance}
