"""What the processes of a run hold together."""

from collections.abc import Sequence

import torch
from accelerate import PartialState
from accelerate.utils import gather, pad_across_processes
from torch import Tensor


def gather_rows(tensors: Sequence[Tensor]) -> tuple[list[Tensor], slice]:
    """The rows of every process in order of their ranks, and where the own ones stand.

    Args:
        tensors: [n, ...] each, n the same for all of them but not for all processes; the other
            sizes are equal everywhere.
    """
    own = PartialState().process_index
    counts = gather(torch.tensor([len(tensors[0])], device=tensors[0].device)).tolist()
    whole = []
    for tensor in tensors:
        blocks = gather(pad_across_processes(tensor.contiguous())).split(max(counts))
        whole.append(torch.cat([b[:count] for b, count in zip(blocks, counts, strict=True)]))
    start = sum(counts[:own])
    return whole, slice(start, start + counts[own])
