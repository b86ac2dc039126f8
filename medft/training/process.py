"""Setup of a command's process: logging, seeds, threads and a clean shutdown."""

import functools
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path

from medft.errors import MedftError, RunError
from medft.masking import log_handler
from medft.training.signals import StopSignals

THREADS = "MEDFT_THREADS"
"""Environment variable: threads of torch on each process that trains."""

_WAIT_FOR_STORE = timedelta(seconds=5)
"""For the store in which processes agree who shows an error."""

_CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")
"""Microseconds of CPU time and of the period they are for, in a container; else `max`."""


@contextmanager
def process_setup(*, level: int = logging.INFO) -> Iterator[None]:
    """Set up logging for the block, and destroy the process group after it.

    Args:
        level: the lowest of log lines that are shown; from ERROR on, warnings of libraries are not.
    """
    import torch

    # meant for other libraries, not for the user
    warnings.filterwarnings("ignore", category=FutureWarning)
    if not torch.accelerator.is_available():
        # else DeepSpeed says in a launcher, to standard output, that it has looked for one
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        with _logging_from(level if os.environ.get("RANK", "0") == "0" else logging.ERROR):
            yield
    except MedftError as error:
        error.is_shown_elsewhere = another_ended_first()
        raise
    finally:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


@contextmanager
def training_setup(seed: int) -> Iterator[StopSignals]:
    """Set up the process of a training for the block: `process_setup`, seeds, threads and signals.

    Args:
        seed: for all random number generators of the process.

    Returns:
        The signals that are listened to while the block runs.

    Raises:
        RunError: MEDFT_THREADS is no number of threads.
        Stopped: a signal ended the training.
    """
    import torch
    import transformers

    signals = StopSignals()
    with process_setup(), signals.listening():
        transformers.set_seed(seed)
        torch.set_num_threads(num_threads())
        # else Accelerate sets its own number where no launcher has set one
        os.environ["OMP_NUM_THREADS"] = str(torch.get_num_threads())
        yield signals


@functools.cache
def another_ended_first() -> bool | None:
    """Whether another process of the run has called this before; None if that cannot be known."""
    from torch import distributed

    if not (distributed.is_available() and distributed.is_initialized()):
        return None
    address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        store = distributed.TCPStore(  # type: ignore[attr-defined]
            *address, is_master=False, timeout=_WAIT_FOR_STORE
        )
        return store.add("medft/ended", 1) > 1
    except RuntimeError:  # the process that holds it is gone
        return None


@contextmanager
def _logging_from(level: int) -> Iterator[None]:
    """Show medft's log lines from a level on, and rank 0's progress bars below them on a terminal.

    From ERROR on, warnings of transformers are not shown either.
    """
    import datasets
    import transformers
    from tqdm.contrib.logging import logging_redirect_tqdm

    logging.basicConfig(handlers=[log_handler()])
    medft, of_transformers = logging.getLogger("medft"), transformers.utils.logging
    before = medft.level, of_transformers.get_verbosity()
    medft.setLevel(level)
    if level >= logging.ERROR:
        of_transformers.set_verbosity_error()
    has_bars = sys.stderr.isatty() and os.environ.get("RANK", "0") == "0"
    if not has_bars:
        of_transformers.disable_progress_bar()
        datasets.disable_progress_bars()
    try:
        with logging_redirect_tqdm() if has_bars else nullcontext():
            yield
    finally:
        medft.setLevel(before[0])
        of_transformers.set_verbosity(before[1])


def num_threads() -> int:
    """Threads of torch on this process: `$MEDFT_THREADS`, else its part of the cores.

    OMP_NUM_THREADS is not read: launchers set it, each to another number, and sums in float32
    depend on the number.

    Raises:
        RunError: MEDFT_THREADS is no number of threads.
    """
    given = os.environ.get(THREADS)
    if given is None:
        return max(_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")), 1)
    if not given.isdecimal() or int(given) < 1:
        raise RunError(f"expected a number of threads in {THREADS}, got {given!r}: correct it")
    return int(given)


def _cores() -> int:
    """CPU cores that this process may use, as its affinity and its container's quota say."""
    has_affinity = hasattr(os, "sched_getaffinity")  # not on every system
    cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    quota, _, period = (
        _CPU_QUOTA.read_text().partition(" ") if _CPU_QUOTA.is_file() else ("max",) * 3
    )
    return cores if quota == "max" else min(cores, max(int(quota) // int(period), 1))


def wait_for_everyone() -> None:
    """Return once all processes of the run have called this."""
    from accelerate import PartialState

    PartialState().wait_for_everyone()
