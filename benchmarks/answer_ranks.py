"""Scores answers that know nothing beside true ones, to show that no metric lifts them.

    python benchmarks/answer_ranks.py [FOLDER]

On 300 drawn reports of new patients, with 25 % and with 70 % of them normal, and, with the
FOLDER of VQA-RAD (train.json, test.json, images/), on its test questions: the true text, that of
the nearest training image and of a random training row, one normal report or one word for all
rows, a sentence and random words that have nothing to do with them, and nothing. Prints every
metric, how much finding F1 reads, and where gibberish is significantly better than the nearest
text; writes results/answer_ranks.json.
"""

import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from medft.demo.phantoms import MODALITIES, draw_phantom, render, report
from medft.metrics.predictions import AnswerPrediction
from medft.metrics.scores import score

ROWS, TRAINING = 300, 1500
SENTENCE = "The cat sat on the mat."
WORDS = (
    *("river", "seven", "yellow", "quickly", "table", "of", "and", "window", "the", "music", "is"),
    *("in", "running", "over", "a", "with", "bread", "under", "cloud", "no", "paper", "mountain"),
)
SHOWN = ("finding_f1", "token_f1", "exact_match", "rouge_l", "bleu", "closed_accuracy")

Row = tuple[str, str, str, np.ndarray]
"""Group, question, text and gray thumbnail."""


def thumbnail(pixels: np.ndarray) -> np.ndarray:
    """[32, 32] gray values."""
    image = Image.fromarray(np.rint(pixels).astype(np.uint8)).convert("L")
    return np.asarray(image.resize((32, 32), Image.Resampling.BOX), dtype=np.int16)


def drawn(count: int, *, clear: float, seed: int) -> list[Row]:
    """Drawn images with their reports, as many of each modality."""
    random, rows = np.random.default_rng([seed, round(100 * clear)]), []
    for index in range(count):
        modality = list(MODALITIES)[index % len(MODALITIES)]
        phantom = draw_phantom(modality, random, clear=clear)
        image = thumbnail(render(phantom, random, side=56))
        rows.append((f"p{seed}-{index}", modality, report(phantom, random), image))
    return rows


def vqa_rad(folder: Path, name: str) -> list[Row]:
    """The questions of a split; those of one image are a group."""
    thumbnails: dict[str, np.ndarray] = {}
    rows = []
    for entry in json.loads((folder / f"{name}.json").read_text(encoding="utf-8")):
        image = entry["image_name"]
        if image not in thumbnails:
            with Image.open(folder / "images" / image) as opened:
                thumbnails[image] = thumbnail(np.asarray(opened.convert("L")))
        rows.append((image, str(entry["question"]), str(entry["answer"]), thumbnails[image]))
    return rows


def nearest(row: Row, train: list[Row], by_question: dict[str, list[int]]) -> str:
    """The text of the training row with the nearest image, of the same question if there is any."""
    candidates = by_question.get(row[1]) or range(len(train))
    distances = [int(np.abs(train[index][3] - row[3]).sum()) for index in candidates]
    return train[candidates[int(np.argmin(distances))]][2]


def ranked(rows: list[Row], train: list[Row], normal: dict[str, str]) -> dict[str, Any]:
    """Every metric of every kind of answer; gibberish stands for the tuned model.

    Args:
        rows: to be answered.
        train: to be copied from.
        normal: the normal report by question, if there is one.
    """
    random = np.random.default_rng(5)
    by_question: dict[str, list[int]] = defaultdict(list)
    for index, (_, question, _, _) in enumerate(train):
        by_question[question].append(index)
    predictions = []
    for index, row in enumerate(rows):
        group, question, text, _ = row
        same = by_question.get(question) or range(len(train))
        answers: dict[str, str | None] = {
            "tuned": SENTENCE,
            "true": text,
            "nearest": nearest(row, train, by_question),
            "copied": train[same[int(random.integers(len(same)))]][2],
            "normal report": normal.get(question, "Normal study without abnormality."),
            "normal": "Normal.",
            "no": "No",
            "yes": "Yes",
            "random words": " ".join(random.choice(WORDS, 12)),
            "empty": "" if index % 2 else None,
        }
        predictions.append(
            AnswerPrediction(
                id=str(index),
                group_id=group,
                source="s",
                question=question,
                reference=text,
                predictions=answers,
                shuffled_with=None,
            )
        )
    found = score(predictions)
    shown = {
        "gibberish" if name == "tuned" else name: one for name, one in found["systems"].items()
    }
    against = found["differences"]["nearest"]
    return {
        "rows": found["rows"],
        "groups": found["groups"],
        "read": found["read"],
        "systems": {
            name: {metric: figures[metric] for metric in SHOWN} for name, figures in shown.items()
        },
        "gibberish_minus_nearest": {metric: against[metric] for metric in SHOWN},
    }


def print_table(name: str, found: dict[str, Any]) -> None:
    """Print the metrics of every kind of answer."""
    read = found["read"]
    sys.stdout.write(
        f"{name}: {found['rows']} rows of {found['groups']} groups, references read "
        f"{read['references']:.0%}\n{'':16}{'read':>7}"
        + "".join(f"{metric:>16}" for metric in SHOWN)
        + "\n"
    )
    for system, figures in found["systems"].items():
        values = [figures[metric]["value"] for metric in SHOWN]
        share = read["systems"]["tuned" if system == "gibberish" else system]
        sys.stdout.write(
            f"{system:16}{share:7.0%}"
            + "".join(f"{'none' if v is None else format(v, '.3f'):>16}" for v in values)
            + "\n"
        )
    better = [
        metric
        for metric, one in found["gibberish_minus_nearest"].items()
        if one["low"] is not None and one["low"] > 0
    ]
    sys.stdout.write(f"gibberish significantly better than nearest: {better or 'nowhere'}\n\n")


def main(folder: Path | None) -> None:
    """Print the tables and write the results."""
    normal = {name: modality.clear[0] for name, modality in MODALITIES.items()}
    results = {}
    for clear in (0.25, 0.7):
        train = drawn(TRAINING, clear=clear, seed=1)
        results[f"drawn reports, {clear:.0%} normal"] = ranked(
            drawn(ROWS, clear=clear, seed=2), train, normal
        )
    if folder:
        train, test = vqa_rad(folder, "train"), vqa_rad(folder, "test")
        results["VQA-RAD"] = ranked(test, train, {})
    for name, found in results.items():
        print_table(name, found)
    target = Path(__file__).parent / "results" / "answer_ranks.json"
    target.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else None)
