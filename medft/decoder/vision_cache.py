"""Disk cache of image features from the frozen tower and projector, read in later epochs.

One file per image. Files are written atomically, so that several processes and runs may write at
once. A checksum detects a corrupt file, which is computed again. The files are large: for thousands
of images, not for millions.
"""

import hashlib
import json
import logging
import os
import shutil
import time
import uuid
import zlib
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from medft.decoder.families.base import Family, ImageInputs
from medft.files import file_sha256

logger = logging.getLogger(__name__)

KEPT_FREE = 2 * 2**30
"""Bytes of disk space that the cache leaves free."""

LOST_AFTER = 3600
"""Age in seconds after which a draft counts as abandoned."""


class VisionCache:
    """Image features in a folder, for one tower and one image preprocessing."""

    def __init__(self, folder: Path, key: dict[str, Any], *, limit: int) -> None:
        """Open the cache: deletes abandoned drafts, writes nothing.

        Args:
            folder: of all caches.
            key: everything except the image that features depend on.
            limit: bytes up to which this process may fill the folder.
        """
        digest = hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()
        self.folder = folder / digest[:16]
        for draft in folder.rglob("*.draft"):
            if time.time() - draft.stat().st_mtime > LOST_AFTER:
                draft.unlink(missing_ok=True)
        self._room = limit - sum(p.stat().st_size for p in folder.rglob("*.safetensors"))
        self._is_full = False

    def name_of(self, source: Path | bytes) -> str:
        """The name of an image's cache entry, the SHA-256 of its file.

        Raises:
            OSError: the file cannot be read.
        """
        if isinstance(source, Path):
            return file_sha256(source)
        return hashlib.sha256(source).hexdigest()

    def read(self, name: str) -> ImageInputs | None:
        """The features of an image, or None; a corrupt file is deleted."""
        file = self._file(name)
        try:
            with safe_open(file, "pt") as content:
                known = content.metadata()
                features = content.get_tensor("features")
            num_tiles = int(known["num_tiles"])
            if int(known["crc32"]) == _checksum(features, num_tiles):
                return ImageInputs(features=features, num_tiles=num_tiles)
        except FileNotFoundError:
            return None
        except (OSError, SafetensorError, KeyError, TypeError, ValueError):
            pass  # corrupt
        file.unlink(missing_ok=True)
        return None

    def write(self, name: str, features: torch.Tensor, num_tiles: int) -> None:
        """Store the features of an image, unless they are there, or cache or disk is full."""
        if self._is_full or self._file(name).exists():
            return
        kept = features.detach().cpu().contiguous()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(self.folder).free - KEPT_FREE
            if kept.nbytes > self._room:
                self._stop("model.vision_cache_gb is reached")
            elif kept.nbytes > free:
                self._stop("its disk would fill")
            else:
                self._write(name, kept, num_tiles)
                self._room -= kept.nbytes
        except (OSError, SafetensorError) as error:
            self._stop(f"it cannot be written ({error})")

    def _write(self, name: str, kept: torch.Tensor, num_tiles: int) -> None:
        known = {"crc32": str(_checksum(kept, num_tiles)), "num_tiles": str(num_tiles)}
        draft = self.folder / f"{uuid.uuid4().hex}.draft"
        try:
            save_file({"features": kept}, draft, metadata=known)
            os.replace(draft, self._file(name))
        finally:
            draft.unlink(missing_ok=True)

    def _stop(self, reason: str) -> None:
        self._is_full = True
        logger.warning(
            "the vision cache in %s takes no further images: %s. The others are computed in every "
            "epoch",
            self.folder.parent,
            reason,
        )

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"


def _checksum(features: torch.Tensor, num_tiles: int) -> int:
    shape = f"{features.dtype} {tuple(features.shape)} {num_tiles}"
    return zlib.crc32(_bytes_of(features), zlib.crc32(shape.encode()))


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU, not copied."""
    return tensor.flatten().view(torch.uint8).numpy().data


def tower_sha256(model: nn.Module, family: Family) -> str:
    """The SHA-256 of the weights of tower and projector, as they are in memory."""
    digest = hashlib.sha256()
    for part in ("vision", "projector"):
        for name, weight in sorted(model.get_submodule(family.parts[part]).state_dict().items()):
            if torch.is_tensor(weight):
                digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
                digest.update(_bytes_of(weight.detach().cpu().contiguous()))
    return digest.hexdigest()
