"""Setup of a command's process: logging, seeds and a clean shutdown."""

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from medft.masking import log_handler


@contextmanager
def process_setup(*, seed: int | None = None, quiet: bool = False) -> Iterator[None]:
    """Set up logging and seeds for the block, and destroy the process group after it.

    Args:
        seed: for all random number generators of the process; None leaves them unchanged.
        quiet: show warnings only.
    """
    import datasets
    import torch
    import transformers

    is_first = os.environ.get("RANK", "0") == "0"
    logging.basicConfig(handlers=[log_handler()])
    level = logging.WARNING if quiet else logging.INFO
    logging.getLogger("medft").setLevel(level if is_first else logging.ERROR)
    # meant for other libraries, not for the user
    warnings.filterwarnings("ignore", category=FutureWarning)
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
        datasets.disable_progress_bars()
    if "MEDFT_THREADS" in os.environ:
        torch.set_num_threads(int(os.environ["MEDFT_THREADS"]))
    if seed is not None:
        transformers.set_seed(seed)
    try:
        yield
    finally:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def wait_for_everyone() -> None:
    """Return once all processes of the run have called this."""
    from accelerate import PartialState

    PartialState().wait_for_everyone()
