"""Tensors gathered from all processes of a run."""

from collections.abc import Sequence

import torch
from accelerate import PartialState
from accelerate.utils import gather, pad_across_processes
from torch import Tensor


def gather_rows(tensors: Sequence[Tensor]) -> tuple[list[Tensor], slice]:
    """The rows of all processes in order of rank, and the slice of this process's rows.

    Args:
        tensors: [n, ...] each; n is equal for all tensors but may differ between processes, the
            other sizes are equal everywhere.
    """
    own = PartialState().process_index
    counts = gather(torch.tensor([len(tensors[0])], device=tensors[0].device)).tolist()
    whole = []
    for tensor in tensors:
        blocks = gather(pad_across_processes(tensor.contiguous())).split(max(counts))
        whole.append(torch.cat([b[:count] for b, count in zip(blocks, counts, strict=True)]))
    start = sum(counts[:own])
    return whole, slice(start, start + counts[own])
