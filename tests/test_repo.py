"""The files that ship belong together."""

import ast
import json
import os
import re
import subprocess
import sys
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


LOADS = {"from_pretrained", "from_config"}


def test_every_load_from_a_model_folder_refuses_its_code():
    loads = {}
    for path in sorted((ROOT / "medft").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            owner = getattr(node, "func", None)
            if isinstance(owner, ast.Attribute) and owner.attr in LOADS:
                loads[f"{path.name}:{node.lineno} {ast.unparse(owner)}"] = {
                    word.arg: ast.unparse(word.value) for word in node.keywords
                }
    without = ("Peft", "nn.Embedding")  # they have no such argument
    loads = {name: words for name, words in loads.items() if not any(w in name for w in without)}
    assert len(loads) >= 7
    assert {words.get("trust_remote_code") for words in loads.values()} == {"False"}, loads


def test_a_kernel_of_the_hub_is_never_fetched(tmp_path):
    """With the package kernels, bitsandbytes would fetch one and run it."""
    (tmp_path / "kernels.py").write_text("def get_kernel(*words, **keys): print('fetched')\n")
    line = "from kernels import get_kernel; get_kernel('team/kernel')"
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    for first, fetched in (("", True), ("import medft; ", False)):
        done = subprocess.run(
            [sys.executable, "-c", first + line], capture_output=True, text=True, check=False,
            env={**os.environ, "PYTHONPATH": path},
        )  # fmt: skip
        assert ("fetched" in done.stdout) == fetched
        assert ("import of kernels halted" in done.stderr) == (not fetched)


@pytest.mark.slow
def test_bitsandbytes_quantizes_without_the_package_that_fetches(tmp_path):
    mark = tmp_path / "mark"
    (tmp_path / "kernels.py").write_text(f"open({str(mark)!r}, 'w')\n")
    lines = (
        "import torch, medft.decoder.model\n"
        "from bitsandbytes.nn import Linear4bit\n"
        "layer = Linear4bit(64, 64, compute_dtype=torch.float32).to('cpu')\n"
        "print(layer(torch.ones(2, 64)).isfinite().all().item())\n"
    )
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-c", lines], capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    assert done.stdout.split() == ["True"], done.stderr
    assert "kernels" not in done.stderr
    assert not mark.exists()
