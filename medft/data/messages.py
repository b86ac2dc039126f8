"""Chat messages about images."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any, Literal, Required, TypedDict

from medft.data.template import IMAGE_PLACEHOLDER, fill_template
from medft.errors import DataError

PATH_KEYS = ("image", "path", "url")
"""Keys under which an image part may carry the path of its file."""

_PART_KEYS = {"image": {"type", *PATH_KEYS}, "text": {"type", "text"}}


class Part(TypedDict, total=False):
    """A content part: an image placeholder or a text."""

    type: Required[Literal["image", "text"]]
    text: str
    """Content of a text part."""


class Message(TypedDict):
    """A turn, in the form that chat templates read."""

    role: str
    """system, user or assistant."""

    content: list[Part]


def conversation(row: dict[str, Any], prompts: Mapping[str, list[str]]) -> list[Message]:
    """The messages of a pair: its question, or a prompt selected by its id, and its text.

    Args:
        row: of pairs.parquet.
        prompts: for rows without question, by source.

    Raises:
        DataError: there are no prompts for the row's source, or a text holds `<image>`.
    """
    question = row["question"]
    if question is None:
        of_source = prompts.get(row["source"])
        if not of_source:
            raise DataError(
                f"row {row['id']}: expected prompts for its source {row['source']!r} in the "
                f"metadata of the file, there are none: write it with medft data prepare"
            )
        draw = int(hashlib.sha256(row["id"].encode()).hexdigest()[:8], 16)
        fields = json.loads(row["fields"] or "{}")
        template = of_source[draw % len(of_source)]
        try:
            question = fill_template(template, fields)
        except KeyError as error:
            raise DataError(
                f"row {row['id']}: expected the fields that its prompt {template!r} names, there "
                f"is no {error}: write the file with medft data prepare"
            ) from error
    if IMAGE_PLACEHOLDER in question or IMAGE_PLACEHOLDER in row["text"]:
        raise DataError(
            f"row {row['id']}: expected question and text without {IMAGE_PLACEHOLDER}, which "
            f"stands for an image: remove it from the source and prepare again"
        )
    images: list[Part] = [{"type": "image"} for _ in row["images"]]
    return [
        {"role": "user", "content": [*images, {"type": "text", "text": question}]},
        {"role": "assistant", "content": [{"type": "text", "text": row["text"]}]},
    ]


def text_of_message(message: Message) -> str:
    """The text parts of a message, joined."""
    return "".join(part.get("text", "") for part in message["content"])


def text_with_placeholders(message: Message) -> str:
    """The parts of a message as one text, with `<image>` where an image stands."""
    return "".join(part.get("text", IMAGE_PLACEHOLDER) for part in message["content"])


def system_text(messages: list[Message]) -> str | None:
    """The text of the system turn; None without one."""
    return text_of_message(messages[0]) if messages[0]["role"] == "system" else None


def first_texts(messages: list[Message]) -> dict[str, str]:
    """The first user text as `question` and the first assistant text as `answer`."""
    texts: dict[str, str] = {}
    for message in messages:
        name = {"user": "question", "assistant": "answer"}.get(message["role"])
        if name and name not in texts:
            texts[name] = text_of_message(message)
    return texts


def paths_of_parts(messages: Any, name: str) -> list[str]:
    """The paths that the image parts of a row carry, in their order; empty if none does.

    Raises:
        DataError: only some of the parts carry one, one carries several, or one is not text.
    """
    given = [
        [part[key] for key in PATH_KEYS if not is_empty(part.get(key))]
        for part in _raw_parts(messages)
        if part.get("type") == "image"
    ]
    if not any(given):
        return []
    if any(len(paths) != 1 or not isinstance(paths[0], str) for paths in given):
        raise DataError(
            f"row {name}: expected one path as text, under one of {', '.join(PATH_KEYS)}, in every "
            f"image part or in none: correct the parts"
        )
    return [path for [path] in given]


def normalized_messages(messages: Any, num_images: int, name: str) -> list[Message]:
    """Messages with part lists and one image part per image.

    String content becomes a text part. Without any image part, each `<image>` in a user turn
    becomes one, the text around it kept as it is; without those, the images are put before the
    first user text, as in TRL.

    Raises:
        DataError: roles, contents, keys or the number of images are not as expected.
    """
    if not isinstance(messages, list) or not messages:
        raise DataError(f"row {name}: expected a list of messages, got {_kind(messages)}")
    for number, message in enumerate(messages, start=1):
        if isinstance(message, dict):
            _check_keys(message, {"role", "content"}, name, f"message {number}")
    roles = [message.get("role") if isinstance(message, dict) else None for message in messages]
    turns = roles[1:] if roles[0] == "system" else roles
    expected = ["user", "assistant"] * (len(turns) // 2)
    if not turns or turns != expected:
        raise DataError(
            f"row {name}: expected turns of user and assistant in alternation, "
            f"the last by the assistant, got {', '.join(map(str, roles))}"
        )
    normal: list[Message] = [
        {"role": message["role"], "content": _parts(message.get("content"), name)}
        for message in messages
    ]
    _place_images(normal, num_images, name)
    for message in normal:
        images = any(part["type"] == "image" for part in message["content"])
        if images and message["role"] != "user":
            raise DataError(f"row {name}: expected images in user turns only")
        if message["role"] == "assistant" and not text_of_message(message).strip():
            raise DataError(f"row {name}: expected text in every assistant turn, one is empty")
    return normal


def _place_images(messages: list[Message], num_images: int, name: str) -> None:
    """Give the messages one image part per image, in place."""
    placed = sum(part["type"] == "image" for message in messages for part in message["content"])
    written = [
        sum(part.get("text", "").count(IMAGE_PLACEHOLDER) for part in message["content"])
        for message in messages
    ]
    if any(written):
        _check_placeholders(messages, written, placed, num_images, name)
        for message in messages:
            message["content"] = list(_split_at_placeholders(message["content"]))
    elif placed == 0 and num_images:
        first_user = next(message for message in messages if message["role"] == "user")
        first_user["content"][:0] = [{"type": "image"} for _ in range(num_images)]
    elif placed != num_images:
        raise DataError(
            f"row {name}: expected as many image parts as images, got {placed} and {num_images}"
        )


def _check_placeholders(
    messages: list[Message], written: list[int], placed: int, num_images: int, name: str
) -> None:
    for message, count in zip(messages, written, strict=True):
        if count and message["role"] != "user":
            raise DataError(
                f"row {name}: expected {IMAGE_PLACEHOLDER} in user turns only, a turn of the "
                f"{message['role']} holds it: move it to where the image is shown"
            )
    if placed:
        raise DataError(
            f"row {name}: expected image parts or {IMAGE_PLACEHOLDER} in the texts, got both: "
            f"remove {IMAGE_PLACEHOLDER}"
        )
    if sum(written) != num_images:
        raise DataError(
            f"row {name}: expected as many {IMAGE_PLACEHOLDER} in its user turns as images, got "
            f"{sum(written)} and {num_images}: write one for each"
        )


def _split_at_placeholders(parts: list[Part]) -> Iterator[Part]:
    """The parts, with an image part for each placeholder and the text around it as it is."""
    for part in parts:
        if IMAGE_PLACEHOLDER not in part["text"]:
            yield part
            continue
        before, *others = part["text"].split(IMAGE_PLACEHOLDER)
        if before:
            yield {"type": "text", "text": before}
        for text in others:
            yield {"type": "image"}
            if text:
                yield {"type": "text", "text": text}


def _raw_parts(messages: Any) -> Iterator[dict[str, Any]]:
    """The content parts of messages that may be of any form; what is no part is left out."""
    for message in messages if isinstance(messages, list) else []:
        content = message.get("content") if isinstance(message, dict) else None
        if isinstance(content, list):
            yield from (part for part in content if isinstance(part, dict))


def _parts(content: Any, name: str) -> list[Part]:
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise DataError(f"row {name}: expected content to be text or parts, got {_kind(content)}")
    parts: list[Part] = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in ("image", "text"):
            raise DataError(f"row {name}: expected image and text parts, got {_part_kind(part)}")
        _check_keys(part, _PART_KEYS[kind], name, f"a part of type {kind}")
        if kind == "text" and not isinstance(part.get("text"), str):
            found = _kind(part.get("text"))
            raise DataError(f"row {name}: expected text in a part of type text, got {found}")
        if kind == "image":
            parts.append({"type": "image"})
        elif parts and parts[-1]["type"] == "text":  # templates strip each part separately
            parts[-1]["text"] += part["text"]
        else:
            parts.append({"type": "text", "text": part["text"]})
    return parts


def _check_keys(given: dict[str, Any], known: set[str], name: str, place: str) -> None:
    """Refuse keys that other tools may obey; a key without a value says nothing."""
    if "from" in given:
        raise DataError(
            f"row {name}: expected role and content in {place}, got from: rename from to role and "
            f"value to content, human to user and gpt to assistant"
        )
    for key, value in given.items():
        if key not in known and not is_empty(value):
            raise DataError(
                f"row {name}: expected only {' and '.join(sorted(known))} in {place}, got {key}, "
                f"which medft would ignore: remove it"
            )


def is_empty(value: Any) -> bool:
    """Whether a value is null or empty, as of a key that a row has for the sake of others."""
    return value is None or value == "" or value == [] or value == {}


def _part_kind(part: Any) -> str:
    return f"type {str(part.get('type'))[:40]}" if isinstance(part, dict) else type(part).__name__


def _kind(value: Any) -> str:
    return "nothing" if value is None or value == [] else type(value).__name__
