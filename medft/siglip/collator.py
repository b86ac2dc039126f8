"""Rows -> entries of one image and its caption -> batches, with random augmentation."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset as Rows
from PIL import Image
from torch.utils.data import Dataset
from transformers import ProcessorMixin

from medft.config.recipe import SiglipDataSection
from medft.data.images import open_image
from medft.data.messages import first_texts
from medft.data.rows import Row, image_source
from medft.data.template import fill_template, template_names
from medft.errors import DataError, RecipeError
from medft.siglip.augmentation import augment, augments
from medft.training.trainer import ROW_IDS


@dataclass(frozen=True, kw_only=True, slots=True)
class PairEntry:
    """One image and its caption."""

    id: str
    group_id: str
    image: Image.Image
    """RGB."""

    caption: str


class PairDataset(Dataset):
    """One entry per image, with its caption; a row with several images gives several entries."""

    def __init__(self, rows: Rows, captions: Sequence[str]) -> None:
        """Create the dataset; `captions` has one per row."""
        self.rows = rows
        self.captions = captions
        self._places: list[tuple[int, int]] = []
        self.image_keys: list[str] = []
        """Path of each entry's image, or the hash of its content."""
        for number, keys in enumerate(_image_keys(rows)):
            self._places += [(number, place) for place in range(len(keys))]
            self.image_keys += keys
        self._changes: tuple[SiglipDataSection, int] | None = None
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # seen by running workers

    def augment(self, data: SiglipDataSection, seed: int) -> None:
        """Augment images from now on, with changes drawn from seed, epoch and entry."""
        self._changes = (data, seed) if augments(data) else None

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, counted from 0, that changes are drawn from; also in running workers."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> PairEntry:
        """The entry, its image opened and, after `augment`, augmented.

        Raises:
            DataError: the image cannot be read.
        """
        row_index, image_index = self._places[index]
        record = self.rows[row_index]
        try:
            image = open_image(image_source(record["images"][image_index]))
        except DataError as error:
            raise DataError(f"row {record['id']}: {error}") from error
        if self._changes:
            data, seed = self._changes
            image = augment(image, data, (seed, int(self._epoch), index))
        return PairEntry(
            id=record["id"],
            group_id=record["group_id"],
            image=image,
            caption=self.captions[row_index],
        )

    def by_entry(self, of_rows: Sequence[Any]) -> list[Any]:
        """The value of each entry's row, in the order of entries."""
        return [of_rows[row] for row, _ in self._places]


def _image_keys(rows: Rows) -> Iterator[list[str]]:
    if "sha256" in rows.column_names:
        return iter(rows["sha256"])
    return ([image["path"] for image in row["images"]] for row in rows.select_columns(["images"]))


class PairCollator:
    """Entries of a PairDataset -> pixel_values [B, 3, H, W], input_ids [B, S], group_ids [B]."""

    def __init__(self, processor: ProcessorMixin, *, max_length: int) -> None:
        self.processor = processor
        self.max_length = max_length

    def __call__(self, entries: Sequence[PairEntry]) -> dict[str, Any]:
        """The batch, with its ids under ROW_IDS.

        Captions are padded to max_length and have no attention mask, as in SigLIP's training.
        """
        texts = self.processor.tokenizer(
            [entry.caption for entry in entries],
            padding="max_length",
            truncation=True,
            max_length=self.max_length,
            return_tensors="pt",
        )
        images = [entry.image for entry in entries]
        pixels = self.processor.image_processor(images, return_tensors="pt")
        groups = [
            int.from_bytes(hashlib.sha256(entry.group_id.encode()).digest()[:7])
            for entry in entries
        ]
        return {
            "input_ids": texts["input_ids"],
            "pixel_values": pixels["pixel_values"],
            "group_ids": torch.tensor(groups),
            ROW_IDS: [entry.id for entry in entries],
        }


def caption_of(row: Row, template: str | None) -> str:
    """The caption of a row: the filled template, or its first assistant text.

    Raises:
        RecipeError: the template names a field that the row lacks.
    """
    texts = first_texts(row.messages)
    if template is None:
        return texts["answer"]
    values = {**row.fields, **texts, "id": row.id}
    missing = [name for name in template_names(template) if name not in values]
    if missing:
        raise RecipeError(
            f"expected data.caption to name parts of the row, {', '.join(missing)} is none in row "
            f"{row.id}: choose from {', '.join(sorted(values))}"
        )
    return fill_template(template, values)
