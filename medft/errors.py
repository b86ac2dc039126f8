"""Errors for user input that cannot be used, and how a command runs: exit codes, who may read.

Every message is one sentence: what was expected, what came, what to do.
"""

import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from medft.library_lines import leave_out_untrue_lines
from medft.masking import printable

SHARED = "MEDFT_SHARED"
"""Environment variable; at 1, the umask of the process decides who may read what is written."""

EXIT_NO = 1
"""The command ran, and the answer is no."""

EXIT_BAD_INPUT = 2
EXIT_TERMINATED = 143
EXIT_KEYBOARD_INTERRUPT = 130

_PANIC = (
    "expected files of a model that its libraries can read, one of them gave up ({}): take the "
    "files of the model's author, tokenizer.json above all"
)
"""Of the tokenizer's library: it is written in Rust, and its panics are no Exception."""


class MedftError(Exception):
    """User input cannot be used: one sentence for each problem."""

    @property
    def problems(self) -> list[str]:
        """The sentences, in the order of the checks.

        An error from a DataLoader worker has that worker's traceback as its text; its sentence
        follows the last name of an error.
        """
        texts = [str(text).strip() for text in self.args]
        return [
            re.split(r"\n[\w.]+Error: ", text)[-1] if text.startswith("Caught ") else text
            for text in texts
        ]


class RecipeError(MedftError):
    """The recipe file or an override is wrong."""


class DataError(MedftError):
    """A data file, a row or an image cannot be used."""


class BaseModelError(MedftError):
    """The base model, its processor or an adapter target cannot be used."""


class RunError(MedftError):
    """A run directory or a checkpoint cannot be used."""


class Terminated(Exception):
    """The run was stopped by SIGTERM after it had saved."""


class ErrorCollector:
    """Collects the errors of independent checks, so that the user sees all of them at once."""

    def __init__(self) -> None:
        self.problems: list[str] = []

    @contextmanager
    def gather(self) -> Iterator[None]:
        """Collect a MedftError raised inside the block; execution continues after the block."""
        try:
            yield
        except MedftError as error:
            self.problems.extend(error.problems)

    def raise_any(self) -> None:
        """Raise the collected errors, if there are any.

        Raises:
            MedftError: with every sentence, once.
        """
        if self.problems:
            raise MedftError(*dict.fromkeys(self.problems))


def run_command(main: Callable[[list[str]], None], argv: list[str]) -> int:
    """The exit code: 0 done, 2 bad input, 130 interrupted, 143 stopped by SIGTERM after saving.

    A MedftError is shown as its sentences, once, by rank 0; with `--debug` in argv it
    is raised with its traceback instead. Any other exception is a bug of ours and is raised, but
    for a panic of the tokenizer's library, which only its files can cause.

    Folders and files that the command makes, itself or through a library, are its user's alone
    (0700 and 0600), unless MEDFT_SHARED is 1. Called from Python, functions leave the umask alone.
    """
    leave_out_untrue_lines()
    debug = "--debug" in argv
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # it was closed
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    try:
        with _private():
            main([word for word in argv if word != "--debug"])
    except MedftError as error:
        if debug:
            raise
        if os.environ.get("RANK", "0") == "0" or "WORLD_SIZE" not in os.environ:
            for problem in error.problems:
                _show(problem)
        return EXIT_BAD_INPUT
    except Terminated:
        return EXIT_TERMINATED
    except KeyboardInterrupt:
        return EXIT_KEYBOARD_INTERRUPT
    except BaseException as error:
        if debug or type(error).__name__ != "PanicException":
            raise
        _show(_PANIC.format(str(error)))
        return EXIT_BAD_INPUT
    return 0


@contextmanager
def _private() -> Iterator[None]:
    """Take every right of others from what is created while the block runs."""
    if os.environ.get(SHARED) == "1":
        yield
        return
    before = os.umask(0o077)
    os.umask(before | 0o077)
    try:
        yield
    finally:
        os.umask(before)


def _show(problem: str) -> None:
    sys.stderr.write(f"medft: error: {printable(problem)}\n")
