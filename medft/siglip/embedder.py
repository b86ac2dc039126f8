"""A trained SigLIP that embeds images and texts."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from transformers import ProcessorMixin

from medft.config.recipe import ModelSection
from medft.data.pairs import batched
from medft.data.rows import Row
from medft.models.base import check_local_base, default_device, load_config
from medft.models.saved import SavedModel, find_saved_model
from medft.siglip.checks import check_family
from medft.siglip.collator import caption_of
from medft.siglip.model import (
    embed_images,
    embed_texts,
    load_saved,
    load_siglip_processor,
    untrained,
)

BATCH_SIZE = 8
"""Maximum number of images or texts in a batch."""


class Embedder:
    """A SigLIP that embeds images and texts with unit L2 norm."""

    def __init__(
        self,
        model: nn.Module,
        processor: ProcessorMixin,
        *,
        max_length: int,
        caption: str | None = None,
    ) -> None:
        """Wrap a loaded model.

        Args:
            model: on its device, with or without adapter.
            processor: the one used in training.
            max_length: tokens that a text is padded or truncated to.
            caption: template used in training, as `data.caption` in a recipe.
        """
        self.model = model.eval()
        self.processor = processor
        self.max_length = max_length
        self._caption = caption

    @classmethod
    def load(cls, source: Path) -> "Embedder":
        """The SigLIP of a run, an adapter folder or a model folder.

        Raises:
            RunError: the path is none of these.
            BaseModelError: as from `of`.
        """
        return cls.of(find_saved_model(source))

    @classmethod
    def of(cls, saved: SavedModel) -> "Embedder":
        """A saved SigLIP, with its image size, scale and bias.

        Raises:
            BaseModelError: it cannot be loaded, or is not a SigLIP of fixed resolution.
        """
        check_local_base(saved.base)
        config = load_config(saved.base)
        check_family(config)
        model = load_saved(saved).to(default_device())
        max_length = saved.record.max_length or config.text_config.max_position_embeddings
        processor = load_siglip_processor(
            ModelSection(base=str(saved.folder)),
            image_size=saved.record.image_size or config.vision_config.image_size,
            max_length=max_length,
        )
        return cls(model, processor, max_length=max_length, caption=saved.record.caption)

    def caption_of(self, row: Row) -> str:
        """The caption of a row, made as in training."""
        return caption_of(row, self._caption)

    def without_adapter(self) -> AbstractContextManager[None]:
        """A block in which the base embeds: its adapter disabled, its own scale and bias.

        Raises:
            RunError: the model has no adapter.
        """
        return untrained(self.model)

    @torch.inference_mode()
    def embed_images(self, images: Iterator[Image.Image] | Sequence[Image.Image]) -> np.ndarray:
        """[N, D] float32 embeddings of unit L2 norm."""
        rows = []
        for chunk in batched(images, BATCH_SIZE):
            batch = self.processor.image_processor(images=chunk, return_tensors="pt")
            pixels = batch["pixel_values"].to(self.model.device, self.model.dtype)
            rows.append(embed_images(self.model, pixels))
        return _unit(rows)

    def count_cut(self, texts: Sequence[str]) -> int:
        """How many texts have more tokens than `embed_texts` reads."""
        found = self.processor.tokenizer(list(texts), truncation=False, verbose=False)["input_ids"]
        return sum(len(ids) > self.max_length for ids in found)

    @torch.inference_mode()
    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        """[N, D] float32 embeddings of unit L2 norm."""
        rows = []
        for chunk in batched(texts, BATCH_SIZE):
            input_ids = self.processor.tokenizer(
                chunk,
                padding="max_length",
                truncation=True,
                max_length=self.max_length,
                return_tensors="pt",
            )["input_ids"]
            rows.append(embed_texts(self.model, input_ids.to(self.model.device)))
        return _unit(rows)


def _unit(rows: list[torch.Tensor]) -> np.ndarray:
    return nn.functional.normalize(torch.cat(rows).float(), dim=-1).cpu().numpy()
