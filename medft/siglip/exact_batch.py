"""The exact batch loss and its gradient, at the activation memory of one micro-batch.

A caching pass computes the embeddings of all micro-batches of all processes without grad and
compares them with each other. This gives the batch loss and its gradient by every embedding. Each
micro-batch is then computed again, with grad, and passes its cached gradient on to the weights.

Source: gradient caching, arXiv:2101.06983, sections 3.2 and 3.3.

Shape letters in this file:
    n  images and as many texts of a micro-batch
    D  embedding width
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor

from medft.errors import RunError
from medft.siglip.distributed import gather_rows
from medft.siglip.loss import Gradients, Pairs, unit

REPLAY_TOLERANCE = 1e-2
"""Largest L2 distance between a unit embedding and its replay. Equal operations on equal inputs
give equal bits, except for kernels that sum in any order: one bfloat16 step in every entry is 4e-3.
Another dropout mask gives more as soon as the adapter has an effect."""

MicroBatch = Mapping[str, Any]
"""A batch from the collator: input_ids, pixel_values, group_ids."""


@contextmanager
def replay_rng(device: torch.device) -> Iterator[None]:
    """Restore the RNG state after the block, which makes its random numbers come again."""
    devices = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(devices=devices, device_type=device.type if devices else "cuda"):
        yield


@dataclass(frozen=True, kw_only=True, slots=True)
class CachedMicroBatch:
    """The cached part of one micro-batch: the batch loss and its gradients by the embeddings.

    The gradients are scaled as `cache_gradients` describes.
    """

    loss: Tensor
    """The batch loss, a scalar."""

    images: Tensor
    """[n, D] of unit norm, which the loss was computed from."""

    texts: Tensor
    """[n, D] of unit norm, which the loss was computed from."""

    grad_images: Tensor
    """[n, D] d(batch loss)/d(image embedding)."""

    grad_texts: Tensor
    """[n, D] d(batch loss)/d(text embedding)."""

    grad_scale: Tensor
    """d(batch loss)/d(logit_scale), of the parameter's shape; zero but in the last micro-batch."""

    grad_bias: Tensor
    """d(batch loss)/d(logit_bias), of the parameter's shape; zero but in the last micro-batch."""

    def loss_of(
        self, images: Tensor, texts: Tensor, logit_scale: Tensor, logit_bias: Tensor
    ) -> Tensor:
        """The batch loss; its backward pass adds this micro-batch's part of the gradient.

        Args:
            images: [n, D] with grad, computed as in the caching pass.
            texts: [n, D] with grad, computed as in the caching pass.
            logit_scale: the parameter itself.
            logit_bias: the parameter itself.

        Raises:
            RunError: the embeddings differ from those of the caching pass.
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
        carrier = (images * self.grad_images).sum() + (texts * self.grad_texts).sum()
        carrier = carrier + (logit_scale * self.grad_scale + logit_bias * self.grad_bias).sum()
        return self.loss + (carrier - carrier.detach())


class ExactBatch:
    """The micro-batches of one optimizer step of a process, compared as one batch.

    Each micro-batch carries a reference to its batch, so that its loss does not depend on which of
    the trainer's hooks ran last.
    """

    def __init__(
        self,
        micro_batches: Sequence[MicroBatch],
        *,
        embed_without_grad: Callable[[Sequence[MicroBatch]], list[Pairs]],
        gradients_of: Callable[[Pairs], Gradients],
        across_processes: bool = True,
    ) -> None:
        """Collect the micro-batches; nothing is computed yet.

        Args:
            micro_batches: of any sizes, in the order in which their losses are computed.
            embed_without_grad: returns their embeddings and restores the RNG state.
            gradients_of: returns the batch loss and its gradients, as `loss_gradients` does.
            across_processes: whether the other processes' micro-batches belong to the batch.
        """
        self.pairs: Pairs | None = None
        """All pairs that are compared, of every process; None before that."""

        self._micro_batches = list(micro_batches)
        self._embed_without_grad = embed_without_grad
        self._gradients_of = gradients_of
        self._across_processes = across_processes
        self._cached: list[CachedMicroBatch] = []

    def run_caching_pass(self) -> None:
        """Embed and compare the micro-batches, unless that is done or there is only one.

        Call it right before the first micro-batch is computed: until then a resumed run restores
        its RNG state.
        """
        if len(self._micro_batches) > 1 and not self._cached:
            self._compare(self._embed_without_grad(self._micro_batches))
            self._micro_batches.clear()

    def cached(self, index: int, pairs: Pairs) -> CachedMicroBatch:
        """The cached loss and gradients of a micro-batch.

        Args:
            index: of the micro-batch.
            pairs: its embeddings; compared now if it is the only micro-batch.
        """
        if not self._cached:
            self._compare([pairs])
        return self._cached[index]

    def _compare(self, parts: Sequence[Pairs]) -> None:
        self.pairs, own = _whole_batch(parts, across_processes=self._across_processes)
        world = PartialState().num_processes if self._across_processes else 1
        # the training loop averages over processes, and divides each loss by the accumulation
        self._cached = cache_gradients(
            parts, self._gradients_of(self.pairs), own, averaged=world, divided=len(parts)
        )


def _whole_batch(parts: Sequence[Pairs], *, across_processes: bool) -> tuple[Pairs, slice]:
    """All pairs that are compared with each other, and the slice of this process's."""
    whole = [torch.cat(tensors).detach() for tensors in zip(*parts, strict=True)]
    own = slice(0, len(whole[0]))
    if across_processes:
        whole, own = gather_rows(whole)
    return Pairs(*whole), own


def cache_gradients(
    parts: Sequence[Pairs], found: Gradients, own: slice, *, averaged: int, divided: int
) -> list[CachedMicroBatch]:
    """The batch loss and its gradients, split into this process's micro-batches.

    The gradients are scaled up, so that after division by `divided`, summation over a process's
    micro-batches and averaging over processes they equal the gradient of the batch loss.

    Args:
        parts: the micro-batches; their embeddings need no grad.
        found: loss and gradients of the batch.
        own: slice of the process's pairs in the batch.
        averaged: number of processes over which gradients are averaged.
        divided: what the loss of each micro-batch is divided by.
    """
    sizes = [len(part.images) for part in parts]
    grad_images, grad_texts = (
        (part[own] * averaged * divided).split(sizes) for part in (found.images, found.texts)
    )
    last = len(parts) - 1
    return [
        CachedMicroBatch(
            loss=found.loss,
            images=unit(part.images.detach()),
            texts=unit(part.texts.detach()),
            grad_images=grad_images[index],
            grad_texts=grad_texts[index],
            grad_scale=found.logit_scale * divided * (index == last),
            grad_bias=found.logit_bias * divided * (index == last),
        )
        for index, part in enumerate(parts)
    ]
