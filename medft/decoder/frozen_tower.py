"""The vision tower without backward pass, where nothing in it is trained.

With PEFT and gradient checkpointing transformers makes the tower's patch embedding require grad, so
that the stock code stores the activations of a tower without one trainable parameter and runs its
backward; under reentrant checkpointing it then fails.
"""

import functools
from typing import Any

import torch
from torch import nn

from medft.decoder.families import Family
from medft.errors import BaseModelError


def run_frozen_parts_without_grad(model: nn.Module, family: Family) -> list[str]:
    """Make tower and projector run without grad as far as nothing in them, or before, is trained.

    Args:
        model: the base, its adapter attached.
        family: of the base.

    Returns:
        The parts that run without grad.
    """
    frozen = []
    for part in ("vision", "projector"):
        module = model.get_submodule(family.parts[part])
        if any(parameter.requires_grad for parameter in module.parameters()):
            break
        module.forward = _without_grad(module)
        _check_first_output(module, part)
        frozen.append(part)
    return frozen


def _without_grad(module: nn.Module) -> Any:
    forward = module.forward
    layers = [layer for layer in module.modules() if hasattr(layer, "gradient_checkpointing")]

    @functools.wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        for layer in layers:  # Trainer switches them all on when training begins
            layer.gradient_checkpointing = False
        with torch.no_grad():
            return forward(*args, **kwargs)

    return run


def _check_first_output(module: nn.Module, part: str) -> None:
    """Assert once that no hook of a library has made the output require grad again."""

    def check(module: nn.Module, args: tuple, output: Any) -> None:
        handle.remove()
        tensors = [output] if torch.is_tensor(output) else list(output.values())
        if any(torch.is_tensor(tensor) and tensor.requires_grad for tensor in tensors):
            raise BaseModelError(
                f"expected the frozen {part} to run without grad, its output requires grad: a "
                f"hook of this version of the libraries has changed it, report this"
            )

    handle = module.register_forward_hook(check)
