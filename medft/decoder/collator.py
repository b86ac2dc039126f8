"""Rows of conversations -> batches whose labels are the assistant's tokens and nothing else.

Shape letters in this file:
    B  rows of a batch
    S  tokens of its longest row
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import ProcessorMixin

from medft.data.chat import Message, image_source, messages_of
from medft.data.images import open_image
from medft.decoder.families import Family, Picture
from medft.decoder.frozen_tower import PICTURES
from medft.decoder.vision_cache import ENTRY, VisionCache
from medft.errors import BaseModelError, DataError
from medft.training.callbacks import ROW_IDS

IGNORED = -100
"""The label of a token that is not trained; as in torch's cross-entropy."""


@dataclass(frozen=True, slots=True)
class EncodedRow:
    """A conversation in tokens."""

    input_ids: list[int]

    labels: list[int]
    """As input_ids where the assistant speaks, end-of-turn token included; IGNORED elsewhere."""

    prompt_length: int
    """Tokens before the first one that the assistant says."""


class ConversationEncoder:
    """Renders and tokenises conversations of one base, and knows which tokens to train."""

    def __init__(self, processor: ProcessorMixin, family: Family, *, max_image_tiles: int) -> None:
        """Make the encoder.

        Args:
            processor: of the base; the family's chat template is put in where it has none.
            family: of the base.
            max_image_tiles: of an image, for families that cut images into tiles.

        Raises:
            BaseModelError: there is no chat template, or a setting of the processor is refused.
        """
        processor.chat_template = processor.chat_template or family.chat_template
        if not processor.chat_template:
            raise BaseModelError(
                "expected a base with a chat template, this one has none: choose its "
                "instruction-tuned sibling, or put a chat_template.jinja into its folder"
            )
        family.check_processor(processor)
        self.processor = processor
        self.family = family
        self.max_image_tiles = max_image_tiles
        self.image_token_id = family.image_token_id(processor)
        self.end_of_turn = processor.tokenizer.convert_tokens_to_ids(family.end_of_turn)
        pad = processor.tokenizer.pad_token_id
        self._pad = self.end_of_turn if pad is None else pad  # masked, so that any will do
        self._special = {
            token
            for token, added in processor.tokenizer.added_tokens_decoder.items()
            if added.special
        }

    def encode(self, messages: list[Message], name: str) -> EncodedRow:
        """The tokens of a conversation, not cut.

        An assistant turn begins where the prompt for it ends. This holds only if the tokens of
        the prompt are a prefix of the tokens of the whole, which is checked.

        Args:
            messages: turns with part lists.
            name: of the row, for messages.

        Raises:
            DataError: the template refuses the conversation, a text holds a special token, or
                tokens run across the end of a prompt.
        """
        self.check_texts(messages, name)
        whole = self._render(messages, name)
        _check_rendered(whole, messages, name)
        input_ids = self._tokens(whole)
        labels = [IGNORED] * len(input_ids)
        prompt_length = len(input_ids)
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt = self._tokens(self._render(messages[:index], name, prompt=True))
            ended = self._tokens(self._render(messages[: index + 1], name))
            start, stop = len(prompt), len(ended)
            if input_ids[:start] != prompt or input_ids[:stop] != ended:
                raise DataError(
                    f"row {name}: expected the tokens of the prompt to begin those of the whole "
                    f"conversation, they differ: this tokenizer merges across the end of a prompt, "
                    f"as where an answer begins with a line break"
                )
            if self.end_of_turn not in ended[start:]:
                raise DataError(
                    f"row {name}: expected the chat template to end the assistant's turn with "
                    f"{self.family.end_of_turn}, it does not: put the base's own template back"
                )
            stop = start + ended[start:].index(self.end_of_turn) + 1  # a template may write on
            labels[start:stop] = input_ids[start:stop]
            prompt_length = min(prompt_length, start)
        return EncodedRow(input_ids, labels, prompt_length)

    def encode_prompt(self, messages: list[Message]) -> EncodedRow:
        """The tokens of a conversation whose next turn is the assistant's, with nothing to train.

        Raises:
            DataError: the template refuses the conversation.
        """
        input_ids = self._tokens(self._render(messages, "", prompt=True))
        turns = [m["role"] for m in messages]
        first = turns.index("assistant") if "assistant" in turns else len(turns)
        prompt_length = len(self._tokens(self._render(messages[:first], "", prompt=True)))
        return EncodedRow(input_ids, [IGNORED] * len(input_ids), prompt_length)

    def picture(self, image: Image.Image) -> Picture:
        """One image for the tower, as `Family.picture` says."""
        return self.family.picture(self.processor, image, max_image_tiles=self.max_image_tiles)

    def batch(
        self,
        rows: Sequence[EncodedRow],
        pictures: Sequence[Sequence[Picture]],
        *,
        padding_side: Literal["left", "right"],
    ) -> dict[str, Tensor]:
        """The model's inputs for these rows, without the pictures themselves.

        Returns:
            input_ids, attention_mask and labels [B, S], and what `Family.inputs` adds.
        """

        def pad(values: Sequence[Sequence[int]], padding: int) -> Tensor:
            tensors = [torch.tensor(value) for value in values]
            return pad_sequence(
                tensors, batch_first=True, padding_value=padding, padding_side=padding_side
            )

        input_ids = pad([row.input_ids for row in rows], self._pad)
        answers = [[i >= row.prompt_length for i in range(len(row.input_ids))] for row in rows]
        return {
            "input_ids": input_ids,
            "attention_mask": pad([[1] * len(row.input_ids) for row in rows], 0),
            "labels": pad([row.labels for row in rows], IGNORED),
            **self.family.inputs(self.processor, pictures, input_ids, pad(answers, 0)),
        }

    def _render(self, messages: list[Message], name: str, *, prompt: bool = False) -> str:
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

    def _tokens(self, rendered: str) -> list[int]:
        return self._ids(self.family.expand(rendered, self.processor))

    def _ids(self, text: str) -> list[int]:
        return self.processor.tokenizer(text, add_special_tokens=False)["input_ids"]

    def check_texts(self, messages: list[Message], name: str) -> None:
        """Refuse texts that would be read as more than text.

        Args:
            messages: turns with part lists.
            name: of the row, for messages.

        Raises:
            DataError: a text holds a special token.
        """
        for message in messages:
            for part in message["content"]:
                found = self._special.intersection(self._ids(part.get("text") or ""))
                if found:
                    token = self.processor.tokenizer.convert_ids_to_tokens(min(found))
                    raise DataError(
                        f"row {name}: expected ordinary text, a turn of the {message['role']} "
                        f"holds the tokenizer's {token}: remove it"
                    )


def _check_rendered(rendered: str, messages: list[Message], name: str) -> None:
    for message in messages:
        for part in message["content"]:
            if (part.get("text") or "").strip() not in rendered:
                raise DataError(
                    f"row {name}: expected the chat template to write every text, it leaves "
                    f"out one of the {message['role']}: {part['text'][:40]!r}"
                )


def mark_trained(row: EncodedRow, encoder: ConversationEncoder, max_length: int) -> str:
    """The tokens of a row as text on one line, each run that is trained between >>> and <<<.

    The tokens that stand for one image are written once.
    """
    decode = encoder.processor.tokenizer.decode
    tokens = zip(row.input_ids[:max_length], row.labels[:max_length], strict=True)
    pieces = []
    for trained, run in groupby(tokens, key=lambda pair: pair[1] != IGNORED):
        shown = []
        for token, _ in run:
            if not (shown and token == shown[-1] == encoder.image_token_id):
                shown.append(token)
        text = decode(shown)
        pieces.append(f">>>{text}<<<" if trained else text)
    return "".join(pieces).replace("\n", "\\n")


class DecoderCollator:
    """Rows of `medft.data.chat.load_rows` -> a batch of the model's inputs."""

    def __init__(
        self,
        encoder: ConversationEncoder,
        *,
        max_length: int,
        head_rows: int,
        separates_rows: bool,
    ) -> None:
        """Make the collator.

        Args:
            encoder: of the base.
            max_length: tokens of a row; what is longer is cut.
            head_rows: rows of the output head.
            separates_rows: whether rows with different numbers of images may share a batch.
        """
        self.encoder = encoder
        self.max_length = max_length
        self.head_rows = head_rows
        self.separates_rows = separates_rows
        self.cache: VisionCache | None = None

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """The batch as of `ConversationEncoder.batch`, its images in order under PICTURES.

        The ids of its rows stand under ROW_IDS.

        Raises:
            DataError: an image cannot be read, rows have different numbers of images and would
                see each other's, or a label is wrong.
        """
        image_counts = {len(row["images"]) for row in rows}
        if len(image_counts) > 1 and not self.separates_rows:
            raise DataError(
                f"expected rows with equally many images in a batch, got {sorted(image_counts)}, "
                f"which would see each other's images: write model.cross_attention_fix: true"
            )
        names = [row["id"] for row in rows]
        encoded = [self._encode(row) for row in rows]
        pictures = [self._pictures(row) for row in rows]
        batch = self.encoder.batch(encoded, pictures, padding_side="right")
        never = self.encoder.family.never_labels(self.encoder.processor)
        check_labels(batch["labels"], self.head_rows, never, names)
        return {**batch, PICTURES: [p for row in pictures for p in row], ROW_IDS: names}

    def _encode(self, row: dict[str, Any]) -> EncodedRow:
        whole = self.encoder.encode(messages_of(row), row["id"])
        cut = slice(self.max_length)
        return EncodedRow(whole.input_ids[cut], whole.labels[cut], whole.prompt_length)

    def _pictures(self, row: dict[str, Any]) -> list[Picture]:
        try:
            return [self._picture(image_source(image)) for image in row["images"]]
        except DataError as error:
            raise DataError(f"row {row['id']}: {error}") from error

    def _picture(self, source: Path | bytes) -> Picture:
        if self.cache is None:
            return self.encoder.picture(open_image(source))
        try:
            name = self.cache.name_of(source)
        except OSError:
            return self.encoder.picture(open_image(source))  # which says what is wrong
        kept = self.cache.read(name)
        return kept or {**self.encoder.picture(open_image(source)), ENTRY: name}


def check_labels(
    labels: Tensor, head_rows: int, never: frozenset[int], names: Sequence[str]
) -> None:
    """Assert that a batch trains at least one token of every row, and only tokens of answers.

    Args:
        labels: [B, S], IGNORED where nothing is trained.
        head_rows: rows of the output head.
        never: tokens that are no part of an answer.
        names: of the rows.

    Raises:
        DataError: a label lies outside the head or is no answer's, or a row has none.
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
        if max(trained) >= head_rows:
            raise DataError(
                f"row {name}: expected labels below {head_rows}, the rows of the output head, got "
                f"{max(trained)}: an assistant turn holds a token that was added to the tokenizer"
            )
