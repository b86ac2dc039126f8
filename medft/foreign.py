"""What somebody else may have made, read within bounds of size, depth, time and memory."""

import json
import math
import os
import resource
import signal
import stat
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, BinaryIO

MAX_JSON_BYTES = 2**26
"""Bytes of a JSON file at most; a log history of a million steps has as many."""

MAX_JSON_DEPTH = 64
"""Lists and objects in each other at most."""

MAX_PATH_BYTES = 4095
"""Bytes of a path at most, as on Linux."""

MAX_NAME_BYTES = 255
"""Bytes of a file name at most, as on Linux."""


class UnusableFileError(OSError):
    """A file that is not read: no_regular_file or too_large."""

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(None, detail)
        self.kind = kind
        self.detail = detail


def open_regular(path: str | Path, *, max_bytes: int) -> BinaryIO:
    """A regular file, opened to read its bytes.

    It is opened without waiting, so that a pipe cannot stop the command, and looked at once it is
    open, so that nothing can take its place in between.

    Args:
        path: of the file.
        max_bytes: its size at most.

    Raises:
        UnusableFileError: it is a folder, a pipe or a device, or too large.
        OSError: it is missing, or may not be read.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    state = os.fstat(descriptor)
    problem = None
    if not stat.S_ISREG(state.st_mode):
        detail = f"{os.path.basename(path)} is a folder, a pipe or a device"
        problem = UnusableFileError("no_regular_file", detail)
    elif state.st_size > max_bytes:
        detail = f"{os.path.basename(path)} has {state.st_size} bytes, at most {max_bytes} are read"
        problem = UnusableFileError("too_large", detail)
    if problem:
        os.close(descriptor)
        raise problem
    return os.fdopen(descriptor, "rb")


def read_json(path: Path, *, strict: bool = True) -> Any:
    """The content of a JSON file in UTF-8.

    Args:
        path: of the file.
        strict: whether NaN, infinities and a key that stands twice in an object are refused.

    Raises:
        OSError: it is missing, may not be read, is not regular, or too large.
        ValueError: it is not JSON, or nested too deeply.
    """
    with open_regular(path, max_bytes=MAX_JSON_BYTES) as file:
        text = file.read().decode("utf-8")
    try:
        content = json.loads(text, **(_STRICT if strict else {}))
    except RecursionError as error:
        raise ValueError(_TOO_DEEP) from error
    _check_depth(content)
    return content


_TOO_DEEP = f"it is nested more than {MAX_JSON_DEPTH} deep"


class RepeatedKeyError(ValueError):
    """A key stands twice in an object of JSON, which the library would take the last one of."""


def object_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, as `object_pairs_hook`.

    Raises:
        RepeatedKeyError: a key stands twice.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        (twice, _), *_ = Counter(key for key, _ in pairs).most_common(1)
        raise RepeatedKeyError(f"the key {twice[:100]!r} stands twice")
    return found


def _constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON")


_STRICT: dict[str, Any] = {"object_pairs_hook": object_of, "parse_constant": _constant}


def _check_depth(content: Any) -> None:
    level = [content]
    for _ in range(MAX_JSON_DEPTH + 1):
        level = [value for value in level if isinstance(value, dict | list)]
        if not level:
            return
        inner = [value.values() if isinstance(value, dict) else value for value in level]
        level = [value for values in inner for value in values]
    raise ValueError(_TOO_DEEP)


def path_problem(text: str) -> str | None:
    """Why a text cannot be a path; None if it can."""
    if "\0" in text:
        return "a path without NUL characters"
    if not _is_unicode(text):
        return "a path whose bytes are UTF-8"
    names = [os.fsencode(name) for name in text.split("/")]
    if sum(map(len, names)) + len(names) > MAX_PATH_BYTES or max(map(len, names)) > MAX_NAME_BYTES:
        return f"a path of at most {MAX_PATH_BYTES} bytes, with names of at most {MAX_NAME_BYTES}"
    return None


def at_home(text: str) -> Path:
    """The path that a record names; `~` is the home of its reader, never that of another user."""
    return Path(text).expanduser() if text.split("/")[0] == "~" else Path(text)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


@contextmanager
def bounded_time(seconds: float) -> Iterator[None]:
    """A block that raises once it has run for too long.

    It interrupts Python code and the module `re`; a library's compiled code ends first. Threads
    other than the main one have no limit, since they get no signals.

    Args:
        seconds: at most.

    Raises:
        TimeoutError: the block took longer.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"it took more than {math.ceil(seconds)} s")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


@contextmanager
def bounded_memory(max_bytes: int) -> Iterator[None]:
    """A block in which the process may map so much more memory; on Linux alone.

    Args:
        max_bytes: at most.

    Raises:
        MemoryError: the block, or another thread meanwhile, asked for more.
    """
    statm = Path("/proc/self/statm")
    if not statm.exists():
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    bound = int(statm.read_text().split()[0]) * resource.getpagesize() + max_bytes
    others = [limit for limit in (soft, hard) if limit != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_AS, (min([bound, *others]), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
