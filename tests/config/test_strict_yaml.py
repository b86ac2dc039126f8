"""YAML that is wrong is one sentence with its line."""

import pytest
from good_recipe import GOOD, problems

from medft.config.recipe import DecoderRecipe
from medft.errors import RecipeError


@pytest.mark.parametrize("word", ["train.seed", "a.b.c=1", "=1", "train.=2", "train.seed=[1"])
def test_a_malformed_override_is_an_error(load, word):
    [problem] = problems(load, GOOD, word)
    assert "override" in problem


@pytest.mark.parametrize("text", ["? [a]\n: b\n", "a: &a [*a]\n", "lora: {1: 2}\n", "1: 2\n"])
def test_strange_yaml_is_one_sentence(load, text):
    [problem] = problems(load, text)
    assert "expected" in problem


@pytest.mark.parametrize(
    ("text", "line"),
    [("model: {base: x}\nmodel: {base: y}\n", 2), ("model: [\n", 2), ("a: b: c\n", 1)],
)
def test_broken_yaml_names_the_line(load, text, line):
    [problem] = problems(load, text)
    assert f"recipe.yaml:{line}" in problem


def test_empty_and_missing_files_are_errors(load, tmp_path):
    assert "found nothing" in problems(load, "")[0]
    with pytest.raises(RecipeError, match="could not read it"):
        DecoderRecipe.load(tmp_path / "none.yaml")
