"""Contrastive losses over image and text embeddings, in float32 whatever the training precision.

Pure functions: tensors in, a scalar out. No model, no files, no process group.

Shape letters in this file:
    N  images and as many texts
    D  embedding width
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

Loss = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def match_labels(input_ids: Tensor, group_ids: Tensor, positives: str) -> Tensor:
    """Which image-text pairs match: +1 yes, -1 no, 0 neither, left out of the loss.

    Args:
        input_ids: [N, S] tokens of the texts.
        group_ids: [N] integers, equal for rows of one patient or study.
        positives: diagonal (an image matches its own text), caption (every text with the same
            tokens), group (as caption; other texts of the image's group are left out).

    Returns:
        [N, N] float32; row i belongs to image i.
    """
    own = torch.eye(len(input_ids), dtype=torch.bool, device=input_ids.device)
    if positives == "diagonal":
        return torch.where(own, 1.0, -1.0)
    same_text = (input_ids[:, None] == input_ids[None]).all(dim=-1)
    labels = torch.where(same_text, 1.0, -1.0)
    if positives == "group":
        same_group = group_ids[:, None] == group_ids[None]
        labels = torch.where(same_group & ~same_text, 0.0, labels)
    return labels


def sigmoid_loss(
    images: Tensor, texts: Tensor, labels: Tensor, logit_scale: Tensor, logit_bias: Tensor
) -> Tensor:
    """Every pair is a decision of its own: match or not. Summed over texts, averaged over images.

    Args:
        images: [N, D] embeddings, any norm.
        texts: [N, D] embeddings, any norm.
        labels: [N, N] in {+1, -1, 0}, from `match_labels`.
        logit_scale: logarithm of the factor t on the cosine.
        logit_bias: b, added to t * cosine.

    Source: arXiv:2303.15343, algorithm 1; the label 0 is ours.
    """
    with torch.autocast(images.device.type, enabled=False):
        logits = logit_scale.float().exp() * _cosines(images, texts) + logit_bias.float()
        terms = functional.softplus(-labels * logits)
        return (terms * labels.abs()).sum() / len(images)


def softmax_loss(
    images: Tensor, texts: Tensor, labels: Tensor, logit_scale: Tensor, logit_bias: Tensor
) -> Tensor:
    """Symmetric cross-entropy of each image over the texts and each text over the images.

    Pairs that match but for the own one are left out of the denominators. The bias cancels.

    Source: arXiv:2103.00020, figure 3; leaving out other matches is ours.
    """
    with torch.autocast(images.device.type, enabled=False):
        logits = logit_scale.float().exp() * _cosines(images, texts) + logit_bias.float()
        logits = logits.masked_fill(_left_out(labels), -torch.inf)
        target = torch.arange(len(images), device=images.device)
        by_image = functional.cross_entropy(logits, target)
        by_text = functional.cross_entropy(logits.T, target)
        return (by_image + by_text) / 2


def row_sigmoid_loss(
    images: Tensor, texts: Tensor, labels: Tensor, logit_scale: Tensor, logit_bias: Tensor
) -> Tensor:
    """-mean log sigmoid(t (s_ii - log sum_j exp s_ij) + b): each row normalised, then one decision.

    Some write-ups call this SigLIP's loss; it is not the published one. Pairs that match but for
    the own one are left out of the sum.

    Source: ours, after such write-ups.
    """
    with torch.autocast(images.device.type, enabled=False):
        cosines = _cosines(images, texts)
        rows = cosines.masked_fill(_left_out(labels), -torch.inf)
        margin = cosines.diagonal() - rows.logsumexp(dim=1)
        return -functional.logsigmoid(
            logit_scale.float().exp() * margin + logit_bias.float()
        ).mean()


LOSSES: dict[str, Loss] = {
    "sigmoid": sigmoid_loss,
    "softmax": softmax_loss,
    "row_sigmoid": row_sigmoid_loss,
}
"""Losses by the name in `contrastive.loss`."""


def _cosines(images: Tensor, texts: Tensor) -> Tensor:
    images = functional.normalize(images.float(), dim=-1)
    texts = functional.normalize(texts.float(), dim=-1)
    return images @ texts.T


def _left_out(labels: Tensor) -> Tensor:
    own = torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    return (labels >= 0) & ~own
