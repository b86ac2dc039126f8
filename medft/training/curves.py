"""Training curves as a PNG."""

import math
from pathlib import Path
from typing import Any

from medft.files import replaced_bytes
from medft.metrics.retrieval import RECALLS, WAYS

_PANELS = {
    "loss": ("loss", "eval_loss"),
    "perplexity": ("perplexity", "eval_perplexity"),
    "token accuracy": ("mean_token_accuracy", "eval_token_accuracy"),
    **{
        f"recall@{k}": tuple(f"eval_{way}_recall@{k}" for way in (*WAYS, "chance")) for k in RECALLS
    },
    "scale": ("scale",),
    "bias": ("bias",),
    "learning rate": ("learning_rate",),
    "gradient norm": ("grad_norm",),
}
"""Entries of the log history that share a panel, by its title; one without any is left out."""

_COLUMNS = 3


def draw_curves(
    log_history: list[dict[str, float | None]],
    path: Path,
    *,
    best_by: str = "eval_loss",
    best_step: int | None = None,
) -> None:
    """Draw what a training logged over its steps as a PNG.

    Args:
        log_history: Trainer's.
        path: of the file.
        best_by: the metric that chooses best_model/, with or without "eval_"; it has a panel.
        best_step: of the best evaluation, which is marked in the panels of the loss and of the
            metric; None if there was none.
    """
    from matplotlib.figure import Figure

    best_by = f"eval_{best_by.removeprefix('eval_')}"
    logged = {name for entry in log_history for name, value in entry.items() if value is not None}
    has_panel = any(best_by in names for names in _PANELS.values())
    panels = _PANELS if has_panel else {**_PANELS, best_by: (best_by,)}
    drawn = {title: names for title, names in panels.items() if logged.intersection(names)}
    rows = max(math.ceil(len(drawn) / _COLUMNS), 1)
    figure = Figure(figsize=(4 * _COLUMNS, 3.6 * rows), layout="constrained")
    grid = figure.subplots(rows, _COLUMNS, squeeze=False).flatten()
    for axes in grid[len(drawn) :]:
        axes.remove()
    for axes, (title, names) in zip(grid, drawn.items(), strict=False):
        _draw_panel(axes, log_history, names)
        axes.set_title(title)
        if best_step is not None and ("eval_loss" in names or best_by in names):
            axes.axvline(best_step, color="black", ls=":", label=f"best: step {best_step}")
        if len(axes.lines) > 1:
            axes.legend(fontsize="small")
    with replaced_bytes(path) as file:
        figure.savefig(file, format="png", dpi=100)


def _draw_panel(
    axes: Any, log_history: list[dict[str, float | None]], names: tuple[str, ...]
) -> None:
    """Draw the entries of some names over the steps."""
    for name in names:
        points = [(e["step"], e[name]) for e in log_history if e.get(name) is not None]
        if points:
            marker = "o" if name.startswith("eval_") or len(points) == 1 else None
            axes.plot(*zip(*points, strict=True), label=name, marker=marker, markersize=4)
    axes.set_xlabel("step")
    axes.grid(alpha=0.3)
