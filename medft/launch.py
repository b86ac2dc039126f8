"""Starting things: the recipe that a command names, and the process that a script runs in."""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import medft
from medft.errors import RecipeError
from medft.recipe import Recipe

AnyRecipe = TypeVar("AnyRecipe", bound=Recipe)


def shipped(name: str) -> Path:
    """A file that ships with medft, such as recipes/decoder_qlora.py: of the checkout or the wheel.

    Raises:
        RecipeError: this installation lacks it.
    """
    package = Path(medft.__file__).parent
    for root in (package.parent, package / "shipped"):
        if (root / name).exists():
            return root / name
    raise RecipeError(f"expected {name} beside the installed medft, it is missing: reinstall medft")


def split_arguments(argv: list[str]) -> tuple[Path | None, list[str]]:
    """The recipe file, if one is named, and the overrides of a command line.

    Raises:
        RecipeError: a word is neither the one recipe file nor an override.
    """
    file = Path(argv[0]) if argv and "=" not in argv[0] else None
    overrides = argv[1:] if file else argv
    for word in overrides:
        if "=" not in word or word.startswith("-"):
            raise RecipeError(
                f"expected RECIPE.yaml [section.key=value ...], got {word!r}: "
                f"write an override such as train.learning_rate=1e-4"
            )
    return file, overrides


def read_recipe(kind: type[AnyRecipe], argv: list[str]) -> AnyRecipe:
    """The recipe of a script's command line; without a file the one that ships for its kind.

    Raises:
        RecipeError: the words or the recipe are wrong.
    """
    file, overrides = split_arguments(argv)
    return kind.load(file or shipped(f"recipes/{kind.default_file}"), overrides)


@contextmanager
def process_set_up(*, seed: int) -> Iterator[None]:
    """Logging, seeds, and an orderly end of the process group around a script's work."""
    import datasets
    import torch
    import transformers

    is_first = os.environ.get("RANK", "0") == "0"
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger("medft").setLevel(logging.INFO if is_first else logging.ERROR)
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
        datasets.disable_progress_bars()
    transformers.set_seed(seed)
    try:
        yield
    finally:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
