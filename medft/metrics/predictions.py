"""What the systems of an evaluation said of a row: the records of predictions.jsonl."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class AnswerPrediction:
    """The answers to a question about an image, or its reports."""

    id: str
    group_id: str
    source: str
    question: str
    reference: str
    predictions: dict[str, str | None]
    """By system; None where it gave none."""

    shuffled_with: str | None
    """The id of the row whose image the control was shown; None where there was none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RetrievedText:
    """A text of the pool near an image."""

    text: str
    similarity: float
    """Cosine of the two embeddings."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RetrievalPrediction:
    """Where an image and its caption stand among all."""

    id: str
    group_id: str
    source: str
    reference: str
    """The caption."""

    ranks: dict[str, dict[str, float]]
    """By system and way, from 1: the place of the best of the matching entries of the pool."""

    retrieved: dict[str, list[RetrievedText]]
    """By system, the different texts of the pool that are nearest to the image."""

    shuffled_with: str | None
    """The id of the row whose image the control was shown; None where there was none."""


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
