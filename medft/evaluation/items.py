"""The rows of an evaluation as items, one per answer to be given."""

from collections.abc import Callable
from dataclasses import dataclass

from datasets import Dataset
from PIL import Image

from medft.data.images import open_image
from medft.data.messages import Message, text_of_message
from medft.data.rows import Row, image_source
from medft.errors import DataError

_LONGEST_REFERENCE = 2**15
"""Characters of an answer to compare with; time and memory of ROUGE-L are quadratic in words."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Item:
    """One answer to be given: the conversation before it, its images and the reference text."""

    id: str
    group_id: str
    source: str
    prompt: list[Message]
    row: int
    """Row index in the dataset, from which images are read as needed: they may be too many."""

    images: range
    """Indices of the images within the row."""

    reference: str

    @property
    def question(self) -> str:
        """The text of the last user turn."""
        return text_of_message(self.prompt[-1])


def items_of(rows: Dataset) -> list[Item]:
    """One item per assistant turn, with the turns before it as they were written.

    Raises:
        DataError: a turn is longer than any report; scores compare texts word by word.
    """
    items = []
    for index, record in enumerate(rows.remove_columns("images")):
        row = Row.of(record)
        turns = [i for i, message in enumerate(row.messages) if message["role"] == "assistant"]
        for number, turn in enumerate(turns):
            prompt = row.messages[:turn]
            shown = sum(part["type"] == "image" for m in prompt for part in m["content"])
            reference = text_of_message(row.messages[turn])
            if len(reference) > _LONGEST_REFERENCE:
                raise DataError(
                    f"row {row.id}: expected an answer of at most {_LONGEST_REFERENCE} characters "
                    f"to compare with, it has {len(reference)}: leave the row out"
                )
            items.append(
                Item(
                    id=_numbered(row.id, number, len(turns)),
                    group_id=row.group_id,
                    source=row.source,
                    prompt=prompt,
                    row=index,
                    images=range(shown),
                    reference=reference,
                )
            )
    return items


def caption_items(rows: Dataset, caption_of: Callable[[Row], str]) -> list[Item]:
    """One item per image, with its caption as the reference.

    Raises:
        DataError: no row has an image.
    """
    items = []
    for index, record in enumerate(rows):
        row = Row.of(record)
        items += [
            Item(
                id=_numbered(row.id, number, len(row.images)),
                group_id=row.group_id,
                source=row.source,
                prompt=[],
                row=index,
                images=range(number, number + 1),
                reference=caption_of(row),
            )
            for number in range(len(row.images))
        ]
    if not items:
        raise DataError("expected rows with images, none has one: give rows with images")
    return items


def _numbered(name: str, number: int, count: int) -> str:
    """The id of an item, with a number from 1 if its row has several."""
    return name if count == 1 else f"{name}#{number + 1}"


def open_item_images(rows: Dataset, item: Item) -> list[Image.Image]:
    """The images of an item of a dataset.

    Raises:
        DataError: one cannot be read; the message names the row.
    """
    if not item.images:
        return []
    images = rows[item.row]["images"]
    try:
        return [open_image(image_source(images[number])) for number in item.images]
    except DataError as error:
        raise DataError(f"row {item.id}: {error}") from error
