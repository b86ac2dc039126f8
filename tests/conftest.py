"""Tiny bases and drawn data, made once; every test is offline."""

import json
import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["MEDFT_THREADS"] = "1"

import runpy
import sys
from pathlib import Path
from unittest import mock

import pytest
import yaml

ROOT = Path(__file__).parent.parent
SCRIPTS = {"decoder": "decoder_qlora.py", "siglip": "siglip_lora.py"}


def pytest_runtest_setup(item):
    """Skip what needs a GPU where there is none."""
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """What medft would keep in the home folder of its user."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def fresh_process(cache):
    """Undo what a test before left in the process: Accelerate's state, variables Trainer sets."""
    from medft.compat import reset_accelerator

    reset_accelerator()
    with mock.patch.dict(os.environ, {"MEDFT_CACHE": str(cache)}):
        yield


@pytest.fixture(scope="session")
def bases(tmp_path_factory):
    """Folders of tiny decoders (Mllama is called decoder) and of a tiny SigLIP."""
    from gemma_bases import build_gemma3, build_paligemma

    from medft.demo.bases import build_decoder, build_siglip

    folder = tmp_path_factory.mktemp("bases")
    build_decoder(folder / "decoder", seed=5)
    build_siglip(folder / "siglip", seed=5)
    build_paligemma(folder / "paligemma", seed=5)
    build_gemma3(folder / "gemma3", seed=5)
    return folder


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """Prepared drawn data, knee radiographs only: pairs.parquet and chat/."""
    from medft.data.chat import write_chat
    from medft.data.prepare import prepare
    from medft.demo.exports import write_exports

    folder = tmp_path_factory.mktemp("data")
    sources = write_exports(folder / "raw", pairs=144, seed=3)
    spec = yaml.safe_load(sources.read_text())
    spec["sources"] = spec["sources"][:1]
    spec["split"]["validation"] = 0.15
    sources.write_text(yaml.safe_dump(spec))
    prepare(sources, folder)
    write_chat(folder / "pairs.parquet", folder / "chat")
    return folder


@pytest.fixture(scope="session")
def mixed_rows(data):
    """A chat file whose rows have no, one and two images: 5, 15 and 7 of them."""
    lines = (data / "chat" / "train.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines[:27]]
    for row in rows[:5]:
        row["images"], row["messages"][0]["content"][:1] = [], []
    for row in rows[20:]:
        row["images"] *= 2
        row["messages"][0]["content"][:0] = [{"type": "image"}]
    file = data / "chat" / "mixed.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(scope="session")
def sections(bases, data):
    """The sections of a small recipe by kind, to be changed by a test before it is written."""

    def make(kind: str) -> dict:
        chat = data / "chat"
        recipe = {
            "model": {"base": str(bases / kind), "dtype": "float32"},
            "data": {
                "train": str(chat / "train.jsonl"),
                "validation": str(chat / "validation.jsonl"),
            },
            "lora": {"r": 4, "alpha": 8, "dropout": 0.05},
            "train": {
                "output_dir": "missing",
                "per_device_train_batch_size": 3,
                "per_device_eval_batch_size": 2,
                "learning_rate": 1e-2,
                "logging_steps": 1,
                "eval_steps": 500,
                "save_steps": 500,
            },
        }
        if kind == "decoder":
            recipe["quantization"] = None
            recipe["data"]["max_length"] = 96
        else:
            recipe["contrastive"] = {"positives": "caption"}
            recipe["data"]["image_size"] = 84
        return recipe

    return make


@pytest.fixture(scope="session")
def runs(sections, tmp_path_factory, run_script):
    """A finished run of each kind and one on a 4-bit base."""
    folder = tmp_path_factory.mktemp("runs")
    for name, kind, changes in (
        ("decoder", "decoder", []),
        ("nf4", "decoder", ["quantization={bits: 4}"]),
        ("siglip", "siglip", []),
    ):
        recipe = sections(kind)
        recipe["train"] |= {"output_dir": str(folder / name), "max_steps": 8, "learning_rate": 2e-3}
        file = folder / f"{name}.yaml"
        file.write_text(yaml.safe_dump(recipe))
        run_script(kind, file, *changes)
    return folder


@pytest.fixture
def medft():
    """Run the `medft` command in this process; gives its exit code."""
    from medft import cli

    def run(*words: object) -> int:
        with mock.patch.object(sys, "argv", ["medft", *map(str, words)]):
            return cli.main()

    return run


@pytest.fixture(scope="session")
def images(data):
    """Paths of drawn images."""
    return sorted((data / "raw" / "knee" / "images").glob("0*.png"))


@pytest.fixture(scope="session")
def embedder(runs):
    """The SigLIP of the finished run."""
    from medft.siglip.embedder import Embedder

    return Embedder.load(runs / "siglip")


@pytest.fixture
def write_recipe(tmp_path):
    """Write sections to a file; its output_dir is a fresh folder."""

    def write(recipe: dict, name: str = "run") -> Path:
        recipe["train"]["output_dir"] = str(tmp_path / name)
        file = tmp_path / f"{name}.yaml"
        file.write_text(yaml.safe_dump(recipe))
        return file

    return write


@pytest.fixture(scope="session")
def run_script(cache):
    """Run a recipe script in this process, as `python recipes/x.py WORDS` does; may raise."""
    from medft.compat import reset_accelerator

    def run(kind: str, *words: object) -> None:
        reset_accelerator()
        with mock.patch.dict(os.environ, {"MEDFT_CACHE": str(cache)}):
            main = runpy.run_path(str(ROOT / "recipes" / SCRIPTS[kind]))["main"]
            main([str(word) for word in words])

    return run
