"""Combined inference: the report of an image, its embedding, and the nearest training cases.

predictor = Predictor.load("runs/decoder", siglip="runs/siglip")
print(predictor.predict("film.png").text)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from medft.data.dicom_files import is_dicom
from medft.data.dicom_image import dicom_images
from medft.data.images import MAX_PIXELS, open_image
from medft.data.tables import Rejected
from medft.decoder.generator import Answer, Generator, Request
from medft.errors import BaseModelError, DataError
from medft.inference.cases import Case, CaseIndex
from medft.inference.prompts import conversation_for, prompt_for
from medft.models.saved import SavedModel, find_saved_model
from medft.siglip.embedder import Embedder


@dataclass(frozen=True, kw_only=True, slots=True)
class ImagePrediction:
    """The outputs of the models for an image."""

    text: str | None
    """The generated answer; None without decoder."""

    truncated: bool | None
    """Whether the answer was cut at the bound on new tokens; None without decoder."""

    embedding: np.ndarray | None
    """[D], of unit norm; None without SigLIP."""

    nearest: list[Case]
    """Training cases of the SigLIP run, the nearest first."""


class Predictor:
    """A decoder, a SigLIP, or both, over the same images."""

    def __init__(
        self, generator: Generator | None, embedder: Embedder | None, index: CaseIndex | None
    ) -> None:
        self.generator, self.embedder, self.index = generator, embedder, index

    @classmethod
    def load(cls, source: str | Path, *, siglip: str | Path | None = None) -> "Predictor":
        """A run or model of either type, and a SigLIP run beside a decoder.

        Raises:
            RunError: a path holds no finished model, or the training data of the SigLIP changed.
            BaseModelError: a model cannot be loaded, or both are SigLIPs.
        """
        beside = None if siglip is None else find_saved_model(Path(siglip))
        return cls.of(find_saved_model(Path(source)), siglip=beside)

    @classmethod
    def of(cls, saved: SavedModel, *, siglip: SavedModel | None = None) -> "Predictor":
        """Saved models, as `load` finds them.

        Raises:
            RunError: the training data of the SigLIP run changed.
            BaseModelError: a model cannot be loaded, or both are SigLIPs.
        """
        if not saved.is_encoder:
            generator: Generator | None = Generator.of(saved)
        elif siglip is not None:
            raise BaseModelError(
                f"expected a decoder beside the SigLIP {siglip.folder}, {saved.folder} is a SigLIP "
                f"as well: leave --siglip out"
            )
        else:
            generator, siglip = None, saved
        if siglip is None:
            return cls(generator, None, None)
        embedder = Embedder.of(siglip)
        index = CaseIndex.of_run(siglip, embedder) if siglip.run else None
        return cls(generator, embedder, index)

    def predict(
        self, image: str | Path | Image.Image, prompt: str | None = None
    ) -> ImagePrediction:
        """The outputs of the models for an image.

        Args:
            image: a file, or an opened image.
            prompt: for the decoder; None takes one that its training rows declared.

        Raises:
            DataError: the image cannot be read.
            RunError: no prompt is given and none declared.
        """
        if self.generator is not None:
            prompt = prompt_for(self.generator.record, given=prompt)
        return self.predict_batch([image], [prompt or ""])[0]

    def predict_batch(
        self, images: Sequence[str | Path | Image.Image], prompts: Sequence[str]
    ) -> list[ImagePrediction]:
        """The outputs of the models for several images, each with its prompt.

        Raises:
            DataError: an image cannot be read.
        """
        opened = [
            image if isinstance(image, Image.Image) else open_image_file(Path(image))
            for image in images
        ]
        answers: Sequence[Answer | None] = [None] * len(opened)
        if self.generator is not None:
            record = self.generator.record
            answers = self.generator.generate(
                [
                    Request(messages=conversation_for(prompt, record), images=[image])
                    for image, prompt in zip(opened, prompts, strict=True)
                ]
            )
        embeddings: Sequence[np.ndarray | None] = [None] * len(opened)
        if self.embedder is not None:
            embeddings = list(self.embedder.embed_images(opened))
        return [
            ImagePrediction(
                text=answer.text if answer else None,
                truncated=answer.truncated if answer else None,
                embedding=embedding,
                nearest=self._nearest(embedding),
            )
            for answer, embedding in zip(answers, embeddings, strict=True)
        ]

    def _nearest(self, embedding: np.ndarray | None) -> list[Case]:
        return [] if self.index is None or embedding is None else self.index.nearest(embedding)


def open_image_file(path: Path) -> Image.Image:
    """The image of a file, or the middle frame of a DICOM file, as training would see it.

    Raises:
        DataError: it cannot be read.
    """
    try:
        if not is_dicom(path):
            return open_image(path)
        return next(dicom_images(path, max_pixels=MAX_PIXELS)).convert("RGB")
    except Rejected as verdict:
        raise DataError(
            f"expected an image or a DICOM file with one at {path}, {verdict.detail}: leave it out"
        ) from verdict
