"""Conversations as tokens, with labels on those to train.

Shape letters in this file:
    B  rows of a batch
    S  tokens of its longest row
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

import torch
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import ProcessorMixin

from medft.data.messages import Message
from medft.data.template import IMAGE_PLACEHOLDER
from medft.decoder.families.base import Family, ImageInputs
from medft.errors import BaseModelError, DataError
from medft.foreign import bounded_memory, bounded_time

IGNORED = -100
"""Label of a token that is not trained; the ignore_index of torch's cross-entropy."""

_RENDER_SECONDS = 10
"""A chat template, a program of the base's author, may take for a conversation."""

_RENDER_BYTES = 2**31
"""Memory that the process may take meanwhile, with all its threads, which must not starve."""

_PLACEHOLDERS = (
    IMAGE_PLACEHOLDER,
    "<|image|>",
    "<|vision_start|>",
    "<start_of_image>",
    "<image_soft_token>",
)
"""Where an image stands in texts for other models, for which a tokenizer may have no token."""


@dataclass(frozen=True, slots=True)
class EncodedRow:
    """A tokenized conversation."""

    input_ids: list[int]

    labels: list[int]
    """input_ids in assistant turns, end-of-turn token included; IGNORED elsewhere."""

    prompt_length: int
    """Number of tokens before the first assistant token."""


class ConversationEncoder:
    """Renders and tokenizes conversations for one base, and labels the tokens to train."""

    def __init__(self, processor: ProcessorMixin, family: Family, *, max_image_tiles: int) -> None:
        """Make the encoder.

        Args:
            processor: the base's; gets the family's chat template if it has none.
            family: the base's.
            max_image_tiles: maximum per image, for families that cut images into tiles.

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
        self._pad = self.end_of_turn if pad is None else pad  # masked, so any token will do
        self._special = {
            token
            for token, added in processor.tokenizer.added_tokens_decoder.items()
            if added.special
        }

    def encode(self, messages: list[Message], name: str) -> EncodedRow:
        """The tokens and labels of a conversation, not truncated.

        An assistant turn starts where the prompt before it ends. This holds only if the tokens of
        the prompt are a prefix of the tokens of the conversation, which is checked.

        Args:
            messages: turns with part lists.
            name: the row's id, for error messages.

        Raises:
            BaseModelError: the template takes too much time or memory.
            DataError: the template rejects the conversation, leaves out a text or does not end a
                turn, a text holds a special token, or tokens merge across the end of a prompt.
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
            stop = start + ended[start:].index(self.end_of_turn) + 1  # a template may write more
            labels[start:stop] = input_ids[start:stop]
            prompt_length = min(prompt_length, start)
        return EncodedRow(input_ids, labels, prompt_length)

    def encode_prompt(self, messages: list[Message]) -> EncodedRow:
        """The tokens of a conversation up to the assistant's next turn; every label is IGNORED.

        Raises:
            BaseModelError: the template takes too much time or memory.
            DataError: the template rejects the conversation.
        """
        input_ids = self._tokens(self._render(messages, "", prompt=True))
        turns = [m["role"] for m in messages]
        first = turns.index("assistant") if "assistant" in turns else len(turns)
        prompt_length = len(self._tokens(self._render(messages[:first], "", prompt=True)))
        return EncodedRow(input_ids, [IGNORED] * len(input_ids), prompt_length)

    def image_inputs(self, image: Image.Image) -> ImageInputs:
        """The tower's inputs for one image, as from `Family.image_inputs`."""
        return self.family.image_inputs(self.processor, image, max_image_tiles=self.max_image_tiles)

    def batch(
        self,
        rows: Sequence[EncodedRow],
        images: Sequence[Sequence[ImageInputs]],
        *,
        padding_side: Literal["left", "right"],
    ) -> dict[str, Tensor]:
        """The model inputs for these rows, without the images.

        Returns:
            input_ids, attention_mask and labels [B, S], and what `Family.attention_inputs` adds.
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
            **self.family.attention_inputs(self.processor, images, input_ids, pad(answers, 0)),
        }

    def _render(self, messages: list[Message], name: str, *, prompt: bool = False) -> str:
        try:
            with bounded_time(_RENDER_SECONDS), bounded_memory(_RENDER_BYTES):
                return self.processor.apply_chat_template(
                    messages,
                    tokenize=False,
                    add_generation_prompt=prompt,
                    **self.family.template_arguments,
                )
        except (TimeoutError, MemoryError, RecursionError) as error:
            raise BaseModelError(
                f"expected a chat template that renders a conversation in {_RENDER_SECONDS} s and "
                f"{_RENDER_BYTES >> 20} MiB, the base's needs more "
                f"({str(error) or type(error).__name__}): put the template of its author back"
            ) from error
        except Exception as error:  # a template raises what its author chose
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise DataError(
                f"row {name}: the base's chat template refuses the conversation: {reason}"
            ) from error

    def _tokens(self, rendered: str) -> list[int]:
        return self._ids(self.family.expand(rendered, self.processor))

    def _ids(self, text: str) -> list[int]:
        # not verbose: it warns of long texts, which the collator truncates, or refuses
        return self.processor.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def check_texts(self, messages: list[Message], name: str) -> None:
        """Refuse texts that contain special tokens, or what other models write for an image.

        Args:
            messages: turns with part lists.
            name: the row's id, for error messages.

        Raises:
            DataError: a text holds one.
        """
        for message in messages:
            for part in message["content"]:
                text = part.get("text") or ""
                found = self._special.intersection(self._ids(text))
                if found:
                    token = self.processor.tokenizer.convert_ids_to_tokens(min(found))
                    raise DataError(
                        f"row {name}: expected ordinary text, a turn of the {message['role']} "
                        f"holds the tokenizer's {token}: remove it"
                    )
                foreign = next((token for token in _PLACEHOLDERS if token in text), None)
                if foreign:
                    raise DataError(
                        f"row {name}: expected ordinary text, a turn of the {message['role']} "
                        f"holds {foreign}, which other models read as an image: remove it"
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
    """The tokens of a row as one line of text, each trained span between >>> and <<<.

    The tokens of an image are written as one.
    """
    decode = encoder.processor.tokenizer.decode
    per_image = encoder.family.tokens_per_image(encoder.processor)
    seen = 0  # image tokens
    tokens = zip(row.input_ids[:max_length], row.labels[:max_length], strict=True)
    pieces = []
    for trained, run in groupby(tokens, key=lambda pair: pair[1] != IGNORED):
        shown: list[int] = []
        for token, _ in run:
            is_image = token == encoder.image_token_id
            if not is_image or seen % per_image == 0:
                shown.append(token)
            seen += is_image
        text = decode(shown)
        pieces.append(f">>>{text}<<<" if trained else text)
    return "".join(pieces).replace("\n", "\\n")
