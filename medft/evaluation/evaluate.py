"""Evaluation of a trained model: predictions first, then their scores.

The model is compared with its base and two controls: the model shown another image of the same
source, and the text of the training case whose image is nearest pixel by pixel. Every system
answers the same rows, so that differences are paired.
"""

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from datasets import Dataset

from medft.data.images import open_image
from medft.data.overlap import find_overlap
from medft.data.rows import image_source
from medft.decoder.generator import Generator
from medft.errors import DataError, RunError
from medft.evaluation.limits import limits_of_model, limits_of_rows
from medft.evaluation.predictions import answer_predictions, retrieval_predictions
from medft.evaluation.report import shown_cases, write_evaluation_report
from medft.evaluation.rows import rows_that_chose, rows_to_evaluate, run_of, run_rows
from medft.evaluation.seen import choice_line, scores_unseen
from medft.files import check_folder_for_output, complete_folder, write_json
from medft.masking import masked_text
from medft.metrics.predictions import Prediction, RetrievalPrediction, prediction_of
from medft.metrics.scores import score
from medft.models.adapter import check_keeps_base
from medft.models.run_record import read_log_history
from medft.models.saved import find_saved_model
from medft.pages import thumbnail_of
from medft.siglip.embedder import Embedder

logger = logging.getLogger(__name__)


def write_predictions(path: Path, predictions: Iterator[Prediction]) -> None:
    """Write predictions.jsonl, one record at a time."""
    with path.open("w", encoding="utf-8") as file:
        for prediction in predictions:
            file.write(json.dumps(asdict(prediction), ensure_ascii=False) + "\n")


def read_predictions(path: Path) -> list[Prediction]:
    """The predictions in predictions.jsonl."""
    with path.open(encoding="utf-8") as file:
        return [prediction_of(json.loads(line)) for line in file]


def evaluate(
    source: Path, out: Path, *, data: Path | None, split: str | None, against_base: bool
) -> dict[str, Any]:
    """Write predictions.jsonl, metrics.json and report.html; returns the metrics.

    Args:
        source: a run, an adapter folder or a model folder, decoder or SigLIP.
        out: folder; must be empty or not exist.
        data: chat JSONL or pairs.parquet; None for the run's own rows.
        split: which rows of pairs.parquet, or of the run; None for test rows, else validation rows.
        against_base: whether to evaluate the adapter's base as well.

    Raises:
        RunError: there is no finished model, or no adapter for `against_base`, or `out` is not
            empty.
        DataError: the rows cannot be read.
        BaseModelError: the model cannot be loaded.
    """
    check_folder_for_output(out)
    trained = find_saved_model(source)
    if against_base and not trained.is_adapter:
        raise RunError(
            f"expected an adapter for --against base, {source} is a whole model: give the run that "
            f"trained it"
        )
    if against_base:
        check_keeps_base(trained.folder)
    run = run_of(trained)
    evaluated = rows_to_evaluate(run, data, split)
    rows = evaluated.rows
    chose = rows_that_chose(run, evaluated)
    about: dict[str, Any] = {
        "model": masked_text(str(source)),
        "data": masked_text(str(evaluated.path)),
        "split": evaluated.split,
        "data_rows": len(rows),
        "rows_chose_checkpoint": None if chose is None else chose > 0,
        "validation_rows": chose,
        "without_test": evaluated.without_test and masked_text(evaluated.without_test),
    }
    if warning := choice_line(about):
        logger.warning("%s", warning)
    train = run_rows(run, "train")
    notes = limits_of_model(trained, run, train, against_base=against_base)
    overlap = None if train is None else find_overlap(train, rows)
    if run and not (run.history.exists() and run.curves.is_file()):
        run = None
    if run:
        read_log_history(run.history)
    found: Iterator[Prediction]
    with complete_folder(out) as draft:
        if trained.is_encoder:
            found = retrieval_predictions(
                Embedder.of(trained), rows, against_base=against_base, notes=notes
            )
        else:
            found = answer_predictions(
                Generator.of(trained), rows, against_base=against_base, train=train, notes=notes
            )
        write_predictions(draft / "predictions.jsonl", found)
        predictions = read_predictions(draft / "predictions.jsonl")
        figures = score(predictions)
        notes += limits_of_rows(predictions, figures, rows)
        metrics = {**about, **figures, "notes": [masked_text(note) for note in notes]}
        metrics |= scores_unseen(predictions, overlap)
        write_json(draft / "metrics.json", metrics)
        images = shown_images(rows, predictions)
        write_evaluation_report(draft / "report.html", predictions, metrics, images, run=run)
    return metrics


def shown_images(rows: Dataset, predictions: Sequence[Prediction]) -> dict[str, bytes]:
    """JPEG files of the images that the page shows, by case id."""
    images = {}
    indices = {name: index for index, name in enumerate(rows["id"])}
    is_retrieval = isinstance(predictions[0], RetrievalPrediction)
    for case in shown_cases(predictions):
        name, _, number = case.rpartition("#")
        record = rows[indices[case if case in indices else name]]
        first = int(number) - 1 if case not in indices and is_retrieval else 0
        if record["images"]:
            try:
                image = open_image(image_source(record["images"][first]))
            except DataError:
                continue
            images[case] = thumbnail_of(image)
    return images
