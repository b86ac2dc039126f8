"""The arguments of a trainer, and how rows become its steps."""

import math

import pytest
import torch
from straight_line import Line, Squares
from transformers import Trainer, TrainingArguments

from medft.config.train_keys import TrainSection
from medft.errors import RecipeError
from medft.files import packaged_file
from medft.training.arguments import batch_arithmetic, training_arguments


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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"warmup_steps": 7}, "warmup_steps of at most 6, the steps of the run, got 7"),
        ({"warmup_steps": 0, "eval_strategy": "steps", "eval_delay": 7}, "at most 6, the steps of"),
        ({"warmup_steps": 0, "eval_strategy": "epoch", "eval_delay": 3}, "at most 2, the epochs"),
    ],
)
def test_a_run_that_ends_before_what_was_asked_for_is_refused(tmp_path, options, message):
    common = {"num_train_epochs": 2, "per_device_train_batch_size": 4, "use_cpu": True}
    arguments = TrainingArguments(tmp_path, report_to="none", **common, **options)
    with pytest.raises(RecipeError, match=message):
        batch_arithmetic(3, arguments)
    for name in options.keys() & {"warmup_steps", "eval_delay"}:
        setattr(arguments, name, getattr(arguments, name) - 1 if options[name] else 0)
    assert batch_arithmetic(3, arguments)["steps"] == 6


def test_the_key_that_does_not_count_is_said(tmp_path, caplog):
    caplog.set_level("INFO", logger="medft")
    sentence = "train.max_steps ends the run, train.num_train_epochs is not used"
    for steps, said in ((-1, False), (3, True)):
        train = TrainSection(
            output_dir=str(tmp_path), use_cpu=True, max_steps=steps, num_train_epochs=1e9
        )
        training_arguments(TrainingArguments, train, dtype="float32", metrics={})
        assert (sentence in caplog.messages) == said


def test_a_learning_rate_of_zero_is_said(tmp_path, caplog):
    for rate, said in ((1e-9, False), (0, True)):
        train = TrainSection(output_dir=str(tmp_path), use_cpu=True, learning_rate=rate)
        training_arguments(TrainingArguments, train, dtype="float32", metrics={})
        sentence = "train.learning_rate is 0, so that no weight will change"
        assert (caplog.messages == [sentence]) == said


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


def test_float16_is_refused_under_deepspeed(monkeypatch, tmp_path):
    train = TrainSection(output_dir=str(tmp_path), use_cpu=True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    file = packaged_file("deepspeed_configs/zero2.json")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(file))
    with pytest.raises(RecipeError, match="bfloat16 or float32 under DeepSpeed"):
        training_arguments(TrainingArguments, train, dtype="float16", metrics={})
