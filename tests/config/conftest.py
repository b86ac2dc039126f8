"""Recipes from text."""

import pytest

from medft.config.recipe import DecoderRecipe


@pytest.fixture
def load(tmp_path):
    """The recipe in a text, changed by overrides."""

    def load(text, *overrides, kind=DecoderRecipe):
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        return kind.load(path, overrides)

    return load
