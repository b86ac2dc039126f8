"""Random numbers are the training's own, whatever happens between its steps."""

import random

import numpy as np
import torch
import yaml
from safetensors.torch import load_file

from medft.training.random_states import same_numbers_after


def draw():
    return random.random(), np.random.rand(), torch.rand(1).item()


def test_random_numbers_of_a_block_come_again():
    with same_numbers_after():
        drawn = draw()
    assert draw() == drawn
    assert draw() != drawn


def test_an_evaluation_changes_nothing_of_what_is_trained(sections, tmp_path, run_script):
    """Its dataloader draws from torch's generator, as dropout does."""
    found = {}
    for every in (1, 5):
        recipe = sections("siglip")
        recipe["lora"]["dropout"] = 0.3
        run = tmp_path / str(every)
        recipe["train"] |= {"output_dir": str(run), "max_steps": 5}
        recipe["train"] |= {"eval_strategy": "steps", "eval_steps": every}
        file = tmp_path / f"{every}.yaml"
        file.write_text(yaml.safe_dump(recipe))
        run_script("siglip", file)
        found[every] = load_file(run / "adapter" / "adapter_model.safetensors")
    for name, weight in found[1].items():
        assert torch.equal(weight, found[5][name])
