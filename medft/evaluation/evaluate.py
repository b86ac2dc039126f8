"""A trained model measured on rows it was not trained on: predictions first, then scores of them.

Beside the model stand the base it was trained from and two controls that need no skill: the model
shown another picture of the same source, and the text of the training case whose picture is
nearest pixel by pixel. Every system answers the same rows, so that differences are paired.
"""

import hashlib
import json
import logging
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from PIL import Image
from tqdm import tqdm

from medft.data.chat import Message, image_source, load_rows, messages_of
from medft.data.images import open_image
from medft.data.pairs import batched, thumbnail
from medft.errors import DataError, RunError
from medft.evaluation.report import shown_cases, write_evaluation_report
from medft.files import check_folder_for_output, complete_folder, file_sha256, write_json
from medft.metrics.retrieval import ranks_both_ways
from medft.metrics.scores import Line, score
from medft.pages import thumbnail_of
from medft.provenance import read_record
from medft.trained import Encoder, Generator, Request, find_trained

TRAINING_POOL = 10_000
"""Training pictures at the most, drawn by their ids, among which the nearest is looked for."""

_CHUNK = 64

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Item:
    """An answer to be given: a conversation up to it, its pictures' places, what was written."""

    id: str
    group_id: str
    source: str
    prompt: list[Message]
    row: int
    """Of the dataset, whose pictures may be too many to hold."""

    images: range
    """Which of the row's pictures."""

    reference: str

    @property
    def question(self) -> str:
        """The text of the last user turn."""
        return "".join(part.get("text", "") for part in self.prompt[-1]["content"])


def rows_to_evaluate(source: Path, data: Path | None, split: str) -> tuple[Path, Dataset]:
    """The file and its rows: the one given, or that of the run's split.

    Raises:
        RunError: no file is given and the source is no run, or its run had no such split.
        DataError: the file cannot be read, or is no longer what the run saw.
    """
    if data is None:
        if not (source / "run.json").is_file():
            raise RunError(f"expected --data for {source}, which is no run: give a file of rows")
        known = read_record(source)["data"]
        train = Path(known["train"]["path"]).expanduser()
        data = train if train.suffix == ".parquet" else train.with_name(f"{split}.jsonl")
        if split in known:
            data = Path(known[split]["path"]).expanduser()
            if data.is_file() and file_sha256(data) != known[split]["sha256"]:
                raise DataError(
                    f"expected the {split} rows that the run saw in {data}, the file has changed: "
                    f"restore it, or name it with --data"
                )
    return data, load_rows(data, split=split)


def items_of(rows: Dataset) -> list[Item]:
    """An item for every assistant turn, the turns before it as they were written."""
    items = []
    for index, row in enumerate(rows.remove_columns("images")):
        messages = messages_of(row)
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        for number, turn in enumerate(turns):
            prompt = messages[:turn]
            shown = sum(part["type"] == "image" for m in prompt for part in m["content"])
            items.append(
                Item(
                    id=row["id"] if len(turns) == 1 else f"{row['id']}#{number + 1}",
                    group_id=row["group_id"],
                    source=row["source"] or "",
                    prompt=prompt,
                    row=index,
                    images=range(shown),
                    reference="".join(part["text"] for part in messages[turn]["content"]),
                )
            )
    return items


def open_pictures(rows: Dataset, item: Item) -> list[Image.Image]:
    """The pictures of an item of a dataset.

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


def partners(items: Sequence[Item]) -> list[int | None]:
    """For each item another of the same source with as many pictures, of another group.

    The order is drawn from the ids. None where there is no such item, and for one without picture.
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


def decoder_lines(
    generator: Generator, rows: Dataset, *, against_base: bool, train: Dataset | None
) -> Iterator[Line]:
    """The lines of predictions.jsonl of a decoder.

    Args:
        generator: the trained model.
        rows: as from `load_rows`; every assistant turn is answered.
        against_base: whether its base answers as well.
        train: the rows it was trained on; None leaves the nearest text out.
    """
    items = items_of(rows)
    others = partners(items)
    systems = {"tuned": _answers("tuned", generator, rows, items, items)}
    if against_base:
        with generator.without_adapter():
            systems["base"] = _answers("base", generator, rows, items, items)
    shown = [None if other is None else items[other] for other in others]
    systems["shuffled"] = _answers("shuffled images", generator, rows, items, shown)
    if train is not None:
        systems["nearest"] = nearest_texts(rows, train)
    for index, (item, other) in enumerate(zip(items, others, strict=True)):
        yield {
            "id": item.id,
            "group_id": item.group_id,
            "source": item.source,
            "question": item.question,
            "reference": item.reference,
            "predictions": {name: answers[index] for name, answers in systems.items()},
            "shuffled_with": None
            if other is None or systems["shuffled"][index] is None
            else items[other].id,
        }


def _answers(
    name: str,
    generator: Generator,
    rows: Dataset,
    items: Sequence[Item],
    shown: Sequence[Item | None],
) -> list[str | None]:
    """The generator's answers, each item with the pictures of another; None where that fails."""
    answers: dict[int, str] = {}
    indices = [i for i, other in enumerate(shown) if other is not None]
    progress = tqdm(total=len(indices), desc=name, disable=not sys.stderr.isatty())
    if progress.disable:
        logger.info("%s: %s answers", name, len(indices))
    with progress:
        for chunk in batched(indices, _CHUNK):
            requests = {}
            for index in chunk:
                try:
                    generator.encoder.check_texts(items[index].prompt, items[index].id)
                    images = open_pictures(rows, shown[index])
                except DataError as error:
                    logger.warning("no answer to %s: %s", items[index].id, error)
                    continue
                requests[index] = Request(messages=items[index].prompt, images=images)
            texts = generator.generate(list(requests.values()))
            answers.update(zip(requests, texts, strict=True))
            progress.update(len(chunk))
    return [answers.get(index) for index in range(len(items))]


def nearest_texts(rows: Dataset, train: Dataset) -> list[str | None]:
    """For each item of the rows the text of the training case whose first picture is nearest.

    Nearest means the smallest mean difference of 32 x 32 grey thumbnails, among training cases of
    the same source and, where there are such, with the same question.
    """
    items, pool = items_of(rows), _pool(train)
    known = items_of(pool)
    pictures = _thumbnails(pool, known)
    by_source: dict[str, list[int]] = defaultdict(list)
    by_question: dict[tuple[str, str], list[int]] = defaultdict(list)
    for index, item in enumerate(known):
        by_source[item.source].append(index)
        by_question[item.source, item.question].append(index)
    texts: list[str | None] = []
    for item, own in zip(items, _thumbnails(rows, items), strict=True):
        chosen = by_question.get((item.source, item.question)) or by_source.get(item.source)
        candidates = np.array(chosen or range(len(known)))
        distances = np.abs(pictures[candidates].astype(np.int16) - own).mean(axis=1)
        texts.append(known[candidates[distances.argmin()]].reference)
    return texts


def _pool(train: Dataset) -> Dataset:
    if len(train) <= TRAINING_POOL:
        return train
    ids = train["id"]
    drawn = sorted(range(len(train)), key=lambda index: _draw(ids[index]))
    return train.select(sorted(drawn[:TRAINING_POOL]))


def _thumbnails(rows: Dataset, items: Sequence[Item]) -> np.ndarray:
    """[N, 1024] grey values of each item's first picture; black where there is none to read."""
    grey = np.zeros((len(items), 1024), np.uint8)
    for index, item in enumerate(items):
        try:
            first = open_pictures(rows, item)[:1]
        except DataError:
            continue
        for image in first:
            grey[index] = np.asarray(thumbnail(image)).ravel()
    return grey


def _draw(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def encoder_lines(encoder: Encoder, rows: Dataset, *, against_base: bool) -> Iterator[Line]:
    """The lines of predictions.jsonl of a SigLIP: a line for each picture and its caption.

    A rank is the place, from 1, of the best of the matching entries among all of the pool.

    Args:
        encoder: the trained model.
        rows: as from `load_rows`.
        against_base: whether its base is ranked as well.
    """
    items = []
    for index, row in enumerate(rows):
        caption, count = encoder.caption_of(row), len(row["images"])
        items += [
            Item(
                id=row["id"] if count == 1 else f"{row['id']}#{number + 1}",
                group_id=row["group_id"],
                source=row["source"] or "",
                prompt=[],
                row=index,
                images=range(number, number + 1),
                reference=caption,
            )
            for number in range(count)
        ]
    if not items:
        raise DataError("expected rows with images, none has one: give rows with images")
    texts = [item.reference for item in items]
    numbers: dict[str, int] = {}
    keys = np.array([numbers.setdefault(text, len(numbers)) for text in texts])
    others = partners(items)
    systems: dict[str, dict[str, np.ndarray]] = {}
    retrieved: dict[str, list[list[dict[str, Any]]]] = {}
    for name in ("base", "tuned") if against_base else ("tuned",):
        logger.info("%s: embeddings of %s pictures and texts", name, len(items))
        with encoder.without_adapter() if name == "base" else nullcontext():
            images = encoder.embed_images(open_pictures(rows, item)[0] for item in items)
            captions = encoder.embed_texts(texts)
        systems[name] = ranks_both_ways(images, captions, keys)
        retrieved[name] = _best_texts(images, captions, texts)
    shown = [i if other is None else other for i, other in enumerate(others)]
    systems["shuffled"] = ranks_both_ways(images[shown], captions, keys)
    systems = {"tuned": systems.pop("tuned"), **systems}
    for index, item in enumerate(items):
        yield {
            "id": item.id,
            "group_id": item.group_id,
            "source": item.source,
            "reference": item.reference,
            "ranks": {
                name: {way: float(found[index]) for way, found in ways.items()}
                for name, ways in systems.items()
            },
            "retrieved": {name: best[index] for name, best in retrieved.items()},
            "shuffled_with": None if others[index] is None else items[others[index]].id,
        }


def _best_texts(
    images: np.ndarray, captions: np.ndarray, texts: Sequence[str]
) -> list[list[dict[str, Any]]]:
    """For each picture the three nearest different texts of the pool."""
    first: dict[str, int] = {}
    for index, text in enumerate(texts):
        first.setdefault(text, index)
    different, candidates = list(first), captions[list(first.values())]
    best = []
    for image in images:
        similarity = candidates @ image
        nearest = np.argsort(-similarity, kind="stable")[:3]
        best.append(
            [{"text": different[i], "similarity": round(float(similarity[i]), 4)} for i in nearest]
        )
    return best


def read_lines(path: Path) -> list[Line]:
    """The lines of predictions.jsonl."""
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def evaluate(
    source: Path, out: Path, *, data: Path | None, split: str, against_base: bool
) -> dict[str, Any]:
    """Write predictions.jsonl, metrics.json and report.html; returns the metrics.

    Args:
        source: a run, an adapter folder or a model folder, decoder or SigLIP.
        out: folder; must be empty or not exist.
        data: chat JSONL or pairs.parquet; None for the run's own split.
        split: which rows of pairs.parquet, or of the run.
        against_base: whether the base that the adapter was trained on answers as well.

    Raises:
        RunError: there is no finished model, or `out` is not empty.
        DataError: the rows cannot be read.
        BaseModelError: the model cannot be loaded.
    """
    check_folder_for_output(out)
    trained = find_trained(source)
    if against_base and not trained.is_adapter:
        raise RunError(
            f"expected an adapter for --against base, {source} is a whole model: give the run that "
            f"trained it"
        )
    path, rows = rows_to_evaluate(source, data, split)
    notes: list[str] = []
    with complete_folder(out) as draft:
        if trained.is_encoder:
            found = encoder_lines(Encoder.load(source), rows, against_base=against_base)
        else:
            train = _training_rows(source, notes)
            found = decoder_lines(
                Generator.load(source), rows, against_base=against_base, train=train
            )
        with (draft / "predictions.jsonl").open("w", encoding="utf-8") as file:
            for line in found:
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
        lines = read_lines(draft / "predictions.jsonl")
        metrics = {"model": str(source), "data": str(path), "split": split}
        metrics |= {**score(lines), "notes": notes}
        write_json(draft / "metrics.json", metrics)
        files = ("run.json", "log_history.json", "curves.png")
        run = source if all((source / name).is_file() for name in files) else None
        write_evaluation_report(
            draft / "report.html", lines, metrics, pictures_of(rows, lines), run=run
        )
    return metrics


def pictures_of(rows: Dataset, lines: Sequence[Line]) -> dict[str, bytes]:
    """JPEG files of the pictures that the page shows, by the ids of its cases."""
    pictures = {}
    places = {name: index for index, name in enumerate(rows["id"])}
    for case in shown_cases(lines):
        name, _, number = case.rpartition("#")
        row = rows[places[case if case in places else name]]
        first = int(number) - 1 if case not in places and "ranks" in lines[0] else 0
        if row["images"]:
            try:
                image = open_image(image_source(row["images"][first]))
            except DataError:
                continue
            pictures[case] = thumbnail_of(image)
    return pictures


def _training_rows(source: Path, notes: list[str]) -> Dataset | None:
    """The rows that a run was trained on; without them a note says what is missing."""
    if (source / "run.json").is_file():
        known = read_record(source)["data"]["train"]
        path = Path(known["path"]).expanduser()
        if path.is_file() and file_sha256(path) == known["sha256"]:
            return load_rows(path, split="train")
    notes.append("No nearest training text: the training rows are not known or have changed.")
    return None
