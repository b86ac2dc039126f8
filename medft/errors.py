"""Errors for user input that cannot be used, and how a command runs: exit codes, who may read.

Every message is one sentence: what was expected, what came, what to do.
"""

import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from medft import full_disk
from medft.full_disk import is_disk_full, named_file
from medft.library_lines import leave_out_untrue_lines
from medft.masking import printable

SHARED = "MEDFT_SHARED"
"""Environment variable; at 1, the umask of the process decides who may read what is written."""

EXIT_NO = 1
"""The command ran, and the answer is no."""

EXIT_BAD_INPUT = 2
EXIT_SIGNAL = 128
"""Added to the number of the signal that ended a command."""

_PANIC = (
    "expected files of a model that its libraries can read, one of them gave up ({}): take the "
    "files of the model's author, tokenizer.json above all"
)
"""Of the tokenizer's library: it is written in Rust, and its panics are no Exception."""


class MedftError(Exception):
    """User input cannot be used: one sentence for each problem."""

    is_shown_elsewhere: bool | None = None
    """Whether another process of the run shows a sentence; None if processes cannot agree."""

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


class Stopped(BaseException):
    """A signal ends the command; like KeyboardInterrupt, no library shall catch it."""

    def __init__(self, number: signal.Signals, *, at_once: bool = False) -> None:
        """Of a signal; `at_once` where nothing more shall be saved."""
        super().__init__(number.name)
        self.number = number
        self.at_once = at_once


class NothingToDo(Exception):
    """What was asked for is done already; its text says where the result is."""


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
    """The exit code: 0 done, 2 bad input, 128 and its number where a signal ended the command.

    NothingToDo is shown as its sentence, with exit code 0, and a MedftError as its sentences, once,
    by rank 0 or the process that raised it first; with `--debug` in argv the error is raised with
    its traceback instead. Any other exception is a bug of ours and is raised, but for a disk that
    is full, and a panic of the tokenizer's library, which only its files can cause.

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
        if _is_shown(error):
            for problem in error.problems:
                _show(f"error: {problem}")
        return EXIT_BAD_INPUT
    except Stopped as stop:
        return EXIT_SIGNAL + stop.number
    except NothingToDo as done:
        if _is_first():
            _show(str(done))
    except KeyboardInterrupt:
        return EXIT_SIGNAL + signal.SIGINT
    except BaseException as error:
        sentence = _no_bug_of_ours(error)
        if debug or sentence is None:
            raise
        _show(f"error: {sentence}")
        return EXIT_BAD_INPUT
    return 0


def _is_shown(error: MedftError) -> bool:
    """Whether this process shows an error: the first that had one, or rank 0 what all have."""
    if error.is_shown_elsewhere is not None:
        return not error.is_shown_elsewhere
    return _is_first()


def _no_bug_of_ours(error: BaseException) -> str | None:
    """The sentence of an exception that only the user's files or disk can cause, else None."""
    if type(error).__name__ == "PanicException":
        return _PANIC.format(str(error))
    if is_disk_full(error):
        return full_disk.sentence(named_file(error) or "all that this command writes")
    return None


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


def _is_first() -> bool:
    """Whether this process is rank 0 of its launch, or alone."""
    return os.environ.get("RANK", "0") == "0" or "WORLD_SIZE" not in os.environ


def _show(sentence: str) -> None:
    with suppress(OSError):  # it is a file on a full disk
        sys.stderr.write(f"medft: {printable(sentence)}\n")
