"""Keys of `lora` that would do nothing on a base, or something else than they say.

PEFT ignores them, some with a warning.
"""

from collections.abc import Collection, Iterator

from torch import nn

from medft.config.lora_keys import LoraSection
from medft.errors import BaseModelError
from medft.models.patterns import matched_names


def check_effects(lora: LoraSection, targets: Collection[str], adapted: Collection[str]) -> None:
    """Refuse targets that get no adapter, and exclusions, layers and patterns that change none.

    Args:
        lora: the recipe's section.
        targets: names of the modules that `lora.targets` names.
        adapted: names of the modules that have an adapter.

    Raises:
        BaseModelError: there is such an entry, or a target is adapted whatever its layer.
    """
    idle = [
        *_idle_targets(lora.targets, adapted),
        *_idle_exclusions(lora.exclude_modules, targets),
        *_idle_layers(lora, adapted),
        *_idle_patterns("rank_pattern", lora.rank_pattern or {}, adapted),
        *_idle_patterns("alpha_pattern", lora.alpha_pattern or {}, adapted),
    ]
    if idle:
        raise BaseModelError(
            f"expected every entry of lora to give or change an adapter, {idle[0]} does not, or an "
            f"entry before it does so already: correct it or remove it"
        )
    whole = sorted(set(lora.targets) & set(targets))
    if lora.layers_to_transform is not None and whole:
        raise BaseModelError(
            f"expected lora.targets as name endings beside lora.layers_to_transform, {whole[0]} is "
            f"a full name, which PEFT adapts whatever its layer: shorten it"
        )


def _idle_targets(targets: str | list[str], adapted: Collection[str]) -> Iterator[str]:
    for ending in [] if isinstance(targets, str) else targets:
        if not any(ends_in(name, ending) for name in adapted):
            yield f"targets: {ending}"


def _idle_exclusions(excluded: str | list[str] | None, targets: Collection[str]) -> Iterator[str]:
    if isinstance(excluded, str):
        if not matched_names([excluded], targets, where="lora.exclude_modules"):
            yield f"exclude_modules: {excluded}"
        return
    for ending in excluded or []:
        if not any(ends_in(name, ending) for name in targets):
            yield f"exclude_modules: {ending}"


def _idle_layers(lora: LoraSection, adapted: Collection[str]) -> Iterator[str]:
    numbers, lists = lora.layers_to_transform, lora.layers_pattern
    for number in [numbers] if isinstance(numbers, int) else numbers or []:
        if not any(str(number) in name.split(".") for name in adapted):
            yield f"layers_to_transform: {number}"
    for name in [lists] if isinstance(lists, str) else lists or []:
        if not matched_names([rf"(.*\.)?{name}\.\d+\..*"], adapted, where="lora.layers_pattern"):
            yield f"layers_pattern: {name}"


def _idle_patterns(key: str, patterns: Collection[str], adapted: Collection[str]) -> Iterator[str]:
    left = set(adapted)
    for pattern in patterns:
        matched = matched_names([rf"(.*\.)?({pattern})"], left, where=f"lora.{key}")
        left -= set(matched)
        if not matched:
            yield f"{key}: {pattern}"


def check_saved_modules(model: nn.Module, names: Collection[str]) -> None:
    """Refuse entries of `lora.modules_to_save` that PEFT could not train as they are written.

    Args:
        model: the base.
        names: the entries.

    Raises:
        BaseModelError: an entry names no module, or one without weights, 4-bit or tied, or PEFT
            would take further modules for it.
    """
    modules = dict(model.named_modules())
    for name in names:
        named = [path for path in modules if ends_in(path, name)]
        if not named:
            raise BaseModelError(
                f"expected each of lora.modules_to_save to be a module of the base, {name!r} is "
                f"none: name a module (bare parameters cannot be saved this way)"
            )
        further = [path for path in modules if path.endswith(name) and path not in named]
        if further:
            raise BaseModelError(
                f"expected each of lora.modules_to_save to be a whole name, PEFT takes {name!r} "
                f"for {further[0]} too: write more of the name"
            )
        for path in named:
            if problem := _cannot_be_copied(model, path):
                raise BaseModelError(
                    f"expected modules in lora.modules_to_save of which a copy can be trained, "
                    f"{path} {problem}"
                )


def _cannot_be_copied(model: nn.Module, path: str) -> str | None:
    """Why PEFT cannot train a copy of a module that stands for the module."""
    weights = list(model.get_submodule(path).parameters())
    inside = {id(weight) for weight in weights}
    everywhere = model.named_parameters(remove_duplicate=False)
    tied = [name for name, weight in everywhere if id(weight) in inside]
    outside = [name for name in tied if not name.startswith(f"{path}.")]
    if not weights:
        return "has no weights: leave it out"
    if any(hasattr(weight, "quant_state") for weight in weights):
        return "is 4-bit: leave it out, or write quantization: null"
    if outside:
        return f"shares weights with {outside[0]}, which would stay as it is: leave it out"
    return None


def ends_in(name: str, ending: str) -> bool:
    """Whether a module's name is, or ends in, a name of a recipe."""
    return name == ending or name.endswith(f".{ending}")
