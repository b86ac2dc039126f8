"""Declared prompts: those of a data file, those its rows were asked, the one to ask now."""

import json
import re
import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from pydantic import TypeAdapter
from typing_extensions import TypedDict

from medft.data.messages import first_texts
from medft.data.pairs import declared_by_source
from medft.data.source_file import MAX_TEXT_BYTES, open_regular
from medft.data.table_row import Rejected
from medft.data.template import fill_template, template_names

PROMPTS_FILE = "chat.json"
"""Beside chat JSONL: `{"prompts": {SOURCE: [templates]}}`."""


class _ChatFile(TypedDict):
    """Content of chat.json."""

    prompts: dict[str, list[str]]
    """By source."""


def asked_prompts(path: Path, rows: Dataset) -> list[str]:
    """The templates that a data file declares and that one of its rows was asked.

    Args:
        path: chat JSONL, or pairs.parquet.
        rows: of the file, as from `load_rows`.

    Raises:
        RecipeError: a declared prompt is not a template.
    """
    waiting = {template: _pattern(template) for template in _declared(path)}
    declared = list(waiting)
    for messages in rows["messages"]:
        if not waiting:
            break
        question = first_texts(json.loads(messages))["question"]
        waiting = {name: p for name, p in waiting.items() if not p.fullmatch(question)}
    return [template for template in declared if template not in waiting]


def choose_prompt(templates: Sequence[str], fields: Mapping[str, Any]) -> str | None:
    """The first template whose names all have a value in the fields, filled; None if none has."""
    for template in templates:
        if fields.keys() >= set(template_names(template)):
            filled = fill_template(template, fields)
            if filled:
                return filled
    return None


def _declared(path: Path) -> list[str]:
    """The templates of a data file, in their order; none if chat.json is missing or not medft's."""
    if path.suffix == ".parquet":
        by_source = declared_by_source(path)
    else:
        try:
            with open_regular(path.with_name(PROMPTS_FILE), max_bytes=MAX_TEXT_BYTES) as file:
                content = file.read()
            by_source = TypeAdapter(_ChatFile).validate_json(content)["prompts"]
        except (OSError, ValueError, Rejected):
            return []
    return list(dict.fromkeys(text for texts in by_source.values() for text in texts))


def _pattern(template: str) -> re.Pattern[str]:
    """What a filled template looks like."""
    template_names(template)  # raises for what is no template
    parts = string.Formatter().parse(template.strip())
    return re.compile(
        "".join(re.escape(text) + (".*" if name else "") for text, name, *_ in parts), re.DOTALL
    )
