"""The lock of a run directory: one run at a time has it, whichever host it runs on.

A file inside the directory names the process that has it. Whether that process lives is looked up
where it can be seen; a lock that a Slurm job kept over a requeue is the job's own. Of any other the
modification time is watched, which its process renews every HEARTBEAT seconds: the file's times are
compared with each other, never with a clock, since two hosts may have two.
"""

import contextlib
import fcntl
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, BinaryIO

from pydantic import BaseModel, ConfigDict, Field

from medft.errors import RunError
from medft.foreign import open_regular
from medft.provenance import now

LOCK_FILE = ".lock"
"""Name in the run directory; it is gone once the run has ended."""

HEARTBEAT = 30.0
"""Seconds after which the file of a lock that is held gets a new modification time."""

WATCH = 120.0
"""Seconds without a new modification time after which a lock is stale."""

LOOK = 1.0
"""Seconds between two looks at a file that is watched, or was just written."""

MOMENT = 2.0
"""Seconds in which a lock that is being written can be read."""

_MAX_BYTES = 2**16

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_NAMESPACE = Path("/proc/self/ns/pid")

logger = logging.getLogger(__name__)


class Holder(BaseModel):
    """The process that has a lock."""

    model_config = ConfigDict(strict=True, frozen=True)

    host: str
    boot: str | None
    """Of the kernel, which another boot or machine does not share."""

    namespace: str | None
    """In which its number counts; each container has its own."""

    pid: Annotated[int, Field(ge=1, lt=2**31)]
    begun: str | None
    """When the process began, in the kernel's ticks, since numbers come again."""

    started: str
    job: str | None
    """Of Slurm; a job that is requeued keeps its number."""

    nonce: str
    """Of one lock alone."""

    @classmethod
    def this_process(cls) -> "Holder":
        """The process that calls."""
        return cls(
            host=socket.gethostname(),
            boot=_BOOT_ID.read_text().strip() if _BOOT_ID.is_file() else None,
            namespace=os.readlink(_NAMESPACE) if _NAMESPACE.is_symlink() else None,
            pid=os.getpid(),
            begun=_begun(os.getpid()),
            started=now(),
            job=os.environ.get("SLURM_JOB_ID"),
            nonce=uuid.uuid4().hex,
        )

    @classmethod
    def named_in(cls, content: bytes) -> "Holder | None":
        """The process that a lock's content names; None if it names none."""
        try:
            return cls.model_validate_json(content)
        except ValueError:
            return None

    def is_visible_to(self, other: "Holder") -> bool:
        """Whether the number means the same process to both."""
        own = (self.host, self.boot, self.namespace)
        return own == (other.host, other.boot, other.namespace)

    def lives(self) -> bool:
        """Whether it has not ended; for a process that is visible."""
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            pass  # it is another user's
        return _begun(self.pid) in (None, self.begun)

    def refusal(self, folder: Path) -> RunError:
        """The error for another run in its folder."""
        job = f" (Slurm job {self.job})" if self.job else ""
        return RunError(
            f"expected no other run in {folder}, process {self.pid} on {self.host}{job} has "
            f"trained there since {self.started}: wait for it or stop it, or choose another "
            f"train.output_dir"
        )


def _begun(pid: int) -> str | None:
    """When a process began; empty if it has ended and nobody took note, None if it is not known."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return "" if fields[0] in "ZX" else fields[19]


class RunLock:
    """A lock that this process may hold; a copy of it in a forked process holds nothing."""

    def __init__(self, run: Path) -> None:
        """Make a lock, not yet held, of a run directory, which may be missing."""
        self.path = run / LOCK_FILE
        self._content: bytes | None = None  # of the file, while it is held
        self._pid = os.getpid()
        self._made: list[Path] = []
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="run lock", daemon=True)

    @property
    def lost(self) -> bool:
        """Whether another run took the lock, or its file is gone; False if it was never held."""
        if self._content is None:
            return False
        try:
            return _read(self.path) != self._content
        except FileNotFoundError:
            return True
        except OSError:  # what does not answer says nothing
            return False

    def check(self) -> None:
        """Raise if the lock was held and is lost, before anything is written into its folder.

        Raises:
            RunError: another run took it.
        """
        if self.lost:
            raise RunError(
                f"expected {self.path} to be this run's, another run has taken it, as after "
                f"minutes in which this process stood still: its checkpoints count, start this "
                f"run again in another folder"
            )

    def take(self) -> None:
        """Hold the lock until `close`; its folder is made if it is missing.

        Raises:
            RunError: another process holds it, or its file cannot be written.
        """
        content = Holder.this_process().model_dump_json(indent=2).encode() + b"\n"
        self._content = content
        try:
            while True:
                self._made += _make(self.path.parent)
                if self._create(content) or self._take_over(content):
                    break
            self._thread.start()
        except BaseException as error:
            self.close()
            if not isinstance(error, OSError):
                raise
            raise RunError(
                f"expected to write {self.path}, by which other runs know that this one has the "
                f"folder, it cannot be ({error.strerror or error}): make room, or choose another "
                f"train.output_dir"
            ) from error

    def close(self) -> None:
        """Give the lock up, if it is held; folders that were made for it go where it lay alone."""
        if self._content is None or os.getpid() != self._pid:
            return
        self._closed.set()
        if self._thread.ident:
            self._thread.join()
        with contextlib.suppress(OSError), _alone(self.path) as file:
            if file.read() == self._content:
                self.path.unlink()
        self._content = None
        for folder in reversed(self._made):
            with contextlib.suppress(OSError):  # it holds something
                folder.rmdir()

    def _create(self, content: bytes) -> bool:
        """Make the file; False if there is one, or the folder has just been removed."""
        flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC
        try:
            descriptor = os.open(self.path, flags, 0o666)
        except (FileExistsError, FileNotFoundError):
            return False
        try:
            with os.fdopen(descriptor, "wb", buffering=0) as file:
                file.write(content)
        except OSError:
            self.path.unlink(missing_ok=True)
            raise
        return True

    def _take_over(self, content: bytes) -> bool:
        """Take a lock that is stale; False if it changed meanwhile, or is gone."""
        if self.path.is_symlink():
            raise OSError(None, f"{self.path.name} is a link")
        try:
            seen = _settled(self.path)
            _check_stale(self.path, seen)
            with _alone(self.path) as file:
                if file.read() != seen:
                    return False
                file.seek(0)
                file.write(content)
                file.truncate()
            time.sleep(LOOK)  # until another one's write would show, where files cannot be locked
            return _read(self.path) == content
        except FileNotFoundError:
            return False

    def _beat(self) -> None:
        while not self._closed.wait(HEARTBEAT):
            if self.lost:
                logger.error("%s is not this run's any more, another one may write here", self.path)
                return
            with contextlib.suppress(OSError):
                os.utime(self.path)


def refuse_visible_run(run: Path) -> None:
    """Refuse a run directory, which may be missing, without taking its lock.

    Raises:
        RunError: a process that can be seen from here holds it.
    """
    try:
        holder = Holder.named_in(_read(run / LOCK_FILE))
    except OSError:
        return
    if holder and holder.is_visible_to(Holder.this_process()) and holder.lives():
        raise holder.refusal(run)


def _check_stale(path: Path, seen: bytes) -> None:
    """Raise the refusal if the process that a lock's content names may live."""
    holder, own = Holder.named_in(seen), Holder.this_process()
    if holder and holder.is_visible_to(own):
        is_held = holder.lives()
    elif holder and holder.job and holder.job == own.job:
        is_held = False
    else:
        is_held = _is_renewed(path, holder) and _settled(path) == seen  # else it is another's now
    if is_held and holder:
        raise holder.refusal(path.parent)
    if is_held:
        raise RunError(
            f"expected no other run in {path.parent}, its {path.name} is renewed by one: wait for "
            f"it or stop it, or choose another train.output_dir"
        )


def _is_renewed(path: Path, holder: Holder | None) -> bool:
    """Whether the file of a lock gets a new modification time within WATCH seconds."""
    whose = f"process {holder.pid} on {holder.host}" if holder else "an unknown process"
    logger.info(
        "%s is the lock of %s: watching for up to %g s whether it still runs", path, whose, WATCH
    )
    before, end = _modified(path), time.monotonic() + WATCH
    while time.monotonic() < end:
        time.sleep(LOOK)
        if _modified(path) != before:
            return True
    return False


def _modified(path: Path) -> int:
    with open_regular(path, max_bytes=_MAX_BYTES) as file:  # a network's file system looks again
        return os.fstat(file.fileno()).st_mtime_ns


def _settled(path: Path) -> bytes:
    """The content of a lock, once it names a process, or will not."""
    end = time.monotonic() + MOMENT
    while Holder.named_in(content := _read(path)) is None and time.monotonic() < end:
        time.sleep(MOMENT / 40)
    return content


def _read(path: Path) -> bytes:
    with open_regular(path, max_bytes=_MAX_BYTES) as file:
        return file.read()


@contextmanager
def _alone(path: Path) -> Iterator[BinaryIO]:
    """The file at a path, open to be changed in place, while no other process has it so.

    Raises:
        FileNotFoundError: it is gone, or another file is in its place.
        OSError: it is a link, or has another name elsewhere.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "r+b") as file:
        with contextlib.suppress(OSError):  # the file system has no locks
            fcntl.flock(file, fcntl.LOCK_EX)
        state = os.fstat(descriptor)
        if state.st_nlink > 1:
            raise OSError(None, f"{path.name} has another name elsewhere")
        if not os.path.samestat(state, path.stat()):
            raise FileNotFoundError
        yield file


def _make(folder: Path) -> list[Path]:
    """Make a folder and those above it; returns the ones that were missing, from the top."""
    made = []
    for path in reversed([path for path in (folder, *folder.parents) if not path.exists()]):
        with contextlib.suppress(FileExistsError):
            path.mkdir()
            made.append(path)
    return made
