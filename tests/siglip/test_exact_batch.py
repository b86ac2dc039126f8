"""Gradients of a whole batch from its micro-batches, against one graph over all of them."""

import math
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.nn import functional

from medft.errors import RunError
from medft.siglip.exact_batch import ExactBatch, replay_rng
from medft.siglip.loss import Pairs, loss_gradients

SIZES = (3, 1, 7, 2)
CPU = torch.device("cpu")


class Towers(nn.Module):
    """Two small towers with dropout, scale and bias."""

    def __init__(self, dropout):
        super().__init__()
        self.image, self.text = (
            nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.Dropout(dropout), nn.Linear(16, 8))
            for _ in range(2)
        )
        self.scale = nn.Parameter(torch.tensor([math.log(11.0)]))
        self.bias = nn.Parameter(torch.tensor([-7.5]))

    def forward(self, inputs):
        images, texts, ids, groups = inputs
        return Pairs(self.image(images), self.text(texts), ids, groups)


@pytest.fixture
def micro_batches():
    torch.manual_seed(5)
    batches = []
    for start, size in zip((0, 3, 4, 11), SIZES, strict=True):
        numbers = torch.arange(start, start + size)
        tensors = (torch.randn(size, 6), torch.randn(size, 6), numbers[:, None] % 9, numbers // 3)
        batches.append(tensors)
    return batches


def in_one_graph(towers, batches, name, positives):
    """The loss written down once for all pairs, in float64 after the towers."""
    pairs = [towers(batch) for batch in batches]
    images, texts = (
        functional.normalize(torch.cat([pair[i] for pair in pairs]).double(), dim=-1)
        for i in range(2)
    )
    ids, groups = (torch.cat([pair[i].flatten() for pair in pairs]) for i in (2, 3))
    cosines, own = images @ texts.T, torch.eye(len(images), dtype=torch.bool)
    same = own if positives == "diagonal" else ids[:, None] == ids
    t, b = towers.scale.double().exp(), towers.bias.double()
    if name == "sigmoid":
        logits = t * cosines + b
        terms = functional.softplus(torch.where(same, -logits, logits))
        if positives == "group":
            terms = terms * (same | (groups[:, None] != groups))
        return terms.sum() / len(images)
    if name == "softmax":
        logits = (t * cosines).masked_fill(same & ~own, -torch.inf)
        rows, columns = (each.log_softmax(1).diagonal() for each in (logits, logits.T))
        return -(rows + columns).mean() / 2
    cosines = cosines.masked_fill(same & ~own, -torch.inf)
    return -functional.logsigmoid(t * cosines.log_softmax(1).diagonal() + b).mean()


def gradients(towers):
    found = [torch.zeros_like(p) if p.grad is None else p.grad for p in towers.parameters()]
    towers.zero_grad()
    return found


def exact_batch(towers, batches, name, positives, *, replays=True):
    """The micro-batches as one; without replay random numbers go on after the caching pass."""

    def embed_without_grad(batches):
        with replay_rng(CPU) if replays else nullcontext(), torch.no_grad():
            return [towers(batch) for batch in batches]

    def gradients_of(pairs):
        return loss_gradients(name, pairs, positives, towers.scale, towers.bias)

    return ExactBatch(batches, embed_without_grad=embed_without_grad, gradients_of=gradients_of)


def loss_in(exact, index, towers, batch):
    """The loss of a batch, taken at one of its micro-batches."""
    pairs = towers(batch)
    cached = exact.cached(index, pairs)
    return cached.loss_of(pairs.images, pairs.texts, towers.scale, towers.bias)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize(
    ("name", "positives"),
    [
        ("sigmoid", "diagonal"),
        ("sigmoid", "caption"),
        ("sigmoid", "group"),
        ("softmax", "caption"),
        ("row_sigmoid", "caption"),
    ],
)
def test_uneven_micro_batches_are_one_batch(micro_batches, name, positives, dropout):
    torch.manual_seed(1)
    towers = Towers(dropout)
    torch.manual_seed(2)
    expected = in_one_graph(towers, micro_batches, name, positives)
    expected.backward()
    whole = gradients(towers)

    torch.manual_seed(2)
    exact = exact_batch(towers, micro_batches, name, positives)
    exact.run_caching_pass()
    for index, batch in enumerate(micro_batches):
        loss = loss_in(exact, index, towers, batch)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
        (loss / len(SIZES)).backward()  # as the training loop does
    for left, right in zip(gradients(towers), whole, strict=True):
        # rounding of float32 cosines before a factor of 11; the bias has no part in softmax
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-6)

    torch.manual_seed(2)
    for batch in micro_batches:  # the opposite: each micro-batch for itself
        (in_one_graph(towers, [batch], name, positives) * len(batch[0]) / sum(SIZES)).backward()
    for (tower, _), left, right in zip(
        towers.named_parameters(), gradients(towers), whole, strict=True
    ):
        if "weight" in tower:
            assert (left - right).norm() > 0.02 * right.norm()


def test_micro_batches_know_their_batch_whatever_order_they_come_in(micro_batches):
    towers = Towers(0.0)
    halves = micro_batches[:2], micro_batches[2:]
    for half in halves:
        (in_one_graph(towers, half, "sigmoid", "caption") / 2).backward()
    expected = gradients(towers)
    exact = [exact_batch(towers, half, "sigmoid", "caption") for half in halves]
    for which, index in ((1, 1), (0, 0), (1, 0), (0, 1)):
        exact[which].run_caching_pass()
        (loss_in(exact[which], index, towers, halves[which][index]) / 4).backward()
    for left, right in zip(gradients(towers), expected, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-6)  # rounding, as above


def test_another_dropout_mask_in_the_replay_is_an_error(micro_batches):
    towers = Towers(0.3)
    exact = exact_batch(towers, micro_batches, "sigmoid", "caption", replays=False)
    exact.run_caching_pass()
    with pytest.raises(RunError, match="when a micro-batch is computed again"):
        loss_in(exact, 0, towers, micro_batches[0])
