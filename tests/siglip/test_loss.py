"""Losses against transformers and plain torch, at scales and biases of released checkpoints."""

import math

import pytest
import torch
from torch.nn import functional
from transformers import AutoModel

from medft.siglip.loss import Labels, row_sigmoid_loss, sigmoid_loss, softmax_loss


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(4)
    images = torch.randn(7, 16, generator=generator)
    texts = images + 2 * torch.randn(7, 16, generator=generator)
    return images * 3, texts * 0.2  # the norm of an embedding does not matter


SCALE, BIAS = torch.tensor([math.log(117.3)]), torch.tensor([-12.9])
DIAGONAL = 2 * torch.eye(7) - 1


def test_sigmoid_is_transformers_own_loss(bases):
    model = AutoModel.from_pretrained(bases / "siglip")
    generator = torch.Generator().manual_seed(2)
    pixels = torch.randn(7, 3, 56, 56, generator=generator)
    ids = torch.randint(3, 200, (7, 64), generator=generator)
    with torch.no_grad():
        model.logit_scale.fill_(math.log(10.5))
        model.logit_bias.fill_(-9.5)
    outputs = model(input_ids=ids, pixel_values=pixels, return_loss=True)
    images = outputs.vision_model_output.pooler_output
    texts = outputs.text_model_output.pooler_output
    loss = sigmoid_loss(images, texts, DIAGONAL, model.logit_scale, model.logit_bias)
    assert loss.item() == pytest.approx(outputs.loss.item(), rel=1e-6)
    ours = torch.autograd.grad(loss, [model.logit_scale, model.logit_bias], retain_graph=True)
    theirs = torch.autograd.grad(outputs.loss, [model.logit_scale, model.logit_bias])
    for left, right in zip(ours, theirs, strict=True):
        assert left.item() == pytest.approx(right.item(), rel=1e-5)


def test_sigmoid_is_what_the_paper_writes(batch):
    images, texts = (functional.normalize(part, dim=-1) for part in batch)
    total = 0.0
    for i in range(7):
        for j in range(7):
            logit = 117.3 * float(images[i] @ texts[j]) - 12.9
            total += math.log1p(math.exp(-logit if i == j else logit))
    loss = sigmoid_loss(*batch, DIAGONAL, SCALE, BIAS)
    assert loss.item() == pytest.approx(total / 7, rel=1e-5)  # fp32 cosines times 117


def test_left_out_pairs_add_nothing(batch):
    labels = DIAGONAL.clone()
    labels[0, 3] = labels[5, 1] = 0
    whole, part = (sigmoid_loss(*batch, m, SCALE, BIAS) for m in (DIAGONAL, labels))
    images, texts = (functional.normalize(p, dim=-1) for p in batch)
    terms = functional.softplus(117.3 * (images @ texts.T) - 12.9)
    missing = (terms[0, 3] + terms[5, 1]) / 7
    assert whole.item() - part.item() == pytest.approx(missing.item(), rel=1e-3, abs=1e-6)
    assert whole.item() != part.item()


def test_softmax_is_symmetric_cross_entropy(batch):
    images, texts = (functional.normalize(part, dim=-1) for part in batch)
    logits = 117.3 * images @ texts.T
    target = torch.arange(7)
    expected = functional.cross_entropy(logits, target) + functional.cross_entropy(logits.T, target)
    loss = softmax_loss(*batch, DIAGONAL, SCALE, BIAS)
    assert loss.item() == pytest.approx(expected.item() / 2, rel=1e-5)
    twins = DIAGONAL.clone()
    twins[0, 3] = twins[3, 0] = 1
    mild = torch.tensor([math.log(3.0)])  # at 117 a single wrong pair weighs nothing
    assert softmax_loss(*batch, twins, mild, BIAS) < softmax_loss(*batch, DIAGONAL, mild, BIAS)


def test_row_sigmoid_is_the_written_formula(batch):
    images, texts = (functional.normalize(part, dim=-1) for part in batch)
    cosines = images @ texts.T
    margin = cosines.diagonal() - cosines.exp().sum(dim=1).log()
    expected = -functional.logsigmoid(117.3 * margin - 12.9).mean()
    loss = row_sigmoid_loss(*batch, DIAGONAL, SCALE, BIAS)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("loss", [sigmoid_loss, softmax_loss, row_sigmoid_loss])
def test_losses_are_float32_under_autocast(batch, loss):
    expected = loss(*batch, DIAGONAL, SCALE, BIAS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = loss(*batch, DIAGONAL, SCALE, BIAS)
        naive = torch.matmul(*(functional.normalize(p, dim=-1) for p in (batch[0], batch[1].T)))
    assert under.dtype == torch.float32
    assert torch.equal(under, expected)
    assert naive.dtype == torch.bfloat16  # the trap that autocast sets


def test_labels_know_equal_captions_and_groups():
    ids = torch.tensor([[1, 2], [3, 4], [1, 2], [5, 6]])
    groups = torch.tensor([7, 8, 9, 7])
    own = torch.eye(4)
    assert torch.equal(Labels(ids, groups, "diagonal").tile(), 2 * own - 1)
    caption = 2 * own - 1
    caption[0, 2] = caption[2, 0] = 1
    assert torch.equal(Labels(ids, groups, "caption").tile(), caption)
    caption[0, 3] = caption[3, 0] = 0
    assert torch.equal(Labels(ids, groups, "group").tile(), caption)
