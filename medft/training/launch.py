"""Training launched under accelerate, as `medft train` does."""

import contextlib
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType, MappingProxyType
from typing import Any

import psutil

from medft.config.command_line import recipe_class
from medft.config.strict_yaml import StrictYaml
from medft.errors import EXIT_BAD_INPUT, EXIT_NO, EXIT_SIGNAL, RecipeError
from medft.files import packaged_file
from medft.training.launched import ASKED
from medft.training.signals import PASSED_ON, STOPPING, listened_to

_SECONDS_TO_START = 1.0
"""Of a process, in which Python would show a traceback for Ctrl-C."""

_SECONDS_TO_END = 5.0
"""After a second Ctrl-C, until the processes are killed."""


def train(
    file: Path,
    overrides: list[str],
    config_file: Path | None,
    *,
    num_processes: int | None = None,
    machine: Mapping[str, int | str] = MappingProxyType({}),
    debug: bool = False,
) -> int:
    """Launch the recipe's script under accelerate; returns its exit code.

    Without a configuration file it uses the one for a single device, or for several processes DDP,
    never the user's own default, which may set a precision or hyperparameters. Signals are handled
    as by `supervised`.

    Args:
        file: the recipe, already checked.
        overrides: `section.key=value`, as given.
        config_file: accelerate's; None for DDP if there are several processes, else for one GPU if
            there is one, else the CPU.
        num_processes: on all machines, instead of the configuration's.
        machine: options of accelerate by which several machines find each other, as passed on.
        debug: whether the processes show the traceback of an error.

    Raises:
        RecipeError: accelerate would start other processes than these.
    """
    if config_file is None:
        config_file = packaged_file(f"accelerate_configs/{_shipped_name(num_processes or 1)}.yaml")
    config = StrictYaml.read(config_file).raw
    processes = num_processes or config.get("num_processes", 1)
    machines = machine.get("num-machines", config.get("num_machines", 1))
    _check_configuration(config, config_file, processes=processes, machines=machines)
    command = ["--config_file", str(config_file), "--num_processes", str(processes)]
    command += ["--num_cpu_threads_per_process", "1"]  # each process sets its own number
    if processes > 1 and machines == 1 and "main_process_port" not in config:
        machine = {"main-process-port": 0, **machine}  # a free one: others may train here, too
    command += [word for name, value in machine.items() for word in (f"--{name}", str(value))]
    deepspeed = config.get("deepspeed_config") or {}
    if "deepspeed_config_file" in deepspeed:
        path = Path(deepspeed["deepspeed_config_file"])
        command += [
            "--deepspeed_config_file",
            str(path if path.exists() else packaged_file(str(path))),
        ]
    script = packaged_file(f"recipes/{recipe_class(file, overrides).script}")
    environment = {**os.environ, ASKED: str(processes)}
    words = [*command, str(script), str(file), *overrides, *["--debug"] * debug]
    return supervised("accelerate.commands.launch", words, environment)


def supervised(module: str, words: list[str], environment: Mapping[str, str]) -> int:
    """Run a launcher; returns the exit code of its processes.

    It runs in a process group of its own, where no signal of the terminal reaches it. Stopping
    signals are passed on to the processes that train, each of which saves first, however long that
    takes; the exit code is then 128 and the number of the first. A second Ctrl-C ends them.

    Args:
        module: of the launcher.
        words: its options, script and arguments.
        environment: of the launcher.
    """
    launcher = [sys.executable, "-m", "medft.training.quiet_launcher", str(os.getpid()), module]
    environment = {**environment, PASSED_ON: "1"}
    with _Forwarded() as forwarded:
        forwarded.launcher = subprocess.Popen([*launcher, *words], env=environment, process_group=0)
        code = forwarded.wait()
    first = next(iter(forwarded.received), None)
    number = code - EXIT_SIGNAL
    if number in signal.valid_signals() and number not in STOPPING:
        _show_end(signal.Signals(number), was_stopped=first is not None)
    return code if first is None or code in (0, EXIT_NO, EXIT_BAD_INPUT) else EXIT_SIGNAL + first


class _Forwarded:
    """Signals of this process that the children of a launcher get."""

    def __init__(self) -> None:
        self.launcher: subprocess.Popen[bytes]
        self.received: list[int] = []
        self._passed: dict[int, int] = {}
        """By process: how many signals it has got."""

        self._killed_at = math.inf

    def __enter__(self) -> "_Forwarded":
        handlers = {number: self._note for number in listened_to()}
        handlers |= {signal.SIGQUIT: self._quit, signal.SIGTSTP: self._suspend}
        self._before = {n: signal.signal(n, handler) for n, handler in handlers.items()}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def wait(self) -> int:
        """Pass signals on until the launcher ends; returns its exit code, 128 + N for signal N."""
        while (code := self.launcher.poll()) is None:
            if self.received:  # else looking at every process of the machine is in vain
                with contextlib.suppress(psutil.NoSuchProcess):
                    for child in psutil.Process(self.launcher.pid).children():
                        self._pass_on(child)
            if time.monotonic() > self._killed_at:
                self._signal_all(signal.SIGKILL)
            time.sleep(0.1)
        return code if code >= 0 else EXIT_SIGNAL - code

    def _pass_on(self, child: psutil.Process) -> None:
        """Send a child what it has not got yet, once it is old enough to handle it."""
        if time.time() - child.create_time() < _SECONDS_TO_START:
            return
        for number in self.received[self._passed.get(child.pid, 0) :]:
            child.send_signal(number)
        self._passed[child.pid] = len(self.received)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received.append(number)
        if number == signal.SIGINT and len(self.received) > 1:
            self._killed_at = time.monotonic() + _SECONDS_TO_END

    def _quit(self, number: int, frame: FrameType | None) -> None:
        """Let all processes end at once; torch's agent would show a traceback for SIGQUIT."""
        self.received.append(number)
        self._signal_all(signal.SIGKILL)

    def _suspend(self, number: int, frame: FrameType | None) -> None:
        """Ctrl-Z stops the processes, too, until this one goes on."""
        self._signal_all(signal.SIGSTOP)
        os.kill(os.getpid(), signal.SIGSTOP)
        self._signal_all(signal.SIGCONT)

    def _signal_all(self, number: int) -> None:
        """Send a signal to the launcher and all below it, which torch's agent puts into groups."""
        with contextlib.suppress(psutil.NoSuchProcess):
            launcher = psutil.Process(self.launcher.pid)
            for process in (launcher, *launcher.children(recursive=True)):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.send_signal(number)


def _show_end(number: signal.Signals, *, was_stopped: bool) -> None:
    """Say which signal ended a process, which could not do so itself."""
    is_unasked = number == signal.SIGKILL and not was_stopped
    memory = ", as the kernel does where memory runs out" if is_unasked else ""
    sys.stderr.write(
        f"medft: error: expected every process to train to the end, one was ended by "
        f"{number.name}{memory}: go on with train.resume_from_checkpoint=auto\n"
    )


def _shipped_name(num_processes: int) -> str:
    """The name of the shipped configuration for so many processes on this machine."""
    import torch

    if num_processes > 1:
        return "ddp"
    return "single_gpu" if torch.cuda.is_available() else "cpu"


def _check_configuration(
    config: dict[str, Any], file: Path, *, processes: Any, machines: Any
) -> None:
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
    if not isinstance(machines, int) or machines < 1 or processes % machines:
        raise RecipeError(
            f"expected num_processes of all machines together, as many on each of {machines!r}, "
            f"got {processes}: correct num_processes or num_machines"
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
    if processes // machines > gpus > 0:
        raise RecipeError(
            f"expected at most {gpus} processes, one for each GPU, got {processes}"
            f"{f' on {machines} machines' if machines > 1 else ''}: lower num_processes, or set "
            f"CUDA_VISIBLE_DEVICES= to train on the CPU"
        )
    if processes == 1 and kind == "MULTI_GPU":
        raise RecipeError(
            f"expected several processes for distributed_type MULTI_GPU of {file}, got one: leave "
            f"--config-file out"
        )
