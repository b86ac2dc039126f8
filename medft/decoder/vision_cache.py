"""What the frozen tower and projector made of each image, kept on disk and read in later epochs.

One file an image. A file appears whole or not at all, so that several processes and runs may write
at once; its checksum tells damage, and what is damaged is computed again. The files are large: for
thousands of images, not for millions.
"""

import hashlib
import json
import logging
import os
import shutil
import tempfile
import zlib
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from medft.decoder.families import Family, Picture
from medft.files import file_sha256

logger = logging.getLogger(__name__)

ENTRY = "entry"
"""Key of a picture whose features are to be kept, under which name."""

KEPT_FREE = 2 * 2**30
"""Bytes of the disk that the cache leaves free."""


class VisionCache:
    """Features of images in a folder, for one tower and one way of preparing images."""

    def __init__(self, folder: Path, key: dict[str, Any], *, limit: int) -> None:
        """Open the cache; nothing is written yet.

        Args:
            folder: of all caches.
            key: everything but the image that features depend on.
            limit: bytes that the folder may hold.
        """
        digest = hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()
        self.folder = folder / digest[:16]
        self._room = limit - sum(p.stat().st_size for p in folder.rglob("*.safetensors"))
        self._is_full = False

    def name_of(self, source: Path | bytes) -> str:
        """The name of an image's entry, by the bytes of its file."""
        return (
            hashlib.sha256(source).hexdigest() if isinstance(source, bytes) else file_sha256(source)
        )

    def read(self, name: str) -> Picture | None:
        """The features of an image, or None where they are not there or not whole."""
        try:
            with safe_open(self._file(name), "pt") as file:
                known = file.metadata()
                features = file.get_tensor("features")
        except (FileNotFoundError, SafetensorError):
            return None
        if int(known["crc32"]) != _checksum(features):
            return None
        return {"features": features, "num_tiles": int(known["num_tiles"])}

    def write(self, name: str, features: torch.Tensor, num_tiles: int) -> None:
        """Keep the features of an image, unless the cache or the disk is full."""
        if self._is_full:
            return
        kept = features.detach().cpu().contiguous()
        self.folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.folder).free - KEPT_FREE
        if kept.nbytes > min(self._room, free):
            self._is_full = True
            logger.warning(
                "the vision cache in %s takes no further images: %s. The others are computed in "
                "every epoch",
                self.folder.parent,
                "its disk would fill" if kept.nbytes > free else "model.vision_cache_gb is reached",
            )
            return
        metadata = {"crc32": str(_checksum(kept)), "num_tiles": str(num_tiles)}
        handle, draft = tempfile.mkstemp(dir=self.folder, suffix=".draft")
        os.close(handle)
        try:
            save_file({"features": kept}, draft, metadata=metadata)
            os.replace(draft, self._file(name))
        except (OSError, SafetensorError) as error:
            Path(draft).unlink(missing_ok=True)
            self._is_full = True
            logger.warning("the vision cache cannot be written (%s) and goes on unused", error)
            return
        self._room -= kept.nbytes

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"


def _checksum(tensor: torch.Tensor) -> int:
    return zlib.crc32(tensor.flatten().view(torch.uint8).numpy())


def weights_sha256(model: nn.Module, family: Family) -> str:
    """A hash of the weights of tower and projector, as they are in memory."""
    digest = hashlib.sha256()
    for part in ("vision", "projector"):
        for name, weight in sorted(model.get_submodule(family.parts[part]).state_dict().items()):
            if torch.is_tensor(weight):
                digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
                digest.update(
                    weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
                )
    return digest.hexdigest()
