"""Controls: the image of another patient, and the text of the nearest training image."""

import hashlib
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from datasets import Dataset

from medft.data.stored_image import thumbnail
from medft.errors import DataError
from medft.evaluation.items import Item, items_of, open_item_images

TRAINING_POOL = 10_000
"""Maximum number of training rows, chosen by hashed ids, that are searched for the nearest."""


def shuffled_image_control(items: Sequence[Item]) -> list[int | None]:
    """For each item, the index of an item of another group, with the same source and image count.

    The order is that of hashed ids. None if there is no such item or the item has no image.
    """
    kinds: dict[tuple[str, int], list[int]] = defaultdict(list)
    for index, item in enumerate(items):
        if item.images:
            kinds[item.source, len(item.images)].append(index)
    found: list[int | None] = [None] * len(items)
    for members in kinds.values():
        if len({items[index].group_id for index in members}) == 1:
            continue
        members.sort(key=lambda index: _draw(items[index].id))
        for place, index in enumerate(members):
            others = (members[place - step] for step in range(1, len(members)))
            found[index] = next(i for i in others if items[i].group_id != items[index].group_id)
    return found


def nearest_texts(rows: Dataset, train: Dataset) -> list[str | None]:
    """For each item of the rows, the text of the training item whose first image is nearest.

    Nearest means the smallest mean absolute difference of 32 x 32 gray thumbnails, among training
    items of the same source and question, else of the same source, else among all.
    """
    items, pool = items_of(rows), _pool(train)
    known = items_of(pool)
    thumbnails = _thumbnails(pool, known)
    by_source: dict[str, list[int]] = defaultdict(list)
    by_question: dict[tuple[str, str], list[int]] = defaultdict(list)
    for index, item in enumerate(known):
        by_source[item.source].append(index)
        by_question[item.source, item.question].append(index)
    texts: list[str | None] = []
    for item, own in zip(items, _thumbnails(rows, items), strict=True):
        chosen = by_question.get((item.source, item.question)) or by_source.get(item.source)
        candidates = np.array(chosen or range(len(known)))
        distances = np.abs(thumbnails[candidates].astype(np.int16) - own).mean(axis=1)
        texts.append(known[candidates[distances.argmin()]].reference)
    return texts


def _pool(train: Dataset) -> Dataset:
    if len(train) <= TRAINING_POOL:
        return train
    ids = train["id"]
    drawn = sorted(range(len(train)), key=lambda index: _draw(ids[index]))
    return train.select(sorted(drawn[:TRAINING_POOL]))


def _thumbnails(rows: Dataset, items: Sequence[Item]) -> np.ndarray:
    """[N, 1024] gray values of each item's first image; black if none can be read."""
    gray = np.zeros((len(items), 1024), np.uint8)
    for index, item in enumerate(items):
        try:
            first = open_item_images(rows, item)[:1]
        except DataError:
            continue
        for image in first:
            gray[index] = np.asarray(thumbnail(image)).ravel()
    return gray


def _draw(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()
