"""Signals that end a training: Ctrl-C, SIGTERM, SIGHUP and SIGUSR1, on one process or several."""

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch
from torch import distributed

from medft.errors import Stopped

STOPPING = (signal.SIGHUP, signal.SIGINT, signal.SIGUSR1, signal.SIGTERM)
"""Signals that end a training after it has saved."""

PASSED_ON = "MEDFT_SIGNALS_PASSED_ON"
"""Environment variable: a parent passes each signal on once, and no launcher repeats it."""

_SECONDS_OF_ONE = 2.0
"""Within which a launcher that got Ctrl-C from the terminal repeats it to its processes."""


def listened_to() -> list[signal.Signals]:
    """The stopping signals, but for those that were ignored before, as nohup ignores SIGHUP."""
    return [number for number in STOPPING if signal.getsignal(number) is not signal.SIG_IGN]


class StopSignals:
    """Whether a signal has asked this process to stop, and when it stops.

    A signal stops the process at once while nothing is trained, and where it is deferred as soon
    as all processes agree. A second Ctrl-C stops it there at once. While a process ends, further
    signals leave it the time.
    """

    def __init__(self) -> None:
        self._first: signal.Signals | None = None
        self._first_at = 0.0
        self._defers = False
        self._listener = os.getpid()

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle the stopping signals while the block runs.

        Raises:
            Stopped: one arrived, and it is not deferred.
        """
        before = {number: signal.signal(number, self._handle) for number in listened_to()}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Note signals while the block runs, to be found by `raise_agreed`.

        Raises:
            Stopped: one has arrived before, or a second Ctrl-C in the block.
        """
        self._defers = True
        try:
            if self._first:  # a library caught what `listening` had raised
                raise Stopped(self._first)
            yield
        finally:
            self._defers = False

    def raise_agreed(self, device: torch.device) -> None:
        """Stop if a signal has arrived on any process; every process calls this.

        Args:
            device: of this process.

        Raises:
            Stopped: on every process, by the same signal.
        """
        number = int(self._first or 0)
        if distributed.is_initialized() and distributed.get_world_size() > 1:
            highest = torch.tensor(number, device=device)
            distributed.all_reduce(highest, op=distributed.ReduceOp.MAX)
            number = int(highest)
        if number:
            raise Stopped(signal.Signals(number))

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._listener:  # a worker, which ends with the process it works for
            return
        if self._first is None:
            self._first, self._first_at = signal.Signals(number), time.monotonic()
            if not self._defers:
                raise Stopped(self._first)
            _announce(self._first)
        elif number == signal.SIGINT and self._defers and not self._is_repeated():
            self._defers = False
            raise Stopped(signal.SIGINT, at_once=True)

    def _is_repeated(self) -> bool:
        has_agent = "TORCHELASTIC_RUN_ID" in os.environ and PASSED_ON not in os.environ
        return has_agent and time.monotonic() - self._first_at < _SECONDS_OF_ONE


def _announce(number: signal.Signals) -> None:
    """Say on rank 0 what follows; a terminal that was closed cannot be written to."""
    if os.environ.get("RANK", "0") == "0":
        line = f"\nmedft: {number.name}: saving after this step; Ctrl-C stops at once, unsaved\n"
        with contextlib.suppress(OSError):
            os.write(2, line.encode())  # a handler must not use a stream that may be in use
