"""DeepSpeed's configuration may change how a run is sharded, and nothing of what it trains.

And its start, which compiles on a CPU, is said beforehand.
"""

import logging
import os
import sys
from collections.abc import Mapping
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import parse_flag_from_env

from medft.errors import RecipeError
from medft.files import packaged_file
from medft.foreign import read_json

logger = logging.getLogger(__name__)

_OF_CPU = "deepspeed_shm_comm"
"""What DeepSpeed compiles for a CPU, once for each Python and torch."""

_OF_SIZE_AND_TIME = {
    "allgather_bucket_size",
    "allgather_partitions",
    "reduce_bucket_size",
    "reduce_scatter",
    "round_robin_gradients",
    "stage3_max_live_parameters",
    "stage3_max_reuse_distance",
    "sub_group_size",
}
"""Keys of zero_optimization, beyond those of the shipped files, that decide when and in which
portions is communicated."""

_GATHERS = "stage3_gather_16bit_weights_on_model_save"

_OF_LOGS = {"steps_per_print", "wall_clock_breakdown"}


_BESIDE = (
    "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE",
    "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE",
    "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL",
    "ACCELERATE_DEEPSPEED_ZERO_STAGE",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS",
    "ACCELERATE_GRADIENT_CLIPPING",
)
"""What Accelerate's launcher leaves of values beside the file; some override it, some are lost."""


def check_deepspeed(environment: Mapping[str, str]) -> None:
    """Refuse a configuration that differs from the shipped ones in more than sizes and times.

    An optimizer, a scheduler, a learning rate or a clipping of its own would take the place of the
    recipe's, and a missing gradient_clipping switches the recipe's off.

    Args:
        environment: of this process, under DeepSpeed.

    Raises:
        RecipeError: it does, cannot be read, or is no file.
    """
    file = environment.get("ACCELERATE_DEEPSPEED_CONFIG_FILE")
    beside = [name for name in _BESIDE if name in environment]
    if file is None or beside:
        given = f"{beside[0]}={environment[beside[0]]}" if beside else "no such file"
        raise RecipeError(
            f"expected deepspeed_config_file alone in deepspeed_config of accelerate's "
            f"configuration, got {given}, which would override or lose what the recipe says: use "
            f"accelerate_configs/zero2.yaml or zero3.yaml"
        )
    try:
        config = read_json(Path(file))
        stage = config["zero_optimization"]["stage"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise RecipeError(
            f"expected a DeepSpeed configuration with zero_optimization.stage in {file}, could not "
            f"read it ({type(error).__name__}: {error}): give a path to "
            f"deepspeed_configs/zero2.json or a copy of it"
        ) from error
    if stage not in (2, 3):
        raise RecipeError(
            f"expected zero_optimization.stage 2 or 3 in {file}, got {stage!r}, with which medft "
            f"was never tested: use deepspeed_configs/zero2.json or zero3.json"
        )
    shipped = read_json(packaged_file(f"deepspeed_configs/zero{stage}.json"))
    differs = _differences(config, shipped)
    if differs:
        raise RecipeError(
            f"expected {file} to leave what is trained to the recipe, as "
            f"deepspeed_configs/zero{stage}.json does, it differs in {', '.join(differs)}: "
            f"take these from there"
        )


def _differences(config: dict[str, Any], shipped: dict[str, Any]) -> list[str]:
    own, theirs = config.pop("zero_optimization"), shipped.pop("zero_optimization")
    wrong = [
        name
        for name in sorted(config.keys() | shipped.keys())
        if name not in _OF_LOGS and config.get(name) != shipped.get(name)
    ]
    gathers = {_GATHERS} if own.get(_GATHERS) != theirs.get(_GATHERS) else set()
    unknown = own.keys() - theirs.keys() - _OF_SIZE_AND_TIME
    return wrong + [f"zero_optimization.{name}" for name in sorted(unknown | gathers)]


def start_deepspeed() -> None:
    """Start DeepSpeed on a CPU, where it compiles once, after saying so.

    It would start later, while the base is loaded or after. Each process prints then to standard
    output that it has compiled, even where it has not: that line is left out, and what else is
    printed goes to standard error.
    """
    if not _runs_on_cpu():
        return
    import deepspeed

    if compiles_first():
        logger.info("DeepSpeed compiles its exchange between processes now, once, about a minute")
    with redirect_stdout(StringIO()) as printed:
        deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
    for line in printed.getvalue().splitlines(keepends=True):
        if line != f"DeepSpeed deepspeed.ops.comm.{_OF_CPU}_op built successfully\n":
            sys.stderr.write(line)


def _runs_on_cpu() -> bool:
    return parse_flag_from_env("ACCELERATE_USE_DEEPSPEED") and not torch.accelerator.is_available()


def compiles_first() -> bool:
    """Whether DeepSpeed compiles when it starts: torch keeps what it has, for each Python."""
    from torch.utils.cpp_extension import get_default_build_root

    root = os.environ.get("TORCH_EXTENSIONS_DIR")
    version = f"py{sys.version_info.major}{sys.version_info.minor}_*"
    folders = [Path(root)] if root else Path(get_default_build_root()).glob(version)
    return _runs_on_cpu() and not any(
        (folder / _OF_CPU / f"{_OF_CPU}.so").is_file() for folder in folders
    )
