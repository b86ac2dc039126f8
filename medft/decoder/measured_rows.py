"""Rows encoded against a base and a recipe: which fit, how long they are, what is cut."""

from collections import Counter
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

import torch
from datasets import Dataset

from medft.config.recipe import (
    DecoderDataSection,
)
from medft.data.chat_rows import SHOWN_PROBLEMS
from medft.data.messages import system_text
from medft.data.rows import Row
from medft.data.tokens import length_percentiles
from medft.decoder.collator import check_labels
from medft.decoder.conversation import IGNORED, ConversationEncoder, EncodedRow
from medft.errors import DataError


@dataclass(frozen=True, kw_only=True, slots=True)
class MeasuredRows:
    """The rows of a file that fit, and counts over all rows."""

    kept: Dataset
    lengths: list[int]
    """Tokens of each kept row before truncation."""

    counts: dict[str, Any]
    """For run.json."""

    longest_answer: int
    """Trained tokens of the longest assistant turn, its end included."""

    system: str | None
    """The text of the system turn that every kept row has."""

    @property
    def images_a_row(self) -> dict[str, int]:
        """Number of images, as a string -> number of rows."""
        return self.counts["images_a_row"]


def measure_rows(
    rows: Dataset, conversation: ConversationEncoder, data: DecoderDataSection, *, vocab_size: int
) -> MeasuredRows:
    """Encode every row; count images, and tokens and rows that are truncated or dropped.

    Raises:
        DataError: a row cannot be encoded, or its prompt is too long and `too_long` is error.
    """
    lengths: list[int] = []
    kept: list[_KeptRow] = []
    problems: list[str] = []
    systems: set[str | None] = set()
    for place, record in enumerate(rows.select_columns(["id", "messages", "images"])):
        row = Row.of(record)
        try:
            encoded = _encode(row, conversation, vocab_size)
        except DataError as error:
            problems.append(str(error))
            continue
        lengths.append(len(encoded.input_ids))
        needed = _tokens_needed(encoded, conversation.image_token_id)
        if needed <= data.max_length:
            answers = _answer_lengths(encoded.labels[: data.max_length])
            kept.append(_KeptRow(place, len(encoded.input_ids), answers, len(row.images)))
            systems.add(system_text(row.messages))
        elif data.too_long == "error":
            problems.append(
                f"row {row.id}: expected a prompt below data.max_length ({data.max_length}), it "
                f"has {needed - 1} tokens: raise it, or write data.too_long: drop"
            )
    _raise_first(problems)
    if not kept:
        raise DataError(
            f"expected rows whose prompt is below data.max_length ({data.max_length}), all "
            f"{len(rows)} are longer: raise it"
        )
    cut = [max(row.tokens - data.max_length, 0) for row in kept]
    image_counts = Counter(row.images for row in kept)
    return MeasuredRows(
        kept=rows if len(kept) == len(rows) else rows.select([row.place for row in kept]),
        lengths=[row.tokens for row in kept],
        counts={
            "rows_kept": len(kept),
            "rows_dropped": len(rows) - len(kept),
            "answers_cut": sum(map(bool, cut)),
            "tokens_cut": sum(cut),
            "tokens_trained": sum(sum(row.answers) for row in kept),
            "tokens_a_row": length_percentiles(lengths),
            "images_a_row": {str(count): image_counts[count] for count in sorted(image_counts)},
        },
        longest_answer=max(answer for row in kept for answer in row.answers),
        system=systems.pop() if len(systems) == 1 else None,
    )


class _KeptRow(NamedTuple):
    """Position and sizes of a row that fits."""

    place: int
    """Row index in the file, from 0."""

    tokens: int
    """Number of tokens before truncation."""

    answers: list[int]
    """Number of trained tokens by assistant turn."""

    images: int


def _encode(row: Row, conversation: ConversationEncoder, vocab_size: int) -> EncodedRow:
    encoded = conversation.encode(row.messages, row.id)
    _check_image_tokens(row, encoded.input_ids, conversation)
    never = conversation.family.non_answer_token_ids(conversation.processor)
    check_labels(torch.tensor([encoded.labels]), vocab_size, never, [row.id])
    return encoded


def _answer_lengths(labels: list[int]) -> list[int]:
    """Lengths of the trained spans."""
    spans = groupby(labels, key=lambda label: label != IGNORED)
    return [len(list(span)) for trained, span in spans if trained]


def _tokens_needed(row: EncodedRow, image_token_id: int) -> int:
    """Number of tokens up to the first trained one and the last image token, both included."""
    images = (i for i, token in enumerate(row.input_ids) if token == image_token_id)
    return max(row.prompt_length, *images, 0) + 1


def _raise_first(problems: list[str]) -> None:
    more = len(problems) - SHOWN_PROBLEMS
    rest = [f"{more} more rows are bad: correct them too"] if more > 0 else []
    if problems:
        raise DataError(*problems[:SHOWN_PROBLEMS], *rest)


def _check_image_tokens(row: Row, input_ids: list[int], conversation: ConversationEncoder) -> None:
    wanted = len(row.images) * conversation.family.tokens_per_image(conversation.processor)
    found = input_ids.count(conversation.image_token_id)
    if found != wanted:
        raise DataError(
            f"row {row.id}: expected {wanted} image tokens for its {len(row.images)} images, "
            f"the chat template wrote {found}: put the base's own template back"
        )
