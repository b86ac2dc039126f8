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
