"""Contrastive losses over image and text embeddings, in float32 whatever the training precision.

Tensors in, numbers out. No model, no files, no process group.

Shape letters in this file:
    N  images and as many texts
    D  embedding width
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

TILE = 1024
"""Number of images and of texts whose similarities are held at once; 4 MB in float32."""


class Pairs(NamedTuple):
    """Embeddings of images and texts that are all compared, with what decides their labels."""

    images: Tensor
    """[N, D], any norm."""

    texts: Tensor
    """[N, D], any norm."""

    input_ids: Tensor
    """[N, S] tokens of the texts."""

    group_ids: Tensor
    """[N] integers, equal for rows of one patient or study."""


class Gradients(NamedTuple):
    """A scalar loss and its gradients by everything that it was computed from."""

    loss: Tensor
    images: Tensor
    """[N, D] d(loss)/d(image embedding of unit norm)."""

    texts: Tensor
    """[N, D] d(loss)/d(text embedding of unit norm)."""

    logit_scale: Tensor
    """d(loss)/d(logit_scale), of the parameter's shape."""

    logit_bias: Tensor
    """d(loss)/d(logit_bias), of the parameter's shape."""


class Labels:
    """Labels of images and texts: +1 match, -1 no match, 0 left out of the loss."""

    def __init__(self, input_ids: Tensor, group_ids: Tensor, positives: str) -> None:
        """Compare texts by their tokens.

        Args:
            input_ids: [N, S] tokens of the texts.
            group_ids: [N] integers, equal for rows of one patient or study.
            positives: diagonal (an image matches its own text), caption (every text with the same
                tokens), group (as caption; other texts of the image's group are left out).
        """
        self.texts = torch.unique(input_ids, dim=0, return_inverse=True)[1]
        self.groups = group_ids
        self.positives = positives
        self._places = torch.arange(len(input_ids), device=input_ids.device)

    def tile(self, images: slice = slice(None), texts: slice = slice(None)) -> Tensor:
        """[images, texts] float32 labels; all [N, N] by default."""

        def equal(keys: Tensor) -> Tensor:
            return keys[images, None] == keys[texts]

        match = equal(self._places if self.positives == "diagonal" else self.texts)
        labels = torch.where(match, 1.0, -1.0)
        if self.positives == "group":
            labels = torch.where(equal(self.groups) & ~match, 0.0, labels)
        return labels


@contextmanager
def float32(device_type: str) -> Iterator[None]:
    """Disable autocast and TF32, whose mantissa has 10 bits, inside the block."""
    matmul = torch.backends.cuda.matmul
    precision = matmul.fp32_precision
    matmul.fp32_precision = "ieee"
    try:
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        matmul.fp32_precision = precision


def unit(embeddings: Tensor) -> Tensor:
    """Embeddings [N, D] normalized to unit L2 norm, in float32."""
    with float32(embeddings.device.type):
        return functional.normalize(embeddings.float(), dim=-1)


def sigmoid_loss(
    images: Tensor, texts: Tensor, labels: Tensor, logit_scale: Tensor, logit_bias: Tensor
) -> Tensor:
    """Binary cross-entropy of every pair being a match, summed over texts, averaged over images.

    `sigmoid_gradients` computes the same tile by tile.

    Args:
        images: [N, D] embeddings, any norm.
        texts: [N, D] embeddings, any norm.
        labels: [N, N] in {+1, -1, 0}, from `Labels`.
        logit_scale: logarithm of the factor t on the cosine.
        logit_bias: b, added to t * cosine.

    Source: arXiv:2303.15343, algorithm 1; the label 0 is ours.
    """
    with float32(images.device.type):
        logits = logit_scale.float().exp() * (unit(images) @ unit(texts).T) + logit_bias.float()
        terms = functional.softplus(-labels * logits)
        return (terms * labels.abs()).sum() / len(images)


def softmax_loss(
    images: Tensor, texts: Tensor, labels: Tensor, logit_scale: Tensor, logit_bias: Tensor
) -> Tensor:
    """Symmetric cross-entropy of each image over the texts and each text over the images.

    Other pairs with label +1 or 0 are left out of the denominators. The bias would cancel and is
    not used.

    Source: arXiv:2103.00020, figure 3; leaving out other matches is ours.
    """
    with float32(images.device.type):
        logits = logit_scale.float().exp() * (unit(images) @ unit(texts).T)
        logits = logits.masked_fill(_left_out(labels), -torch.inf)
        target = torch.arange(len(images), device=images.device)
        by_image = functional.cross_entropy(logits, target)
        by_text = functional.cross_entropy(logits.T, target)
        return (by_image + by_text) / 2


def row_sigmoid_loss(
    images: Tensor, texts: Tensor, labels: Tensor, logit_scale: Tensor, logit_bias: Tensor
) -> Tensor:
    """-mean log sigmoid(t (s_ii - log sum_j exp s_ij) + b): one decision per normalized row.

    Some write-ups call this SigLIP's loss; it is not the published one. Other pairs with label +1
    or 0 are left out of the sum.

    Source: ours, after such write-ups.
    """
    with float32(images.device.type):
        cosines = unit(images) @ unit(texts).T
        rows = cosines.masked_fill(_left_out(labels), -torch.inf)
        margin = cosines.diagonal() - rows.logsumexp(dim=1)
        return -functional.logsigmoid(
            logit_scale.float().exp() * margin + logit_bias.float()
        ).mean()


def _left_out(labels: Tensor) -> Tensor:
    own = torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    return (labels >= 0) & ~own


@torch.no_grad()
def sigmoid_gradients(
    images: Tensor,
    texts: Tensor,
    labels: Labels,
    logit_scale: Tensor,
    logit_bias: Tensor,
    *,
    tile: int = TILE,
) -> Gradients:
    """`sigmoid_loss` and its gradients in one pass that holds the similarities of one tile.

    Args:
        images: [N, D] embeddings of unit norm, float32.
        texts: [N, D] embeddings of unit norm, float32.
        labels: of these pairs.
        logit_scale: logarithm of the factor t on the cosine.
        logit_bias: b, added to t * cosine.
        tile: images and texts whose similarities are held at once.

    Source: the derivatives of arXiv:2303.15343, algorithm 1. With z the labels, s the cosines and
    g = -z sigmoid(-z (t s + b)) / N: by the images t g Y, by the texts t g^T X, by log t the sum of
    t g s, by b the sum of g.
    """
    with float32(images.device.type):
        t, b = logit_scale.float().exp(), logit_bias.float()
        grad_images, grad_texts = torch.zeros_like(images), torch.zeros_like(texts)
        loss, grad_scale, grad_bias = torch.zeros(3, dtype=torch.float64, device=images.device)
        for rows, columns, cosines, z in _tiles(images, texts, labels, tile=tile):
            logits = t * cosines + b
            loss += (functional.softplus(-z * logits) * z.abs()).sum()
            g = -z * torch.sigmoid(-z * logits) / len(images)
            grad_images[rows] += t * (g @ texts[columns])
            grad_texts[columns] += t * (g.T @ images[rows])
            grad_scale += (g * cosines).sum() * t.squeeze()
            grad_bias += g.sum()
        return Gradients(
            loss=(loss / len(images)).float(),
            images=grad_images,
            texts=grad_texts,
            logit_scale=grad_scale.to(logit_scale).expand_as(logit_scale),
            logit_bias=grad_bias.to(logit_bias).expand_as(logit_bias),
        )


class _Tile(NamedTuple):
    """A tile of the similarity matrix."""

    rows: slice
    """Of the images."""

    columns: slice
    """Of the texts."""

    cosines: Tensor
    """[rows, columns]."""

    labels: Tensor
    """[rows, columns] in {+1, -1, 0}."""


def _tiles(images: Tensor, texts: Tensor, labels: Labels, *, tile: int = TILE) -> Iterator[_Tile]:
    """All pairs of images and texts [N, D] of unit norm, one tile at a time."""
    steps = [slice(start, start + tile) for start in range(0, len(images), tile)]
    for rows in steps:
        for columns in steps:
            cosines = images[rows] @ texts[columns].T
            yield _Tile(rows, columns, cosines, labels.tile(rows, columns))


MATRIX_LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "softmax": softmax_loss,
    "row_sigmoid": row_sigmoid_loss,
}
"""Losses that need all similarities at once, by the name in `contrastive.loss`."""


def loss_gradients(
    name: str, pairs: Pairs, positives: str, logit_scale: Tensor, logit_bias: Tensor
) -> Gradients:
    """The named loss over all pairs of images and texts, with its gradients.

    Args:
        name: sigmoid, softmax or row_sigmoid.
        pairs: what is compared.
        positives: as for `Labels`.
        logit_scale: logarithm of the factor t on the cosine.
        logit_bias: b, added to t * cosine.
    """
    labels = Labels(pairs.input_ids, pairs.group_ids, positives)
    images, texts = unit(pairs.images.detach()), unit(pairs.texts.detach())
    if name == "sigmoid":
        return sigmoid_gradients(images, texts, labels, logit_scale, logit_bias)
    with torch.enable_grad():
        x, y, scale, bias = (
            part.detach().requires_grad_() for part in (images, texts, logit_scale, logit_bias)
        )
        loss = MATRIX_LOSSES[name](x, y, labels.tile(), scale, bias)
        found = torch.autograd.grad(loss, (x, y, scale, bias), materialize_grads=True)
    return Gradients(loss.detach(), *found)


@torch.no_grad()
def loss_alone(
    name: str, pairs: Pairs, positives: str, logit_scale: Tensor, logit_bias: Tensor
) -> Tensor:
    """The loss of `loss_gradients` without its gradients."""
    labels = Labels(pairs.input_ids, pairs.group_ids, positives)
    images, texts = unit(pairs.images), unit(pairs.texts)
    if name != "sigmoid":
        return MATRIX_LOSSES[name](images, texts, labels.tile(), logit_scale, logit_bias)
    t, b = logit_scale.float().exp(), logit_bias.float()
    loss = torch.zeros((), dtype=torch.float64, device=images.device)
    with float32(images.device.type):
        for _, _, cosines, z in _tiles(images, texts, labels):
            loss += (functional.softplus(-z * (t * cosines + b)) * z.abs()).sum()
    return (loss / len(images)).float()


@torch.no_grad()
def mean_logits(
    pairs: Pairs, positives: str, logit_scale: Tensor, logit_bias: Tensor
) -> tuple[Tensor, Tensor]:
    """The mean t * cosine + b of the pairs that match, and of those that do not.

    NaN where there is no such pair.
    """
    labels = Labels(pairs.input_ids, pairs.group_ids, positives)
    images, texts = unit(pairs.images), unit(pairs.texts)
    sums = torch.zeros(2, 2, dtype=torch.float64, device=images.device)
    with float32(images.device.type):
        for _, _, cosines, z in _tiles(images, texts, labels):
            for sign, chosen in enumerate((z > 0, z < 0)):
                sums[sign] += torch.stack([(cosines * chosen).sum(), chosen.sum()])
    means = logit_scale.double().exp() * sums[:, 0] / sums[:, 1] + logit_bias.double()
    return means[0], means[1]
