"""A recipe with nothing wrong, and what is said of one that has something."""

import pytest

from medft.config.recipe import DecoderRecipe
from medft.errors import RecipeError

GOOD = """\
model: {base: some/base}
data: {train: train.jsonl}
train:
  output_dir: runs/x
  learning_rate: 1e-4
"""


def problems(load, text, *overrides, kind=DecoderRecipe):
    with pytest.raises(RecipeError) as caught:
        load(text, *overrides, kind=kind)
    return caught.value.problems
