"""A run whose activations come near the end of float16 stops in its first step."""

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from medft.errors import RunError
from medft.training.overflow import LIMIT, OverflowCallback


class Rows(torch.utils.data.Dataset):
    """Inputs 1, 2, ..., 8."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return {"x": torch.tensor([index + 1.0])}


class Hidden(nn.Module):
    """A layer whose outputs are large and a normalization that hides it from the loss."""

    def __init__(self, weight):
        super().__init__()
        self.large = nn.Linear(1, 2, bias=False)
        self.normalized = nn.LayerNorm(2)
        nn.init.constant_(self.large.weight, weight)

    def forward(self, x):
        return {"loss": self.normalized(self.large(x)).mean()}


@pytest.fixture
def train(tmp_path):
    """Train two steps of four rows."""

    def run(weight, dtype=torch.float32, **options):
        options = {"per_device_train_batch_size": 4, "max_steps": 2, **options}
        arguments = TrainingArguments(
            tmp_path, use_cpu=True, report_to="none", save_strategy="no", **options
        )
        trainer = Trainer(Hidden(weight), arguments, train_dataset=Rows())
        trainer.add_callback(OverflowCallback(dtype))
        trainer.train()
        return trainer

    return run


def measured(caplog):
    [line] = [line for line in caplog.messages if line.startswith("largest activation")]
    return line


def seen_first(caplog, weight):
    """The largest of the rows of the first step, which is the batch's largest input."""
    value = float(measured(caplog).split(": ")[1].split(" (")[0])
    return round(value / weight)


def test_the_largest_activation_is_measured_once_and_training_goes_on(train, caplog):
    caplog.set_level("INFO", logger="medft")
    trainer = train(1000.0)
    assert seen_first(caplog, 1000.0) in range(4, 9)  # four different rows of 1 to 8
    assert measured(caplog).endswith("(large)")
    assert trainer.state.global_step == 2


@pytest.mark.parametrize("weight", [1e4, -1e30, float("inf"), float("nan")])
def test_an_activation_beyond_half_of_float16_ends_the_run(train, weight):
    assert LIMIT == 32752
    with pytest.raises(RunError, match=r"below 32,752 .* \(large\): write model\.dtype: bfloat16"):
        train(weight)


def test_accumulated_batches_of_a_step_all_count(train, caplog):
    caplog.set_level("INFO", logger="medft")
    train(1000.0, per_device_train_batch_size=1, gradient_accumulation_steps=8, max_steps=1)
    assert seen_first(caplog, 1000.0) == 8


def test_outputs_of_another_precision_do_not_count(train, caplog):
    caplog.set_level("INFO", logger="medft")
    train(1e30, torch.float16)
    assert measured(caplog) == "largest activation of the first step: 0 (no module)"
    caplog.clear()
    with pytest.raises(RunError, match="half of what float16 holds"):
        train(1e5, torch.bfloat16, bf16=True)
