"""Lines of libraries that are not true for a user do not come; those that may be true do."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import LlamaConfig, SiglipTextConfig

from medft.data.tokens import token_keys
from medft.library_lines import UNTRUE, leave_out_untrue_lines
from medft.siglip.model import load_siglip_processor

ROOT = Path(__file__).parent.parent


@pytest.fixture
def shown(caplog):
    """What the loggers of UNTRUE let through; they leave nothing out yet."""
    loggers = [logging.getLogger(name) for name in UNTRUE]
    for logger in loggers:
        for known in [*logger.filters]:
            logger.removeFilter(known)
        logger.addHandler(caplog.handler)
    yield caplog
    for logger in loggers:
        logger.removeHandler(caplog.handler)


def test_the_ids_of_siglips_configuration_are_left_out_and_wrong_ones_are_not(shown):
    SiglipTextConfig(vocab_size=32001)
    stock = len({*shown.messages})
    assert stock == 2
    leave_out_untrue_lines()
    SiglipTextConfig(vocab_size=32002)  # a message comes once a process
    assert len({*shown.messages}) == stock
    LlamaConfig(vocab_size=100, bos_token_id=49405, eos_token_id=2)
    assert len({*shown.messages}) == stock + 1


def test_deepspeeds_guess_of_the_device_is_left_out_and_its_warnings_are_not(shown):
    leave_out_untrue_lines()
    leave_out_untrue_lines()
    deepspeed = logging.getLogger("DeepSpeed")
    assert len(deepspeed.filters) == 1
    deepspeed.warning(
        "Setting accelerator to CPU. If you have GPU or other accelerator, we were unable to "
        "detect it."
    )
    deepspeed.warning("the loss scale is 0")
    assert {*shown.messages} == {"the loss scale is 0"}


def test_long_captions_are_counted_and_not_said_to_be_indexing_errors(bases, shown):
    from medft.config.recipe import ModelSection

    model = ModelSection(base=str(bases / "siglip"))
    processor = load_siglip_processor(model, image_size=56, max_length=4)
    text = "one large erosion in the upper left part of the joint"
    _, lengths = token_keys([text], processor.tokenizer, 4)
    assert lengths[text] > 4
    assert not [said for said in shown.messages if "indexing errors" in said]
    processor.tokenizer(text)
    assert [said for said in shown.messages if "indexing errors" in said]  # as stock transformers


def test_the_level_of_torchs_own_lines_is_the_users_where_he_sets_one(monkeypatch):
    monkeypatch.delenv("TORCH_CPP_LOG_LEVEL", raising=False)
    leave_out_untrue_lines()
    assert os.environ["TORCH_CPP_LOG_LEVEL"] == "ERROR"
    monkeypatch.setenv("TORCH_CPP_LOG_LEVEL", "INFO")
    leave_out_untrue_lines()
    assert os.environ["TORCH_CPP_LOG_LEVEL"] == "INFO"


OWN = (
    "4-bit nf4 layers: ", "batches: ", "captions are padded to 12 tokens", "checking ", "done: ",
    "frozen, without backward pass: ", "step ", "train: ", "training an adapter on a ",
    "validation: ",
)  # fmt: skip
"""How lines of medft begin; nothing else is allowed."""


def lines_of(*words, **environment):
    """Lines that a medft train writes, to standard output and to standard error."""
    command = [sys.executable, "-m", "medft.cli", "train", *words]
    environment = {k: v for k, v in os.environ.items() if k != "TORCH_CPP_LOG_LEVEL"} | environment
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines(), done.stderr.splitlines()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("siglip", ["data.max_length=12", "train.dataloader_num_workers=2"]),
        ("siglip", ["model.dtype=bfloat16", "--num-processes", "2"]),
        ("decoder", ["quantization={bits: 4}", "train.gradient_checkpointing=true"]),
        ("decoder", ["train.dataloader_num_workers=1", "--num-processes", "2"]),
    ],
)
def test_a_training_prints_nothing_but_lines_of_medft(sections, write_recipe, kind, changes):
    recipe = sections(kind)
    recipe["train"]["max_steps"] = 4
    printed, lines = lines_of(str(write_recipe(recipe)), *changes)
    assert printed == []
    assert lines[0].startswith("checking ")  # before the seconds of the imports
    assert [line for line in lines if not line.startswith(OWN)] == []
    assert len(lines) == len(set(lines)) > 7  # nothing twice


@pytest.mark.slow
def test_deepspeed_says_that_it_compiles_the_first_time(sections, write_recipe, tmp_path):
    recipe = sections("decoder")
    recipe["train"]["max_steps"] = 3
    said = []
    for name in ("zero2", "zero3"):
        config = str(ROOT / "accelerate_configs" / f"{name}.yaml")
        words = [str(write_recipe(recipe, name)), "--config-file", config, "--num-processes", "2"]
        printed, lines = lines_of(*words, XDG_CACHE_HOME=str(tmp_path))
        assert printed == []
        others = [line for line in lines if not line.startswith(OWN)]
        said.append([line.partition(" its")[0] for line in others])
    assert said == [["DeepSpeed compiles"], []]


@pytest.mark.slow
def test_torchs_own_lines_come_where_a_user_asks_for_them(sections, write_recipe):
    recipe = sections("siglip")
    recipe["train"]["max_steps"] = 2
    words = [str(write_recipe(recipe)), "--num-processes", "2"]
    _, lines = lines_of(*words, TORCH_CPP_LOG_LEVEL="WARNING")
    assert [line for line in lines if "find_unused_parameters=True" in line]
