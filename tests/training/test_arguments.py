"""The arguments of a trainer, and how rows become its steps."""

import math

import pytest
import torch
from transformers import Trainer, TrainingArguments

from medft.config.train_keys import TrainSection
from medft.errors import RecipeError
from medft.training.arguments import batch_arithmetic, training_arguments


class Squares(torch.utils.data.Dataset):
    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return self.rows

    def __getitem__(self, index):
        return {"x": torch.tensor([float(index)])}


class Line(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return {"loss": (self.weight * x).mean()}


@pytest.mark.parametrize(
    ("rows", "options"),
    [
        (17, {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2}),
        (17, {"per_device_train_batch_size": 3, "num_train_epochs": 2.5}),
        (3, {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 4}),
        (17, {"per_device_train_batch_size": 2, "max_steps": 5, "warmup_steps": 2}),
    ],
)
def test_the_arithmetic_is_trainers(tmp_path, rows, options):
    options = {"warmup_steps": 0.1, **options}
    arguments = TrainingArguments(
        tmp_path, save_strategy="no", report_to="none", use_cpu=True, **options
    )
    trainer = Trainer(Line(), arguments, train_dataset=Squares(rows))
    trainer.train()
    batches = math.ceil(rows / arguments.per_device_train_batch_size)
    batch = batch_arithmetic(batches, arguments)
    assert batch["steps"] == trainer.state.max_steps == trainer.state.global_step
    assert batch["effective"] == (
        arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps
    )
    assert batch["warmup_steps"] == arguments.get_warmup_steps(trainer.state.max_steps)


def test_a_process_that_sees_several_gpus_is_refused(monkeypatch, tmp_path):
    train = TrainSection(output_dir=str(tmp_path), use_cpu=True)

    def arguments():
        return training_arguments(TrainingArguments, train, dtype="float32", metrics={})

    assert arguments().train_batch_size == 8
    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda self: 4))
    stock = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    assert stock.train_batch_size == 32  # the trap
    with pytest.raises(RecipeError, match="one GPU in a process, this one sees 4"):
        arguments()
