"""Losses against transformers and plain torch, at scales and biases of released checkpoints."""

import math

import pytest
import torch
from live_memory import PeakCounter
from torch.nn import functional
from transformers import AutoModel

from medft.siglip.loss import (
    Labels,
    Pairs,
    float32,
    loss_alone,
    loss_gradients,
    mean_logits,
    row_sigmoid_loss,
    sigmoid_gradients,
    sigmoid_loss,
    softmax_loss,
    unit,
)


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(4)
    images = torch.randn(7, 16, generator=generator)
    texts = images + 2 * torch.randn(7, 16, generator=generator)
    return images * 3, texts * 0.2  # the norm of an embedding does not matter


SCALE, BIAS = torch.tensor([math.log(117.3)]), torch.tensor([-12.9])
DIAGONAL = 2 * torch.eye(7) - 1
TEXTS = torch.tensor([[1], [2], [1], [3], [2], [4], [1]])
GROUPS = torch.tensor([5, 5, 6, 6, 7, 8, 8])


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


def double_precision(images, texts, labels, scale, bias):
    """Loss and derivatives by unit embeddings, scale and bias, by autograd in float64."""
    leaves = [part.double().requires_grad_() for part in (images, texts, scale, bias)]
    logits = leaves[2].exp() * leaves[0] @ leaves[1].T + leaves[3]
    terms = functional.softplus(-labels.double() * logits) * labels.double().abs()
    loss = terms.sum() / len(images)
    return loss, *torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize("positives", ["diagonal", "caption", "group"])
@pytest.mark.parametrize("tile", [1, 3, 7, 50])
def test_tiles_give_the_loss_and_every_gradient(batch, positives, tile):
    images, texts = map(unit, batch)
    labels = Labels(TEXTS, GROUPS, positives)
    expected = double_precision(images, texts, labels.tile(), SCALE, BIAS)
    found = sigmoid_gradients(images, texts, labels, SCALE, BIAS, tile=tile)
    assert found.logit_scale.shape == SCALE.shape
    for name, left, right in zip(found._fields, found, expected, strict=True):
        # float32 cosines times 117 are wrong by 1e-5, and the bias' gradient is a small difference
        gap = (left.double() - right).norm() / right.norm()
        assert gap < 2e-5, name
    other = sigmoid_gradients(images, texts.flip(0), labels, SCALE, BIAS, tile=tile)
    assert (other.images - found.images).norm() > 0.1 * found.images.norm()
    plain = sigmoid_loss(images, texts, labels.tile(), SCALE, BIAS)
    assert found.loss.item() == pytest.approx(plain.item(), rel=1e-6)


@pytest.mark.parametrize("name", ["sigmoid", "softmax", "row_sigmoid"])
@pytest.mark.parametrize("positives", ["diagonal", "caption", "group"])
def test_gradients_of_raw_embeddings_are_autograds(batch, name, positives):
    scale, bias = torch.tensor([math.log(10.7)]), torch.tensor([-9.1])
    images, texts = (part.clone().requires_grad_() for part in batch)
    scale.requires_grad_(), bias.requires_grad_()
    losses = {"sigmoid": sigmoid_loss, "softmax": softmax_loss, "row_sigmoid": row_sigmoid_loss}
    labels = Labels(TEXTS, GROUPS, positives).tile()
    plain = losses[name](images, texts, labels, scale, bias)
    expected = torch.autograd.grad(plain, [images, texts, scale, bias], materialize_grads=True)

    found = loss_gradients(name, Pairs(*batch, TEXTS, GROUPS), positives, scale, bias)
    carrier = (unit(images) * found.images).sum() + (unit(texts) * found.texts).sum()
    ours = [
        *torch.autograd.grad(carrier, [images, texts]), found.logit_scale, found.logit_bias
    ]  # fmt: skip
    assert found.loss.item() == pytest.approx(plain.item(), rel=1e-6)
    assert (found.logit_bias == 0).all() == (name == "softmax")
    for left, right in zip(ours, expected, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-7)


@pytest.mark.slow
def test_memory_of_the_tiled_pass_grows_linearly_to_16k():
    found = {}
    for count in (4096, 8192, 16384):
        generator = torch.Generator().manual_seed(count)
        images, texts = (unit(torch.randn(count, 8, generator=generator)) for _ in range(2))
        ids = torch.arange(count)[:, None]
        with PeakCounter() as memory:
            labels = Labels(ids, ids[:, 0], "caption")
            sigmoid_gradients(images, texts, labels, SCALE, BIAS)
        found[count] = memory.peak
    matrix = 16384**2 * 4
    assert found[16384] < matrix / 10
    # tiles of 1024 x 1024 whatever the batch, then a few vectors for each pair
    assert found[16384] - found[8192] <= 2.2 * (found[8192] - found[4096])
    with PeakCounter() as memory:
        labels = Labels(torch.arange(2048)[:, None], torch.arange(2048), "caption")
        sigmoid_loss(images[:2048], texts[:2048], labels.tile(), SCALE, BIAS)
    assert memory.peak > 2048**2 * 4  # the reference holds the matrix


def test_the_loss_is_float32_where_tf32_is_switched_on():
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32"  # as train.tf32 does
    try:
        with float32("cpu"):
            assert matmul.fp32_precision == "ieee"
        assert matmul.fp32_precision == "tf32"
    finally:
        matmul.fp32_precision = before


def test_mean_logits_are_those_of_matches_and_of_others(batch):
    labels = Labels(TEXTS, GROUPS, "group").tile()
    logits = 117.3 * unit(batch[0]) @ unit(batch[1]).T - 12.9
    positive, negative = mean_logits(Pairs(*batch, TEXTS, GROUPS), "group", SCALE, BIAS)
    assert positive.item() == pytest.approx(logits[labels > 0].mean().item(), rel=1e-5)
    assert negative.item() == pytest.approx(logits[labels < 0].mean().item(), rel=1e-5)
    assert (labels == 0).any()
    one = Pairs(*(part[:1] for part in (*batch, TEXTS, GROUPS)))
    assert mean_logits(one, "group", SCALE, BIAS)[1].isnan()


def test_the_loss_alone_is_that_of_the_formula(batch):
    labels = Labels(TEXTS, GROUPS, "group").tile()
    losses = {"sigmoid": sigmoid_loss, "softmax": softmax_loss, "row_sigmoid": row_sigmoid_loss}
    for name, plain in losses.items():
        found = loss_alone(name, Pairs(*batch, TEXTS, GROUPS), "group", SCALE, BIAS)
        expected = plain(*batch, labels, SCALE, BIAS).item()
        assert found.item() == pytest.approx(expected, rel=1e-6)


def test_no_clamp_at_100_as_in_open_clip(batch):
    scale = torch.tensor([math.log(250.0)])
    found = sigmoid_gradients(
        *map(unit, batch), Labels(torch.arange(7)[:, None], GROUPS, "caption"), scale, BIAS
    )
    images, texts = map(unit, batch)
    expected = double_precision(images, texts, DIAGONAL, scale, BIAS)
    assert found.loss.item() == pytest.approx(expected[0].item(), rel=1e-5)
    assert found.logit_scale.abs() > 1e-3  # a clamp gives none
    clamped = double_precision(images, texts, DIAGONAL, torch.tensor([math.log(100.0)]), BIAS)[0]
    assert abs(clamped.item() - expected[0].item()) > 0.1
