"""pairs.parquet -> chat JSONL with images and prompts, for medft and for other tools."""

import io
import json
import re
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from medft.data.images import open_image, opened
from medft.data.messages import Message, conversation, text_with_placeholders
from medft.data.pairs import SPLITS, declared_by_source, open_pairs, prompts_of, read_pairs
from medft.data.plain_content import plain_content
from medft.data.prompts import PROMPTS_FILE
from medft.errors import DataError
from medft.files import check_folder_for_output, complete_folder, write_json


def write_chat(
    pairs: Path, out: Path, *, format: str = "trl", join_questions: bool = False
) -> dict[str, int]:
    """Write train.jsonl, validation.jsonl, test.jsonl, chat.json and images/ as a complete folder.

    Args:
        pairs: pairs.parquet.
        out: folder; replaced once the new one is complete, refused if it holds anything else.
        format: "trl" (TRL's conversational vision format) or "sharegpt" (LLaMA-Factory, ms-swift).
        join_questions: join all questions about the same images into one conversation.

    Returns:
        Number of rows by split.

    Raises:
        DataError: the pairs cannot be read.
        RunError: `out` holds anything else.
    """
    open_pairs(pairs)
    check_folder_for_output(out, allow_content=_is_ours(out))
    counts = dict.fromkeys(SPLITS, 0)
    with complete_folder(out) as draft, ExitStack() as opened_files:
        (draft / "images").mkdir()
        files = {
            split: opened_files.enter_context(
                (draft / f"{split}.jsonl").open("w", encoding="utf-8")
            )
            for split in SPLITS
        }
        for row, messages in _conversations(pairs, join_questions):
            names = [f"images/{digest}.png" for digest in row["sha256"]]
            for name, image in zip(names, row["images"], strict=True):
                if not (draft / name).exists():
                    (draft / name).write_bytes(_pixels_alone(row, image["bytes"]))
            line = _trl_row(row, names, messages)
            if format == "sharegpt":
                line = _sharegpt_row(row, names, messages)
            files[row["split"]].write(json.dumps(line, ensure_ascii=False) + "\n")
            counts[row["split"]] += 1
        write_json(draft / PROMPTS_FILE, {"prompts": declared_by_source(pairs)})
    return counts


def _conversations(
    pairs: Path, join_questions: bool
) -> Iterator[tuple[dict[str, Any], list[Message]]]:
    """Rows with their messages; with join_questions, one row per set of images.

    A joined row has the fields on which all its questions agree.
    """
    prompts = prompts_of(pairs)
    if not join_questions:
        for row in read_pairs(pairs):
            yield row, conversation(row, prompts)
        return
    turns: dict[tuple[str, ...], list[Message]] = {}
    fields: dict[tuple[str, ...], dict[str, Any]] = {}
    for row in read_pairs(pairs, images=False):
        key = (row["split"], *row["sha256"])
        messages = conversation({**row, "images": []}, prompts)
        turns.setdefault(key, []).extend(messages)
        own = json.loads(row["fields"] or "{}")
        shared = fields.setdefault(key, own).items()
        fields[key] = {name: value for name, value in shared if own.get(name) == value}
    for row in read_pairs(pairs):
        key = (row["split"], *row["sha256"])
        joined = turns.pop(key, [])
        if joined:
            joined[0]["content"][:0] = [{"type": "image"} for _ in row["images"]]
            yield {**row, "fields": json.dumps(fields[key])}, joined


def _pixels_alone(row: dict[str, Any], content: bytes) -> bytes:
    """The image, decoded, as a PNG file without metadata; one that has none stays as it is.

    Raises:
        DataError: it cannot be decoded.
    """
    stream = io.BytesIO()
    try:
        with opened(content) as image:
            plain = plain_content(content, image) if image.format == "PNG" else None
            if plain is not None:
                image.load()
                return plain
        open_image(content).save(stream, format="PNG", compress_level=1)
    except DataError as error:
        raise DataError(f"row {row['id']}: {error}") from error
    return stream.getvalue()


def _is_ours(folder: Path) -> bool:
    """Whether a folder holds what `write_chat` writes and nothing else."""
    splits = {f"{split}.jsonl" for split in SPLITS}
    images = folder / "images"
    return (
        folder.is_dir()
        and {path.name for path in folder.iterdir()} - {PROMPTS_FILE} == {"images", *splits}
        and images.is_dir()
        and all(re.fullmatch(r"[0-9a-f]{64}\.png", path.name) for path in images.iterdir())
    )


def _trl_row(row: dict[str, Any], names: list[str], messages: list[Message]) -> dict[str, Any]:
    head = {"id": row["id"], "group_id": row["group_id"], "source": row["source"]}
    fields = json.loads(row["fields"] or "{}")
    return {**head, "images": names, "fields": fields, "messages": messages}


def _sharegpt_row(row: dict[str, Any], names: list[str], messages: list[Message]) -> dict[str, Any]:
    flat = [
        {"role": message["role"], "content": text_with_placeholders(message)}
        for message in messages
    ]
    return {"id": row["id"], "messages": flat, "images": names}
