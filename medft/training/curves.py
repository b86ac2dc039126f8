"""Training curves as a PNG."""

from pathlib import Path

from medft.files import replaced_bytes


def draw_curves(log_history: list[dict[str, float | None]], path: Path) -> None:
    """Draw loss, validation loss, learning rate and gradient norm over the steps as a PNG."""
    from matplotlib.figure import Figure

    panels = [("loss", "eval_loss"), ("learning_rate",), ("grad_norm",)]
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    for axes, names in zip(figure.subplots(1, len(panels)), panels, strict=True):
        for name in names:
            points = [(e["step"], e[name]) for e in log_history if e.get(name) is not None]
            if points:
                marker = "o" if name.startswith("eval_") or len(points) == 1 else None
                axes.plot(*zip(*points, strict=True), label=name, marker=marker)
        axes.set_title(names[0].replace("_", " "))
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        if len(axes.lines) > 1:
            axes.legend()
    with replaced_bytes(path) as file:
        figure.savefig(file, format="png", dpi=100)
