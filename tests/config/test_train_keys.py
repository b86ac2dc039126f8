"""The section train takes what is listed, and says why it refuses the rest."""

import pytest
from good_recipe import GOOD, problems

from medft.config.train_keys import EARLY_STOPPING_KEYS, REFUSED_TRAIN_KEYS, TrainSection


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        ("max_length: 5", "data.max_length"),
        ("packing: true", "packing"),
        ("padding_free: true", "padded"),
        ("assistant_only_loss: true", "assistant"),
        ("completion_only_loss: true", "assistant"),
        ("model_init_kwargs: {}", "section model"),
        ("remove_unused_columns: true", "images"),
        ("load_best_model_at_end: true", "best_model/"),
        ("deepspeed: x.json", "launcher"),
        ("fsdp: full_shard", "launcher"),
        ("bf16: true", "model.dtype"),
        ("fp16: false", "model.dtype"),
        ("dataloader_persistent_workers: true", "a resumed run would differ"),
    ],
)
def test_train_keys_that_medft_owns_are_refused_with_the_reason(load, key, reason):
    [problem] = problems(load, GOOD + f"  {key}\n")
    assert "recipe.yaml:6: train." in problem
    assert reason in problem


def test_every_field_of_the_library_is_taken_or_refused():
    import dataclasses

    from transformers import TrainingArguments
    from trl import SFTConfig

    own = TrainSection.model_fields.keys() - EARLY_STOPPING_KEYS
    for library in (SFTConfig, TrainingArguments):
        assert {field.name for field in dataclasses.fields(library)} > own
    assert not TrainSection.model_fields.keys() & REFUSED_TRAIN_KEYS.keys()


def test_the_train_section_shows_what_was_written_and_medfts_defaults(load):
    """A key that nobody wrote stays the library's; a whole number stays one; null is no number."""
    shown = load(GOOD, "train.save_steps=4", "train.save_total_limit=null").train.model_dump()
    assert {key: shown[key] for key in ("save_steps", "save_total_limit", "weight_decay")} == {
        "save_steps": 4,
        "save_total_limit": None,
        "weight_decay": 0.01,
    }
    assert isinstance(shown["save_steps"], int)
    assert not {"gradient_accumulation_steps", "optim", "tf32"} & shown.keys()
    for key in ("gradient_accumulation_steps", "optim", "num_train_epochs"):
        [problem] = problems(load, GOOD, f"train.{key}=null")
        assert "got None" in problem
    assert load(GOOD).train.early_stopping() == {}
    stopping = load(GOOD, "data.validation=v.jsonl", "train.early_stopping_patience=3").train
    assert stopping.early_stopping() == {"early_stopping_patience": 3}
    assert not stopping.library_fields().keys() & {*EARLY_STOPPING_KEYS, "resume_from_checkpoint"}


def test_a_field_that_medft_does_not_know_is_refused_not_passed_on(load):
    [problem] = problems(load, GOOD + "  hub_model_id: x\n")
    assert "train.hub_model_id is refused: medft does not pass it on" in problem


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("warmup_steps: 2.5", "a whole number of steps, or a fraction below 1, got 2.5"),
        ("warmup_steps: 1e30", "less than or equal to 1000000000"),
        ("max_steps: 0", "at least 1, or -1 to go by num_train_epochs, got 0"),
    ],
)
def test_steps_that_trainer_would_round_or_ignore_are_errors(load, key, expected):
    [problem] = problems(load, GOOD + f"  {key}\n")
    assert f"recipe.yaml:6: train.{key.partition(':')[0]}: expected {expected}" in problem


def test_steps_that_mean_what_they_say_are_taken(load):
    shown = load(GOOD, "train.warmup_steps=0.25", "train.max_steps=-1").train
    assert (shown.warmup_steps, shown.max_steps) == (0.25, -1)
    assert load(GOOD, "train.warmup_steps=7").train.warmup_steps == 7


def test_evaluation_steps_that_the_strategy_ignores_are_an_error(load):
    words = ["data.validation=v.jsonl", "train.eval_steps=50"]
    [problem] = problems(load, GOOD, *words, "train.eval_strategy=epoch")
    assert "train.eval_strategy is epoch: write train.eval_strategy: steps" in problem
    assert load(GOOD, *words).train.eval_steps == 50
