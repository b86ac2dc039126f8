"""Peak bytes of the tensors that a piece of code holds."""

import weakref
from typing import Any

from torch import is_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class PeakCounter(TorchDispatchMode):
    """Tracks the live and peak bytes of the tensors that are created inside the block."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: dict[int, int] = {}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        before = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if is_tensor(t)}
        output = function(*args, **(kwargs or {}))
        for tensor in filter(is_tensor, tree_leaves(output)):
            storage = tensor.untyped_storage()
            if storage._cdata not in before and storage._cdata not in self._known:
                self._known[storage._cdata] = storage.nbytes()
                self.live += storage.nbytes()
                weakref.finalize(storage, self._free, storage._cdata)
        self.peak = max(self.peak, self.live)
        return output

    def _free(self, key: int) -> None:
        self.live -= self._known.pop(key, 0)
