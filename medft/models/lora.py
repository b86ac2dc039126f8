"""LoRA on exactly the modules that the recipe names: targets, attaching, planning.

An adapter that never runs and a target that matches no module are errors here; PEFT ignores them.
"""

from collections.abc import Collection, Mapping

import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from torch import nn

from medft.compat import is_lora_layer
from medft.config.lora_keys import LoraSection
from medft.errors import BaseModelError
from medft.models.adapter import initial_weights
from medft.models.effects import check_effects, check_saved_modules, ends_in
from medft.models.patterns import check_patterns, matched_names
from medft.models.resolved import Recorded, recorded_fields
from medft.models.saved import SavedModel

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
    pattern = presets.get(targets, targets)
    matched = matched_names([pattern], modules, where="lora.targets")
    if not matched:
        raise BaseModelError(
            f"expected lora.targets to match modules of the base, {targets!r} matches none: "
            f"presets are {', '.join(presets)}; a regular expression must match whole names such "
            f"as {_example(modules)}"
        )
    return matched


def _matched_by_endings(modules: Mapping[str, nn.Module], targets: list[str]) -> list[str]:
    found = {ending: [name for name in modules if ends_in(name, ending)] for ending in targets}
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
    model: nn.Module,
    lora: LoraSection,
    presets: Mapping[str, str],
    *,
    task_type: str | None,
    seed: int,
    initial: SavedModel | None = None,
    recorded: Recorded | None = None,
) -> PeftModel:
    """The model with a LoRA adapter in float32, new or continued; PEFT freezes the rest.

    A new one depends on the seed alone, not on what loading the base drew before, which is more
    under ZeRO-3. The RNG state is left as it was.

    Args:
        model: the base.
        lora: the recipe's section.
        presets: regular expressions by preset.
        task_type: PEFT's; None for a model that is no language model.
        seed: of the initial weights.
        initial: from `find_initial`.
        recorded: the record of the run that is repeated, whose fields take the place of all others.

    Raises:
        RunError: PEFT lacks a recorded field.
        BaseModelError: the targets are wrong, PEFT refuses the configuration, or the initial
            adapter does not match.
        ValueError: there is no initial adapter although the section names one.
    """
    if lora.init_from and initial is None:
        raise ValueError("expected the adapter of lora.init_from, got none")
    named = target_modules(model, lora.targets, presets)
    targets = lora.targets
    if isinstance(targets, str):
        targets = presets.get(targets, targets)
    check_saved_modules(model, lora.modules_to_save or [])
    fields = {
        "r": lora.r,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": targets,
        "task_type": task_type,
        **lora.library_fields(),
        **recorded_fields(LoraConfig, recorded, "lora"),
    }
    try:
        config = LoraConfig(**fields)
        check_patterns(model, config, where="lora")
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            adapted = get_peft_model(model, config)
    except (ValueError, TypeError, NotImplementedError) as error:
        raise BaseModelError(
            f"expected a LoRA configuration that PEFT accepts, it says: "
            f"{str(error).splitlines()[0]}"
        ) from error
    check_effects(lora, named, adapted_names(adapted))
    frozen = [n for n, p in adapted.named_parameters() if "lora_" in n and not p.requires_grad]
    if frozen:
        raise BaseModelError(f"expected the adapter to be trained, PEFT froze {frozen[0]}")
    cast_trainable_to_float32(adapted)
    if initial:
        set_peft_model_state_dict(adapted, initial_weights(adapted, initial))
    return adapted


def cast_trainable_to_float32(model: nn.Module) -> None:
    """Cast trainable parameters to float32; in bfloat16 a late step changes hardly any entry."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def adapted_names(adapted: nn.Module) -> list[str]:
    """Names in the base of the layers that have an adapter; of a PeftModel or its base."""
    layers = [name for name, module in adapted.named_modules() if is_lora_layer(module)]
    return [name.removeprefix("base_model.model.") for name in layers]


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
    empty: nn.Module,
    lora: LoraSection,
    presets: Mapping[str, str],
    parts: Mapping[str, str],
    initial: SavedModel | None = None,
) -> str:
    """Number of adapted layers by part of the model and of trained parameters, as text.

    Args:
        empty: the base on the meta device; it is changed.
        lora: the recipe's section.
        presets: regular expressions by preset.
        parts: prefixes of module names, by part.
        initial: from `find_initial`.

    Raises:
        BaseModelError: as from `attach_adapter`, or every target is excluded again.
    """
    # no random numbers are taken from those that training draws
    shapes_only = lora.model_copy(update={"init_lora_weights": False, "init_from": None})
    adapted = attach_adapter(empty, shapes_only, presets, task_type=None, seed=0)
    if initial:
        initial_weights(adapted, initial)
    layers = count_by_part(adapted_names(adapted), parts)
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    share = trained / sum(p.numel() for p in adapted.parameters())
    return f"{layers}; {trained:,} parameters, {share:.2%} of all"
