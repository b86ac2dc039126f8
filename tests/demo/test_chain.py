"""The demo end to end, by its command; and its check fails where images tell nothing."""

import json
import os
import random
import subprocess
import sys

import pytest

from medft.demo.chain import check_learned, run_demo, train_both
from medft.errors import RunError
from medft.evaluation.evaluate import evaluate

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def demo(cache, tmp_path_factory):
    """The folder of a demo and what its command printed."""
    out = tmp_path_factory.mktemp("runs") / "demo"
    command = [sys.executable, "-m", "medft.cli", "demo", "--out", str(out)]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        cwd=out.parent,
        env={**os.environ, "MEDFT_CACHE": str(cache)},
    )
    assert done.returncode == 0, done.stderr
    return out, done.stdout


def test_the_demo_learns_and_ends_with_the_path_of_its_page(demo):
    out, printed = demo
    assert printed.splitlines()[-1] == str(out / "report.html")
    page = (out / "report.html").read_text()
    assert page.count('class="case"') == 24
    assert page.count("data:image/jpeg") >= 24 + 16 + 12
    assert page.count("data:image/png") == 2  # curves
    assert "http" not in page
    for kind in ("decoder", "siglip"):
        metrics = json.loads((out / "evaluation" / kind / "metrics.json").read_text())
        assert metrics["groups"] < metrics["rows"]
        assert (out / f"{kind}_merged" / "model.safetensors").is_file()
        assert (out / f"{kind}.log").read_text()
    predictions = (out / "predictions.jsonl").read_text().splitlines()
    assert len(predictions) == 12


@pytest.mark.proof
def test_images_that_belong_to_other_texts_make_the_check_fail(demo, tmp_path):
    out, _ = demo
    chat = tmp_path / "chat"
    chat.mkdir()
    rows = [json.loads(line) for line in (out / "data/chat/train.jsonl").read_text().splitlines()]
    by_count = {}
    for row in rows:
        by_count.setdefault(len(row["images"]), []).append(row["images"])
    for images in by_count.values():
        random.Random(3).shuffle(images)
    for row in rows:
        row["images"] = [
            str(out / "data" / "chat" / name) for name in by_count[len(row["images"])].pop()
        ]
    (chat / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    validation = (out / "data/chat/validation.jsonl").read_text()
    (chat / "validation.jsonl").write_text(
        validation.replace('"images/', f'"{out}/data/chat/images/')
    )
    train_both(out / "models", chat, tmp_path, ["train.max_steps=150"])
    metrics = {
        kind: evaluate(
            tmp_path / kind,
            tmp_path / "evaluation" / kind,
            data=None,
            split="validation",
            against_base=True,
        )
        for kind in ("decoder", "siglip")
    }
    with pytest.raises(RunError, match="tuned minus shuffled images") as refused:
        check_learned(metrics)
    assert "recall@1" in str(refused.value)
    known = {
        kind: json.loads((out / "evaluation" / kind / "metrics.json").read_text())
        for kind in ("decoder", "siglip")
    }
    check_learned(known)


def test_a_folder_of_somebody_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years")
    with pytest.raises(RunError, match="to be empty"):
        run_demo(tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "years"
