"""The loss of a whole batch, and its gradient, at the activation memory of one micro-batch.

The embeddings of all micro-batches of all processes are computed without grad and compared with
each other. That gives the loss and its derivative by every embedding, after which each micro-batch
is computed once more, with grad, and passes its part on to the weights.

Source: gradient caching, arXiv:2101.06983, sections 3.2 and 3.3.

Shape letters in this file:
    n  images and as many texts of a micro-batch
    D  embedding width
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from accelerate import PartialState
from torch import Tensor

from medft.errors import RunError
from medft.siglip.distributed import gather_rows
from medft.siglip.loss import Gradients, Pairs, unit

REPLAY_TOLERANCE = 1e-2
"""Length of the difference between an embedding of length 1 and its replay. Equal operations on
equal inputs give equal bits, but for kernels that sum in any order: a bfloat16 step in every entry
is 4e-3. Another dropout mask is more as soon as the adapter does anything."""


@contextmanager
def random_numbers_again(device: torch.device) -> Iterator[None]:
    """Random numbers that are drawn in the block are drawn again after it."""
    devices = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(devices=devices, device_type=device.type if devices else "cuda"):
        yield


@dataclass(frozen=True, kw_only=True, slots=True)
class Share:
    """What a micro-batch has to do with the loss of the whole batch."""

    loss: Tensor
    """Of the whole batch."""

    images: Tensor
    """[n, D] of length 1, as the loss was computed from."""

    texts: Tensor
    """[n, D] of length 1, as the loss was computed from."""

    by_images: Tensor
    """[n, D], what each image's embedding is to be moved by."""

    by_texts: Tensor
    """[n, D], what each text's embedding is to be moved by."""

    by_scale: Tensor
    """Of the shape of the parameter; zero but in the last micro-batch."""

    by_bias: Tensor
    """Of the shape of the parameter; zero but in the last micro-batch."""

    def loss_of(
        self, images: Tensor, texts: Tensor, logit_scale: Tensor, logit_bias: Tensor
    ) -> Tensor:
        """The loss of the whole batch, whose backward pass adds this micro-batch's gradient.

        Args:
            images: [n, D] with grad, computed again as they were the first time.
            texts: [n, D] with grad, computed again as they were the first time.
            logit_scale: the parameter itself.
            logit_bias: the parameter itself.

        Raises:
            RunError: the embeddings are others than the first time.
        """
        images, texts = unit(images), unit(texts)
        for now, then in ((images, self.images), (texts, self.texts)):
            gap = (now.detach() - then).norm(dim=-1).max()
            if gap > REPLAY_TOLERANCE:
                raise RunError(
                    f"expected the same embeddings when a micro-batch is computed again, they "
                    f"differ by {gap:.1e}: something draws random numbers that are not replayed; "
                    f"write contrastive.exact_batch: false, and report this"
                )
        carrier = (images * self.by_images).sum() + (texts * self.by_texts).sum()
        carrier = carrier + (logit_scale * self.by_scale + logit_bias * self.by_bias).sum()
        return self.loss + (carrier - carrier.detach())


def share_out(
    micro_batches: Sequence[Pairs],
    gradients_of: Callable[[Pairs], Gradients],
    *,
    across_processes: bool = True,
    divided_by: int = 1,
) -> list[Share]:
    """The shares of this process's micro-batches in the loss of all of them together.

    The gradients that the shares leave add up to that of the whole loss over the micro-batches of
    a process, and are to be averaged over the processes, as DistributedDataParallel and DeepSpeed
    do.

    Args:
        micro_batches: of any sizes; their embeddings need no grad.
        gradients_of: the loss of a whole batch, such as `loss_gradients`.
        across_processes: whether the other processes' micro-batches belong to the batch.
        divided_by: what the training loop divides the loss of each micro-batch by.
    """
    whole = [torch.cat(parts).detach() for parts in zip(*micro_batches, strict=True)]
    own = slice(0, len(whole[0]))
    world = 1
    if across_processes:
        whole, own = gather_rows(whole)
        world = PartialState().num_processes
    found = gradients_of(Pairs(*whole))
    sizes = [len(part.images) for part in micro_batches]
    by_images, by_texts = (
        (part[own] * world * divided_by).split(sizes) for part in (found.images, found.texts)
    )
    last = len(micro_batches) - 1
    return [
        Share(
            loss=found.loss,
            images=unit(part.images.detach()),
            texts=unit(part.texts.detach()),
            by_images=by_images[index],
            by_texts=by_texts[index],
            by_scale=found.logit_scale * divided_by * (index == last),
            by_bias=found.logit_bias * divided_by * (index == last),
        )
        for index, part in enumerate(micro_batches)
    ]
