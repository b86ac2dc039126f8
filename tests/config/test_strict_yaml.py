"""YAML that is wrong is one sentence with its line."""

import os
import time

import pytest
from good_recipe import GOOD, problems

from medft.config.recipe import DecoderRecipe
from medft.data.sources import load_sources
from medft.errors import RecipeError


@pytest.mark.parametrize("word", ["train.seed", "a.b.c=1", "=1", "train.=2", "train.seed=[1"])
def test_a_malformed_override_is_an_error(load, word):
    [problem] = problems(load, GOOD, word)
    assert "override" in problem


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (["train.seed=1", "train.seed=2"], "train.seed"),
        (["train.seed=1", "lora.r=4", "train.seed=1"], "train.seed"),
        (["lora=null", "lora.r=4"], "lora"),
        (["lora.r=4", "lora={alpha: 8}"], "lora"),
    ],
)
def test_what_two_overrides_set_is_an_error_that_names_both(load, words, key):
    [problem] = problems(load, GOOD, *words)
    assert problem == (
        f"expected a key to be overridden once, {words[0]!r} and {words[-1]!r} both set {key}: "
        f"remove one"
    )
    recipe = load(GOOD, "train.seed=1", "train.data_seed=2", "lora.r=4")
    assert (recipe.train.seed, recipe.train.data_seed, recipe.lora.r) == (1, 2, 4)


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


def tower(inner):
    """Twelve aliases in each other, ten times each: 10^12 values if they were expanded."""
    levels = [f"a{i}: &a{i} {inner(f'*a{i - 1}')}" for i in range(1, 12)]
    return "\n".join(["a0: &a0 {k: 1}", *levels, ""])


HOSTILE = {
    "aliases": tower(lambda name: f"[{', '.join([name] * 10)}]"),
    "merges": tower(lambda name: f"{{<<: [{', '.join([name] * 10)}]}}"),
    "nested 10,000 deep": "lora: " + "[" * 10_000 + "]" * 10_000 + "\n",
    "mappings 10,000 deep": "lora: " + "{a: " * 10_000 + "1" + "}" * 10_000 + "\n",
    "an alias of itself": "lora: &a {x: *a}\n",
    "5,000 digits": "lora: {r: " + "9" * 5000 + "}\n",
    "5,000 hexadecimal digits": "lora: {r: 0x" + "f" * 5000 + "}\n",
    "a key of 10,000 characters": "? " + "k" * 10_000 + "\n: 1\n",
    "code": "lora: !!python/object/apply:os.system [id]\n",
    "10^5 values": "lora: [" + "1, " * 100_000 + "1]\n",
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("reads", ["a recipe", "SOURCES.yaml"])
def test_hostile_yaml_is_one_short_sentence(load, tmp_path, name, reads):
    started = time.monotonic()
    (tmp_path / "SOURCES.yaml").write_text("sources: []\n" + HOSTILE[name])
    with pytest.raises(RecipeError) as caught:
        load(GOOD + HOSTILE[name]) if reads == "a recipe" else load_sources(
            tmp_path / "SOURCES.yaml"
        )
    assert time.monotonic() - started < 30
    assert all(len(problem) < 700 for problem in caught.value.problems)
    assert len(caught.value.problems) < 20


def test_aliases_and_merges_of_ordinary_size_are_read(load):
    text = GOOD + "lora: {r: &width 8, alpha: *width, rank_pattern: {<<: {a: 3}}}\n"
    assert load(text).lora.alpha == 8
    assert load(text).lora.rank_pattern == {"a": 3}


def test_what_is_no_file_of_ordinary_size_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe.yaml")
    with (tmp_path / "large.yaml").open("wb") as file:
        file.truncate(10**9)
    (tmp_path / "folder.yaml").mkdir()
    names = ("pipe.yaml", "large.yaml", "folder.yaml", "/dev/zero")
    for name in names:
        with pytest.raises(RecipeError, match=r"could not read it \(.*(device|at most)"):
            DecoderRecipe.load(tmp_path / name)


def test_a_long_value_is_shown_short_and_many_problems_are_counted(load):
    [problem] = problems(load, GOOD.replace("some/base", "b" * 900_000))
    assert "bbb...bbb" in problem
    assert len(problem) < 400
    found = problems(load, GOOD + "lora: {" + ", ".join(f"k{i}: 1" for i in range(300)) + "}\n")
    assert len(found) == 51
    assert "250 more keys are wrong" in found[-1]
    assert len(problems(load, GOOD + "lora: {k1: 1, k2: 2}\n")) == 2


BOUNDS = {
    "lora.r": (4096, 1_000_000),
    "lora.alpha": (8192, 10**12),
    "train.num_train_epochs": (1000, 1e308),
    "train.learning_rate": (1e30, 1e308),
    "train.warmup_steps": (10**6, 1e30),
    "train.max_steps": (10**6, 10**30),
    "train.per_device_train_batch_size": (4096, 10**9),
    "train.gradient_accumulation_steps": (4096, 10**9),
    "train.dataloader_num_workers": (64, 10**5),
    "train.ddp_timeout": (86400, 10**15),
    "data.max_length": (131072, 10**9),
}


@pytest.mark.parametrize("key", BOUNDS)
def test_numbers_have_bounds(load, key):
    good, bad = BOUNDS[key]
    load(GOOD, f"{key}={good}")
    [problem] = problems(load, GOOD, f"{key}={bad}")
    assert "expected less than or equal to" in problem


@pytest.mark.parametrize("word", ["r=" + "9" * 5000, "targets=" + "[" * 5000, "alpha=*a"])
def test_a_hostile_override_is_one_short_sentence(load, word):
    [problem] = problems(load, GOOD, f"lora.{word}")
    assert "expected a YAML value" in problem
    assert len(problem) < 400


@pytest.mark.parametrize("key", ["train.output_dir", "data.train", "model.base", "lora.init_from"])
def test_what_no_file_system_takes_is_no_path_of_a_recipe(load, key):
    for value in ('"a\\0b"', "o" * 10_000, "a/" * 5000):
        [problem] = problems(load, GOOD, f"{key}={value}")
        assert "expected a path" in problem
        assert len(problem) < 700
    load(GOOD, f"{key}=a/b c")


def test_a_recipe_names_no_module_to_import(load):
    for key in ("megatron_config", "auto_mapping"):
        assert f"lora.{key} is refused: " in problems(load, GOOD, f"lora.{key}={{a: b}}")[0]
