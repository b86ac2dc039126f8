"""Combined inference: the report of a picture, its embedding, and the nearest training cases.

from medft.inference.predictor import Predictor
predictor = Predictor.load("runs/decoder", siglip="runs/siglip")
print(predictor.predict("film.png").text)
"""

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
from PIL import Image

from medft.data.chat import Message, image_source, load_rows
from medft.data.dicom import open_dicom
from medft.data.images import MAX_PIXELS, open_image
from medft.data.tables import Rejected
from medft.errors import BaseModelError, DataError, RunError
from medft.files import file_sha256
from medft.provenance import read_record
from medft.trained import Encoder, Generator, Request, find_trained

DEFAULT_PROMPT = "Describe this medical image."

NEAREST = 5
"""Training cases that are shown for a picture."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """A training case near a picture."""

    id: str
    text: str
    similarity: float
    """Cosine of the two pictures' embeddings."""


class CaseIndex:
    """The embeddings of a SigLIP run's training pictures, with the texts that belong to them."""

    def __init__(self, ids: Sequence[str], texts: Sequence[str], embeddings: np.ndarray) -> None:
        self.ids, self.texts, self.embeddings = ids, texts, embeddings

    @classmethod
    def of_run(cls, run: Path, encoder: Encoder) -> "CaseIndex":
        """The index of a run, from RUN/index.npz where that still fits its data and weights.

        Raises:
            RunError: the run's training data is gone or has changed.
        """
        data = read_record(run)["data"]["train"]
        path = Path(data["path"]).expanduser()
        if not path.is_file() or file_sha256(path) != data["sha256"]:
            raise RunError(
                f"expected the training data of {run} unchanged at {path}, to look up its nearest "
                f"cases: restore it, or predict without --siglip"
            )
        key = f"{data['sha256']} {find_trained(run).weights}"
        stored = _stored_index(run / "index.npz", key)
        if stored is None:
            logger.info("embedding the training pictures of %s", run)
            stored = _embedded(path, encoder)
            draft = run / ".index.npz"
            with draft.open("wb") as file:
                np.savez(file, key=key, **stored)
            draft.replace(run / "index.npz")
        ids, texts = (json.loads(stored[name].tobytes()) for name in ("ids", "texts"))
        return cls(ids, texts, stored["embeddings"])

    def nearest(self, embedding: np.ndarray) -> list[Case]:
        """The training cases with the nearest pictures, each case once, the nearest first.

        Args:
            embedding: [D], of length 1.
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


def _stored_index(path: Path, key: str) -> dict[str, np.ndarray] | None:
    try:
        with np.load(path) as stored:
            return dict(stored) if str(stored["key"]) == key else None
    except (OSError, ValueError, KeyError, BadZipFile):
        return None


def _embedded(path: Path, encoder: Encoder) -> dict[str, np.ndarray]:
    ids: list[str] = []
    texts: list[str] = []

    def images() -> Iterator[Image.Image]:
        for row in load_rows(path, split="train"):
            for image in row["images"]:
                ids.append(row["id"])
                texts.append(encoder.caption_of(row))
                yield open_image(image_source(image))

    embeddings = encoder.embed_images(images())
    lists = {"ids": ids, "texts": texts}
    stored = {n: np.frombuffer(json.dumps(v).encode(), np.uint8) for n, v in lists.items()}
    return {**stored, "embeddings": embeddings}


@dataclass(frozen=True, kw_only=True, slots=True)
class Prediction:
    """What the models say of a picture."""

    text: str | None
    """The generated answer; None without decoder."""

    embedding: np.ndarray | None
    """[D], of length 1; None without SigLIP."""

    nearest: list[Case]
    """Training cases of the SigLIP run, the nearest first."""


class Predictor:
    """A decoder, a SigLIP, or both, over the same pictures."""

    def __init__(
        self, generator: Generator | None, encoder: Encoder | None, index: CaseIndex | None
    ) -> None:
        self.generator, self.encoder, self.index = generator, encoder, index

    @classmethod
    def load(cls, source: str | Path, *, siglip: str | Path | None = None) -> "Predictor":
        """Load a run or model of either kind, and a SigLIP run beside a decoder.

        Raises:
            RunError: a path holds no finished model.
            BaseModelError: a model cannot be loaded, or both are SigLIPs.
        """
        source = Path(source)
        if not find_trained(source).is_encoder:
            generator: Generator | None = Generator.load(source)
        elif siglip is not None:
            raise BaseModelError(
                f"expected a decoder beside the SigLIP {siglip}, {source} is a SigLIP as well: "
                f"leave --siglip out"
            )
        else:
            generator, siglip = None, source
        encoder = Encoder.load(Path(siglip)) if siglip is not None else None
        has_cases = siglip is not None and (Path(siglip) / "run.json").is_file()
        index = CaseIndex.of_run(Path(siglip), encoder) if has_cases else None
        return cls(generator, encoder, index)

    def predict(self, image: str | Path | Image.Image, prompt: str = DEFAULT_PROMPT) -> Prediction:
        """What the models say of a picture.

        Raises:
            DataError: the picture cannot be read.
        """
        return self.predict_batch([image], [prompt])[0]

    def predict_batch(
        self, images: Sequence[str | Path | Image.Image], prompts: Sequence[str]
    ) -> list[Prediction]:
        """What the models say of several pictures, each with its prompt.

        Raises:
            DataError: a picture cannot be read.
        """
        opened = [
            image if isinstance(image, Image.Image) else open_picture(Path(image))
            for image in images
        ]
        texts: Sequence[str | None] = [None] * len(opened)
        if self.generator is not None:
            texts = self.generator.generate(
                [
                    Request(messages=[question_of(prompt)], images=[image])
                    for image, prompt in zip(opened, prompts, strict=True)
                ]
            )
        embeddings: Sequence[np.ndarray | None] = [None] * len(opened)
        if self.encoder is not None:
            embeddings = list(self.encoder.embed_images(opened))
        return [
            Prediction(
                text=text,
                embedding=embedding,
                nearest=self.index.nearest(embedding) if self.index else [],
            )
            for text, embedding in zip(texts, embeddings, strict=True)
        ]


def open_picture(path: Path) -> Image.Image:
    """The picture of a file, of a DICOM file the middle frame, as training would see it.

    Raises:
        DataError: it cannot be read.
    """
    if path.suffix.lower() != ".dcm":
        return open_image(path)
    try:
        return open_dicom(path, max_pixels=MAX_PIXELS)[0]
    except Rejected as verdict:
        raise DataError(
            f"expected a DICOM file with a picture, {verdict.detail}: leave it out"
        ) from verdict


def question_of(prompt: str) -> Message:
    """The turn of a user that shows a picture and asks."""
    return {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}
