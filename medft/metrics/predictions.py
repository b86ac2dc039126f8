"""Predictions of the evaluated systems for a row: the records of predictions.jsonl."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class AnswerPrediction:
    """The systems' answers to a question about an image, or their reports on it."""

    id: str
    group_id: str
    source: str
    question: str
    reference: str
    predictions: dict[str, str | None]
    """Text by system; None where it gave none."""

    shuffled_with: str | None
    """Id of the row whose image the shuffled-image control received; None without one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RetrievedText:
    """A text of the pool, retrieved for an image."""

    text: str
    similarity: float
    """Cosine of the two embeddings."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RetrievalPrediction:
    """Retrieval ranks of an image and its caption."""

    id: str
    group_id: str
    source: str
    reference: str
    """The caption."""

    ranks: dict[str, dict[str, float]]
    """Rank, from 1, of the best matching entry of the pool, by system and direction."""

    retrieved: dict[str, list[RetrievedText]]
    """Distinct texts of the pool nearest to the image, by system."""

    shuffled_with: str | None
    """Id of the row whose image the shuffled-image control received; None without one."""


Prediction = AnswerPrediction | RetrievalPrediction


def prediction_of(record: Mapping[str, Any]) -> Prediction:
    """A prediction from its record, as `dataclasses.asdict` made it."""
    if "ranks" not in record:
        return AnswerPrediction(**record)
    retrieved = {
        system: [RetrievedText(**text) for text in texts]
        for system, texts in record["retrieved"].items()
    }
    return RetrievalPrediction(**{**record, "retrieved": retrieved})
