"""The curves of a run."""

import math

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
