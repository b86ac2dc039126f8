"""Evaluated rows that the model's run has seen: in training, or to choose its checkpoint."""

from collections.abc import Mapping, Sequence
from typing import Any

from medft.data.overlap import Overlap
from medft.metrics.predictions import Prediction
from medft.metrics.scores import score


def scores_unseen(predictions: Sequence[Prediction], overlap: Overlap | None) -> dict[str, Any]:
    """The overlap with the training rows, and the scores without it.

    Args:
        predictions: those of predictions.jsonl.
        overlap: of training and evaluated rows; None if the training rows are not known.

    Returns:
        overlap (counts, or null) and unseen: what `score` gives for the rows that training has not
        seen, null if it has seen none or all.
    """
    if overlap is None or not overlap.rows:
        return {"overlap": overlap and overlap.record, "unseen": None}
    seen = set(overlap.rows)
    others = [p for p in predictions if not {p.id, p.id.rpartition("#")[0]} & seen]
    return {"overlap": overlap.record, "unseen": score(others) if others else None}


def choice_line(metrics: Mapping[str, Any]) -> str:
    """A sentence on the evaluated rows that chose the checkpoint; empty if none of them did.

    Args:
        metrics: content of metrics.json.
    """
    if metrics["rows_chose_checkpoint"] is None:
        return (
            "Whether these rows chose the checkpoint is not known: the model is of no run, or the "
            "validation rows of its run are not there or have changed."
        )
    if not metrics["rows_chose_checkpoint"]:
        return ""
    found, rows = metrics["validation_rows"], metrics["data_rows"]
    which = "These rows" if found == rows else f"{found:,} of these {rows:,} rows"
    why = f" No test rows: {metrics['without_test']}." if metrics["without_test"] else ""
    return (
        f"{which} are validation rows of the run, which choose its checkpoint (best_model/, early "
        f"stopping): scores on them tend to be better than on patients to come.{why}"
    )


def overlap_line(metrics: Mapping[str, Any]) -> str:
    """A sentence on what training has seen of the evaluated rows.

    Args:
        metrics: content of metrics.json.
    """
    overlap, unseen = metrics["overlap"], metrics["unseen"]
    if overlap is None:
        return (
            "Whether training has seen these rows is not known: its rows are not there, or have "
            "changed."
        )
    if not overlap["rows"]:
        return "Training has seen none of these rows, nor a row of a group that both name."
    rest = "These are all rows, so that there is no score without them."
    if unseen:
        rest = f"Scores without them stand below, over {unseen['rows']:,} rows."
    return (
        f"Training has seen {overlap['rows']:,} of these rows: {overlap['groups']:,} groups are in "
        f"both, {overlap['same']:,} rows have the images and text of a training row. {rest}"
    )
