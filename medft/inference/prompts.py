"""The conversation in which an image is shown to a decoder, as its training had it."""

from collections.abc import Mapping
from typing import Any

from medft.data.messages import Message
from medft.data.prompts import choose_prompt
from medft.data.template import text_of
from medft.errors import RunError
from medft.models.saved import SavedRecord


def prompt_for(
    record: SavedRecord, *, given: str | None = None, fields: Mapping[str, Any] | None = None
) -> str:
    """The question of an image's row, else the given prompt, else one of the training rows.

    Args:
        record: of the model that is asked.
        given: by the user.
        fields: the columns of the image's row, if it has one.

    Raises:
        RunError: there is none of these.
    """
    fields = fields or {}
    own = text_of(fields.get("question"))
    prompt = own or given or choose_prompt(record.prompts or [], fields)
    if prompt:
        return prompt
    if record.prompts:
        raise RunError(
            f"expected a prompt or a table whose rows fill one of the model's "
            f"({' | '.join(record.prompts)}), got {', '.join(fields) or 'images alone'}: give "
            f"--prompt"
        )
    raise RunError(
        "expected a prompt, the model has none that its training rows declared (they had questions "
        "of their own, or no chat.json beside them): give --prompt"
    )


def conversation_for(prompt: str, record: SavedRecord) -> list[Message]:
    """The turns before the answer: the system turn of training, and an image with the prompt."""
    system: list[Message] = []
    if record.system is not None:
        system = [{"role": "system", "content": [{"type": "text", "text": record.system}]}]
    return [
        *system,
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]},
    ]
