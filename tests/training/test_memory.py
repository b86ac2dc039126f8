"""Memory that runs out is one sentence with keys that take less, and with nothing else."""

import errno
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

from medft.config.recipe import RECIPE_KINDS
from medft.errors import BaseModelError, DataError, RunError
from medft.training.memory import changes_that_help, memory_that_ran_out

STARVED = Path(__file__).parents[1] / "recipes" / "starved.py"
WITH = "with train.resume_from_checkpoint=true and"
DATA = {"train": {"tokens_a_row": {"median": 40, "p95": 70, "p99": 75, "longest": 90}}}


def caused(error, cause):
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        RuntimeError("unable to mmap 80 bytes from file <x>: Cannot allocate memory (12)"),
        caused(BaseModelError("expected files that can be read"), MemoryError()),
    ],
)
def test_memory_that_ran_out_is_known(error):
    assert memory_that_ran_out(error)


@pytest.mark.parametrize(
    "error",
    [
        ValueError("CUDA"),
        RuntimeError("CUDA error: device-side assert triggered"),
        RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED."),
        OSError(errno.ENOSPC, "No space left on device"),
        DataError("row 3: the text is 'Cannot allocate memory'"),
    ],
)
def test_what_is_something_else_is_not_called_memory(error):
    assert memory_that_ran_out(error) is None


@pytest.fixture
def keys_of(sections, tmp_path):
    """The keys that are named for a recipe with some values changed."""

    def find(kind, where, *overrides, data=DATA, **arguments):
        file = tmp_path / "recipe.yaml"
        file.write_text(yaml.safe_dump(sections(kind)))
        recipe = RECIPE_KINDS[kind].load(file, overrides)
        usual = {
            "gradient_checkpointing": True, "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": 4, "per_device_eval_batch_size": 1,
            "dataloader_num_workers": 0, "dataloader_prefetch_factor": None,
        }  # fmt: skip
        changes = changes_that_help(recipe, SimpleNamespace(**usual | arguments), data, where)
        assert len(changes) <= 3
        return [change.keys for change in changes]

    return find


def test_a_step_takes_less_by_what_costs_least(keys_of):
    found = keys_of("decoder", "step", gradient_checkpointing=False, per_device_train_batch_size=6)
    assert found == [
        "train.gradient_checkpointing=true",
        "train.per_device_train_batch_size=3 train.gradient_accumulation_steps=8",
        "model.dtype=bfloat16",
    ]


def test_what_is_there_already_or_would_change_nothing_is_not_named(keys_of):
    half = "model.dtype=bfloat16"
    assert keys_of("decoder", "step", half)[:2] == ["quantization={bits: 4}".replace("{", "'{")
                                                    + "'", "data.max_length=70"]  # fmt: skip
    quantized = keys_of("decoder", "step", half, "quantization={bits: 4}")
    assert quantized == ["data.max_length=70", "lora.r=2 lora.alpha=4", "another model.base"]
    short = {"train": {"tokens_a_row": {"p95": 86, "longest": 90}}}
    assert "data.max_length=86" not in keys_of("decoder", "step", half, data=short)
    tiles = "data.max_image_tiles=2"
    assert tiles not in keys_of("decoder", "step", half, "quantization={bits: 4}", data=short)
    fixed = ("model.cross_attention_fix=true", "quantization={bits: 4}", half)
    assert tiles in keys_of("decoder", "step", *fixed, data=short)


def test_the_same_number_of_rows_makes_a_step(keys_of):
    for rows in range(2, 13):
        [keys] = keys_of("siglip", "rows", per_device_train_batch_size=rows)[:1]
        fewer, accumulation = map(int, re.findall(r"=(\d+)", keys))
        assert fewer * accumulation == rows * 4
        assert fewer < rows


def test_an_evaluation_a_base_and_rows_have_keys_of_their_own(keys_of):
    assert keys_of("siglip", "evaluation", per_device_eval_batch_size=9)[0] == (
        "train.per_device_eval_batch_size=4"
    )
    assert keys_of("decoder", "loading")[:2] == ["model.dtype=bfloat16", "quantization='{bits: 4}'"]
    assert keys_of("siglip", "loading") == ["another model.base"]
    assert keys_of("decoder", "rows", dataloader_num_workers=5)[:2] == [
        "train.dataloader_num_workers=2",
        "train.dataloader_prefetch_factor=1",
    ]
    assert keys_of("decoder", "rows", dataloader_num_workers=1)[0] == (
        "train.dataloader_num_workers=0 train.dataloader_prefetch_factor=null"
    )
    every_weight = keys_of("decoder", "step", "lora=null")
    assert every_weight[0] == "lora='{r: 16, alpha: 32}'"
    apart = keys_of(
        "siglip", "step", "contrastive.exact_batch=false", per_device_train_batch_size=2
    )
    assert "contrastive.exact_batch=true" in apart[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("moment", "megabytes", "where", "first", "goes_on", "complete"),
    [
        ("loading", 4, "the loading of the base", "1. another model.base", "", []),
        (
            "step",
            10,
            "a training step",
            "1. train.gradient_checkpointing=true",
            f"checkpoint-2 {WITH} 1, with another start a new run in another folder",
            [1, 2],
        ),
        (
            "evaluation",
            6,
            "an evaluation",
            "1. train.per_device_eval_batch_size=2",
            f"checkpoint-1 {WITH} 1, with another start a new run in another folder",
            [1],
        ),
    ],
)
def test_memory_of_the_host_that_runs_out(
    sections, tmp_path, moment, megabytes, where, first, goes_on, complete
):
    recipe = sections("siglip")
    recipe["data"]["image_size"] = 560
    recipe["train"] |= {"output_dir": str(tmp_path / "run"), "max_steps": 4, "save_steps": 1}
    recipe["train"] |= {"eval_strategy": "steps", "eval_steps": 2}
    recipe["train"] |= {"per_device_train_batch_size": 4, "per_device_eval_batch_size": 5}
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe))
    words = [sys.executable, STARVED, moment, megabytes, "siglip", file]
    done = subprocess.run([*map(str, words)], capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    [sentence] = [x for x in done.stderr.splitlines() if x.startswith("medft: error: ")]
    assert "expected the host (" in sentence
    assert f"to hold {where}, it ran out: write, in the order of what is lost, {first}" in sentence
    assert sentence.endswith(goes_on)
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["status"] == "failed"
    assert record["error"] == f"RunError: {sentence.removeprefix('medft: error: ')}"
    manifests = (tmp_path / "run").glob("checkpoint-*/manifest.json")
    assert sorted(int(path.parent.name[11:]) for path in manifests) == complete


@pytest.mark.gpu
def test_memory_of_a_gpu_that_runs_out(sections, write_recipe, run_script):
    recipe = sections("siglip")
    recipe["data"]["image_size"] = 560
    recipe["train"] |= {"max_steps": 2, "per_device_train_batch_size": 16}
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(2e8 / torch.cuda.mem_get_info()[1])
    try:
        with pytest.raises(RunError, match=r"expected the GPU \(.* GiB\) to hold a training step"):
            run_script("siglip", write_recipe(recipe))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.slow
def test_memory_of_one_process_of_two_is_said_once(sections, tmp_path):
    recipe = sections("siglip")
    recipe["data"] |= {"image_size": 560, "validation": None}
    recipe["train"] |= {"output_dir": str(tmp_path / "run"), "max_steps": 4, "save_steps": 1}
    recipe["train"] |= {"per_device_train_batch_size": 4}
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    words = [*launcher, STARVED, "step", 10, "siglip", file]
    done = subprocess.run([*map(str, words)], capture_output=True, text=True, check=False)
    assert done.returncode
    [sentence] = [x for x in done.stderr.splitlines() if x.startswith("medft: error: ")]
    assert "to hold a training step, it ran out" in sentence
    assert "RuntimeError" not in done.stderr  # of the process that lost the other one
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["status"] == "failed"
    assert "another one ended before" in record["error"]
    assert (tmp_path / "run" / "checkpoint-2" / "manifest.json").exists()
