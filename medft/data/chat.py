"""Conversations about images: chat JSONL written from pairs, and rows to train on read from either.

A row to train on is the same whatever file it came from: its id, its images (a path or bytes) and
its messages, each a role and a list of parts, an image part for every image. Rows are checked
whole, before a model is loaded; a bad row is named by its id or its line.
"""

import hashlib
import io
import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Image, List, Value

from medft.data.images import open_image
from medft.data.pairs import SPLITS, check_row, open_pairs, prompts_of, read_pairs
from medft.data.template import fill_template
from medft.errors import DataError
from medft.files import check_folder_for_output, complete_folder, file_sha256

Message = dict[str, Any]

SHOWN_PROBLEMS = 10
"""Bad rows that are shown before the rest is only counted."""

_FEATURES = Features(
    {
        "id": Value("string"),
        "group_id": Value("string"),
        "source": Value("string"),
        "images": List(Image(decode=False)),
        "messages": Value("string"),
        "fields": Value("string"),
    }
)


_ROW_KEYS = {"id", "group_id", "source", "images", "image", "messages"}

_NO_ROWS = Dataset.from_dict({})


def write_chat(
    pairs: Path, out: Path, *, format: str = "trl", join_questions: bool = False
) -> dict[str, int]:
    """Write train.jsonl, validation.jsonl, test.jsonl and images/ as one complete folder.

    Args:
        pairs: pairs.parquet.
        out: folder; replaced once the new one is whole, refused where it holds something else.
        format: "trl" (TRL's conversational vision format) or "sharegpt" (LLaMA-Factory, ms-swift).
        join_questions: all questions about the same images become one conversation.

    Returns:
        Rows by split.

    Raises:
        DataError: the pairs cannot be read.
        RunError: `out` holds something else.
    """
    open_pairs(pairs)
    check_folder_for_output(out, allow_content=_is_ours(out))
    counts = dict.fromkeys(SPLITS, 0)
    with complete_folder(out) as draft:
        (draft / "images").mkdir()
        files = {split: (draft / f"{split}.jsonl").open("w", encoding="utf-8") for split in SPLITS}
        for row, messages in _conversations(pairs, join_questions):
            names = [f"images/{digest}.png" for digest in row["sha256"]]
            for name, image in zip(names, row["images"], strict=True):
                if not (draft / name).exists():
                    (draft / name).write_bytes(_as_png(image["bytes"]))
            line = _trl_row(row, names, messages)
            if format == "sharegpt":
                line = _sharegpt_row(row, names, messages)
            files[row["split"]].write(json.dumps(line, ensure_ascii=False) + "\n")
            counts[row["split"]] += 1
        for file in files.values():
            file.close()
    return counts


def _conversations(
    pairs: Path, join_questions: bool
) -> Iterator[tuple[dict[str, Any], list[Message]]]:
    """Rows with their messages; questions about the same images after one another, if asked."""
    prompts = prompts_of(pairs)
    if not join_questions:
        for row in read_pairs(pairs):
            yield row, conversation(row, prompts)
        return
    turns: dict[tuple[str, ...], list[Message]] = {}
    for row in read_pairs(pairs, images=False):
        key = (row["split"], *row["sha256"])
        messages = conversation({**row, "images": []}, prompts)
        turns.setdefault(key, []).extend(messages)
    for row in read_pairs(pairs):
        messages = turns.pop((row["split"], *row["sha256"]), None)
        if messages is not None:
            messages[0]["content"][:0] = [{"type": "image"} for _ in row["images"]]
            yield row, messages


def _as_png(content: bytes) -> bytes:
    """The picture's file as a PNG: as it is, or its pixels written anew."""
    if content.startswith(b"\x89PNG"):
        return content
    stream = io.BytesIO()
    open_image(content).save(stream, format="PNG", compress_level=1)
    return stream.getvalue()


def _is_ours(folder: Path) -> bool:
    """Whether a folder holds what `write_chat` writes and nothing else."""
    splits = {f"{split}.jsonl" for split in SPLITS}
    images = folder / "images"
    return (
        folder.is_dir()
        and {path.name for path in folder.iterdir()} == {"images", *splits}
        and images.is_dir()
        and all(re.fullmatch(r"[0-9a-f]{64}\.png", path.name) for path in images.iterdir())
    )


def _trl_row(row: dict[str, Any], names: list[str], messages: list[Message]) -> dict[str, Any]:
    head = {"id": row["id"], "group_id": row["group_id"], "source": row["source"]}
    return {**head, "images": names, "messages": messages}


def _sharegpt_row(row: dict[str, Any], names: list[str], messages: list[Message]) -> dict[str, Any]:
    flat = [
        {
            "role": message["role"],
            "content": "".join(part.get("text", "<image>") for part in message["content"]),
        }
        for message in messages
    ]
    return {"id": row["id"], "messages": flat, "images": names}


def conversation(row: dict[str, Any], prompts: list[str]) -> list[Message]:
    """The messages of a pair: its question, or the prompt that its id chooses, and its text."""
    question = row["question"]
    if question is None:
        draw = int(hashlib.sha256(row["id"].encode()).hexdigest()[:8], 16)
        question = fill_template(prompts[draw % len(prompts)], json.loads(row["fields"]))
    images = [{"type": "image"} for _ in row["images"]]
    return [
        {"role": "user", "content": [*images, {"type": "text", "text": question}]},
        {"role": "assistant", "content": [{"type": "text", "text": row["text"]}]},
    ]


def load_rows(path: Path, *, split: str) -> Dataset:
    """The rows of a chat JSONL, or of one split of pairs.parquet, checked.

    Returns:
        A dataset with the columns id (a second of equal ones gets its line beside it), group_id,
        source, images (bytes or path), messages (JSON) and fields (JSON), and of pairs.parquet
        sha256 (of each image); read a row's messages with `messages_of`.

    Raises:
        DataError: the file is missing, empty or not of this kind, or rows of it are bad.
    """
    if not path.is_file():
        raise DataError(f"expected a data file at {path}, there is none: check the path")
    if path.stat().st_size == 0:
        raise DataError(f"expected rows in {path}, the file is empty: prepare it again")
    rows = _pairs_dataset(path, split) if path.suffix == ".parquet" else _jsonl_dataset(path)
    if len(rows) == 0:
        raise DataError(f"expected rows of split {split} in {path}, found none: check the file")
    return rows


def messages_of(row: dict[str, Any]) -> list[Message]:
    """The messages of a row of `load_rows`."""
    return json.loads(row["messages"])


def first_texts(messages: list[Message]) -> dict[str, str]:
    """The first user text as `question` and the first assistant text as `answer`."""
    texts = {}
    for message in messages:
        name = {"user": "question", "assistant": "answer"}.get(message["role"])
        if name and name not in texts:
            texts[name] = "".join(part.get("text", "") for part in message["content"])
    return texts


def image_source(image: dict[str, Any]) -> Path | bytes:
    """What `open_image` takes, of an entry of a row's images."""
    return image["bytes"] if image["bytes"] is not None else Path(image["path"])


def fingerprint(path: Path, rows: Dataset) -> dict[str, Any]:
    """What identifies the data of a run: path, hash of the file, number of rows."""
    return {"path": str(path), "sha256": file_sha256(path), "rows": len(rows)}


def describe_counts(counts: dict[str, Any]) -> str:
    """A line such as "rows kept 200, rows dropped 3, images a row 1: 190, 2: 10"."""
    known = ((name, value) for name, value in counts.items() if value is not None)
    return "; ".join(f"{name.replace('_', ' ')} {_shown(value)}" for name, value in known)


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name}: {count}" for name, count in value.items())
    if isinstance(value, float):
        return f"{value:.4g}"
    return " = ".join(map(repr, value)) if isinstance(value, list) else str(value)


def _pairs_dataset(path: Path, split: str) -> Dataset:
    prompts = prompts_of(path)
    splits = open_pairs(path).read(columns=["split"]).column("split").to_pylist()
    chosen = [index for index, name in enumerate(splits) if name == split]
    if not chosen:
        return _NO_ROWS
    columns = ["id", "group_id", "source", "images", "sha256", "text", "question", "fields"]
    dataset = Dataset.from_parquet(str(path), columns=columns)
    dataset = dataset.cast_column("images", List(Image(decode=False))).select(chosen)
    messages = []
    for row in dataset:
        check_row(path, row)
        messages.append(json.dumps(conversation(row, prompts), ensure_ascii=False))
    return dataset.remove_columns(["text", "question"]).add_column("messages", messages)


def _jsonl_dataset(path: Path) -> Dataset:
    rows, problems = [], []
    folder = path.parent
    existing: dict[str, bool] = {}
    names: Counter[str] = Counter()
    for number, line in _numbered_lines(path):
        try:
            row = _checked_row(line, number, folder, existing)
            names[row["id"]] += 1
            if names[row["id"]] > 1:  # as in files whose id is that of the image
                row["id"] = f"{row['id']} (line {number})"
            rows.append(row)
        except DataError as error:
            problems.append(f"{path}:{number}: {error}")
    if problems:
        more = len(problems) - SHOWN_PROBLEMS
        rest = [f"{path}: {more} more rows are bad: correct them too"] if more > 0 else []
        raise DataError(*islice(problems, SHOWN_PROBLEMS), *rest)
    return Dataset.from_list(rows, features=_FEATURES) if rows else _NO_ROWS


def _numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, line
    except UnicodeDecodeError as error:
        raise DataError(f"expected UTF-8 text in {path}, found other bytes: convert it") from error


def _checked_row(line: str, number: int, folder: Path, existing: dict[str, bool]) -> dict[str, Any]:
    try:
        row = json.loads(line)
        json.dumps(row, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise DataError(f"expected a JSON object, could not parse it ({error})") from error
    if not isinstance(row, dict):
        raise DataError(f"expected a JSON object, got {type(row).__name__}")
    name = f"line {number}" if row.get("id") is None else str(row["id"])
    paths = row.get("images") or ([row["image"]] if row.get("image") else [])
    unread = sorted(key for key in row.keys() - _ROW_KEYS if re.search(r"image|img|picture", key))
    if unread:
        raise DataError(f"row {name}: expected the key images, got {unread[0]}: rename it")
    if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
        raise DataError(f"row {name}: expected images to be a list of paths")
    messages = normalised_messages(row.get("messages"), len(paths), name)
    images = []
    for path in paths:
        whole = os.path.join(folder, path)  # an absolute path stays as it is
        if whole not in existing:
            existing[whole] = os.path.isfile(whole)
        if not existing[whole]:
            raise DataError(f"row {name}: expected an image at {whole}, there is no file")
        images.append({"bytes": None, "path": whole})
    fields = {key: value for key, value in row.items() if key not in _ROW_KEYS}
    group = row.get("group_id")
    return {
        "id": name,
        "group_id": name if group is None else str(group),
        "source": str(row.get("source") or ""),
        "images": images,
        "messages": json.dumps(messages, ensure_ascii=False),
        "fields": json.dumps(fields, ensure_ascii=False),
    }


def normalised_messages(messages: Any, num_images: int, name: str) -> list[Message]:
    """Messages with part lists and one image part for each image.

    Plain text contents become text parts; where no part asks for an image, the images stand
    before the first user text, as TRL places them.

    Raises:
        DataError: roles, contents or the number of images are not as expected.
    """
    if not isinstance(messages, list) or not messages:
        raise DataError(f"row {name}: expected a list of messages, got {_kind(messages)}")
    roles = [message.get("role") if isinstance(message, dict) else None for message in messages]
    turns = roles[1:] if roles[0] == "system" else roles
    expected = ["user", "assistant"] * (len(turns) // 2)
    if not turns or turns != expected:
        raise DataError(
            f"row {name}: expected turns of user and assistant in alternation, "
            f"the last by the assistant, got {', '.join(map(str, roles))}"
        )
    normal = [
        {"role": message["role"], "content": _parts(message.get("content"), name)}
        for message in messages
    ]
    placed = sum(part["type"] == "image" for message in normal for part in message["content"])
    if placed == 0 and num_images:
        first_user = next(message for message in normal if message["role"] == "user")
        first_user["content"][:0] = [{"type": "image"} for _ in range(num_images)]
    elif placed != num_images:
        raise DataError(
            f"row {name}: expected as many image parts as images, got {placed} and {num_images}"
        )
    for message in normal:
        is_assistant = message["role"] == "assistant"
        if is_assistant and any(part["type"] == "image" for part in message["content"]):
            raise DataError(f"row {name}: expected images in user turns only")
        if is_assistant and not "".join(part["text"] for part in message["content"]).strip():
            raise DataError(f"row {name}: expected text in every assistant turn, one is empty")
    return normal


def _parts(content: Any, name: str) -> list[dict[str, str]]:
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise DataError(f"row {name}: expected content to be text or parts, got {_kind(content)}")
    parts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "image":
            parts.append({"type": "image"})
        elif kind == "text" and isinstance(part.get("text"), str):
            if parts and parts[-1]["type"] == "text":  # templates trim each part by itself
                parts[-1]["text"] += part["text"]
            else:
                parts.append({"type": "text", "text": part["text"]})
        else:
            raise DataError(f"row {name}: expected image and text parts, got {part!r}")
    return parts


def _kind(value: Any) -> str:
    return "nothing" if value is None or value == [] else type(value).__name__
