"""Rows of conversations -> batches whose labels are the assistant's tokens and nothing else.

Shape letters in this file:
    B  rows of a batch
    S  tokens of its longest row
    I  images of a row, the same for all rows of a batch
    T  tiles an image is padded to (4)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import BaseImageProcessor, ProcessorMixin
from transformers.models.mllama.image_processing_pil_mllama import (
    get_image_size_fit_to_canvas,
    get_optimal_tiled_canvas,
)

from medft.callbacks import ROW_IDS
from medft.data.chat import Message, image_source, messages_of
from medft.data.images import open_image
from medft.decoder.families import Family
from medft.errors import DataError

IGNORED = -100
"""The label of a token that is not trained; as in torch's cross-entropy."""


@dataclass(frozen=True, slots=True)
class EncodedRow:
    """A conversation in tokens."""

    text: str
    """The whole conversation as the chat template renders it."""

    input_ids: list[int]

    labels: list[int]
    """As input_ids where the assistant speaks, end-of-turn token included; IGNORED elsewhere."""

    prompt_length: int
    """Tokens before the first one that is trained."""


class ConversationEncoder:
    """Renders and tokenises conversations of one base, and knows which tokens to train."""

    def __init__(self, processor: ProcessorMixin, family: Family) -> None:
        self.processor = processor
        self.family = family
        self.image_token_id = processor.image_token_id

    def encode(self, messages: list[Message], name: str) -> EncodedRow:
        """The tokens of a conversation, not cut.

        An assistant turn begins where the prompt for it ends. This holds only if the tokens of
        the prompt are a prefix of the tokens of the whole, which is checked.

        Args:
            messages: turns with part lists.
            name: of the row, for messages.

        Raises:
            DataError: the template refuses the conversation, or tokens run across the end of
                a prompt.
        """
        text = self.render(messages, name)
        input_ids = self._tokens(text)
        labels = [IGNORED] * len(input_ids)
        prompt_length = len(input_ids)
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt = self._tokens(self.render(messages[:index], name, prompt=True))
            ended = self._tokens(self.render(messages[: index + 1], name))
            start, stop = len(prompt), len(ended)
            if input_ids[:start] != prompt or input_ids[:stop] != ended:
                raise DataError(
                    f"row {name}: expected the tokens of the prompt to begin those of the whole "
                    f"conversation, they differ: this tokenizer merges across the end of a prompt"
                )
            labels[start:stop] = input_ids[start:stop]
            prompt_length = min(prompt_length, start)
        return EncodedRow(text, input_ids, labels, prompt_length)

    def render(self, messages: list[Message], name: str, *, prompt: bool = False) -> str:
        """The conversation as the base's chat template writes it.

        Args:
            messages: turns with part lists.
            name: of the row, for messages.
            prompt: end where the assistant's next turn begins.

        Raises:
            DataError: the template refuses it.
        """
        try:
            return self.processor.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=prompt,
                **self.family.template_arguments,
            )
        except Exception as error:  # a template raises what its author chose
            raise DataError(
                f"row {name}: the base's chat template refuses the conversation: {error}"
            ) from error

    def _tokens(self, text: str) -> list[int]:
        return self.processor.tokenizer(text, add_special_tokens=False)["input_ids"]


def mark_trained(row: EncodedRow, encoder: ConversationEncoder, max_length: int) -> str:
    """The tokens of a row as text on one line, each run that is trained between >>> and <<<."""
    decode = encoder.processor.tokenizer.decode
    tokens = zip(row.input_ids[:max_length], row.labels[:max_length], strict=True)
    pieces = []
    for trained, run in groupby(tokens, key=lambda pair: pair[1] != IGNORED):
        text = decode([token for token, _ in run])
        pieces.append(f">>>{text}<<<" if trained else text)
    return "".join(pieces).replace("\n", "\\n")


class DecoderCollator:
    """Rows of `medft.data.chat.load_rows` -> a batch of the model's inputs.

    Returns input_ids, attention_mask and labels [B, S], pixel_values [B, I, T, 3, height, width],
    aspect_ratio_ids [B, I], aspect_ratio_mask [B, I, T] and cross_attention_mask [B, S, I, T];
    the last four only for rows with images.
    """

    def __init__(
        self,
        encoder: ConversationEncoder,
        *,
        max_length: int,
        max_image_tiles: int,
        head_rows: int,
    ) -> None:
        self.encoder = encoder
        self.max_length = max_length
        self.max_image_tiles = max_image_tiles
        self.head_rows = head_rows

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """The batch, with the ids of its rows under ROW_IDS.

        Raises:
            DataError: an image cannot be read, or rows have different numbers of images.
        """
        image_counts = {len(row["images"]) for row in rows}
        if len(image_counts) > 1:
            raise DataError(
                f"expected rows with equally many images in a batch, got {sorted(image_counts)}: "
                f"Mllama's rows would see each other's images"
            )
        encoded = [self.encoder.encode(messages_of(row), row["id"]) for row in rows]
        processor = self.encoder.processor
        batch = processor(
            images=[self._images(row) for row in rows] if image_counts != {0} else None,
            text=[row.text for row in encoded],
            add_special_tokens=False,
            padding=True,
            padding_side="right",
            truncation=True,
            max_length=self.max_length,
            return_tensors="pt",
        )
        labels = torch.full_like(batch["input_ids"], IGNORED)
        for index, row in enumerate(encoded):
            kept = row.labels[: self.max_length]
            labels[index, : len(kept)] = torch.tensor(kept)
            tokens = batch["input_ids"][index, : len(kept)].tolist()
            if tokens != row.input_ids[: self.max_length]:
                raise DataError(f"row {rows[index]['id']}: the processor changed the tokens")
        names = [row["id"] for row in rows]
        check_labels(labels, self.head_rows, names)
        return {**batch, "labels": labels, ROW_IDS: names}

    def _images(self, row: dict[str, Any]) -> list[Image.Image]:
        try:
            images = [open_image(image_source(image)) for image in row["images"]]
        except DataError as error:
            raise DataError(f"row {row['id']}: {error}") from error
        processor = self.encoder.processor.image_processor
        return [limit_tiles(image, processor, self.max_image_tiles) for image in images]


def limit_tiles(
    image: Image.Image, processor: BaseImageProcessor, max_image_tiles: int
) -> Image.Image:
    """The picture, shrunk so that the processor lays it on at most max_image_tiles tiles.

    The processor keeps its own limit of tiles, since the base's ids of tile arrangements and its
    padding are counted with it.
    """
    tile = processor.size["height"]
    canvas = get_optimal_tiled_canvas(image.height, image.width, processor.max_image_tiles, tile)
    if canvas[0] * canvas[1] <= max_image_tiles * tile * tile:
        return image
    canvas = get_optimal_tiled_canvas(image.height, image.width, max_image_tiles, tile)
    height, width = get_image_size_fit_to_canvas(image.height, image.width, *canvas, tile)
    return image.resize((int(width), int(height)), Image.Resampling(processor.resample))


def check_labels(labels: Tensor, head_rows: int, names: Sequence[str]) -> None:
    """Assert that a batch trains at least one token of every row, and only tokens of the head.

    Args:
        labels: [B, S], IGNORED where nothing is trained.
        head_rows: rows of the output head.
        names: of the rows.

    Raises:
        DataError: a label lies outside the head, or a row has none.
    """
    for row, name in zip(labels, names, strict=True):
        trained = row[row != IGNORED]
        if not len(trained):
            raise DataError(f"row {name}: expected at least one token to train, found none")
        if int(trained.max()) >= head_rows:
            raise DataError(
                f"row {name}: expected labels below {head_rows}, the rows of the output head, "
                f"got {int(trained.max())}: an assistant turn holds an image token"
            )
