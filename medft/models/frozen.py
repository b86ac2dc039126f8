"""Runs frozen parts of a model without grad, whatever hooks the libraries install.

With PEFT and gradient checkpointing, transformers makes the embeddings of every part require grad.
Stock code then stores the activations of a tower without any trainable parameter and runs its
backward pass.
"""

import functools
from typing import Any

import torch
from torch import nn

from medft.compat import checkpointing_layers
from medft.errors import BaseModelError


def is_frozen(module: nn.Module) -> bool:
    """Whether a module has no trainable parameter."""
    return not any(parameter.requires_grad for parameter in module.parameters())


def run_without_grad(module: nn.Module, part: str) -> None:
    """Make a frozen module run without grad; its first output is checked.

    Args:
        module: part of the model; its forward is replaced.
        part: name of the module in the error.
    """
    forward = module.forward
    layers = checkpointing_layers(module)

    @functools.wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        for layer in layers:  # Trainer switches them all on when training begins
            layer.gradient_checkpointing = False
        with torch.no_grad():
            return forward(*args, **kwargs)

    module.forward = run
    _check_first_output(module, part)


def _check_first_output(module: nn.Module, part: str) -> None:
    """Check once that no library hook has made the output require grad again."""

    def check(module: nn.Module, args: tuple, output: Any) -> None:
        handle.remove()
        tensors = [output] if torch.is_tensor(output) else list(output.values())
        if any(torch.is_tensor(tensor) and tensor.requires_grad for tensor in tensors):
            raise BaseModelError(
                f"expected the frozen {part} to run without grad, its output requires grad: a "
                f"hook of this version of the libraries has changed it, report this"
            )

    handle = module.register_forward_hook(check)
