"""Regular expressions over module names, from a recipe or from an adapter of somebody else."""

import re
from collections.abc import Collection, Iterable

from peft import LoraConfig
from torch import nn

from medft.errors import BaseModelError
from medft.foreign import bounded_time

SECONDS = 10
"""All expressions of an adapter may take together."""


def matched_names(patterns: Iterable[str], names: Collection[str], *, where: str) -> list[str]:
    """The names that any of the regular expressions matches as a whole.

    Args:
        patterns: regular expressions.
        names: of modules.
        where: what holds the expressions, for the error.

    Raises:
        BaseModelError: an expression is none, or they take too long.
    """
    try:
        with bounded_time(SECONDS):
            compiled = [re.compile(pattern) for pattern in patterns]
            return [name for name in names if any(p.fullmatch(name) for p in compiled)]
    except (re.error, OverflowError, RecursionError, TimeoutError) as error:
        raise BaseModelError(
            f"expected in {where} a regular expression that is matched in {SECONDS} s, got one "
            f"that is not ({error}): correct it, or write a preset or plain names"
        ) from error


def check_patterns(model: nn.Module, config: LoraConfig, *, where: str) -> None:
    """Try the expressions of a configuration as PEFT will, which has no limit of time.

    Args:
        model: the base.
        config: of the adapter.
        where: what holds the expressions, for the error.

    Raises:
        BaseModelError: as from `matched_names`.
    """
    whole = [p for p in (config.target_modules, config.exclude_modules) if isinstance(p, str)]
    endings = [*(config.rank_pattern or {}), *(config.alpha_pattern or {})]
    layers = config.layers_pattern or []
    layers = [layers] if isinstance(layers, str) else layers
    patterns = [
        *whole,
        *(rf"(.*\.)?({ending})" for ending in endings),
        *(rf"(?:^|.*?\.){layer}\.(?P<idx>\d+)\..*" for layer in layers),
        *(rf"(^|.*\.){name}($|\..*)" for name in config.modules_to_save or []),
    ]
    matched_names(patterns, [name for name, _ in model.named_modules()], where=where)
