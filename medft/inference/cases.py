"""Training cases near an image, by the embeddings of a SigLIP run."""

import contextlib
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from zipfile import ZIP_STORED, ZipFile

import numpy as np
from PIL import Image

from medft.data.images import open_image
from medft.data.rows import Row, load_rows
from medft.errors import RunError
from medft.files import file_sha256
from medft.foreign import at_home, open_regular
from medft.models.saved import SavedModel
from medft.siglip.embedder import Embedder

NEAREST = 5
"""Maximum number of training cases per image."""

_MAX_INDEX_BYTES = 2**34

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """A training case near an image."""

    id: str
    text: str
    similarity: float
    """Cosine of the two images' embeddings."""


class CaseIndex:
    """The embeddings of a SigLIP run's training images, with their texts."""

    def __init__(self, ids: Sequence[str], texts: Sequence[str], embeddings: np.ndarray) -> None:
        self.ids, self.texts, self.embeddings = ids, texts, embeddings

    @classmethod
    def of_run(cls, saved: SavedModel, embedder: Embedder) -> "CaseIndex":
        """The index of a run, from its index.npz if that matches its data and weights.

        Args:
            saved: the SigLIP of a run.
            embedder: the same, loaded.

        Raises:
            RunError: the run's training data is gone or has changed.
        """
        assert saved.run is not None
        run = saved.run
        data = run.read_record()["data"]["train"]
        path = at_home(data["path"])
        if not path.is_file() or file_sha256(path) != data["sha256"]:
            raise RunError(
                f"expected the training data of {run.directory} unchanged at {path}, to look up "
                f"its nearest cases: restore it, or predict without --siglip"
            )
        key = f"{data['sha256']} {saved.weights}"
        width = embedder.embed_texts([""]).shape[1]
        stored = _stored_index(run.index, key, width)
        if stored is None:
            logger.info("embedding the training images of %s", run.directory)
            stored = _embedded(path, embedder)
            _store(run.index, {"key": np.array(key), **stored})
        ids, texts = (json.loads(stored[name].tobytes()) for name in ("ids", "texts"))
        return cls(ids, texts, stored["embeddings"])

    def nearest(self, embedding: np.ndarray) -> list[Case]:
        """The training cases with the nearest images, each case once, the nearest first.

        Args:
            embedding: [D], of unit norm.
        """
        similarity = self.embeddings @ embedding
        cases: dict[str, Case] = {}
        for index in np.argsort(-similarity, kind="stable"):
            case = Case(
                id=self.ids[index],
                text=self.texts[index],
                similarity=round(float(similarity[index]), 4),
            )
            cases.setdefault(case.id, case)
            if len(cases) == NEAREST:
                break
        return list(cases.values())


def _stored_index(path: Path, key: str, width: int) -> dict[str, np.ndarray] | None:
    """The arrays of index.npz; None if it is damaged, of another key, or anything but an index.

    Objects are never unpickled, and nothing is inflated: `_embedded` writes plain arrays.
    """
    try:
        with open_regular(path, max_bytes=_MAX_INDEX_BYTES) as file:
            with ZipFile(file) as archive:
                if any(member.compress_type != ZIP_STORED for member in archive.infolist()):
                    return None
            file.seek(0)
            with np.load(file, allow_pickle=False) as arrays:
                stored = {name: arrays[name] for name in ("key", "ids", "texts", "embeddings")}
        is_index = str(stored["key"]) == key and _fits(stored, width)
        return stored if is_index else None
    except Exception:  # foreign files make the libraries raise any exception
        return None


def _store(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write index.npz for later commands; a run that cannot be written into goes without."""
    draft = path.with_name(f".{path.name}")
    try:
        draft.unlink(missing_ok=True)  # it may be a link to elsewhere
        with draft.open("xb") as file:
            np.savez(file, allow_pickle=False, **arrays)
        draft.replace(path)
    except OSError as error:
        logger.warning("the embeddings are not kept for later in %s: %s", path, error)
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)


def _fits(stored: dict[str, np.ndarray], width: int) -> bool:
    embeddings = stored["embeddings"]
    lists = [json.loads(stored[name].tobytes()) for name in ("ids", "texts")]
    return (
        embeddings.ndim == 2
        and embeddings.shape[1] == width
        and embeddings.dtype == np.float32
        and bool(np.isfinite(embeddings).all())
        and all(isinstance(texts, list) and len(texts) == len(embeddings) for texts in lists)
        and all(isinstance(text, str) for texts in lists for text in texts)
    )


def _embedded(path: Path, embedder: Embedder) -> dict[str, np.ndarray]:
    ids: list[str] = []
    texts: list[str] = []

    def images() -> Iterator[Image.Image]:
        for row in map(Row.of, load_rows(path, split="train")):
            for source in row.images:
                ids.append(row.id)
                texts.append(embedder.caption_of(row))
                yield open_image(source)

    embeddings = embedder.embed_images(images())
    lists = {"ids": ids, "texts": texts}
    stored = {n: np.frombuffer(json.dumps(v).encode(), np.uint8) for n, v in lists.items()}
    return {**stored, "embeddings": embeddings}
