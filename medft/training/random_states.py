"""The states of all random number generators of a process, kept and put back."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


class RandomStates:
    """The states of Python's, numpy's and torch's generators, as they are when this is created."""

    def __init__(self) -> None:
        self._of_python: tuple[Any, ...] = random.getstate()
        self._of_numpy = np.random.get_state()
        self._of_torch = torch.get_rng_state()
        self._on_gpu = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []

    def put_back(self) -> None:
        """Have the same numbers come again."""
        random.setstate(self._of_python)
        np.random.set_state(self._of_numpy)
        torch.set_rng_state(self._of_torch)
        if self._on_gpu:
            torch.cuda.set_rng_state_all(self._on_gpu)


@contextmanager
def same_numbers_after() -> Iterator[None]:
    """A block whose random numbers come again after it, however many it draws."""
    before = RandomStates()
    try:
        yield
    finally:
        before.put_back()
