"""LoRA on exactly the modules that the recipe names: targets, attaching, planning, loading.

An adapter that never runs, a target that matches no module and a key that matches no tensor are
errors here; PEFT warns or ignores them.
"""

import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file
from torch import nn

from medft.compat import is_lora_layer
from medft.config.recipe import LoraSection
from medft.errors import BaseModelError, RunError
from medft.models.saved import RECORD_FILE, WEIGHTS_FILE, SavedRecord, check_weights, find_adapter
from medft.provenance import folder_sha256, masked

ALL_WEIGHTS = "none, every weight is trained"
"""Adapter plan of a full fine-tuning."""


def target_modules(
    model: nn.Module, targets: str | list[str], presets: Mapping[str, str]
) -> dict[str, nn.Module]:
    """The modules that an adapter with these targets adapts, by name.

    Args:
        model: weights may be on the meta device.
        targets: as `lora.targets` in a recipe.
        presets: regular expressions over full module names, by preset.

    Raises:
        BaseModelError: a target matches nothing, a module that is not linear, or one whose adapter
            would not run.
    """
    modules = {name: module for name, module in model.named_modules() if name}
    if isinstance(targets, str):
        matched = _matched_by_pattern(modules, targets, presets)
    else:
        matched = _matched_by_endings(modules, targets)
    for name in matched:
        parent = model.get_submodule(name.rpartition(".")[0])
        if isinstance(parent, nn.MultiheadAttention) or isinstance(
            modules[name], nn.MultiheadAttention
        ):
            raise BaseModelError(
                f"expected lora.targets to name layers whose adapter runs, {name} belongs to an "
                f"nn.MultiheadAttention, which never calls it: leave it out, or write a preset "
                f"that splits it (SigLIP: vision, both)"
            )
        if not isinstance(modules[name], nn.Linear):
            kind = type(modules[name]).__name__
            raise BaseModelError(
                f"expected lora.targets to name linear layers, {name} is a {kind}: "
                f"end the expression in the layers' names"
            )
    return {name: modules[name] for name in matched}


def _matched_by_pattern(
    modules: Mapping[str, nn.Module], targets: str, presets: Mapping[str, str]
) -> list[str]:
    try:
        pattern = re.compile(presets.get(targets, targets))
    except re.error as error:
        raise BaseModelError(
            f"expected lora.targets to be a preset, a regular expression or a list, "
            f"got {targets!r} ({error}): presets are {', '.join(presets)}"
        ) from error
    matched = [name for name in modules if pattern.fullmatch(name)]
    if not matched:
        raise BaseModelError(
            f"expected lora.targets to match modules of the base, {targets!r} matches none: "
            f"presets are {', '.join(presets)}; a regular expression must match whole names such "
            f"as {_example(modules)}"
        )
    return matched


def _matched_by_endings(modules: Mapping[str, nn.Module], targets: list[str]) -> list[str]:
    found = {
        ending: [name for name in modules if name == ending or name.endswith(f".{ending}")]
        for ending in targets
    }
    unmatched = [ending for ending, names in found.items() if not names]
    if unmatched or not targets:
        raise BaseModelError(
            f"expected each of lora.targets to match modules of the base, "
            f"{', '.join(map(repr, unmatched)) or 'an empty list'} matches none: names end like "
            f"{_example(modules)}"
        )
    return list(dict.fromkeys(name for names in found.values() for name in names))


def _example(modules: Mapping[str, nn.Module]) -> str:
    return next(name for name, module in modules.items() if isinstance(module, nn.Linear))


def attach_adapter(
    model: nn.Module, lora: LoraSection, presets: Mapping[str, str], *, task_type: str | None
) -> PeftModel:
    """The model with a LoRA adapter in float32, new or continued; PEFT freezes the rest.

    Raises:
        BaseModelError: the targets are wrong, PEFT refuses the configuration, or the adapter of
            `lora.init_from` does not match.
        RunError: `lora.init_from` is not an adapter.
    """
    target_modules(model, lora.targets, presets)
    targets = lora.targets
    if isinstance(targets, str):
        targets = presets.get(targets, targets)
    further = lora.model_extra or {}
    for name in further.get("modules_to_save") or []:
        if not any(path == name or path.endswith(f".{name}") for path, _ in model.named_modules()):
            raise BaseModelError(
                f"expected each of lora.modules_to_save to be a module of the base, {name!r} is "
                f"none: name a module (bare parameters cannot be saved this way)"
            )
    try:
        config = LoraConfig(
            r=lora.r,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            target_modules=targets,
            task_type=task_type,
            **further,
        )
        adapted = get_peft_model(model, config)
    except (ValueError, TypeError, NotImplementedError) as error:
        raise BaseModelError(
            f"expected a LoRA configuration that PEFT accepts, it says: "
            f"{str(error).splitlines()[0]}"
        ) from error
    frozen = [n for n, p in adapted.named_parameters() if "lora_" in n and not p.requires_grad]
    if frozen:
        raise BaseModelError(f"expected the adapter to be trained, PEFT froze {frozen[0]}")
    cast_trainable_to_float32(adapted)
    if lora.init_from:
        set_peft_model_state_dict(adapted, _initial_weights(adapted, lora.init_from))
    return adapted


def _initial_weights(adapted: PeftModel, init_from: str) -> dict[str, torch.Tensor]:
    """The weights of a trained adapter, which must have the same shapes and scale."""
    folder = find_adapter(Path(init_from))
    if (folder / RECORD_FILE).is_file():
        check_weights(folder, SavedRecord.read(folder))
    saved = _read_weights(folder)
    own = get_peft_model_state_dict(adapted)
    other = [name for name in own.keys() | saved if _shape(own, name) != _shape(saved, name)]
    if other:
        raise BaseModelError(
            f"expected the adapter of lora.init_from to sit on the same layers with the same "
            f"lora.r, {len(other)} tensors of {folder} differ, first {min(other)}: take the "
            f"section lora of its recipe.yaml"
        )
    with _read_by_peft(folder):
        trained = PeftConfig.from_pretrained(str(folder))
        if not isinstance(trained, LoraConfig):
            raise TypeError(f"its adapter_config.json describes a {type(trained).__name__}")
    if trained.init_lora_weights not in (True, False, "gaussian", "orthogonal"):
        raise BaseModelError(
            f"expected lora.init_from to name an adapter on the base's own weights, the one in "
            f"{folder} began with init_lora_weights {trained.init_lora_weights}, which changed "
            f"them: merge it with medft merge and give the result as model.base"
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


def initial_adapter(lora: LoraSection | None, base: Mapping[str, Any]) -> dict[str, Any]:
    """Path and hash of the adapter that a run starts from, for run.json; empty for a new one.

    Args:
        lora: the recipe's section.
        base: from `medft.models.base.identify_base`.

    Raises:
        RunError: `lora.init_from` is not an adapter.
        BaseModelError: it was trained on another base.
    """
    if lora is None or lora.init_from is None:
        return {}
    folder = find_adapter(Path(lora.init_from))
    record = SavedRecord.read(folder)
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


def cast_trainable_to_float32(model: nn.Module) -> None:
    """Cast trainable parameters to float32; in bfloat16 a late step changes hardly any entry."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def count_by_part(names: Collection[str], parts: Mapping[str, str]) -> str:
    """Number of modules by part of the model, as text such as "28 language, 4 vision".

    Args:
        names: of modules.
        parts: prefixes of module names, by part.
    """
    counts = {
        part: sum(name == prefix or name.startswith(f"{prefix}.") for name in names)
        for part, prefix in parts.items()
    }
    rest = len(names) - sum(counts.values())
    if rest:
        counts["other"] = rest
    return ", ".join(f"{count} {part}" for part, count in counts.items() if count)


def plan_adapter(
    empty: nn.Module, lora: LoraSection, presets: Mapping[str, str], parts: Mapping[str, str]
) -> str:
    """Number of adapted layers by part of the model and of trained parameters, as text.

    Args:
        empty: the base on the meta device; it is changed.
        lora: the recipe's section.
        presets: regular expressions by preset.
        parts: prefixes of module names, by part.

    Raises:
        BaseModelError: as from `attach_adapter`, or every target is excluded again.
    """
    # initial weights may be computed from the base's weights, which do not exist here
    without = {"init_lora_weights": False, "init_from": None}
    shapes_only = LoraSection(**{**lora.model_dump(), **without})
    adapted = attach_adapter(empty, shapes_only, presets, task_type=None)
    if lora.init_from:
        _initial_weights(adapted, lora.init_from)
    layers = [name for name, module in adapted.named_modules() if is_lora_layer(module)]
    names = [name.removeprefix("base_model.model.") for name in layers]
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    share = trained / sum(p.numel() for p in adapted.parameters())
    return f"{count_by_part(names, parts)}; {trained:,} parameters, {share:.2%} of all"


def load_adapter(model: nn.Module, folder: Path) -> PeftModel:
    """The model with a trained adapter; every tensor of its file must match the model.

    Raises:
        BaseModelError: a file is damaged, tensor names do not match this model, or a layer of the
            adapter was never trained.
    """
    saved = _read_weights(folder)
    with _read_by_peft(folder):
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
        RunError: the model has no adapter, so its base is unknown.
    """
    if not isinstance(model, PeftModel):
        raise RunError(
            "expected an adapter, whose base can be compared with it, got a whole model: give the "
            "run that trained it"
        )
    return model.disable_adapter()


def _read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of an adapter folder, every layer checked to be trained."""
    weights_file = folder / WEIGHTS_FILE
    if not weights_file.is_file():
        raise BaseModelError(
            f"expected an adapter with {weights_file.name} in {folder}, found none: "
            f"give the folder of a finished run, or its adapter/ or best_model/"
        )
    with _read_by_peft(folder):
        saved = load_file(weights_file)
    refuse_inert(saved)
    return saved


@contextmanager
def _read_by_peft(folder: Path) -> Iterator[None]:
    try:
        yield
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
