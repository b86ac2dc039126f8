"""What becomes of a run whose data breaks meanwhile, or a process that reads it.

All processes stop together, at one batch. One that stopped alone would leave the others waiting for
it, and no checkpoint could be saved, which takes all of them.
"""

import re
import signal
import threading
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import distributed
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from medft.errors import DataError
from medft.full_disk import causes
from medft.training.random_states import RandomStates

_LOST_WORKER = re.compile(r"DataLoader worker \(pid(\(s\))? [\d, ]+\) (exited|is killed)")


class BrokenBatchError(DataError):
    """A batch could not be read, on this process or on another."""


def lost_worker(error: BaseException, arguments: TrainingArguments) -> str | None:
    """A sentence, if an error says that a worker process of the dataloader is gone; else None.

    Args:
        error: as the dataloader raised it.
        arguments: the trainer's.
    """
    workers = arguments.dataloader_num_workers
    is_cut_off = isinstance(error, ConnectionError | EOFError) and workers
    if not is_cut_off and not any(_LOST_WORKER.match(str(cause)) for cause in causes(error)):
        return None
    return (
        f"expected the {workers} worker processes that prepare batches to go on, one ended, as "
        f"where the system or its /dev/shm runs out of memory: write "
        f"train.dataloader_num_workers={workers // 2}"
        f"{' train.dataloader_prefetch_factor=null' * (workers == 1)}"
    )


def fetch_together(batches: Iterator[Any], count: int, arguments: TrainingArguments) -> list[Any]:
    """The next batches; every process calls this, and takes part in one reduction of a number.

    Args:
        batches: of this process.
        count: how many; fewer come out where they end.
        arguments: the trainer's.

    Raises:
        BrokenBatchError: on every process, with the sentences of those that could not read, or
            whose worker processes were killed.
    """
    found: list[Any] = []
    problems: list[str] = []
    try:
        found.extend(islice(batches, count))
    except DataError as error:
        problems = error.problems
    except (RuntimeError, ConnectionError, EOFError) as error:
        if (problem := lost_worker(error, arguments)) is None:
            raise
        problems = [problem]
    finally:
        # torch's handler raises wherever the process is when a worker ends, in a save for one;
        # without it the dataloader finds out itself
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    if distributed.is_initialized() and distributed.get_world_size() > 1:
        is_broken = torch.tensor(len(problems), device=arguments.device)
        distributed.all_reduce(is_broken)
        problems = gather_object(problems) if is_broken else []
    if problems:
        raise BrokenBatchError(*dict.fromkeys(problems))
    return found


class WatchedLoader:
    """A dataloader whose batches are fetched one by one by a function of the trainer."""

    def __init__(self, loader: Any, fetch: Callable[[Iterator[Any], int], list[Any]]) -> None:
        self._loader = loader
        self._fetch = fetch

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Any]:
        batches = iter(self._loader)
        while found := self._fetch(batches, 1):
            yield from found


class EpochStartCallback(TrainerCallback):
    """Keeps the random numbers from before an epoch's dataloader drew its own.

    A checkpoint of the last step before an epoch is saved before that; where it is saved later,
    they are put back, so that a resumed run draws the same ones.
    """

    def __init__(self) -> None:
        self._step = -1
        self._states: RandomStates | None = None

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Keep them."""
        self._step, self._states = state.global_step, RandomStates()

    def put_back(self, step: int) -> None:
        """Put them back if no step of the epoch was done at `step`."""
        if step == self._step and self._states:
            self._states.put_back()
