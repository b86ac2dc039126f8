"""Training launched under accelerate, as `medft train` does."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path

from medft.config.command_line import recipe_class
from medft.config.strict_yaml import StrictYaml
from medft.errors import EXIT_TERMINATED
from medft.files import packaged_file


def train(file: Path, overrides: list[str], config_file: Path | None) -> int:
    """Launch the recipe's script under accelerate; returns its exit code.

    Without a configuration file it uses the one for a single device, never the user's own default,
    which may set a precision or hyperparameters. SIGTERM is handled as by `supervised`.

    Args:
        file: the recipe, already checked.
        overrides: `section.key=value`, as given.
        config_file: accelerate's; None for one GPU if there is one, else the CPU.
    """
    import torch

    kind = recipe_class(file, overrides)
    if config_file is None:
        device = "single_gpu" if torch.cuda.is_available() else "cpu"
        config_file = packaged_file(f"accelerate_configs/{device}.yaml")
    script = packaged_file(f"recipes/{kind.script}")
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    config = StrictYaml.read(config_file).raw
    shared = max((os.cpu_count() or 1) // int(config.get("num_processes", 1)), 1)
    threads = os.environ.get("OMP_NUM_THREADS", str(shared))
    command += ["--config_file", str(config_file), "--num_cpu_threads_per_process", threads]
    deepspeed = config.get("deepspeed_config") or {}
    if "deepspeed_config_file" in deepspeed:
        path = Path(deepspeed["deepspeed_config_file"])
        command += [
            "--deepspeed_config_file",
            str(path if path.exists() else packaged_file(str(path))),
        ]
    return supervised([*command, str(script), str(file), *overrides])


def supervised(command: list[str], environment: Mapping[str, str] | None = None) -> int:
    """Run a launcher; returns its exit code.

    SIGTERM is forwarded to the training processes, which save a checkpoint first; the exit code is
    then 143.

    Args:
        command: of a launcher, whose children train.
        environment: of the command; None for this process's.
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
