"""The demo: every step of the pipeline in order, on synthetic images and tiny models."""

import logging
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

import numpy as np

from medft.data.chat import write_chat
from medft.data.prepare import prepare
from medft.demo.exports import write_exports
from medft.demo.phantoms import MODALITIES, draw_phantom, image_of, render
from medft.demo.pretrain import pretrained_bases
from medft.demo.report import write_demo_report
from medft.errors import RunError
from medft.evaluation.evaluate import evaluate
from medft.export.merge import merge
from medft.files import check_folder_for_output, packaged_file
from medft.inference.files import predict_files

SEED = 17

PAIRS = 2317
"""Accepted rows and studies; 5 % of them are 116."""

KINDS = ("decoder", "siglip")

MARKER = ".medft-demo"
"""File that marks the folder of a demo, which the next demo deletes."""

logger = logging.getLogger(__name__)


class Steps:
    """The steps of a demo and the seconds that each took."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Announce a step and record its seconds when it ends."""
        logger.info("\n%s. %s", len(self.seconds) + 1, name)
        started = time.monotonic()
        yield
        self.seconds[name] = time.monotonic() - started


def run_demo(out: Path, *, seed: int = SEED) -> Path:
    """Generate data, prepare it, train both models, evaluate, merge and use them.

    Args:
        out: folder of the demo; an earlier demo in it is replaced.
        seed: of images, bases and training.

    Returns:
        The path of report.html.

    Raises:
        RunError: the folder is not the demo's, pydicom is missing, a training failed, or nothing
            was learned.
    """
    check_folder_for_output(out, allow_content=(out / MARKER).is_file())
    if find_spec("pydicom") is None:
        raise RunError(
            'expected pydicom for the demo\'s CT slices, it is missing: pip install "medft[dicom]"'
        )
    if out.exists():
        shutil.rmtree(out)
    out.mkdir(parents=True)
    (out / MARKER).touch()
    data, models, steps = out / "data", out / "models", Steps()

    with steps.step("drawing images as four hospitals export them"):
        sources = write_exports(data / "raw", pairs=PAIRS, seed=seed)
    with steps.step("medft data prepare: every row accepted, or rejected with its reason"):
        summary = prepare(sources, data)
        logger.info("%s pairs: %s", summary["pairs"], summary["splits"])
    with steps.step("medft data chat: conversations to train on"):
        write_chat(data / "pairs.parquet", data / "chat")
    with steps.step("tiny base models that can name discs (kept for the next demo)"):
        pretrained_bases(models, seed=seed)
    with steps.step("medft train: QLoRA on the decoder and LoRA on SigLIP, side by side"):
        train_both(models, data / "chat", out, [f"train.seed={seed}"])
    with steps.step("medft evaluate: base and tuned model on patients never trained on"):
        metrics = {
            kind: evaluate(
                out / kind,
                out / "evaluation" / kind,
                data=None,
                split="validation",
                against_base=True,
            )
            for kind in KINDS
        }
    with steps.step("medft merge: adapters folded into their bases"):
        for kind in KINDS:
            merge(out / kind, out / f"{kind}_merged")
    with steps.step("medft predict: reports and nearest cases of new images"):
        images = draw_new_images(data / "new", seed=seed)
        predict_files(
            out / "decoder_merged",
            [images],
            out / "predictions.jsonl",
            siglip=out / "siglip",
        )
    report = write_demo_report(out, summary, metrics, steps.seconds)
    check_learned(metrics)
    return report


def train_both(models: Path, chat: Path, out: Path, overrides: list[str]) -> None:
    """Run `medft train` for both models at once, each on one thread, into `out`/KIND.

    Their output goes to KIND.log beside the runs; the losses in it are logged.

    Args:
        models: folder with the bases decoder/ and siglip/.
        chat: folder of train.jsonl and validation.jsonl.
        out: folder of the runs.
        overrides: for the two recipes, such as train.seed=3.

    Raises:
        RunError: one of them failed.
    """
    one_thread = {"MEDFT_THREADS": "1", "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", **one_thread}
    running = {}
    for kind in KINDS:
        command = [sys.executable, "-m", "medft.cli", "train"]
        command += [
            str(packaged_file(f"recipes/{kind}/tiny.yaml")),
            f"model.base={models / kind}",
            f"data.train={chat / 'train.jsonl'}",
            f"data.validation={chat / 'validation.jsonl'}",
            f"train.output_dir={out / kind}",
            *overrides,
        ]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
        )
        reader = threading.Thread(target=_follow, args=(kind, process.stdout, out / f"{kind}.log"))
        reader.start()
        running[kind] = process, reader
    for process, reader in running.values():
        process.wait()
        reader.join()
    for kind, (process, _) in running.items():
        if process.returncode:
            raise RunError(
                f"expected the training of {kind} to end well, it ended with "
                f"{process.returncode}: see {out / f'{kind}.log'}"
            )


def _follow(kind: str, output: IO[str], log: Path) -> None:
    with log.open("w", encoding="utf-8") as file:
        for line in output:
            file.write(line)
            file.flush()
            if "loss'" in line:
                entries = (entry.partition(": ") for entry in line.strip("{}\n").split(", "))
                values = {name.strip("'"): value.strip("'") for name, _, value in entries}
                shown = [name for name in ("epoch", "loss", "eval_loss") if name in values]
                logger.info("%s: %s", kind, ", ".join(f"{n} {values[n]}" for n in shown))


def draw_new_images(folder: Path, *, seed: int) -> Path:
    """Write three images of each modality that no table names; returns the folder."""
    folder.mkdir(parents=True)
    random = np.random.default_rng([seed, 99])
    for modality in MODALITIES:
        for number in range(3):
            phantom = draw_phantom(modality, random)
            image = image_of(render(phantom, random), gray=modality != "skin")
            image.save(folder / f"{modality}{number}.png")
    return folder


def check_learned(metrics: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse results that are possible without looking at the images.

    Args:
        metrics: of both models, under decoder and siglip.

    Raises:
        RunError: an interval of tuned minus control, or tuned minus base, is not above zero, or
            SigLIP's recall@1 is less than five times that of chance.
    """
    decoder, siglip = metrics["decoder"], metrics["siglip"]
    recall = "image_to_text_recall@1"
    found = {
        "finding F1, tuned minus shuffled images": decoder["differences"]["shuffled"]["finding_f1"],
        "finding F1, tuned minus base": decoder["differences"]["base"]["finding_f1"],
        "recall@1, tuned minus base": siglip["differences"]["base"][recall],
    }
    failed = [
        f"{name} {estimate['low']}"
        for name, estimate in found.items()
        if estimate["low"] is None or estimate["low"] <= 0
    ]
    tuned, chance = siglip["systems"]["tuned"][recall]["value"], siglip["chance"]["recall@1"]
    if tuned < 5 * chance:
        failed.append(f"recall@1 {tuned:.3f} against a chance of {chance:.3f}")
    if failed:
        raise RunError(
            f"expected the models to learn from the images, the lower ends of these do not show "
            f"it: {'; '.join(failed)}: see report.html"
        )
