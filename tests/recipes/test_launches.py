"""Every way to start a training gives one result, or says why it is not what was asked for."""

import json
import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent.parent
SCRIPT = str(ROOT / "recipes" / "decoder_qlora.py")
ACCELERATE = ["-m", "accelerate.commands.launch"]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
pytestmark = pytest.mark.slow


def started(words, **environment):
    inherited = {k: v for k, v in os.environ.items() if k != "MEDFT_THREADS"}
    inherited["OMP_WAIT_POLICY"] = "PASSIVE"  # cores may be shared with other tests
    return subprocess.run(
        [sys.executable, *map(str, words)],
        capture_output=True, text=True, check=False, cwd=ROOT, env={**inherited, **environment},
    )  # fmt: skip


@pytest.fixture
def recipe(sections, write_recipe):
    content = sections("decoder")
    content["train"] |= {"max_steps": 4, "save_steps": 2}
    return write_recipe(content)


def outcome(run):
    record = json.loads((run / "run.json").read_text())
    return record["launch"], (run / "adapter" / "adapter_model.safetensors").read_bytes()


def test_python_accelerate_torchrun_and_medft_train_give_one_result(recipe, tmp_path):
    cpu = ["--config_file", ROOT / "accelerate_configs" / "cpu.yaml"]
    ways = {
        "python": [SCRIPT],
        "accelerate": [*ACCELERATE, *cpu, SCRIPT],
        "torchrun": [*TORCHRUN, "1", SCRIPT],
        "medft train": ["-m", "medft.cli", "train"],
    }
    found = {}
    for number, (way, words) in enumerate(ways.items()):
        run = tmp_path / way
        # launchers leave different numbers there, as their users do
        done = started([*words, recipe, f"train.output_dir={run}"], OMP_NUM_THREADS=str(number + 1))
        assert done.returncode == 0, done.stderr
        found[way] = outcome(run)
    for way, (launch, adapter) in found.items():
        assert launch["launcher"] == way
        assert launch["strategy"] == "single"
        assert launch["asked_processes"] == (None if way == "python" else 1)
        assert (launch["processes"], launch["threads"]) == (1, len(os.sched_getaffinity(0)))
        assert adapter == found["python"][1]

    run = tmp_path / "other"
    done = started([SCRIPT, recipe, f"train.output_dir={run}"], MEDFT_THREADS="3")
    assert done.returncode == 0, done.stderr
    assert outcome(run)[0]["threads"] == 3


def test_medft_train_starts_as_many_processes_as_it_is_asked_for(recipe):
    words = ["-m", "medft.cli", "train", recipe, "--num-processes", "2"]
    done = started(words)
    assert done.returncode == 0, done.stderr
    run = recipe.parent / "run"
    record = json.loads((run / "run.json").read_text())
    share = max(len(os.sched_getaffinity(0)) // 2, 1)
    assert record["launch"] == {
        "launcher": "medft train",
        "strategy": "ddp",
        "asked_processes": 2,
        "processes": 2,
        "threads": share,
    }
    assert record["batch"]["world"] == 2
    (run / "checkpoint-4" / "manifest.json").unlink()
    alone = started([SCRIPT, recipe, "train.resume_from_checkpoint=true"])
    assert alone.returncode == 2
    assert "expected 2 processes as in the interrupted run" in alone.stderr


def test_two_machines_train_one_run(recipe):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["-m", "medft.cli", "train", recipe, "--num_machines", 2, "--num-processes", 2]
    words += ["--main-process-ip", "127.0.0.1", "--main-process-port", port, "--machine-rank"]
    with ThreadPoolExecutor() as machines:
        first, second = machines.map(
            lambda rank: started([*words, rank], MEDFT_THREADS="1"), (0, 1)
        )
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    record = json.loads((recipe.parent / "run" / "run.json").read_text())
    assert (record["status"], record["batch"]["world"]) == ("completed", 2)
    assert record["launch"]["asked_processes"] == 2


MULTI_CPU = {"distributed_type": "MULTI_CPU", "num_processes": 2, "use_cpu": True}
DDP = yaml.safe_load((ROOT / "accelerate_configs" / "ddp.yaml").read_text())
FSDP = {
    **DDP,
    "distributed_type": "FSDP",
    "num_processes": 2,
    "fsdp_config": {"fsdp_version": 2},
}
DYNAMO = {**DDP, "num_processes": 2, "dynamo_config": {"dynamo_backend": "INDUCTOR"}}


@pytest.mark.parametrize(
    ("config", "options", "sentence"),
    [
        (MULTI_CPU, [], "expected 2 processes, as accelerate was asked for, 1 was started"),
        (DDP, ["--cpu", "--num_processes", "3"], "expected 3 processes, as accelerate was asked"),
        (FSDP, [], "the launcher asks for FSDP"),
        pytest.param(DYNAMO, [], "dynamo_backend to be absent", marks=pytest.mark.proof),
    ],
)
def test_what_accelerate_would_do_otherwise_is_said_before_anything_is_written(
    recipe, tmp_path, config, options, sentence
):
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump({"compute_environment": "LOCAL_MACHINE", **config}))
    done = started([*ACCELERATE, "--config_file", file, *options, SCRIPT, recipe])
    assert done.returncode != 0
    assert done.stderr.count("medft: error: ") == 1, done.stderr
    assert sentence in done.stderr
    assert not (recipe.parent / "run").exists()


@pytest.mark.parametrize("rank", ["0", "1"])
def test_processes_that_nothing_connects_do_not_train(recipe, rank):
    done = started([SCRIPT, recipe], RANK=rank, LOCAL_RANK=rank)
    assert done.returncode == 2
    assert done.stderr.count("medft: error: expected RANK, LOCAL_RANK and WORLD_SIZE") == 1
    assert not (recipe.parent / "run").exists()
