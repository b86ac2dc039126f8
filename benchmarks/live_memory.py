"""Peak bytes of the tensors that a piece of code holds."""

import weakref
from typing import Any

from medft.compat import TorchDispatchMode, storage_key, tensors_in


class PeakCounter(TorchDispatchMode):
    """Tracks the live and peak bytes of the tensors that are created inside the block."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: dict[int, int] = {}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        before = {storage_key(tensor) for tensor in tensors_in((args, kwargs))}
        output = function(*args, **(kwargs or {}))
        for tensor in tensors_in(output):
            storage, key = tensor.untyped_storage(), storage_key(tensor)
            if key not in before and key not in self._known:
                self._known[key] = storage.nbytes()
                self.live += storage.nbytes()
                weakref.finalize(storage, self._free, key)
        self.peak = max(self.peak, self.live)
        return output

    def _free(self, key: int) -> None:
        self.live -= self._known.pop(key, 0)
