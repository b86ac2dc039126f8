"""The files that ship belong together."""

import json
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from medft.config.recipe import DecoderRecipe, SiglipRecipe
from medft.data.source_section import SourceSection
from medft.data.sources import SourcesFile, load_sources
from medft.files import packaged_file

ROOT = Path(__file__).parent.parent
RECIPES = sorted(
    path for kind in ("decoder", "siglip") for path in (ROOT / "recipes" / kind).glob("*.yaml")
)
CONFIGS = sorted((ROOT / "accelerate_configs").glob("*.yaml"))


def test_the_recipes_that_ship_are_counted():
    assert {path.relative_to(ROOT / "recipes").as_posix() for path in RECIPES} == {
        "decoder/llama32_11b_24gb.yaml",
        "decoder/medgemma_4b_24gb.yaml",
        "decoder/paligemma2_3b_24gb.yaml",
        "decoder/tiny.yaml",
        "siglip/medsiglip_448.yaml",
        "siglip/siglip_base_448.yaml",
        "siglip/tiny.yaml",
    }


def test_the_sources_that_ship_load_and_name_themselves():
    files = sorted((ROOT / "recipes" / "sources").glob("*.yaml"))
    assert [path.stem for path in files] == ["path_vqa", "slake", "vqa_rad"]
    for path in files:
        assert len(load_sources(path).sources) > 1
        assert f"medft data prepare recipes/sources/{path.name}" in path.read_text()


@pytest.mark.parametrize("page", ["README.md", "docs/data.md"])
def test_the_sources_in_the_documentation_load(page, tmp_path):
    [block] = re.findall(r"```yaml\n(sources:.*?)```", (ROOT / page).read_text(), flags=re.DOTALL)
    (tmp_path / "SOURCES.yaml").write_text(block)
    shown = load_sources(tmp_path / "SOURCES.yaml")
    if page == "docs/data.md":  # all keys, with their defaults
        assert shown.sources[0].model_fields_set == set(SourceSection.model_fields)
        assert shown.model_fields_set == set(SourcesFile.model_fields)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_that_ships_loads_and_its_header_names_itself(path):
    kind = {"decoder": DecoderRecipe, "siglip": SiglipRecipe}[path.parent.name]
    recipe = kind.load(path)
    header = "".join(re.findall(r"^#(.*)$", path.read_text(), flags=re.MULTILINE))
    assert path.relative_to(ROOT).as_posix() in header
    per_device = recipe.train.per_device_train_batch_size
    accumulation = recipe.train.gradient_accumulation_steps or 1
    assert re.search(rf"\b{per_device} (row|pair)s? ", header)
    assert re.search(
        rf"= {per_device * accumulation} (row|pair)s|{per_device} (row|pair)s a step", header
    )


def test_default_recipes_exist():
    for kind in (DecoderRecipe, SiglipRecipe):
        assert packaged_file(f"recipes/{kind.default_file}").is_file()
        assert packaged_file(f"recipes/{kind.script}").is_file()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_an_accelerate_config_holds_no_precision_and_no_hyper_parameters(path):
    config = yaml.safe_load(path.read_text())
    assert not {"mixed_precision", "gradient_accumulation_steps"} & config.keys()
    deepspeed = config.get("deepspeed_config", {})
    assert set(deepspeed) <= {"deepspeed_config_file", "zero3_init_flag"}
    if deepspeed:
        content = json.loads((ROOT / deepspeed["deepspeed_config_file"]).read_text())
        assert content["bf16"] == content["fp16"] == {"enabled": "auto"}
        assert content["gradient_accumulation_steps"] == content["gradient_clipping"] == "auto"


def test_the_accelerate_configs_are_counted():
    names = {path.stem for path in CONFIGS}
    assert names == {"cpu", "single_gpu", "ddp", "zero2", "zero3"}


def test_paths_named_in_the_documentation_exist():
    named = set()
    for page in ("README.md", "CONTRIBUTING.md"):
        text = (ROOT / page).read_text()
        named |= set(
            re.findall(
                r"\b(?:recipes|accelerate_configs|deepspeed_configs|medft|tests)/[\w/.]+\w", text
            )
        )
    assert len(named) > 5
    assert [path for path in sorted(named) if not (ROOT / path).exists()] == []


def test_constraints_pin_every_direct_dependency_and_name_no_host():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    assert all(re.fullmatch(r"[\w.\-]+==[\w.+\-]+", line) for line in lines)
    pinned = {canonicalize_name(name): version for name, version in (x.split("==") for x in lines)}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = project["dependencies"] + project["optional-dependencies"]["deepspeed"]
    capped = set()
    for need in map(Requirement, needed):
        assert pinned[canonicalize_name(need.name)] in need.specifier, need
        capped |= {need.name} if "<" in str(need.specifier) else set()
    assert capped >= {"transformers", "trl", "peft", "accelerate", "bitsandbytes", "deepspeed"}


def test_tracked_files_are_small():
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.split()
    sizes = {name: (ROOT / name).stat().st_size for name in listed if (ROOT / name).exists()}
    assert {name: size for name, size in sizes.items() if size > 250_000} == {}


@pytest.mark.parametrize("page", ["silent-failures.md", "data-cases.md", "hostile-cases.md"])
def test_every_test_in_the_table_of_silent_failures_exists(page):
    text = (ROOT / "docs" / page).read_text()
    named = re.findall(r"`(tests/\S+)::(\w+)`", text)
    assert named
    rows = [line for line in text.splitlines() if line.startswith("| ") and "---" not in line]
    headers = text.count("\n| --- ")
    assert len(named) == len(rows) - headers
    for file, name in named:
        assert f"def {name}(" in (ROOT / file).read_text(), name
