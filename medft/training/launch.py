"""Training launched under accelerate, as `medft train` does."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from medft.config.command_line import recipe_class
from medft.config.strict_yaml import StrictYaml
from medft.errors import EXIT_TERMINATED, RecipeError
from medft.files import packaged_file
from medft.training.launched import ASKED


def train(
    file: Path, overrides: list[str], config_file: Path | None, num_processes: int | None = None
) -> int:
    """Launch the recipe's script under accelerate; returns its exit code.

    Without a configuration file it uses the one for a single device, or for several processes DDP,
    never the user's own default, which may set a precision or hyperparameters. SIGTERM is handled
    as by `supervised`.

    Args:
        file: the recipe, already checked.
        overrides: `section.key=value`, as given.
        config_file: accelerate's; None for DDP if there are several processes, else for one GPU if
            there is one, else the CPU.
        num_processes: instead of the configuration's.

    Raises:
        RecipeError: accelerate would start other processes than these.
    """
    if config_file is None:
        config_file = packaged_file(f"accelerate_configs/{_shipped_name(num_processes or 1)}.yaml")
    config = StrictYaml.read(config_file).raw
    processes = num_processes or config.get("num_processes", 1)
    _check_configuration(config, config_file, processes)
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    command += ["--config_file", str(config_file), "--num_processes", str(processes)]
    command += ["--num_cpu_threads_per_process", "1"]  # each process sets its own number
    deepspeed = config.get("deepspeed_config") or {}
    if "deepspeed_config_file" in deepspeed:
        path = Path(deepspeed["deepspeed_config_file"])
        command += [
            "--deepspeed_config_file",
            str(path if path.exists() else packaged_file(str(path))),
        ]
    script = packaged_file(f"recipes/{recipe_class(file, overrides).script}")
    environment = {**os.environ, ASKED: str(processes)}
    return supervised([*command, str(script), str(file), *overrides], environment)


def supervised(command: list[str], environment: Mapping[str, str]) -> int:
    """Run a launcher; returns its exit code.

    SIGTERM is forwarded to the training processes, which save a checkpoint first; the exit code is
    then 143.

    Args:
        command: of a launcher, whose children train.
        environment: of the command.
    """
    import psutil

    process = subprocess.Popen(command, env=environment)
    terminated = threading.Event()
    previous = signal.signal(signal.SIGTERM, lambda number, frame: terminated.set())
    passed_on: set[int] = set()
    try:
        while process.poll() is None:
            if terminated.is_set():
                # on SIGTERM the launcher leaves a single training process running
                for child in psutil.Process(process.pid).children():
                    if child.pid not in passed_on:
                        child.terminate()
                        passed_on.add(child.pid)
            time.sleep(0.1)
    except psutil.NoSuchProcess:
        process.wait()
    except KeyboardInterrupt:
        process.wait()  # the terminal has sent Ctrl-C to the training processes too
        raise
    finally:
        signal.signal(signal.SIGTERM, previous)
    return EXIT_TERMINATED if terminated.is_set() and process.returncode else process.returncode


def _shipped_name(num_processes: int) -> str:
    """The name of the shipped configuration for so many processes on this machine."""
    import torch

    if num_processes > 1:
        return "ddp"
    return "single_gpu" if torch.cuda.is_available() else "cpu"


def _check_configuration(config: dict[str, Any], file: Path, processes: Any) -> None:
    """Refuse a configuration by which accelerate starts something else, or one process of several.

    Raises:
        RecipeError: it does.
    """
    import torch

    kind = str(config.get("distributed_type", "NO")).upper()
    if not isinstance(processes, int) or processes < 1:
        raise RecipeError(
            f"expected num_processes from 1 on in {file}, got {processes!r}: correct it"
        )
    if kind not in ("NO", "MULTI_CPU", "MULTI_GPU", "DEEPSPEED"):
        raise RecipeError(
            f"expected one process, DDP, ZeRO-2 or ZeRO-3, {file} has distributed_type {kind}, "
            f"with which medft was never tested: use accelerate_configs/ddp.yaml, zero2.yaml or "
            f"zero3.yaml"
        )
    if processes > 1 and kind in ("NO", "MULTI_CPU"):
        raise RecipeError(
            f"expected {processes} processes, accelerate would start one for distributed_type "
            f"{kind} of {file}: use --config-file accelerate_configs/ddp.yaml, which runs on CPUs, "
            f"too"
        )
    gpus = 0 if config.get("use_cpu") else torch.cuda.device_count()
    if config.get("num_machines", 1) == 1 and processes > gpus > 0:
        raise RecipeError(
            f"expected at most {gpus} processes, one for each GPU, got {processes}: lower "
            f"num_processes, or set CUDA_VISIBLE_DEVICES= to train on the CPU"
        )
    if processes == 1 and kind == "MULTI_GPU":
        raise RecipeError(
            f"expected several processes for distributed_type MULTI_GPU of {file}, got one: leave "
            f"--config-file out"
        )
