"""Starting things: the recipe that a command names, and the process that a script runs in."""

import logging
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import medft
from medft.config.recipe import DecoderRecipe, Recipe, SiglipRecipe
from medft.config.strict_yaml import StrictYaml
from medft.errors import EXIT_TERMINATED, RecipeError

AnyRecipe = TypeVar("AnyRecipe", bound=Recipe)


def shipped(name: str) -> Path:
    """A file that ships with medft, such as recipes/decoder_qlora.py: of the checkout or the wheel.

    Raises:
        RecipeError: this installation lacks it.
    """
    package = Path(medft.__file__).parent
    for root in (package.parent, package / "shipped"):
        if (root / name).exists():
            return root / name
    raise RecipeError(f"expected {name} beside the installed medft, it is missing: reinstall medft")


def split_arguments(argv: list[str]) -> tuple[Path | None, list[str]]:
    """The recipe file, if one is named, and the overrides of a command line.

    Raises:
        RecipeError: a word is neither the one recipe file nor an override.
    """
    file = Path(argv[0]) if argv and "=" not in argv[0] else None
    overrides = argv[1:] if file else argv
    for word in overrides:
        if "=" not in word or word.startswith("-"):
            raise RecipeError(
                f"expected RECIPE.yaml [section.key=value ...], got {word!r}: "
                f"write an override such as train.learning_rate=1e-4"
            )
    return file, overrides


def read_recipe(kind: type[AnyRecipe], argv: list[str]) -> AnyRecipe:
    """The recipe of a script's command line; without a file the one that ships for its kind.

    Raises:
        RecipeError: the words or the recipe are wrong.
    """
    file, overrides = split_arguments(argv)
    return kind.load(file or shipped(f"recipes/{kind.default_file}"), overrides)


def recipe_class(file: Path, overrides: list[str]) -> type[Recipe]:
    """What a recipe file trains: its sections tell, or else what its base is or is called.

    The hub is not asked; the checks of the base find out where this guess is wrong.

    Raises:
        RecipeError: the file cannot be read.
    """
    source = StrictYaml.read(file)
    for override in overrides:
        source.override(override)
    if "contrastive" in source.raw:
        return SiglipRecipe
    if source.raw.get("quantization"):
        return DecoderRecipe
    model = source.raw.get("model")
    base = model.get("base") if isinstance(model, dict) else None
    if not isinstance(base, str):
        return DecoderRecipe
    from transformers import PreTrainedConfig

    try:
        content, _ = PreTrainedConfig.get_config_dict(base, local_files_only=True)
    except (OSError, ValueError):
        content = {"model_type": "siglip" if "siglip" in base.lower() else None}
    return SiglipRecipe if content.get("model_type") == "siglip" else DecoderRecipe


def train(file: Path, overrides: list[str], config_file: Path | None) -> int:
    """Launch the recipe's script under accelerate; returns its exit code.

    Without a configuration file the one for a single device is taken, never the user's own
    default, which may hold a precision or hyper-parameters. SIGTERM is passed on to the training
    processes, which save first; then the exit code is 143.

    Args:
        file: the recipe, already checked.
        overrides: as given.
        config_file: of accelerate; None for one GPU where there is one, else the CPU.
    """
    import psutil
    import torch

    kind = recipe_class(file, overrides)
    if config_file is None:
        device = "single_gpu" if torch.cuda.is_available() else "cpu"
        config_file = shipped(f"accelerate_configs/{device}.yaml")
    script = shipped(f"recipes/{kind.script}")
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    config = StrictYaml.read(config_file).raw
    shared = max((os.cpu_count() or 1) // int(config.get("num_processes", 1)), 1)
    threads = os.environ.get("OMP_NUM_THREADS", str(shared))
    command += ["--config_file", str(config_file), "--num_cpu_threads_per_process", threads]
    deepspeed = config.get("deepspeed_config") or {}
    if "deepspeed_config_file" in deepspeed:
        path = Path(deepspeed["deepspeed_config_file"])
        command += ["--deepspeed_config_file", str(path if path.exists() else shipped(str(path)))]
    process = subprocess.Popen([*command, str(script), str(file), *overrides])
    terminated = threading.Event()
    previous = signal.signal(signal.SIGTERM, lambda number, frame: terminated.set())
    passed_on: set[int] = set()
    try:
        while process.poll() is None:
            if terminated.is_set():
                # the launcher itself would leave a single training process behind
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


@contextmanager
def process_set_up(*, seed: int | None = None, quiet: bool = False) -> Iterator[None]:
    """Logging, seeds, and an orderly end of the process group around a command's work.

    Args:
        seed: of all random numbers of the process; None leaves them alone.
        quiet: show warnings only.
    """
    import datasets
    import torch
    import transformers

    is_first = os.environ.get("RANK", "0") == "0"
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    level = logging.WARNING if quiet else logging.INFO
    logging.getLogger("medft").setLevel(level if is_first else logging.ERROR)
    # one library's words to another, not to the user
    warnings.filterwarnings("ignore", category=FutureWarning)
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
        datasets.disable_progress_bars()
    if seed is not None:
        transformers.set_seed(seed)
    try:
        yield
    finally:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
