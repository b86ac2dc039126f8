"""What medft says when the user's input cannot be used, and the exit code that goes with it.

Every message is one sentence: what was expected, what came, what to do.
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

EXIT_BAD_INPUT = 2
EXIT_TERMINATED = 143
EXIT_KEYBOARD_INTERRUPT = 130


class MedftError(Exception):
    """Something the user gave cannot be used: one sentence for each thing that is wrong."""

    @property
    def problems(self) -> list[str]:
        """The sentences, in the order of the checks.

        An error that comes from a DataLoader's worker has that process's traceback as its text,
        the sentence last.
        """
        texts = [str(text).strip() for text in self.args]
        return [
            text.splitlines()[-1].partition("Error: ")[2] if text.startswith("Caught ") else text
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
    """Errors of independent checks, gathered so that the user sees all of them at once."""

    def __init__(self) -> None:
        self.problems: list[str] = []

    @contextmanager
    def gather(self) -> Iterator[None]:
        """Keep a MedftError raised inside the block, and go on after it."""
        try:
            yield
        except MedftError as error:
            self.problems.extend(error.problems)

    def raise_any(self) -> None:
        """Raise what was gathered, if anything was.

        Raises:
            MedftError: with every sentence.
        """
        if self.problems:
            raise MedftError(*self.problems)


def run_command(main: Callable[[list[str]], None], argv: list[str]) -> int:
    """The exit code of a command: 0 done, 2 bad input, 143 stopped by SIGTERM after saving.

    A MedftError is shown as its sentences, once, by the first rank; with `--debug` in argv it
    is raised with its traceback instead. Any other exception is a bug of ours and is raised.
    """
    debug = "--debug" in argv
    try:
        main([word for word in argv if word != "--debug"])
    except MedftError as error:
        if debug:
            raise
        if os.environ.get("RANK", "0") == "0":
            sys.stderr.writelines(f"medft: error: {problem}\n" for problem in error.problems)
        return EXIT_BAD_INPUT
    except Terminated:
        return EXIT_TERMINATED
    except KeyboardInterrupt:
        return EXIT_KEYBOARD_INTERRUPT
    return 0
