"""Which rows are evaluated, and what the run that trained the model knew of them.

Without a file these are the run's test rows, and its validation rows only where it has none: those
have chosen among its checkpoints, so that scores on them are better than on patients to come.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset

from medft.data.chat_rows import OWN_GROUP
from medft.data.overlap import find_overlap
from medft.data.pairs import rows_by_split
from medft.data.rows import fingerprint, load_rows
from medft.errors import DataError, RunError
from medft.files import file_sha256
from medft.foreign import at_home
from medft.models.saved import RunLayout, SavedModel


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluatedRows:
    """The rows of an evaluation and where they are from."""

    path: Path
    split: str | None
    """None for the rows of a chat JSONL that was given."""

    rows: Dataset

    without_test: str | None = None
    """Why validation rows are evaluated where nobody asked for them; None where somebody did."""


def run_of(saved: SavedModel) -> RunLayout | None:
    """The run that a model is of: given by its path, or the one that its folder lies in."""
    layout = RunLayout(saved.folder.resolve().parent)
    results = (layout.adapter, layout.model, layout.best_model)
    name = saved.folder.resolve().name
    is_result = name in {path.name for path in results} or name.startswith("checkpoint-")
    return saved.run or (layout if is_result and layout.record.is_file() else None)


def rows_to_evaluate(run: RunLayout | None, data: Path | None, split: str | None) -> EvaluatedRows:
    """The rows of the given file, or the run's own: of the split, else test, else validation.

    Args:
        run: whose rows are taken without a file.
        data: chat JSONL or pairs.parquet.
        split: which rows of pairs.parquet, or of the run.

    Raises:
        RunError: neither a file nor a run is given.
        DataError: a file is missing, cannot be read, is no longer what the run saw, or has no such
            rows, or `split` is given for a chat JSONL.
    """
    if data is not None:
        return _given_rows(data, split)
    if run is None:
        raise RunError("expected --data for a model that is no run: give a file of rows")
    known = run.read_record()["data"]
    if split is not None:
        path = _file_of(known, split)
        return EvaluatedRows(path=path, split=split, rows=load_rows(path, split=split))
    path = _file_of(known, "test")
    lacks = _lacks(path, "test")
    if lacks is None:
        return EvaluatedRows(path=path, split="test", rows=load_rows(path, split="test"))
    path = _file_of(known, "validation")
    return EvaluatedRows(
        path=path,
        split="validation",
        rows=load_rows(path, split="validation"),
        without_test=lacks,
    )


def _given_rows(data: Path, split: str | None) -> EvaluatedRows:
    if data.suffix != ".parquet":
        if split is not None:
            raise DataError(
                f"expected --split with a pairs.parquet, {data} is a chat JSONL, whose rows are "
                f"all evaluated: leave --split out"
            )
        return EvaluatedRows(path=data, split=None, rows=load_rows(data, split="test"))
    lacks = None
    if split is None:
        lacks = _lacks(data, "test")
        split = "validation" if lacks else "test"
        if lacks and _lacks(data, "validation"):
            raise DataError(
                f"expected rows of split test or validation in {data}, it has neither: name "
                f"another one with --split"
            )
    rows = load_rows(data, split=split)
    return EvaluatedRows(path=data, split=split, rows=rows, without_test=lacks)


def _file_of(known: Mapping[str, Any], split: str) -> Path:
    """The file of a split of a run: the one that it recorded, else the one of its train file.

    Raises:
        DataError: a file that the run saw is missing or has changed. Rows beside such a file may be
            of another split, in which patients that it was trained on are test rows.
    """
    if known.get(split):
        return _unchanged(known, split)
    train = _unchanged(known, "train")
    if train.suffix == ".parquet":
        return train
    validation = known.get("validation") and at_home(known["validation"]["path"])
    if validation and validation.parent == train.parent and validation.exists():
        _unchanged(known, "validation")
    return train.with_name(f"{split}.jsonl")


def _unchanged(known: Mapping[str, Any], name: str) -> Path:
    path = at_home(known[name]["path"])
    problem = None if path.is_file() else "there is no such file"
    if path.is_file() and file_sha256(path) != known[name]["sha256"]:
        problem = "the file has changed"
    if problem:
        raise DataError(
            f"expected the {name} rows that the run saw in {path}, {problem}: restore it, or name "
            f"the rows to evaluate with --data"
        )
    return path


def _lacks(path: Path, split: str) -> str | None:
    """Why a file has no rows of a split; None if it has some, or is for `load_rows` to refuse."""
    if path.suffix == ".parquet":
        return None if rows_by_split(path)[split] else f"{path} has no rows of split {split}"
    if not path.exists():
        return f"there is no {path}"
    return f"{path} is empty" if path.is_file() and path.stat().st_size == 0 else None


def run_rows(run: RunLayout | None, name: str, *, other: Path | None = None) -> Dataset | None:
    """The rows that a run saw; None if it is not known, or they are not there or have changed.

    Args:
        run: whose rows.
        name: train or validation.
        other: a file that is taken as well if it has the content of the one that the run read.
    """
    known = run.read_record()["data"].get(name) if run else None
    if known is None:
        return None
    for path in (at_home(known["path"]), *([other] if other else [])):
        if path.is_file() and file_sha256(path) == known["sha256"]:
            return load_rows(path, split=name)
    return None


def rows_that_chose(run: RunLayout | None, evaluated: EvaluatedRows) -> int | None:
    """How many of the evaluated rows are validation rows of the run; None if that is not known.

    Such a row has the images and text of a validation row, or its id and group.
    """
    if run is None:
        return None
    known = run.read_record()["data"]
    if not known.get("validation"):
        return 0
    rows, path = evaluated.rows, evaluated.path
    digest = fingerprint(path, rows)["sha256"]
    is_one_split = path.suffix != ".parquet" or evaluated.split == "validation"
    if digest == known["validation"]["sha256"] and is_one_split:
        return len(rows)
    validation = run_rows(run, "validation", other=path)
    if validation is None:
        return None
    same = set(find_overlap(validation, rows).same_rows)
    of_validation = set(_grouped(validation))
    return len(same | {name for name, group in _grouped(rows) if (name, group) in of_validation})


def _grouped(rows: Dataset) -> Iterator[tuple[str, str]]:
    """Ids and groups of the rows that have a group."""
    pairs = zip(rows["id"], rows["group_id"], strict=True)
    return ((name, group) for name, group in pairs if not group.startswith(OWN_GROUP))
