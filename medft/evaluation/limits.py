"""Sentences on what the figures of an evaluation do not say by themselves."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset

from medft.data.chat_rows import OWN_GROUP
from medft.evaluation.controls import TRAINING_POOL
from medft.metrics.predictions import Prediction
from medft.models.saved import RECORD_FILE, RunLayout, SavedModel


def limits_of_model(
    saved: SavedModel, run: RunLayout | None, train: Dataset | None, *, against_base: bool
) -> list[str]:
    """What is to be known of the systems.

    Args:
        saved: the evaluated model.
        run: the run that it is of.
        train: the rows that it was trained on.
        against_base: whether its base is evaluated as well.
    """
    record = saved.record
    limits = []
    if run and saved.folder.name == run.adapter.name:
        limits.append(
            "This is adapter/, the end of training; best_model/ is evaluated by its path."
        )
    if against_base and record.quantization:
        limits.append(
            f"Base: in {record.quantization.bits} bits, as the adapter was trained on it."
        )
    if against_base and record.cross_attention_fix:
        limits.append("Base: without cross_attention_fix, as plain transformers computes it.")
    if not saved.is_encoder and train is None:
        limits.append("No nearest training text: the training rows are not known or have changed.")
    elif not saved.is_encoder and len(train or ()) > TRAINING_POOL:
        limits.append(
            f"Nearest training text: among {TRAINING_POOL:,} of {len(train or ()):,} training "
            f"rows, drawn by id."
        )
    alone = sum(group.startswith(OWN_GROUP) for group in train["group_id"]) if train else 0
    if train and alone:
        limits.append(
            f"{alone:,} of {len(train):,} training rows have no group: whether training has seen "
            f"the patients of these rows is not known."
        )
    if run and (began := run.read_record().get("init_from")):
        limits.append(
            f"Training began with the adapter {began['path']} (lora.init_from): whether its "
            f"training has seen these rows is not compared."
        )
    if saved.is_adapter and (Path(saved.base.base) / RECORD_FILE).is_file():
        limits.append("The base was trained by medft: whether on these rows is not compared.")
    return limits


def limits_of_rows(
    predictions: Sequence[Prediction], metrics: Mapping[str, Any], rows: Dataset
) -> list[str]:
    """What is to be known of the rows that are scored.

    Args:
        predictions: those of predictions.jsonl.
        metrics: from `score`.
        rows: the evaluated rows.
    """
    limits = []
    if without := metrics["without_other_image"]:
        limits.append(
            f"Other image: scored on {len(predictions) - without:,} of {len(predictions):,}; for "
            f"the others no other group has a row of the same source with as many images."
        )
    if alone := sum(group.startswith(OWN_GROUP) for group in rows["group_id"]):
        limits.append(
            f"{alone:,} of {len(rows):,} rows have no group: each counts as a patient of its own, "
            f"so that intervals are too narrow where a patient has several, and whether training "
            f"has seen the patient is not known."
        )
    return limits
