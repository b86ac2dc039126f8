"""What an error says of a disk that is full, whichever library met it.

Most raise an OSError with its number. safetensors and the tokenizers, written in Rust, have the
system's words alone; torch.save has neither, so the disk is asked.
"""

import errno
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryFile

_NUMBERS = (errno.ENOSPC, errno.EDQUOT)

_WORDS = re.compile("No space left on device|Disk quota exceeded")

_SHARED_MEMORY = re.compile("shared memory|/torch_|/dev/shm")
"""What has the same words and lies in memory."""

_OF_TORCH_SAVE = re.compile("inline_container|PytorchStreamWriter|iostream error")

_PROBE_BYTES = 2**20


def causes(error: BaseException) -> Iterator[BaseException]:
    """An error, and those that it came from."""
    current: BaseException | None = error
    while current is not None:
        yield current
        hidden = None if current.__suppress_context__ else current.__context__
        current = current.__cause__ or hidden


def is_disk_full(error: BaseException, folder: Path | None = None) -> bool:
    """Whether an error came from a disk, or a quota of it, that is full.

    Args:
        error: as it was caught.
        folder: that was written to, into which nothing fits any more if torch.save failed there.
    """
    for cause in causes(error):
        number = getattr(cause, "errno", None)
        if number in _NUMBERS:
            return True
        text = str(cause)
        is_own = type(cause).__module__.startswith("medft.")  # it may quote a row
        if number is None and not is_own and _WORDS.search(text):
            return not _SHARED_MEMORY.search(text)
        if folder and isinstance(cause, RuntimeError) and _OF_TORCH_SAVE.search(text):
            return not _has_room(folder)
    return False


def sentence(path: Path | str) -> str:
    """What a user is told who may start again: no room for a file or folder.

    Args:
        path: of it, or what else it is called.
    """
    return f"expected room to write {path}, its disk is full: make room, and start again"


def named_file(error: BaseException) -> str | None:
    """The file that the system could not write, where the error names it."""
    for cause in causes(error):
        if isinstance(cause, OSError) and cause.errno in _NUMBERS:
            return cause.filename2 or cause.filename
    return None


def _has_room(folder: Path) -> bool:
    existing = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
    with suppress(OSError), TemporaryFile(dir=existing) as file:
        file.write(os.urandom(_PROBE_BYTES))  # a file system may compress what is regular
        file.flush()
        os.fsync(file.fileno())
        return True
    return False
