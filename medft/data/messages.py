"""Chat messages about images."""

import hashlib
import json
from typing import Any, Literal, Required, TypedDict

from medft.data.template import fill_template
from medft.errors import DataError


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


def conversation(row: dict[str, Any], prompts: list[str]) -> list[Message]:
    """The messages of a pair: its question, or a prompt selected by its id, and its text."""
    question = row["question"]
    if question is None:
        draw = int(hashlib.sha256(row["id"].encode()).hexdigest()[:8], 16)
        question = fill_template(prompts[draw % len(prompts)], json.loads(row["fields"]))
    images: list[Part] = [{"type": "image"} for _ in row["images"]]
    return [
        {"role": "user", "content": [*images, {"type": "text", "text": question}]},
        {"role": "assistant", "content": [{"type": "text", "text": row["text"]}]},
    ]


def text_of_message(message: Message) -> str:
    """The text parts of a message, joined."""
    return "".join(part.get("text", "") for part in message["content"])


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


def normalized_messages(messages: Any, num_images: int, name: str) -> list[Message]:
    """Messages with part lists and one image part per image.

    String content becomes a text part. Without any image part, the images are put before the
    first user text, as in TRL.

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
    normal: list[Message] = [
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


def _parts(content: Any, name: str) -> list[Part]:
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise DataError(f"row {name}: expected content to be text or parts, got {_kind(content)}")
    parts: list[Part] = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "image":
            parts.append({"type": "image"})
        elif kind == "text" and isinstance(part.get("text"), str):
            if parts and parts[-1]["type"] == "text":  # templates strip each part separately
                parts[-1]["text"] += part["text"]
            else:
                parts.append({"type": "text", "text": part["text"]})
        else:
            raise DataError(f"row {name}: expected image and text parts, got {part!r}")
    return parts


def _kind(value: Any) -> str:
    return "nothing" if value is None or value == [] else type(value).__name__
