"""The curves of a run."""

import math

import pytest
from matplotlib.figure import Figure
from PIL import Image

from medft.training.curves import draw_curves


def test_curves_are_a_png(tmp_path):
    history = [
        {"step": step, "loss": math.exp(-step), "learning_rate": 1.0, "grad_norm": None}
        for step in range(5)
    ] + [{"step": 4, "eval_loss": 0.3}]
    draw_curves(history, tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as image:
        assert image.size == (1200, 360)
        colors = len(image.convert("RGB").getcolors(1 << 20))
    draw_curves([], tmp_path / "empty.png")
    with Image.open(tmp_path / "empty.png") as image:
        assert len(image.convert("RGB").getcolors(1 << 20)) < colors


@pytest.fixture
def drawn(tmp_path, monkeypatch):
    """Draw a history; gives the lines of each panel, by their labels."""

    def draw(history, **options):
        figures, save = [], Figure.savefig
        monkeypatch.setattr(
            Figure, "savefig", lambda f, *a, **k: figures.append(f) or save(f, *a, **k)
        )
        draw_curves(history, tmp_path / "curves.png", **options)
        return {
            axes.get_title(): [line.get_label() for line in axes.lines] for axes in figures[0].axes
        }

    return draw


def test_panels_are_those_of_what_was_logged(drawn):
    decoder = [{"step": 1, "loss": 2.0, "perplexity": 7.4}, {"step": 2, "eval_token_accuracy": 0.5}]
    assert drawn(decoder) == {
        "loss": ["loss"],
        "perplexity": ["perplexity"],
        "token accuracy": ["eval_token_accuracy"],
    }
    siglip = [{"step": 1, "scale": 10.0, "bias": -9.0, "grad_norm": None}]
    siglip += [{"step": 2, "eval_text_to_image_recall@1": 0.5, "eval_chance_recall@1": 0.1}]
    assert drawn(siglip) == {
        "recall@1": ["eval_text_to_image_recall@1", "eval_chance_recall@1"],
        "scale": ["scale"],
        "bias": ["bias"],
    }


@pytest.mark.parametrize("best_by", ["eval_text_to_image_median_rank", "text_to_image_median_rank"])
def test_the_best_step_is_marked_at_the_loss_and_at_the_metric(drawn, best_by):
    name = "eval_text_to_image_median_rank"
    history = [{"step": 4, "eval_loss": 1.0, name: 3.0, "eval_text_to_image_recall@5": 0.4}]
    panels = drawn(history, best_by=best_by, best_step=4)
    assert panels == {
        "loss": ["eval_loss", "best: step 4"],
        "recall@5": ["eval_text_to_image_recall@5"],
        name: [name, "best: step 4"],
    }
    assert drawn(history, best_by=best_by)["loss"] == ["eval_loss"]
    recall = {"best_by": "eval_text_to_image_recall@5", "best_step": 4}
    assert drawn(history, **recall)["recall@5"][-1] == "best: step 4"
