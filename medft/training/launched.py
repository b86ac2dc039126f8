"""How a training was launched: what was asked for, compared with what runs.

Accelerate starts one process where its configuration asks for several on the CPU, processes that no
launcher connects each train alone into the same folder, and its configurations can shard, compile
or schedule in ways that medft was never tested with. Each is refused before anything is written.
What cannot be seen: a launcher on another machine, or one that has ended. Then only the
environment that it left is compared.
"""

import argparse
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import huggingface_hub
import psutil
import torch
from accelerate import PartialState
from accelerate.utils import DistributedType, str_to_bool
from transformers import TrainingArguments

from medft.config.strict_yaml import StrictYaml
from medft.errors import RecipeError
from medft.training.deepspeed import check_deepspeed

ASKED = "MEDFT_ASKED_PROCESSES"
"""Environment variable by which `medft train` says how many processes it was asked for."""

_SAFE_SECONDS_TO_SAVE = 20
"""Of the 30 that torch's agent leaves its processes, which have a step to finish as well."""

Launcher = Literal["python", "accelerate", "torchrun", "medft train"]
Strategy = Literal["single", "ddp", "zero2", "zero3"]

_UNTESTED = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism_config",
    "ACCELERATE_USE_SAGEMAKER": "SageMaker",
}
"""What Accelerate's launcher switches on by environment variables."""

_TESTED = (
    DistributedType.NO,
    DistributedType.MULTI_CPU,
    DistributedType.MULTI_GPU,
    DistributedType.DEEPSPEED,
)

_ACCELERATE = {"accelerate", "accelerate.commands.accelerate_cli"}

_COUNTS = (
    "WORLD_SIZE",
    "OMPI_COMM_WORLD_SIZE",
    "PMI_SIZE",
    "MV2_COMM_WORLD_SIZE",
    "SLURM_STEP_NUM_TASKS",
)
"""Variables by which launchers give the number of processes; the first that is set counts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Launch:
    """How this process came to train, as run.json has it."""

    launcher: Launcher
    strategy: Strategy
    asked_processes: int | None
    """By the launcher; None where nothing asked, as under `python`."""

    processes: int
    threads: int
    """Of torch, on each process."""


def check_environment(environment: Mapping[str, str] = os.environ) -> None:
    """Refuse what a launcher left in the environment, before processes are joined.

    Args:
        environment: of this process.

    Raises:
        RecipeError: it names a strategy that was never tested, a DeepSpeed configuration that
            overrides the recipe, other numbers of processes than run, or processes that would not
            find each other.
    """
    for name, strategy in _UNTESTED.items():
        if str_to_bool(environment.get(name) or "false"):
            raise RecipeError(_untested(strategy))
    backend = environment.get("ACCELERATE_DYNAMO_BACKEND", "NO")
    if backend.upper() != "NO":
        raise RecipeError(
            f"expected accelerate's dynamo_backend to be absent, it is {backend} and would compile "
            f"the model, which was never tested: remove it from accelerate's configuration"
        )
    if str_to_bool(environment.get("ACCELERATE_USE_DEEPSPEED") or "false"):
        check_deepspeed(environment)
    started = _started_processes(environment)
    launcher, asked = _asked(environment)
    if asked is not None and asked != started:
        raise RecipeError(
            f"expected {asked} processes, as {launcher} was asked for, {started} "
            f"{'was' if started == 1 else 'were'} started (on CPUs accelerate starts one unless "
            f"mpirun starts more): use medft train --num-processes {asked}, "
            f"torchrun --nproc_per_node {asked}, or ask for {started}"
        )


def _untested(strategy: str) -> str:
    return (
        f"expected one process, DDP, ZeRO-2 or ZeRO-3, the launcher asks for {strategy}, with "
        f"which medft was never tested: use accelerate_configs/ddp.yaml, zero2.yaml or zero3.yaml"
    )


def _started_processes(environment: Mapping[str, str]) -> int:
    """Number of processes that a launcher started, of which this is one.

    Raises:
        RecipeError: they would not find each other, and each would train alone.
    """
    name = next((name for name in _COUNTS if name in environment), None)
    count = environment[name] if name else "1"
    if not count.isdecimal() or int(count) < 1:
        raise RecipeError(f"expected a number of processes in {name}, got {count!r}: correct it")
    ranks = [known for known in ("RANK", "LOCAL_RANK") if environment.get(known, "-1") != "-1"]
    wanted = ["RANK", "LOCAL_RANK", "WORLD_SIZE"] if int(count) > 1 else ["WORLD_SIZE"]
    missing = [known for known in wanted if known not in environment]
    if (int(count) > 1 or ranks) and missing:
        found = dict.fromkeys([*filter(None, [name]), *ranks])
        raise RecipeError(
            f"expected RANK, LOCAL_RANK and WORLD_SIZE where several processes train, the "
            f"environment has {', '.join(f'{k}={environment[k]}' for k in found)} without "
            f"{', '.join(missing)} and each could train alone into one folder: start with "
            f"torchrun, accelerate launch or medft train, or unset {', '.join(found)}"
        )
    rank = environment.get("RANK", "0")
    if not rank.isdecimal() or int(rank) >= int(count):
        raise RecipeError(
            f"expected a RANK below WORLD_SIZE, got {rank!r} and {count}: unset both, or start "
            f"with torchrun"
        )
    return int(count)


def _asked(environment: Mapping[str, str]) -> tuple[Launcher, int | None]:
    """The launcher, and the number of processes that it was asked for."""
    if ASKED in environment:
        return "medft train", int(environment[ASKED])
    for words, folder in _ancestors():
        if (options := options_of_launch(words)) is not None:
            return "accelerate", asked_of_accelerate(options, folder)
    if "TORCHELASTIC_RUN_ID" in environment:
        return "torchrun", int(environment["WORLD_SIZE"])
    if "ACCELERATE_USE_DEEPSPEED" in environment:  # started on another machine
        return "accelerate", None
    return "python", None


def asked_of_accelerate(options: list[str], folder: Path) -> int | None:
    """Number of processes that an `accelerate launch` was asked for; None if it was not said.

    Args:
        options: the words behind it.
        folder: where it was started.
    """
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--num_processes", "--num-processes", type=int)
    parser.add_argument("--config_file", "--config-file", type=Path)
    parser.add_argument("--cpu", action="store_true")
    known, _ = parser.parse_known_args(options)
    default = Path(huggingface_hub.constants.HF_HOME) / "accelerate" / "default_config.yaml"
    if known.config_file is None and default.is_file() and not known.cpu:
        known.config_file = default
    if known.num_processes is None and known.config_file is not None:
        known.num_processes = StrictYaml.read(folder / known.config_file).raw.get("num_processes")
    return known.num_processes


def _ancestors() -> Iterator[tuple[list[str], Path]]:
    """Command line and folder of each process above this one that can be read."""
    for process in psutil.Process().parents():
        try:
            yield process.cmdline(), Path(process.cwd())
        except psutil.Error:  # it has ended, or is another user's
            continue


def options_of_launch(words: list[str]) -> list[str] | None:
    """The words behind `accelerate launch` in a command line; None if it is another."""
    names = [Path(word).name for word in words]
    for end, name in enumerate(names, start=1):
        if name in ("accelerate-launch", "accelerate.commands.launch"):
            return words[end:]
        if name == "launch" and {*names[end - 2 : end - 1]} & _ACCELERATE:
            return words[end:]
    return None


def find_launch(arguments: TrainingArguments) -> Launch:
    """How this process was launched, as what runs and what was asked for agree.

    Args:
        arguments: the trainer's, by which processes were joined.

    Raises:
        RecipeError: Accelerate sees another number of processes than was started, or a device or
            strategy that was never tested.
    """
    state = PartialState()
    if state.distributed_type not in _TESTED:
        raise RecipeError(_untested(str(state.distributed_type.value)))
    started = _started_processes(os.environ)
    joined = arguments.world_size, arguments.process_index
    if joined != (started, int(os.environ.get("RANK", "0"))):
        raise RecipeError(
            f"expected {started} processes that see each other, as the environment says, "
            f"accelerate sees {joined[0]}: start with torchrun, accelerate launch or medft train"
        )
    plugin = arguments.deepspeed_plugin
    strategy: Strategy = "single" if started == 1 else "ddp"
    if plugin is not None:
        strategy = "zero3" if plugin.zero_stage == 3 else "zero2"
    launcher, asked = _asked(os.environ)
    return Launch(
        launcher=launcher,
        strategy=strategy,
        asked_processes=asked,
        processes=started,
        threads=torch.get_num_threads(),
    )


def how_to_stop(launch: Launch, seconds_to_save: float) -> str:
    """What stops this training after it has saved, as a part of a sentence.

    Args:
        launch: of this process.
        seconds_to_save: of the last checkpoint; 0 if there was none.
    """
    has_agent = launch.processes > 1 and launch.launcher in ("accelerate", "torchrun")
    if has_agent and seconds_to_save > _SAFE_SECONDS_TO_SAVE:
        return (
            f"Ctrl-C may not save, since the last checkpoint took {seconds_to_save:.0f} s and the "
            f"launcher ends its processes 30 s after it: kill -USR1 {os.getpid()} saves, as does "
            f"Ctrl-C under medft train"
        )
    return "Ctrl-C saves a checkpoint and stops"
