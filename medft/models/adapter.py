"""A trained adapter: loaded for use, or continued by another run.

A damaged file, a key that matches no tensor and a layer that was never trained are errors here;
PEFT warns or ignores them.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn

from medft.config.lora_keys import LoraSection
from medft.config.strict_yaml import shortened
from medft.errors import BaseModelError, RunError
from medft.models.model_folder import check_model_folder
from medft.models.patterns import check_patterns
from medft.models.saved import WEIGHTS_FILE, SavedModel, check_weights, find_saved_adapter
from medft.provenance import folder_sha256, masked

_PLAUSIBLE_RANK = 1024

_KEEPS_BASE, _CHANGES_BASE = ("gaussian", "orthogonal"), ("pissa", "olora")
"""Values of init_lora_weights, besides true and false, with which an adapter is loaded."""

_NEVER_LOADED = (
    *("alora_invocation_tokens", "arrow_config", "fan_in_fan_out", "kasa_config"),
    *("layer_replication", "megatron_config", "monteclora_config", "target_parameters"),
    *("use_bdlora", "use_qalora"),
)
"""Fields of peft.LoraConfig that need another base, other layers or other inputs."""


def find_initial(lora: LoraSection | None) -> SavedModel | None:
    """The adapter of `lora.init_from`; None if training starts from a new one, or has none.

    Raises:
        RunError: `lora.init_from` is not an adapter.
        BaseModelError: its record cannot be read.
    """
    return find_saved_adapter(Path(lora.init_from)) if lora and lora.init_from else None


def check_initial(initial: SavedModel, base: Mapping[str, Any]) -> dict[str, Any]:
    """Path and hash of the adapter that a run starts from, for run.json.

    Args:
        initial: from `find_initial`.
        base: from `medft.models.base.identify_base`.

    Raises:
        BaseModelError: it was trained on another base.
    """
    folder, record = initial.folder, initial.record
    has_hashes = record.sha256 is not None and "sha256" in base
    given = masked(base)
    for key in ["sha256"] if has_hashes else ["base", "revision"]:
        trained_on = getattr(record, key)
        if trained_on != given[key]:
            raise BaseModelError(
                f"expected model.base with {key} {trained_on}, on which the adapter of "
                f"lora.init_from was trained, {base['base']} has {given[key]}: correct one of the "
                f"two"
            )
    return {"init_from": {"path": str(folder), "sha256": folder_sha256(folder)}}


def initial_weights(adapted: PeftModel, initial: SavedModel) -> dict[str, torch.Tensor]:
    """The weights of a trained adapter for a new one.

    Args:
        adapted: the base with the new adapter.
        initial: from `find_initial`.

    Raises:
        BaseModelError: the two differ in layers, shapes or scale, or the file is damaged.
    """
    folder = initial.folder
    check_weights(folder, initial.record)
    saved = _read_weights(folder)
    own = get_peft_model_state_dict(adapted)
    other = [name for name in own.keys() | saved if _shape(own, name) != _shape(saved, name)]
    if other:
        raise BaseModelError(
            f"expected the adapter of lora.init_from to sit on the same layers with the same "
            f"lora.r, {len(other)} tensors of {folder} differ, first {min(other)}: take the "
            f"section lora of its recipe.yaml"
        )
    trained = _read_config(folder)
    if change := _change_of_base(trained):
        raise BaseModelError(
            f"expected lora.init_from to name an adapter on the base's own weights, the one in "
            f"{folder} has {change}, which changed them: merge it with medft merge and give the "
            f"result as model.base"
        )
    config = adapted.peft_config["default"]
    for name, key in (("lora_alpha", "alpha"), ("use_rslora",) * 2, ("alpha_pattern",) * 2):
        if getattr(trained, name) != getattr(config, name):
            raise BaseModelError(
                f"expected lora.{key}: {getattr(trained, name)}, as the adapter of lora.init_from "
                f"was trained, got {getattr(config, name)}: the update would be scaled otherwise"
            )
    return saved


def _shape(weights: Mapping[str, torch.Tensor], name: str) -> torch.Size | None:
    return weights[name].shape if name in weights else None


def load_adapter(model: nn.Module, folder: Path) -> PeftModel:
    """The model with a trained adapter; every tensor of its file must match the model.

    Raises:
        BaseModelError: a file is damaged, tensor names do not match this model, or a layer of the
            adapter was never trained.
    """
    saved = _read_weights(folder)
    config = _read_config(folder)
    with _read_by_peft(folder):
        check_patterns(model, config, where=str(folder / "adapter_config.json"))
        _check_ranks(config, saved)
        adapted = PeftModel.from_pretrained(model, str(folder))
    unmatched = saved.keys() ^ get_peft_model_state_dict(adapted).keys()
    if unmatched:
        raise BaseModelError(
            f"expected every tensor of {folder} to have a place in the base, {len(unmatched)} of "
            f"{len(saved)} have none, first {min(unmatched)}: it was trained on another base"
        )
    return adapted


def without_adapter(model: nn.Module) -> AbstractContextManager[None]:
    """A context in which a model computes what its base does.

    Raises:
        RunError: the model has no adapter, so its base is unknown, or one that changes the base.
    """
    if not isinstance(model, PeftModel):
        raise RunError(
            "expected an adapter, whose base can be compared with it, got a whole model: give the "
            "run that trained it"
        )
    for config in model.peft_config.values():
        _refuse_changed_base(config)
    return model.disable_adapter()


def check_keeps_base(folder: Path) -> None:
    """Refuse an adapter folder whose base cannot be had back, before anything is loaded.

    Raises:
        RunError: its settings change the base.
        BaseModelError: its settings cannot be read.
    """
    _refuse_changed_base(_read_config(folder))


def _refuse_changed_base(config: LoraConfig) -> None:
    if change := _change_of_base(config):
        raise RunError(
            f"expected an adapter without which the model is its base, this one has {change}, "
            f"which changes the base's own weights: compare with a run on the base itself"
        )


def _change_of_base(config: LoraConfig) -> str | None:
    """The setting by which an adapter changes weights of its base, if there is one."""
    if config.init_lora_weights in _CHANGES_BASE:
        return f"init_lora_weights: {config.init_lora_weights}"
    return f"bias: {config.bias}" if config.bias != "none" else None


def _read_config(folder: Path) -> LoraConfig:
    """The configuration of an adapter folder."""
    with _read_by_peft(folder):
        config = PeftConfig.from_pretrained(str(folder))
        if not isinstance(config, LoraConfig):
            raise TypeError(f"its adapter_config.json describes a {type(config).__name__}")
        _check_settings(config)
    return config


def _check_settings(config: LoraConfig) -> None:
    """Refuse what no recipe can ask for, and what PEFT would compute from the base without end.

    What recipes could ask for in earlier versions of medft is loaded.
    """
    initial = config.init_lora_weights
    if not (isinstance(initial, bool) or initial in (*_KEEPS_BASE, *_CHANGES_BASE)):
        raise ValueError(f"its adapter_config.json has init_lora_weights {shortened(initial)}")
    for name in _NEVER_LOADED:
        if getattr(config, name, None):
            raise ValueError(f"its adapter_config.json sets {name}, which no base of medft has")
    for alpha in (config.lora_alpha, *(config.alpha_pattern or {}).values()):
        if not math.isfinite(alpha):
            raise ValueError(f"its adapter_config.json has a lora_alpha of {alpha}")


def _check_ranks(config: LoraConfig, weights: Mapping[str, torch.Tensor]) -> None:
    """Refuse ranks for which PEFT would take memory without end, before it reads the weights."""
    widths = [weight.shape[0] for name, weight in weights.items() if "lora_A" in name]
    largest = max(_PLAUSIBLE_RANK, *widths, 0)
    for rank in (config.r, *(config.rank_pattern or {}).values()):
        if not 1 <= rank <= largest:
            raise ValueError(f"its adapter_config.json has a rank of {rank}, the weights have none")


def _read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of an adapter folder, checked to be finite and every layer to be trained."""
    weights_file = folder / WEIGHTS_FILE
    if not weights_file.is_file():
        raise BaseModelError(
            f"expected an adapter with {weights_file.name} in {folder}, found none: "
            f"give the folder of a finished run, or its adapter/ or best_model/"
        )
    with _read_by_peft(folder):
        check_model_folder(folder)
        saved = load_file(weights_file)
    infinite = [name for name, weight in saved.items() if not weight.isfinite().all()]
    if infinite:
        raise BaseModelError(
            f"expected an adapter of finite numbers in {folder}, {len(infinite)} of {len(saved)} "
            f"tensors have others, first {min(infinite)}: its training diverged, give an earlier "
            f"checkpoint"
        )
    refuse_inert(saved)
    return saved


@contextmanager
def _read_by_peft(folder: Path) -> Iterator[None]:
    try:
        yield
    except BaseModelError:
        raise
    except Exception as error:  # damaged files make the libraries raise any exception
        raise BaseModelError(
            f"expected an adapter that PEFT reads in {folder}, it says: "
            f"{(str(error).strip() or type(error).__name__).splitlines()[0]}"
        ) from error


def refuse_inert(weights: Mapping[str, torch.Tensor]) -> None:
    """Raise for an adapter with an untrained layer, whose lora_B is zero as before training.

    Args:
        weights: tensors of the adapter file.

    Raises:
        BaseModelError: there is such a layer.
    """
    last = {name: weight for name, weight in weights.items() if "lora_B" in name}
    inert = [name for name, weight in last.items() if not weight.any()]
    if inert:
        which = "every lora_B" if len(inert) == len(last) else f"{min(inert)}"
        raise BaseModelError(
            f"expected a trained adapter, {which} is zero as before training ({len(inert)} of "
            f"{len(last)}): train longer, or leave layers that no row runs out of lora.targets"
        )
