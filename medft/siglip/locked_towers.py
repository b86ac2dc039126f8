"""Frozen towers, such as the image tower in locked-image tuning.

Source: the name is that of arXiv:2111.07991.
"""

import functools
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from medft.models.frozen import is_frozen, run_without_grad
from medft.siglip.model import PARTS, bare_model


class LockedTowers:
    """The frozen towers of a model, run without grad or dropout and never computed twice.

    Their outputs of a caching pass are stored and returned again in the forwards with grad.
    """

    def __init__(self, model: nn.Module) -> None:
        """Replace the forward of each frozen tower; `model` has its adapter attached."""
        self._kept: dict[str, deque[Tensor]] = {}
        self._keeps = False
        bare = bare_model(model)
        for part, name in PARTS.items():
            tower = bare.get_submodule(name)
            if is_frozen(tower):
                self._kept[part] = deque()
                run_without_grad(tower, f"{part} tower")
                tower.forward = functools.partial(self._run, part, tower, tower.forward)

    @property
    def parts(self) -> list[str]:
        """Names of the frozen towers."""
        return list(self._kept)

    @contextmanager
    def caching_pass(self) -> Iterator[None]:
        """Store the outputs inside the block; later forwards return them in the same order."""
        for outputs in self._kept.values():
            outputs.clear()
        self._keeps = True
        try:
            yield
        finally:
            self._keeps = False

    def _run(self, part: str, tower: nn.Module, forward: Any, *args: Any, **inputs: Any) -> Any:
        outputs = self._kept[part]
        if outputs and not self._keeps:
            return BaseModelOutputWithPooling(pooler_output=outputs.popleft())
        tower.eval()
        output = forward(*args, **inputs)
        if self._keeps:
            outputs.append(output.pooler_output)
        return output
