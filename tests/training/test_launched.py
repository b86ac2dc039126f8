"""What a launcher asks for against what runs: refused before anything is written."""

import json
import os
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from transformers import TrainingArguments

from medft.errors import RecipeError, RunError
from medft.files import packaged_file
from medft.training import process
from medft.training.launch import train
from medft.training.launched import (
    ASKED,
    Launch,
    asked_of_accelerate,
    check_environment,
    find_launch,
    how_to_stop,
    options_of_launch,
)
from medft.training.process import num_threads, process_setup, training_setup

TWO = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "0"}
ZERO2 = {"ACCELERATE_USE_DEEPSPEED": "true"}


@pytest.mark.parametrize(
    ("environment", "sentence"),
    [
        ({"ACCELERATE_USE_FSDP": "true"}, "asks for FSDP, .* zero2.yaml or zero3.yaml"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "asks for Megatron-LM"),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, "asks for a parallelism_config"),
        ({"ACCELERATE_USE_SAGEMAKER": "true"}, "asks for SageMaker"),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "dynamo_backend to be absent, it is INDUCTOR"),
        ({"ACCELERATE_MIXED_PRECISION": "fp8"}, "mixed_precision to be absent, it is fp8"),
        (ZERO2, "deepspeed_config_file alone in .* got no such file"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 without RANK, LOCAL_RANK"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "WORLD_SIZE=2, RANK=0 without LOCAL_RANK"),
        ({"RANK": "0", "LOCAL_RANK": "0"}, "RANK=0, LOCAL_RANK=0 without WORLD_SIZE"),
        ({"RANK": "1"}, "RANK=1 without WORLD_SIZE"),
        ({"SLURM_STEP_NUM_TASKS": "2"}, "SLURM_STEP_NUM_TASKS=2 without RANK, LOCAL_RANK, WORLD"),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, "OMPI_COMM_WORLD_SIZE=4 without RANK"),
        ({**TWO, "RANK": "2"}, "RANK below WORLD_SIZE, got '2' and 2"),
        ({**TWO, "RANK": "first"}, "RANK below WORLD_SIZE, got 'first' and 2"),
        ({**TWO, "WORLD_SIZE": "two"}, "number of processes in WORLD_SIZE, got 'two'"),
        ({ASKED: "2"}, "expected 2 processes, as medft train was asked for, 1 was started"),
        ({**TWO, ASKED: "4"}, "expected 4 processes, as medft train .* 2 were started"),
    ],
)
@pytest.mark.parametrize("kind", ["decoder", "siglip"])
def test_other_launches_than_tested_ones_are_refused_before_anything_is_written(
    kind, environment, sentence, sections, write_recipe, run_script, monkeypatch
):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    file = write_recipe(sections(kind))
    with pytest.raises(RecipeError, match=sentence):
        run_script(kind, file)
    assert not (file.parent / "run").exists()


@pytest.mark.parametrize(
    "environment",
    [
        {},
        TWO,
        {**TWO, ASKED: "2"},
        {ASKED: "1"},
        {"WORLD_SIZE": "1", "RANK": "0", "MASTER_ADDR": "somewhere"},
        {"SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "4"},
        {**TWO, "SLURM_STEP_NUM_TASKS": "1", "PMI_SIZE": "1"},
        {"ACCELERATE_USE_FSDP": "false", "ACCELERATE_DYNAMO_BACKEND": "NO"},
        {"LOCAL_RANK": "-1"},  # as older tools say that nothing is distributed
        {"ACCELERATE_USE_FSDP": ""},
    ],
)
def test_consistent_launches_are_let_through(environment):
    check_environment(environment)


def test_processes_that_accelerate_does_not_join_are_refused(monkeypatch, tmp_path):
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    launch = asdict(find_launch(arguments))
    assert launch == {
        "launcher": "python",
        "strategy": "single",
        "asked_processes": None,
        "processes": 1,
        "threads": torch.get_num_threads(),
    }
    for name, value in TWO.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RecipeError, match=r"2 processes that see each other, .* accelerate sees 1"):
        find_launch(arguments)


@pytest.mark.parametrize(
    ("words", "options"),
    [
        (["python", "/opt/bin/accelerate", "launch", "--cpu", "x.py"], ["--cpu", "x.py"]),
        (["python", "-m", "accelerate.commands.launch", "x.py"], ["x.py"]),
        (["python", "-m", "accelerate.commands.accelerate_cli", "launch", "x.py"], ["x.py"]),
        (["/opt/bin/accelerate-launch", "x.py"], ["x.py"]),
        (["medft", "train", "launch"], None),
        (["launch", "accelerate"], None),
        (["accelerate", "test"], None),
        ([], None),
    ],
)
def test_a_command_line_of_accelerate_is_known(words, options):
    assert options_of_launch(words) == options


def test_accelerate_was_asked_for_what_its_options_say_else_its_file(tmp_path, monkeypatch):
    (tmp_path / "two.yaml").write_text("distributed_type: MULTI_CPU\nnum_processes: 2\n")

    def asked(*options):
        return asked_of_accelerate([*options, "x.py", "recipe.yaml", "train.seed=3"], tmp_path)

    assert asked() is None
    assert asked("--config_file", "two.yaml") == 2
    assert asked("--main_process_port", "1", "--config-file=two.yaml", "--num-processes", "3") == 3
    assert asked("--num_cpu_threads_per_process", "8", "--num_processes=4", "--cpu") == 4
    home = tmp_path / "home" / "accelerate"
    home.mkdir(parents=True)
    (home / "default_config.yaml").write_text((tmp_path / "two.yaml").read_text())
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(home.parent))
    assert asked() == 2  # what `accelerate config` wrote, which is read without being named
    assert asked("--cpu") is None  # and is not read then


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"optimizer": {"type": "Adam", "params": {"lr": 1.0}}}, "it differs in optimizer:"),
        ({"scheduler": {"type": "WarmupLR", "params": {}}}, "it differs in scheduler:"),
        ({"gradient_clipping": 0.1}, "it differs in gradient_clipping:"),
        ({"gradient_clipping": None}, "it differs in gradient_clipping:"),
        ({"bf16": {"enabled": True}}, "it differs in bf16:"),
        ({"fp32_allreduce": True, "amp": {}}, "it differs in amp, fp32_allreduce:"),
        ({"zero_optimization": {"stage": 1}}, "stage 2 or 3 in .*, got 1,"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
         "it differs in zero_optimization.offload_optimizer:"),
        ({"zero_optimization": None}, "expected a DeepSpeed configuration with"),
    ],
)  # fmt: skip
def test_a_deepspeed_configuration_does_not_override_the_recipe(tmp_path, change, sentence):
    config = json.loads(packaged_file("deepspeed_configs/zero2.json").read_text()) | change
    file = tmp_path / "zero.json"
    file.write_text(json.dumps({name: v for name, v in config.items() if v is not None}))
    environment = {**ZERO2, "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(file)}
    with pytest.raises(RecipeError, match=sentence):
        check_environment(environment)


def test_a_deepspeed_configuration_may_differ_in_sizes_and_logs(tmp_path):
    for stage in (2, 3):
        config = json.loads(packaged_file(f"deepspeed_configs/zero{stage}.json").read_text())
        file = tmp_path / f"zero{stage}.json"
        file.write_text(json.dumps(config))
        environment = {**ZERO2, "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(file)}
        check_environment(environment)
        config["zero_optimization"] |= {"reduce_bucket_size": 1000, "overlap_comm": False}
        file.write_text(json.dumps({**config, "steps_per_print": 1}))
        check_environment(environment)
        for name, value in (("ZERO_STAGE", "3"), ("OFFLOAD_PARAM_DEVICE", "cpu")):
            beside = {**environment, f"ACCELERATE_DEEPSPEED_{name}": value}
            with pytest.raises(RecipeError, match=f"alone in .* got .*{name}={value},"):
                check_environment(beside)


@pytest.mark.parametrize(
    ("config", "processes", "sentence"),
    [
        ({"distributed_type": "MULTI_CPU", "num_processes": 2}, None, "expected 2 .* start one"),
        ({"distributed_type": "NO"}, 3, "expected 3 processes, .*_type NO"),
        ({"distributed_type": "FSDP", "num_processes": 2}, None, "has distributed_type FSDP"),
        ({"distributed_type": "MULTI_GPU", "num_processes": 4}, 1, "expected several processes"),
        ({"distributed_type": "MULTI_GPU", "num_processes": -1}, None, "from 1 on in .* got -1"),
    ],
)
def test_medft_train_refuses_what_accelerate_would_start_otherwise(
    tmp_path, config, processes, sentence
):
    file = tmp_path / "config.yaml"
    file.write_text(json.dumps(config))
    with pytest.raises(RecipeError, match=sentence):
        train(Path("recipe.yaml"), [], file, num_processes=processes)


def test_medft_train_refuses_more_processes_than_gpus(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    zero2 = packaged_file("accelerate_configs/zero2.yaml")
    with pytest.raises(RecipeError, match="expected at most 2 processes, one for each GPU, got 3"):
        train(
            Path("recipe.yaml"), [], packaged_file("accelerate_configs/zero2.yaml"), num_processes=3
        )
    on_two = {"num-machines": 2, "machine-rank": 0}
    zero2 = packaged_file("accelerate_configs/zero2.yaml")
    for processes, sentence in ((6, "at most 2 .* got 6 on 2 machines"), (3, "as many on each of")):
        with pytest.raises(RecipeError, match=sentence):
            train(Path("recipe.yaml"), [], zero2, num_processes=processes, machine=on_two)


@pytest.mark.parametrize(
    ("launcher", "processes", "seconds", "saves"),
    [
        ("torchrun", 2, 21, False),
        ("accelerate", 2, 21, False),
        ("torchrun", 2, 19, True),
        ("torchrun", 1, 21, True),
        ("medft train", 2, 21, True),
        ("python", 1, 21, True),
    ],
)
def test_where_a_launcher_would_end_a_save_another_way_to_stop_is_named(
    launcher, processes, seconds, saves
):
    launch = Launch(
        launcher=launcher, strategy="ddp", asked_processes=None, processes=processes, threads=1
    )
    sentence = how_to_stop(launch, seconds)
    assert sentence.startswith("Ctrl-C saves" if saves else "Ctrl-C may not save")
    assert (f"kill -USR1 {os.getpid()} saves" in sentence) != saves


def test_threads_are_the_users_or_the_cores_shared_by_processes(tmp_path, monkeypatch):
    monkeypatch.setenv("MEDFT_THREADS", "3")
    assert num_threads() == 3
    for wrong in ("0", "many", "-1"):
        monkeypatch.setenv("MEDFT_THREADS", wrong)
        with pytest.raises(RunError, match="expected a number of threads in MEDFT_THREADS"):
            num_threads()
    monkeypatch.delenv("MEDFT_THREADS")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.setattr(os, "sched_getaffinity", lambda number: set(range(12)))
    quota = tmp_path / "cpu.max"
    monkeypatch.setattr(process, "_CPU_QUOTA", quota)
    assert num_threads() == 12
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "5")
    assert num_threads() == 2
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    for content, threads in (("max 100000", 12), ("450000 100000", 4), ("5000 100000", 1)):
        quota.write_text(content + "\n")
        assert num_threads() == threads


def test_a_training_has_its_threads_and_sums_depend_on_them(monkeypatch):
    """Why the number is recorded: float32 sums are added in another order."""
    before = torch.get_num_threads()
    values = torch.randn(2**20, generator=torch.Generator().manual_seed(5))
    sums = set()
    try:
        for threads in ("1", "2", "3"):
            monkeypatch.setenv("MEDFT_THREADS", threads)
            with training_setup(5):
                assert torch.get_num_threads() == int(threads)
                sums.add(values.sum().item())
        monkeypatch.setenv("MEDFT_THREADS", "1")
        with process_setup():
            assert torch.get_num_threads() == 3  # no training
    finally:
        torch.set_num_threads(before)
    assert len(sums) > 1
