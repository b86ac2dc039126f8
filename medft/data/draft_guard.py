"""A process that removes a draft if this one is killed, which cannot do so itself then."""

import multiprocessing
import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def without_interrupts() -> Iterator[None]:
    """Keep Ctrl-C from the processes that the block starts; this one gets it after the block."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def removed_if_killed(draft: Path) -> Iterator[None]:
    """Let another process remove a folder if this one is killed inside the block.

    It ends after all processes that this one starts within the block and that end with it, so that
    none of them still writes. Until then it keeps what this one holds, such as a lock.

    Args:
        draft: the folder; one that has its path later is left.
    """
    guard = multiprocessing.get_context("fork").Process(target=_wait, args=(draft,), daemon=True)
    with without_interrupts():
        guard.start()
    try:
        yield
    finally:
        guard.kill()
        guard.join()


def _wait(draft: Path) -> None:
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_IGN)  # the one that is guarded decides
    parent = multiprocessing.parent_process()
    assert parent is not None
    with suppress(OSError):
        opened = os.open(draft, os.O_RDONLY | os.O_CLOEXEC)
        parent.join()
        if os.path.samestat(os.fstat(opened), draft.stat()):
            shutil.rmtree(draft, ignore_errors=True)
