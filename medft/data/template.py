"""Templates such as "{findings} {impression}": names between braces, no formats."""

import string
from collections.abc import Mapping
from typing import Any

from medft.errors import RecipeError

IMAGE_PLACEHOLDER = "<image>"
"""What LLaMA-Factory, ms-swift and LLaVA write into a text where an image stands."""


def template_names(template: str) -> list[str]:
    """The names between the braces of a template.

    Raises:
        RecipeError: a brace is unmatched, or braces hold anything but a name.
    """
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise RecipeError(
            f"expected a template such as '{{findings}} {{impression}}', got {template!r}: "
            f"write a literal brace twice"
        ) from error
    names = []
    for _, name, format_spec, conversion in parts:
        if name is None:
            continue
        if not name or format_spec or conversion or any(sign in name for sign in ".[]"):
            raise RecipeError(
                f"expected a name alone between the braces of a template, got {template!r}: "
                f"remove formats and indices"
            )
        names.append(name)
    return names


def text_of(value: Any) -> str:
    """A cell as stripped text; empty for None and NaN."""
    if value is None or value != value:  # NaN
        return ""
    return str(value).strip()


def fill_template(template: str, values: Mapping[str, Any]) -> str:
    """The template with its names replaced by values; empty where all its values are.

    Raises:
        KeyError: a name has no value.
    """
    texts = {name: text_of(values[name]) for name in template_names(template)}
    if texts and not any(texts.values()):
        return ""
    return template.format_map(texts).strip()
