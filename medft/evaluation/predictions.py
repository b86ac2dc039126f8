"""Predictions of a model and its controls: the records of predictions.jsonl."""

import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext

import numpy as np
from datasets import Dataset
from tqdm import tqdm

from medft.data.pairs import batched
from medft.decoder.generator import Generator, Request
from medft.errors import DataError
from medft.evaluation.controls import nearest_texts, shuffled_image_control
from medft.evaluation.items import Item, caption_items, items_of, open_item_images
from medft.metrics.predictions import AnswerPrediction, RetrievalPrediction, RetrievedText
from medft.metrics.retrieval import ranks_both_ways
from medft.siglip.embedder import Embedder

_CHUNK = 64
"""Number of items whose images are open at once."""

_RETRIEVED = 3
"""Number of retrieved texts that are kept per image."""

logger = logging.getLogger(__name__)


def answer_predictions(
    generator: Generator,
    rows: Dataset,
    *,
    against_base: bool,
    train: Dataset | None,
    notes: list[str],
) -> Iterator[AnswerPrediction]:
    """The answers of a decoder and its controls for every assistant turn of the rows.

    Args:
        generator: the trained model.
        rows: as from `load_rows`.
        against_base: whether its base answers as well.
        train: the rows it was trained on; None leaves the nearest text out.
        notes: gets sentences on answers that were truncated or not given.
    """
    items = items_of(rows)
    others = shuffled_image_control(items)
    systems = {"tuned": _answers("tuned", generator, rows, items, items, notes)}
    if against_base:
        with generator.without_adapter():
            systems["base"] = _answers("base", generator, rows, items, items, notes)
    shown = [None if other is None else items[other] for other in others]
    systems["shuffled"] = _answers("shuffled images", generator, rows, items, shown, notes)
    if train is not None:
        systems["nearest"] = nearest_texts(rows, train)
    for index, (item, other) in enumerate(zip(items, others, strict=True)):
        yield AnswerPrediction(
            id=item.id,
            group_id=item.group_id,
            source=item.source,
            question=item.question,
            reference=item.reference,
            predictions={name: answers[index] for name, answers in systems.items()},
            shuffled_with=None
            if other is None or systems["shuffled"][index] is None
            else items[other].id,
        )


def _answers(
    name: str,
    generator: Generator,
    rows: Dataset,
    items: Sequence[Item],
    shown: Sequence[Item | None],
    notes: list[str],
) -> list[str | None]:
    """The generator's answers, each item with the images of `shown`; None where that fails."""
    answers: dict[int, str] = {}
    truncated = 0
    asked = [(index, other) for index, other in enumerate(shown) if other is not None]
    progress = tqdm(total=len(asked), desc=name, disable=not sys.stderr.isatty())
    if progress.disable:
        logger.info("%s: %s answers", name, len(asked))
    with progress:
        for chunk in batched(asked, _CHUNK):
            requests = {}
            for index, other in chunk:
                try:
                    generator.conversation.check_texts(items[index].prompt, items[index].id)
                    images = open_item_images(rows, other)
                except DataError as error:
                    logger.warning("no answer to %s: %s", items[index].id, error)
                    continue
                requests[index] = Request(messages=items[index].prompt, images=images)
            turns = generator.generate(list(requests.values()))
            answers.update({i: turn.text for i, turn in zip(requests, turns, strict=True)})
            truncated += sum(turn.truncated for turn in turns)
            progress.update(len(chunk))
    limits = []
    if truncated:
        limits.append(
            f"{name}: {truncated} of {len(answers)} answers truncated at "
            f"{generator.max_new_tokens} tokens."
        )
    if len(answers) < len(asked):
        limits.append(f"{name}: {len(asked) - len(answers)} of {len(asked)} could not be asked.")
    for limit in limits:
        logger.warning("%s", limit)
    notes += limits
    return [answers.get(index) for index in range(len(items))]


def retrieval_predictions(
    embedder: Embedder, rows: Dataset, *, against_base: bool, notes: list[str]
) -> Iterator[RetrievalPrediction]:
    """The ranks of each image and its caption among all, for a SigLIP and its controls.

    Args:
        embedder: the trained model.
        rows: as from `load_rows`.
        against_base: whether its base is ranked as well.
        notes: gets a sentence on captions that are cut.

    Raises:
        DataError: no row has an image.
    """
    items = caption_items(rows, embedder.caption_of)
    texts = [item.reference for item in items]
    if cut := embedder.count_cut(texts):
        notes.append(f"{cut} of {len(texts)} captions are cut at {embedder.max_length} tokens.")
        logger.warning("%s", notes[-1])
    numbers: dict[str, int] = {}
    keys = np.array([numbers.setdefault(text, len(numbers)) for text in texts])
    others = shuffled_image_control(items)
    systems: dict[str, dict[str, np.ndarray]] = {}
    retrieved: dict[str, list[list[RetrievedText]]] = {}
    for name in ("base", "tuned") if against_base else ("tuned",):
        logger.info("%s: embeddings of %s images and texts", name, len(items))
        with embedder.without_adapter() if name == "base" else nullcontext():
            images = embedder.embed_images(open_item_images(rows, item)[0] for item in items)
            captions = embedder.embed_texts(texts)
        systems[name] = ranks_both_ways(images, captions, keys)
        retrieved[name] = _best_texts(images, captions, texts)
    shown = [i if other is None else other for i, other in enumerate(others)]
    systems["shuffled"] = ranks_both_ways(images[shown], captions, keys)
    systems = {"tuned": systems.pop("tuned"), **systems}
    for index, (item, other) in enumerate(zip(items, others, strict=True)):
        yield RetrievalPrediction(
            id=item.id,
            group_id=item.group_id,
            source=item.source,
            reference=item.reference,
            ranks={
                name: {way: float(found[index]) for way, found in ways.items()}
                for name, ways in systems.items()
            },
            retrieved={name: best[index] for name, best in retrieved.items()},
            shuffled_with=None if other is None else items[other].id,
        )


def _best_texts(
    images: np.ndarray, captions: np.ndarray, texts: Sequence[str]
) -> list[list[RetrievedText]]:
    """For each image, the nearest distinct texts of the pool."""
    first: dict[str, int] = {}
    for index, text in enumerate(texts):
        first.setdefault(text, index)
    different, candidates = list(first), captions[list(first.values())]
    best = []
    for image in images:
        similarity = candidates @ image
        nearest = np.argsort(-similarity, kind="stable")[:_RETRIEVED]
        best.append(
            [
                RetrievedText(text=different[i], similarity=round(float(similarity[i]), 4))
                for i in nearest
            ]
        )
    return best
