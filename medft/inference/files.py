"""Predictions for images, folders and tables, in a file that a later run continues."""

import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from medft.data.pairs import batched
from medft.data.template import text_of
from medft.errors import DataError, RunError
from medft.files import named_if_full
from medft.inference.inputs import Entry, entries_of, writable
from medft.inference.predictor import (
    ImagePrediction,
    Predictor,
    open_image_file,
)
from medft.inference.prompts import conversation_for, prompt_for
from medft.inference.records import check_out, kept_rows, record_writer, rewrite
from medft.masking import masked_text
from medft.models.saved import SavedModel, find_saved_model

logger = logging.getLogger(__name__)

CHUNK = 8
"""Images whose predictions are written together."""


def predict_files(
    source: Path,
    inputs: Sequence[Path],
    out: Path,
    *,
    prompt: str | None = None,
    siglip: Path | None = None,
    max_new_tokens: int | None = None,
) -> dict[str, int]:
    """Write a record for each image; those of an earlier, stopped run are kept.

    Args:
        source: a run or model, decoder or SigLIP.
        inputs: images, folders and tables.
        out: a .jsonl or .csv file.
        prompt: for images without a question of their own; None takes a declared one of training.
        siglip: a SigLIP run beside a decoder, for embeddings and nearest training cases.
        max_new_tokens: bound of an answer; truncated ones of an earlier run are generated again.

    Returns:
        How many were `written`, `kept` from before, and `failed` and `truncated` among those
        written.

    Raises:
        DataError: the inputs are wrong.
        RunError: `out` is not .jsonl or .csv, cannot be written, or holds predictions of other
            models; a prompt is wanted; or one is given for a SigLIP, which answers nothing.
    """
    check_out(out)
    saved = find_saved_model(source)
    _check_asks(saved, prompt, max_new_tokens)
    entries = entries_of(inputs, partial(_prompt, saved, prompt))
    beside = None if siglip is None else find_saved_model(siglip)
    weights = " ".join(model.weights for model in (saved, beside) if model)
    head = {
        "model": writable(masked_text(str(source))),
        "siglip": writable(masked_text(str(siglip or ""))),
    }
    head["weights"] = weights
    kept = kept_rows(out, weights)
    if max_new_tokens is not None:
        kept = [row for row in kept if str(row["truncated"]) != "True"]
    done = {(row["image"], row["prompt"]) for row in kept}
    left = [entry for entry in entries if (entry.name, entry.prompt) not in done]
    counts = {"written": 0, "kept": len(kept), "failed": 0, "truncated": 0}
    if not left:
        return counts
    _log_prompts(left)
    predictor = Predictor.of(saved, siglip=beside)
    if predictor.generator is not None and max_new_tokens is not None:
        predictor.generator.max_new_tokens = max_new_tokens
    out.parent.mkdir(parents=True, exist_ok=True)
    rewrite(out, kept)
    progress = tqdm(total=len(left), desc="images", disable=not sys.stderr.isatty())
    with (
        named_if_full(out),
        out.open("a", encoding="utf-8", newline="") as file,
        closing(progress),
    ):
        write = record_writer(out, file)
        for chunk in batched(left, CHUNK):
            for row in _predicted(predictor, chunk):
                write({**row, **head})
                counts["written"] += 1
                counts["failed"] += row["error"] is not None
                counts["truncated"] += row["truncated"] is True
            file.flush()
            progress.update(len(chunk))
    return counts


def _check_asks(saved: SavedModel, prompt: str | None, max_new_tokens: int | None) -> None:
    if saved.is_encoder and (prompt or max_new_tokens):
        raise RunError(
            f"expected a decoder to ask, {saved.folder} is a SigLIP: leave --prompt and "
            f"--max-new-tokens out"
        )


def _prompt(saved: SavedModel, given: str | None, fields: Mapping[str, Any]) -> str:
    """The prompt of an image; of a SigLIP, what its row says."""
    if saved.is_encoder:
        return text_of(fields.get("question"))
    return prompt_for(saved.record, given=given, fields=fields)


def _log_prompts(entries: Sequence[Entry]) -> None:
    prompts = {entry.prompt for entry in entries}
    shown = prompts.pop() if len(prompts) == 1 else f"{len(prompts)} different ones, see the file"
    if shown:
        logger.info("prompt: %s", shown)


def _predicted(predictor: Predictor, entries: Sequence[Entry]) -> Iterator[dict[str, Any]]:
    images: dict[int, Image.Image] = {}
    errors: dict[int, str] = {}
    for index, entry in enumerate(entries):
        try:
            if predictor.generator is not None:
                turns = conversation_for(entry.prompt, predictor.generator.record)
                predictor.generator.conversation.check_texts(turns, str(entry.image))
            images[index] = open_image_file(entry.image)
        except DataError as error:
            errors[index] = writable(str(error))
    predictions: dict[int, ImagePrediction] = {}
    if images:
        prompts = [entries[index].prompt for index in images]
        found = predictor.predict_batch(list(images.values()), prompts)
        predictions = dict(zip(images, found, strict=True))
    nothing = ImagePrediction(text=None, truncated=None, embedding=None, nearest=[])
    for index, entry in enumerate(entries):
        prediction = predictions.get(index, nothing)
        embedding = prediction.embedding
        yield {
            "image": entry.name,
            "prompt": entry.prompt,
            "text": prediction.text,
            "truncated": prediction.truncated,
            "nearest": [asdict(case) for case in prediction.nearest],
            "embedding": None if embedding is None else [round(float(x), 6) for x in embedding],
            "error": errors.get(index),
        }
