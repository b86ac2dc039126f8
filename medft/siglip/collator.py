"""From rows to batches: an image and its caption an entry, changed at random where asked."""

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from datasets import Dataset as Rows
from torch.utils.data import Dataset
from transformers import ProcessorMixin

from medft.config.recipe import SiglipDataSection
from medft.data.chat import image_source
from medft.data.images import open_image
from medft.errors import DataError
from medft.siglip.augmentation import augment, augments
from medft.training.callbacks import ROW_IDS


class PairDataset(Dataset):
    """One image and its caption an entry; a row with several images gives one entry each."""

    def __init__(self, rows: Rows, captions: Sequence[str]) -> None:
        """Make the dataset; `captions` has one for each row."""
        self.rows = rows
        self.captions = captions
        self._places: list[tuple[int, int]] = []
        self.image_keys: list[str] = []
        """Of each entry, the path of its image or the hash of its content."""
        for number, keys in enumerate(_image_keys(rows)):
            self._places += [(number, place) for place in range(len(keys))]
            self.image_keys += keys
        self._changes: tuple[SiglipDataSection, int] | None = None
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # workers live on

    def augment(self, data: SiglipDataSection, seed: int) -> None:
        """Change pictures at random from here on, drawn from seed, epoch and entry."""
        self._changes = (data, seed) if augments(data) else None

    def set_epoch(self, epoch: int) -> None:
        """Draw the changes of an epoch, counted from 0; also in workers that run already."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """id, image (RGB), caption and group_id of an entry.

        Raises:
            DataError: the image cannot be read.
        """
        row_index, image_index = self._places[index]
        row = self.rows[row_index]
        try:
            image = open_image(image_source(row["images"][image_index]))
        except DataError as error:
            raise DataError(f"row {row['id']}: {error}") from error
        if self._changes:
            data, seed = self._changes
            image = augment(image, data, (seed, int(self._epoch), index))
        return {
            "id": row["id"],
            "group_id": row["group_id"],
            "image": image,
            "caption": self.captions[row_index],
        }

    def by_entry(self, of_rows: Sequence[Any]) -> list[Any]:
        """What belongs to each row, for each entry."""
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

    def __call__(self, entries: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """The batch, with its ids under ROW_IDS.

        Captions are padded to max_length and come without attention mask, as in training SigLIP.
        """
        texts = self.processor.tokenizer(
            [entry["caption"] for entry in entries],
            padding="max_length",
            truncation=True,
            max_length=self.max_length,
            return_tensors="pt",
        )
        images = [entry["image"] for entry in entries]
        pixels = self.processor.image_processor(images, return_tensors="pt")
        groups = [
            int.from_bytes(hashlib.sha256(entry["group_id"].encode()).digest()[:7])
            for entry in entries
        ]
        return {
            "input_ids": texts["input_ids"],
            "pixel_values": pixels["pixel_values"],
            "group_ids": torch.tensor(groups),
            ROW_IDS: [entry["id"] for entry in entries],
        }
