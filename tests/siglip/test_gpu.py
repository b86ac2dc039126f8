"""What a GPU does otherwise than the CPU, on a tiny SigLIP: `make gpu` runs it."""

import contextlib

import pytest
import torch
from siglip_steps import build_trainer

from medft.errors import RunError
from medft.siglip import trainer as siglip_trainer
from medft.siglip.loss import Labels, sigmoid_loss

pytestmark = pytest.mark.gpu


@pytest.fixture
def trainer(sections, write_recipe):
    """A trainer of exact batches of 6 pairs, with dropout."""

    def make(changes=(), **train):
        recipe = sections("siglip")
        recipe["lora"]["dropout"] = 0.3
        recipe["train"] |= {
            "max_steps": 6,
            "save_strategy": "no",
            "warmup_steps": 0,
            "gradient_accumulation_steps": 2,
            **train,
        }
        return build_trainer(write_recipe(recipe), changes)

    return make


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dropout_is_replayed(trainer, dtype):
    made = trainer([f"model.dtype={dtype}"])
    made.train()
    found = [entry["loss"] for entry in made.state.log_history if "loss" in entry]
    assert len(found) == 6
    assert made.args.device.type == "cuda"


def test_dropout_that_is_not_replayed_is_an_error(trainer, monkeypatch):
    monkeypatch.setattr(siglip_trainer, "replay_rng", lambda device: contextlib.nullcontext())
    with pytest.raises(RunError, match="expected the same embeddings when a micro-batch"):
        trainer().train()


def test_the_loss_is_float32_where_tf32_is_switched_on():
    random = torch.manual_seed(9)
    images, texts = (torch.randn(64, 384, generator=random) for _ in range(2))
    labels = Labels(torch.arange(64)[:, None], torch.arange(64), "diagonal").tile()
    scale, bias = torch.tensor([4.77]), torch.tensor([-12.9])
    unit = [torch.nn.functional.normalize(part.double(), dim=-1) for part in (images, texts)]
    logits = 4.77 * torch.ones(1, dtype=torch.float64)
    logits = logits.exp() * unit[0] @ unit[1].T - 12.9
    expected = torch.nn.functional.softplus(-labels.double() * logits).sum() / 64
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32"
    try:
        on_device = [part.cuda() for part in (images, texts, labels, scale, bias)]
        found = sigmoid_loss(*on_device).item()
        short = on_device[0] @ on_device[1].T  # outside of the loss, 10 bits
    finally:
        matmul.fp32_precision = before
    assert found == pytest.approx(expected.item(), rel=1e-5)  # float32, 384 products summed
    exact = images.double() @ texts.double().T
    assert (short.cpu() - exact).abs().max() > 1e-3
