"""The process that a command runs in: logging, seeds, and an orderly end."""

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def process_setup(*, seed: int | None = None, quiet: bool = False) -> Iterator[None]:
    """Logging, seeds, and an orderly end of the process group around a command's work.

    Args:
        seed: of all random numbers of the process; None leaves them alone.
        quiet: show warnings only.
    """
    import datasets
    import torch
    import transformers

    is_first = os.environ.get("RANK", "0") == "0"
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    level = logging.WARNING if quiet else logging.INFO
    logging.getLogger("medft").setLevel(level if is_first else logging.ERROR)
    # one library's words to another, not to the user
    warnings.filterwarnings("ignore", category=FutureWarning)
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
        datasets.disable_progress_bars()
    if seed is not None:
        transformers.set_seed(seed)
    try:
        yield
    finally:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def wait_for_everyone() -> None:
    """Return when all processes of the run have come here."""
    from accelerate import PartialState

    PartialState().wait_for_everyone()
