"""What a model trained with `cross_attention_fix` computes in plain transformers, which lacks it.

Stock code gives tokens that may see no image a share of every image and padding tile of the batch.
So it differs for each row with an image, by the tokens before that, and for a row without image in
a batch with one; alone, such a row stays as it is.
"""

from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from datasets import Dataset
from PIL import Image
from torch import Tensor
from transformers import BatchFeature, PreTrainedModel, ProcessorMixin

from medft.config.recipe import DecoderDataSection
from medft.data.images import open_image
from medft.data.messages import Message
from medft.data.rows import Row
from medft.decoder.conversation import ConversationEncoder, EncodedRow
from medft.decoder.families import family_of
from medft.decoder.families.base import ImageInputs
from medft.errors import DataError
from medft.evaluation.rows import run_of, run_rows
from medft.models.saved import SavedModel

_ROWS = 2
"""Rows with images that are compared: alone, without their images, and both in one batch."""

_Encoded = tuple[EncodedRow, list[ImageInputs]]
"""A row's tokens and images."""


def difference_without_fix(
    merged: PreTrainedModel, processor: ProcessorMixin, saved: SavedModel
) -> dict[str, Any]:
    """A merged model as plain transformers computes it against itself under the fix.

    The rows are those of its run where these are known, else drawn ones.

    Args:
        merged: without the fix, which is installed for the comparison.
        processor: the adapter's.
        saved: the adapter.

    Returns:
        For merge.json: mean_logit_difference and max_logit_difference (absolute), top1_agreement
        (share of tokens with the same largest logit), rows (number compared), rows_from, and
        max_logit_difference_by: with_image, without_image and in_one_batch.
    """
    family = family_of(saved.record.family)
    standard = DecoderDataSection.model_fields["max_image_tiles"].default
    tiles = saved.record.max_image_tiles or standard
    conversation = ConversationEncoder(processor, family, max_image_tiles=tiles)
    rows_from, rows = _rows_of(saved, conversation)
    bare: list[_Encoded] = [(conversation.encode(_without_images(m), "row"), []) for m, _ in rows]
    shown: list[_Encoded] = [(conversation.encode(m, "row"), images) for m, images in rows]
    batches = {
        "with_image": [[row] for row in shown],
        "without_image": [[row] for row in bare],
        "in_one_batch": [[row, other] for row, other in zip(shown, bare, strict=True)],
    }
    family.isolate_rows(merged.eval())
    largest = dict.fromkeys(batches, 0.0)
    tokens, same, total = 0, 0, 0.0  # total: of the mean differences of each token's logits
    for name, given in batches.items():
        for members in given:
            plain, fixed = _logits(merged, conversation, members)
            gap = (plain - fixed).abs()
            largest[name] = max(largest[name], gap.max().item())
            total += gap.mean(dim=-1).sum().item()
            tokens += len(gap)
            same += int((plain.argmax(-1) == fixed.argmax(-1)).sum())
    return {
        "mean_logit_difference": total / tokens,
        "max_logit_difference": max(largest.values()),
        "top1_agreement": same / tokens,
        "rows": sum(len(members) for given in batches.values() for members in given),
        "rows_from": rows_from,
        "max_logit_difference_by": largest,
    }


def _logits(
    merged: PreTrainedModel, conversation: ConversationEncoder, rows: list[_Encoded]
) -> tuple[Tensor, Tensor]:
    """[tokens, vocabulary] float32 logits of a batch's tokens, without the fix and with it."""
    images = [own for _, own in rows]
    batch = BatchFeature(conversation.batch([r for r, _ in rows], images, padding_side="right"))
    del batch["labels"]
    stacked = conversation.family.stack_images([own for own in images if own])
    missing = len(rows) - sum(map(bool, images))
    for name, value in stacked.items():
        stacked[name] = torch.cat([value, value.new_zeros(missing, *value.shape[1:])])
    if stacked and missing:  # the first tile of an image that is none, as transformers marks it
        stacked["aspect_ratio_mask"][-missing:, :, 0] = 1
    batch.update(stacked)
    is_token = batch["attention_mask"].bool()
    batch = batch.to(merged.device, merged.dtype)
    with torch.no_grad():
        fixed = merged(**batch).logits
        with conversation.family.without_isolation(merged):
            plain = merged(**batch).logits
    return plain[is_token].float().cpu(), fixed[is_token].float().cpu()


def _rows_of(
    saved: SavedModel, conversation: ConversationEncoder
) -> tuple[str, list[tuple[list[Message], list[ImageInputs]]]]:
    """Where some rows with images are from, and their messages and images."""
    run = run_of(saved)
    for name in ("validation", "train"):
        rows = run_rows(run, name)
        found = [] if rows is None else list(islice(_with_images(rows, saved, conversation), _ROWS))
        if found:
            return f"{name} rows of the run", found
    drawn = [Image.linear_gradient("L"), Image.radial_gradient("L")]
    messages = _drawn_messages(saved.record.system)
    return "drawn rows", [(messages, [conversation.image_inputs(i.convert("RGB"))]) for i in drawn]


def _with_images(
    rows: Dataset, saved: SavedModel, conversation: ConversationEncoder
) -> Iterator[tuple[list[Message], list[ImageInputs]]]:
    """The rows that have images and are trained on to their end."""
    for record in rows:
        row = Row.of(record)
        try:
            tokens = conversation.encode(row.messages, row.id).input_ids if row.images else []
            if 0 < len(tokens) <= (saved.record.max_length or len(tokens)):
                images = [open_image(image) for image in row.images]
                yield row.messages, [conversation.image_inputs(image) for image in images]
        except DataError:
            continue


def _drawn_messages(system: str | None) -> list[Message]:
    def turn(role: str, text: str) -> Message:
        return {"role": role, "content": [{"type": "text", "text": text}]}

    question = turn("user", "Describe this medical image.")
    question["content"].insert(0, {"type": "image"})
    first = [] if system is None else [turn("system", system)]
    return [*first, question, turn("assistant", "There is no fracture and no effusion.")]


def _without_images(messages: list[Message]) -> list[Message]:
    """The messages without their image parts; a turn that had no other asks what there is."""
    bare: list[Message] = []
    for message in messages:
        texts = [part for part in message["content"] if part["type"] != "image"]
        asked = texts or [{"type": "text", "text": "What is there?"}]
        bare.append({"role": message["role"], "content": asked})
    return bare
