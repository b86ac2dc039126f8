"""The loss of a whole batch, and its gradient, at the activation memory of one micro-batch.

A caching pass computes the embeddings of all micro-batches of all processes without grad and
compares them with each other. That gives the loss and its derivative by every embedding, after
which each micro-batch is computed once more, with grad, and passes its part on to the weights.

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
"""Length of the difference between an embedding of length 1 and its replay. Equal operations on
equal inputs give equal bits, but for kernels that sum in any order: a bfloat16 step in every entry
is 4e-3. Another dropout mask is more as soon as the adapter does anything."""

MicroBatch = Mapping[str, Any]
"""What the collator made: input_ids, pixel_values, group_ids."""


@contextmanager
def replay_rng(device: torch.device) -> Iterator[None]:
    """Random numbers that are drawn in the block are drawn again after it."""
    devices = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(devices=devices, device_type=device.type if devices else "cuda"):
        yield


@dataclass(frozen=True, kw_only=True, slots=True)
class CachedMicroBatch:
    """What a micro-batch has to do with the loss of the whole batch."""

    loss: Tensor
    """Of the whole batch."""

    images: Tensor
    """[n, D] of length 1, as the loss was computed from."""

    texts: Tensor
    """[n, D] of length 1, as the loss was computed from."""

    grad_images: Tensor
    """[n, D] d(batch loss)/d(image embedding)."""

    grad_texts: Tensor
    """[n, D] d(batch loss)/d(text embedding)."""

    grad_scale: Tensor
    """Of the shape of the parameter; zero but in the last micro-batch."""

    grad_bias: Tensor
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
        carrier = (images * self.grad_images).sum() + (texts * self.grad_texts).sum()
        carrier = carrier + (logit_scale * self.grad_scale + logit_bias * self.grad_bias).sum()
        return self.loss + (carrier - carrier.detach())


class ExactBatch:
    """The micro-batches of one optimizer step of a process, compared as one batch.

    Each micro-batch carries the batch that it belongs to, so that its loss does not depend on which
    of the trainer's hooks ran last.
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
            micro_batches: of any sizes, in the order in which their losses are taken.
            embed_without_grad: gives their embeddings; random numbers that it draws come again
                after it.
            gradients_of: the loss of a whole batch, such as `loss_gradients`.
            across_processes: whether the other processes' micro-batches belong to the batch.
        """
        self.pairs: Pairs | None = None
        """All that is compared, of every process; None before it was."""

        self._micro_batches = list(micro_batches)
        self._embed_without_grad = embed_without_grad
        self._gradients_of = gradients_of
        self._across_processes = across_processes
        self._cached: list[CachedMicroBatch] = []

    def run_caching_pass(self) -> None:
        """Compare the micro-batches, unless that was done or there is but one.

        Call it right before the first micro-batch is computed: until then a resumed run restores
        its random state.
        """
        if len(self._micro_batches) > 1 and not self._cached:
            self._compare(self._embed_without_grad(self._micro_batches))
            self._micro_batches.clear()

    def cached(self, index: int, pairs: Pairs) -> CachedMicroBatch:
        """What a micro-batch has to do with the loss of the batch.

        Args:
            index: of the micro-batch.
            pairs: its embeddings; those of a single micro-batch are compared as they are.
        """
        if not self._cached:
            self._compare([pairs])
        return self._cached[index]

    def _compare(self, parts: Sequence[Pairs]) -> None:
        self.pairs, own = _whole_batch(parts, across_processes=self._across_processes)
        world = PartialState().num_processes if self._across_processes else 1
        # the training loop averages over the processes, and divides each loss by their number
        self._cached = cache_gradients(
            parts, self._gradients_of(self.pairs), own, averaged=world, divided=len(parts)
        )


def _whole_batch(parts: Sequence[Pairs], *, across_processes: bool) -> tuple[Pairs, slice]:
    """All pairs that are compared with each other, and where this process's stand."""
    whole = [torch.cat(tensors).detach() for tensors in zip(*parts, strict=True)]
    own = slice(0, len(whole[0]))
    if across_processes:
        whole, own = gather_rows(whole)
    return Pairs(*whole), own


def cache_gradients(
    parts: Sequence[Pairs], found: Gradients, own: slice, *, averaged: int, divided: int
) -> list[CachedMicroBatch]:
    """What is kept of the loss of a whole batch for each of this process's micro-batches.

    The gradients that these leave, each divided by `divided`, added up over a process and averaged
    over the processes, are that of the whole loss.

    Args:
        parts: the micro-batches; their embeddings need no grad.
        found: loss and gradients of the whole batch.
        own: where the process's pairs stand in it.
        averaged: processes over which gradients are averaged.
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
