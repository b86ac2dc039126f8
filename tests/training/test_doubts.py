"""Warnings of trainings that run, and will hardly do what their users hope for."""

import json

import pytest
from straight_line import Line, Squares
from transformers import Trainer, TrainingArguments

from medft.training import doubts
from medft.training.doubts import LossFallsCallback


@pytest.mark.parametrize(
    ("options", "is_said"),
    [
        ({"learning_rate": 0.0}, True),
        ({"learning_rate": 0.0, "num_train_epochs": 3}, True),
        ({"learning_rate": 1e-2}, False),
        ({"learning_rate": 0.0, "logging_steps": 4}, False),  # too few entries
        ({"learning_rate": 0.0, "max_steps": 19}, False),  # the epoch is not complete
    ],
)
def test_a_loss_that_has_not_fallen_in_an_epoch_is_said_once(tmp_path, caplog, options, is_said):
    options = {"logging_steps": 2, "num_train_epochs": 1, **options}
    arguments = TrainingArguments(
        tmp_path, report_to="none", use_cpu=True, save_strategy="no",
        per_device_train_batch_size=1, **options,
    )  # fmt: skip
    trainer = Trainer(Line(), arguments, train_dataset=Squares(20), callbacks=[LossFallsCallback()])
    trainer.train()
    said = [text for text in caplog.messages if "the loss has not fallen in the first" in text]
    assert len(said) == is_said


def test_a_training_that_goes_on_after_the_first_epoch_does_not_say_it_again(tmp_path, caplog):
    def train(epochs, resume):
        arguments = TrainingArguments(
            tmp_path, report_to="none", use_cpu=True, save_strategy="epoch", learning_rate=0.0,
            logging_steps=2, per_device_train_batch_size=1, num_train_epochs=epochs,
        )  # fmt: skip
        callbacks = [LossFallsCallback()]
        trainer = Trainer(Line(), arguments, train_dataset=Squares(20), callbacks=callbacks)
        trainer.train(resume_from_checkpoint=resume)

    train(1, None)
    assert len(caplog.messages) == 1
    train(2, str(tmp_path / "checkpoint-20"))
    assert len(caplog.messages) == 1


@pytest.mark.parametrize("limit", [10**4, 2 * 10**9])
def test_a_large_base_on_the_cpu_is_said_before_it_is_loaded(
    sections, write_recipe, run_script, caplog, monkeypatch, limit
):
    caplog.set_level("INFO", logger="medft")
    monkeypatch.setattr(doubts, "LARGE", limit)
    recipe = sections("decoder")
    recipe["train"]["max_steps"] = 2
    file = write_recipe(recipe)
    run_script("decoder", file)
    record = json.loads((file.with_suffix("") / "run.json").read_text())
    weights = record["total_parameters"] - record["trainable_parameters"]
    said = [index for index, text in enumerate(caplog.messages) if text.startswith("a base of")]
    assert bool(said) == (weights > limit)
    if said:
        assert caplog.messages[said[0]].startswith(f"a base of {weights / 1e9:.1f} billion weights")
        loaded = [text.startswith("frozen, without backward pass") for text in caplog.messages]
        assert said[0] < loaded.index(True)
