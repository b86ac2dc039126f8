"""Where two runs of one recipe differ: adapter or model, log history, final metrics."""

import math
import re
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from medft.errors import RunError
from medft.foreign import read_json
from medft.models.run_record import parts_of, read_log_history, resumed_steps
from medft.models.saved import RECORD_FILE, RunLayout

_MEASURES = re.compile(r".*(_runtime|_per_second|_wait)|peak_memory_gib")
"""Entries of log and metrics that measure time or memory, which are not compared."""

_SINCE_START = ("train_loss", "num_tokens")
"""Entries that the libraries count from where a process began."""

_MEANS = ("loss", "perplexity", "entropy", "mean_token_accuracy")
"""Entries that are means since the entry before, or since the process began."""

_OF_EVALUATIONS = re.compile(
    r"train\.(eval_.*|per_device_eval_batch_size|max_steps|num_train_epochs)"
)
"""Recipe keys that decide at which steps a run evaluates, or in which batches."""

Difference = dict[str, Any]
"""What differs, with the values then and now."""


def compare_runs(then: RunLayout, now: RunLayout) -> list[Difference]:
    """Everything in which a run differs from the one that it repeats, a difference an entry.

    Of the log history it holds the entries of the first step that differs. Where the first run went
    on with other evaluations, they are left out, and the best model that they chose.

    Raises:
        RunError: a result is missing or cannot be read.
    """
    record, again = then.read_record(), now.read_record()
    differences = []
    for folder in then.results:
        differences += compare_weights(folder.name, folder, now.directory / folder.name)
    same_evaluations = not _changed_evaluations(record)
    if same_evaluations and then.best_model.is_dir() and now.best_model.is_dir():
        differences += compare_weights("best_model", then.best_model, now.best_model)
    resumed_at = resumed_steps(record)
    first, second = (
        [entry for entry in read_log_history(run) if same_evaluations or "eval_loss" not in entry]
        for run in (then.history, now.history)
    )
    differences += compare_histories(first, second, resumed_at)
    for part in ("base", "data", "init_from", "batch", "metrics"):
        # the last training loss stands in the history, which knows where it was resumed
        left_out = ["loss"] if part == "metrics" and resumed_at else []
        differences += _compared(part, record.get(part) or {}, again.get(part) or {}, left_out)
    if same_evaluations and record.get("best_metric") != again.get("best_metric"):
        both = record.get("best_metric"), again.get("best_metric")
        differences.append(_difference("best_metric", *both))
    return differences


def _changed_evaluations(record: dict[str, Any]) -> bool:
    """Whether a run went on with other evaluations than it began with, as where it got longer."""
    changed = [part.get("changed", {}) for part in parts_of(record) if part["from_step"]]
    return any(_OF_EVALUATIONS.fullmatch(key) for keys in changed for key in keys)


def first_different_step(differences: list[Difference]) -> int | None:
    """The step of the first entry of the log history that differs."""
    return next((entry["step"] for entry in differences if "step" in entry), None)


def compare_weights(name: str, then: Path, now: Path) -> list[Difference]:
    """The difference of two folders of weights, in a list; empty if they are equal bit for bit.

    Args:
        name: what they are.
        then: folder.
        now: folder.

    Raises:
        RunError: a file cannot be read.
    """
    with ExitStack() as stack:
        try:
            first, second = (_Weights(folder, stack) for folder in (then, now))
            names = sorted(first.names | second.names)
            other = [key for key in names if not _is_equal(first.get(key), second.get(key))]
            largest = _max_difference(first, second, other)
        except Exception as error:  # damaged files make the library raise any exception
            raise RunError(
                f"expected weights that can be read in {then} and {now}, they cannot be "
                f"({str(error).splitlines()[0]}): restore them"
            ) from error
    if not other:
        return []
    found = {"what": name, "tensors": len(other), "of": len(names), "first": other[0]}
    return [{**found, "max_difference": largest}]


class _Weights:
    """The tensors of a folder, read one by one, with SigLIP's scale and bias from medft.json."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self._files: dict[str, Any] = {}
        for path in sorted(folder.glob("*.safetensors")):
            file = stack.enter_context(safe_open(path, framework="pt"))
            self._files |= dict.fromkeys(file.keys(), file)
        record = read_json(folder / RECORD_FILE) if (folder / RECORD_FILE).is_file() else {}
        scalars = {name: record.get(name) for name in ("logit_scale", "logit_bias")}
        self._scalars = {name: value for name, value in scalars.items() if value is not None}
        self.names = self._files.keys() | self._scalars.keys()

    def get(self, name: str) -> torch.Tensor | None:
        """The tensor of this name; None if there is none."""
        if name in self._scalars:
            return torch.tensor(self._scalars[name], dtype=torch.float64)
        return self._files[name].get_tensor(name) if name in self._files else None


def _is_equal(first: torch.Tensor | None, second: torch.Tensor | None) -> bool:
    """Whether two tensors are equal bit for bit, NaN and the sign of zero included."""
    if first is None or second is None or first.dtype != second.dtype:
        return False
    if first.shape != second.shape:
        return False
    return torch.equal(*(tensor.reshape(-1).view(torch.uint8) for tensor in (first, second)))


def _max_difference(first: _Weights, second: _Weights, names: list[str]) -> float | None:
    """The largest difference of two weights of one place; None if it is not finite."""
    largest = [0.0]
    for name in names:
        was, is_now = first.get(name), second.get(name)
        if was is None or is_now is None or was.shape != is_now.shape:
            return None
        largest.append(float((was.double() - is_now.double()).abs().max()))
    return max(largest) if all(map(math.isfinite, largest)) else None


def compare_histories(
    then: list[dict[str, Any]], now: list[dict[str, Any]], resumed_at: list[int]
) -> list[Difference]:
    """The entries of the first step at which two log histories differ.

    Args:
        then: log_history.json.
        now: log_history.json.
        resumed_at: steps from which the first run went on after a stop. What counts from the begin
            of a process is not compared, nor a mean over other steps, as after such a step or
            where the interval of the log was changed there.
    """
    first, second = _by_step(then), _by_step(now)
    for step in sorted(first.keys() | second.keys()):
        was, is_now = first.get(step, {}), second.get(step, {})
        if resumed_at and ("loss" in was) != ("loss" in is_now):
            was, is_now = map(_evaluated, (was, is_now))
        left_out = [*_SINCE_START] if resumed_at else []
        if _counted_since(step, first, resumed_at) != _counted_since(step, second, []):
            left_out += _MEANS
        if found := _compared("log_history", was, is_now, left_out):
            return [{"step": step, **entry} for entry in found]
    return []


def _evaluated(entry: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in entry.items() if name.startswith("eval_")}


def _counted_since(step: int, history: dict[int, dict[str, Any]], resumed_at: list[int]) -> int:
    """The step after which the means of an entry count, of a log or where its process began."""
    logged = [known for known, entry in history.items() if "loss" in entry]
    return max((start for start in [*logged, *resumed_at] if start < step), default=0)


def _by_step(history: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """The entries of each step as one, in the order of the steps."""
    steps: dict[int, dict[str, Any]] = {}
    for entry in history:
        steps.setdefault(int(entry["step"]), {}).update(entry)
    return steps


def _compared(
    what: str, then: dict[str, Any], now: dict[str, Any], left_out: Sequence[str] = ()
) -> list[Difference]:
    return [
        _difference(f"{what}.{name}", then.get(name), now.get(name))
        for name in {**then, **now}
        if name not in left_out
        and not _MEASURES.fullmatch(name)
        and then.get(name) != now.get(name)
    ]


def _difference(what: str, then: Any, now: Any) -> Difference:
    return {"what": what, "then": then, "now": now}
