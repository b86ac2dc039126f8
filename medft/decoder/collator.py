"""Rows of conversations -> batches whose labels are the assistant's tokens and nothing else.

Shape letters in this file:
    B  rows of a batch
    S  tokens of its longest row
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from medft.data.images import open_image
from medft.data.rows import Row
from medft.decoder.conversation import IGNORED, ConversationEncoder, EncodedRow
from medft.decoder.families.base import ImageInputs
from medft.decoder.frozen_tower import IMAGES
from medft.decoder.vision_cache import VisionCache
from medft.errors import DataError
from medft.training.trainer import ROW_IDS


class DecoderCollator:
    """Rows of `medft.data.rows.load_rows` -> a batch of model inputs."""

    def __init__(
        self,
        conversation: ConversationEncoder,
        *,
        max_length: int,
        vocab_size: int,
        isolates_rows: bool,
    ) -> None:
        """Make the collator.

        Args:
            conversation: the base's.
            max_length: tokens of a row; longer rows are truncated.
            vocab_size: rows of the output head.
            isolates_rows: whether rows with different numbers of images may share a batch.
        """
        self.conversation = conversation
        self.max_length = max_length
        self.vocab_size = vocab_size
        self.isolates_rows = isolates_rows
        self.cache: VisionCache | None = None

    def __call__(self, records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The batch of `ConversationEncoder.batch`, with images under IMAGES and ids under ROW_IDS.

        IMAGES lists the images of all rows in order.

        Raises:
            DataError: an image cannot be read, rows have different numbers of images and would
                see each other's, or a label is wrong.
        """
        rows = [Row.of(record) for record in records]
        image_counts = {len(row.images) for row in rows}
        if len(image_counts) > 1 and not self.isolates_rows:
            raise DataError(
                f"expected rows with equally many images in a batch, got {sorted(image_counts)}, "
                f"which would see each other's images: write model.cross_attention_fix: true"
            )
        names = [row.id for row in rows]
        encoded = [self._encode(row) for row in rows]
        images = [self._images(row) for row in rows]
        batch = self.conversation.batch(encoded, images, padding_side="right")
        never = self.conversation.family.non_answer_token_ids(self.conversation.processor)
        check_labels(batch["labels"], self.vocab_size, never, names)
        return {**batch, IMAGES: [image for row in images for image in row], ROW_IDS: names}

    def _encode(self, row: Row) -> EncodedRow:
        whole = self.conversation.encode(row.messages, row.id)
        cut = slice(self.max_length)
        return EncodedRow(whole.input_ids[cut], whole.labels[cut], whole.prompt_length)

    def _images(self, row: Row) -> list[ImageInputs]:
        try:
            return [self._image_inputs(source) for source in row.images]
        except DataError as error:
            raise DataError(f"row {row.id}: {error}") from error

    def _image_inputs(self, source: Path | bytes) -> ImageInputs:
        if self.cache is None:
            return self.conversation.image_inputs(open_image(source))
        try:
            name = self.cache.name_of(source)
        except OSError:
            return self.conversation.image_inputs(open_image(source))  # raises with the reason
        kept = self.cache.read(name)
        return kept or replace(self.conversation.image_inputs(open_image(source)), cache_entry=name)


def check_labels(
    labels: Tensor, vocab_size: int, never: frozenset[int], names: Sequence[str]
) -> None:
    """Check that a batch trains at least one token of every row, and only tokens of answers.

    Args:
        labels: [B, S], IGNORED where nothing is trained.
        vocab_size: rows of the output head.
        never: token ids that never belong to an answer.
        names: ids of the rows.

    Raises:
        DataError: a label is out of the vocabulary or in `never`, or a row has none.
    """
    for row, name in zip(labels, names, strict=True):
        trained = set(row[row != IGNORED].tolist())
        if not trained:
            raise DataError(f"row {name}: expected at least one token to train, found none")
        if trained & never:
            raise DataError(
                f"row {name}: expected no image token among the labels, got {min(trained & never)}"
                f": an assistant turn holds an image"
            )
        if max(trained) >= vocab_size:
            raise DataError(
                f"row {name}: expected labels below {vocab_size}, the rows of the output head, got "
                f"{max(trained)}: an assistant turn holds a token that was added to the tokenizer"
            )
