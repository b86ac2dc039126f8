"""Predictions for images, folders and tables, in a file that a later run continues."""

import csv
import io
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from PIL import Image
from tqdm import tqdm

from medft.data.pairs import batched
from medft.data.tables import Rejected, table_rows
from medft.data.template import text_of
from medft.errors import DataError, RunError
from medft.inference.predictor import (
    ImagePrediction,
    Predictor,
    open_image_file,
)
from medft.inference.prompts import conversation_for, prompt_for
from medft.models.saved import SavedModel, find_saved_model

logger = logging.getLogger(__name__)

IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp", ".gif", ".ppm", ".dcm")
"""Extensions of the files that are taken from a folder."""

TABLE_ENDINGS = (".csv", ".json", ".jsonl", ".parquet")
"""Extensions of tables: column `image` with paths relative to the table, and `question` if any."""

CHUNK = 8
"""Images whose predictions are written together."""

HEAD = ("image", "prompt", "model", "siglip", "weights")

COLUMNS = (*HEAD, "text", "truncated", "nearest", "embedding", "error")
"""Keys of a record of a .jsonl file."""

CSV_COLUMNS = (
    *HEAD,
    "text",
    "truncated",
    "nearest_id",
    "nearest_text",
    "nearest_similarity",
    "error",
)
"""Columns of a .csv file, which has the nearest case only and no embedding."""


@dataclass(frozen=True, slots=True)
class Entry:
    """An image and its prompt."""

    image: Path
    prompt: str

    @property
    def name(self) -> str:
        """The path as text, bytes that are not UTF-8 escaped."""
        return str(self.image).encode("utf-8", "backslashreplace").decode()


def entries_of(
    inputs: Sequence[Path], prompt_of: Callable[[Mapping[str, Any]], str]
) -> list[Entry]:
    """The images that files, folders and tables name, each once per prompt.

    Args:
        inputs: in the order of the command line; the files of a folder in the order of names.
        prompt_of: gives the prompt of an image from the columns of its row, if it has one.

    Raises:
        DataError: a path does not exist, a folder holds no image, a table lacks `image`.
    """
    found: dict[Entry, None] = {}
    for path in inputs:
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in IMAGE_ENDINGS)
            if not inside:
                raise DataError(
                    f"expected images in the folder {path}, found none that ends in "
                    f"{', '.join(IMAGE_ENDINGS)}: check the path"
                )
            found.update(dict.fromkeys(Entry(p, prompt_of({})) for p in inside))
        elif not path.is_file():
            raise DataError(f"expected an image, folder or table at {path}: check the path")
        elif path.suffix.lower() in TABLE_ENDINGS:
            found.update(dict.fromkeys(_entries_of_table(path, prompt_of)))
        else:
            found[Entry(path, prompt_of({}))] = None
    return list(found)


def _entries_of_table(
    table: Path, prompt_of: Callable[[Mapping[str, Any]], str]
) -> Iterator[Entry]:
    for number, row in enumerate(table_rows(table.suffix.lower()[1:], table), start=1):
        if isinstance(row, Rejected):
            raise DataError(f"{table}, row {number}: {row.detail}: correct the table")
        name = row.get("image")
        if not isinstance(name, str) or not name.strip():
            raise DataError(
                f"expected a column image with paths in {table}, row {number} has none (columns "
                f"{', '.join(row)}): rename the column or fill it"
            )
        yield Entry(table.parent / name.strip(), prompt_of(row))


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
        RunError: `out` is not .jsonl or .csv, or holds predictions of other models; a prompt is
            wanted; or one is given for a SigLIP, which answers nothing.
    """
    if out.suffix not in (".jsonl", ".csv"):
        raise RunError(f"expected --out to end in .jsonl or .csv, got {out}: rename it")
    saved = find_saved_model(source)
    _check_asks(saved, prompt, max_new_tokens)
    entries = entries_of(inputs, partial(_prompt, saved, prompt))
    beside = None if siglip is None else find_saved_model(siglip)
    weights = " ".join(model.weights for model in (saved, beside) if model)
    head = {"model": str(source), "siglip": str(siglip or ""), "weights": weights}
    kept = _kept_rows(out, weights)
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
    _rewrite(out, kept)
    progress = tqdm(total=len(left), desc="images", disable=not sys.stderr.isatty())
    with out.open("a", encoding="utf-8", newline="") as file, closing(progress):
        write = _writer(out, file)
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
            errors[index] = str(error)
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


def _writer(out: Path, file: TextIO) -> Callable[[dict[str, Any]], Any]:
    """A function that writes a row as a JSON record, or as its CSV columns."""
    if out.suffix == ".jsonl":
        return lambda row: file.write(
            json.dumps({name: row[name] for name in COLUMNS}, ensure_ascii=False) + "\n"
        )
    table = csv.DictWriter(file, CSV_COLUMNS, extrasaction="ignore")

    def write(row: dict[str, Any]) -> None:
        nearest = row["nearest"][0] if row.get("nearest") else {}
        table.writerow(row | {f"nearest_{name}": value for name, value in nearest.items()})

    return write


def _kept_rows(out: Path, weights: str) -> list[dict[str, Any]]:
    """The rows of an earlier run's file that need not be predicted again.

    A truncated last row and rows that failed are dropped.

    Raises:
        RunError: the file is not one of predictions, or of other models.
    """
    if not out.exists():
        return []
    try:
        content = out.read_bytes().decode("utf-8-sig")
        rows = _rows_of_lines(content) if out.suffix == ".jsonl" else _rows_of_table(content)
    except (ValueError, csv.Error) as error:
        raise RunError(
            f"expected predictions of medft in {out}, it holds something else: choose another --out"
        ) from error
    if any(row["weights"] != weights for row in rows):
        raise RunError(
            f"expected predictions of the same models in {out}, it holds those of "
            f"{' and '.join(filter(None, (rows[0]['model'], rows[0]['siglip'])))} as they were "
            f"then: choose another --out"
        )
    return [row for row in rows if not row["error"]]


def _rows_of_lines(content: str) -> list[dict[str, Any]]:
    *lines, truncated = content.split("\n")
    rows = [json.loads(line) for line in lines]
    begins = f'{{"{COLUMNS[0]}": "'
    whole = all(isinstance(row, dict) and tuple(row) == COLUMNS for row in rows)
    if not whole or truncated[: len(begins)] != begins[: len(truncated)]:
        raise ValueError
    return rows


def _rows_of_table(content: str) -> list[dict[str, Any]]:
    heading = ",".join(CSV_COLUMNS)
    if content[: len(heading)] != heading[: len(content)]:
        raise ValueError
    rows = list(csv.DictReader(io.StringIO(content, newline="")))
    if any(None in row for row in rows):
        raise ValueError
    if rows and (rows[-1]["error"] is None or not content.endswith("\n")):
        rows.pop()
    return rows


def _rewrite(out: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Rewrite the file with its complete rows, or create it with its header."""
    draft = out.with_name(f".{out.name}.draft")
    with draft.open("w", encoding="utf-8", newline="") as file:
        if out.suffix == ".csv":
            csv.DictWriter(file, CSV_COLUMNS).writeheader()
            csv.DictWriter(file, CSV_COLUMNS).writerows(rows)
        else:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    os.replace(draft, out)
