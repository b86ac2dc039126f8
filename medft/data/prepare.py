"""Raw tables and their images -> pairs.parquet, with a reason for every rejected row.

Every row that is read ends in pairs.parquet or in rejects.jsonl: accepted + rejected = rows read,
for each source. Images are decoded and hashed by worker processes; the order of the rows is that
of the tables. Output files appear only when all of them are complete.
"""

import json
import logging
import multiprocessing
import os
import shutil
import sys
import threading
from collections import Counter
from collections.abc import Generator, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, TextIO

import numpy as np
from tqdm import tqdm

from medft.data.clearing import Clearer, SearchCounts
from medft.data.group_key import group_key_of, keyed
from medft.data.pairing import Maker, Pair, Result, Task, content_hash
from medft.data.pairs import write_pairs
from medft.data.report import write_data_report
from medft.data.sources import (
    SourceSection,
    SourcesFile,
    check_columns,
    check_prompts,
    load_sources,
    source_rows,
)
from medft.data.splits import (
    OwnSplitSection,
    SplitSection,
    assign_splits,
    check_no_overlap,
    join_groups,
)
from medft.data.tables import Rejected, TableRow, takes
from medft.data.template import text_of
from medft.errors import DataError, RecipeError
from medft.files import check_folder_for_output, write_json

CHUNK = 16
"""Tasks that a worker takes at a time."""

IN_FLIGHT = 4 * CHUNK
"""Tasks per worker that may be queued, in progress or not yet consumed; bounds the memory."""

_BUFFER = 2**20


logger = logging.getLogger(__name__)


@dataclass(slots=True)
class SourceCounts:
    """Numbers of a source's rows by outcome, and of its pairs."""

    read: int = 0
    accepted: int = 0
    rejected: int = 0
    pairs: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    searches: SearchCounts = field(default_factory=SearchCounts)


@dataclass(slots=True)
class _Collected:
    """Groups, hashes and splits of all pairs, kept in memory; no images."""

    groups: list[str] = field(default_factory=list)
    hashes: list[list[str]] = field(default_factory=list)
    phashes: list[list[str]] = field(default_factory=list)
    splits: list[str] = field(default_factory=list)


def prepare(sources_path: Path, out: Path, *, max_rejects: float = 0.2) -> dict[str, Any]:
    """Write pairs.parquet, rejects.jsonl, summary.json and report.html; returns the summary.

    Args:
        sources_path: SOURCES.yaml.
        out: folder; earlier files in it are replaced once the new ones are complete.
        max_rejects: largest rejected fraction of a source's rows; `duplicate` does not count.

    Raises:
        RecipeError: SOURCES.yaml is wrong.
        DataError: a table or a column is missing, or too many rows were rejected
            (rejects.jsonl is written then).
    """
    spec = load_sources(sources_path)
    root = sources_path.parent
    if len({source.name for source in spec.sources}) < len(spec.sources):
        raise RecipeError(f"{sources_path}: expected a different name for each source")
    for source in spec.sources:
        check_prompts(spec.prompts, source)
        check_columns(source, root, spec.split)
    key = group_key_of(spec, root)
    check_folder_for_output(out, allow_content=True)
    draft = out / ".draft"
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    try:
        summary = _prepare_into(draft, spec, root, key, max_rejects, out)
        for name in ("rejects.jsonl", "summary.json", "report.html", "pairs.parquet"):
            os.replace(draft / name, out / name)
    except OSError as error:
        raise DataError(
            f"expected to read the sources and write into {out}, it failed ({error}): make room or "
            f"check the permissions, and prepare again"
        ) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return summary


def _prepare_into(
    draft: Path, spec: SourcesFile, root: Path, key: bytes | None, max_rejects: float, out: Path
) -> dict[str, Any]:
    counts = [SourceCounts() for _ in spec.sources]
    collected = _Collected()
    with (
        (draft / "rejects.jsonl").open("w", encoding="utf-8", errors="backslashreplace") as rejects,
        (draft / "thumbnails").open("wb", buffering=_BUFFER) as thumbnails,
        (draft / "records.jsonl").open("w", buffering=_BUFFER, encoding="utf-8") as records,
        closing(_results(spec, root, draft, key)) as results,
    ):
        for pair in _accepted_pairs(results, spec, key, counts, collected, rejects):
            thumbnails.write(b"".join(image.stored.thumbnail for image in pair.images))
            records.write(json.dumps(pair.record(), ensure_ascii=False) + "\n")
    try:
        _check_rejects(spec, counts, max_rejects, out / "rejects.jsonl")
    except DataError:
        os.replace(draft / "rejects.jsonl", out / "rejects.jsonl")
        raise
    pixels = np.zeros((0, 1024), np.uint8)
    if collected.groups:
        pixels = np.memmap(draft / "thumbnails", np.uint8, "r").reshape(-1, 1024)
    groups, joins = join_groups(collected.groups, collected.hashes, collected.phashes, pixels)
    splits = collected.splits
    if isinstance(spec.split, SplitSection):
        splits = assign_splits(groups, spec.split)
    withheld = {source.name for source in spec.sources if Clearer(source, key).withholds}
    check_no_overlap(keyed(groups, key or os.urandom(16)) if withheld else groups, splits)
    rows = _whole_rows(draft, keyed(groups, key) if key else groups, splits, withheld)
    write_pairs(draft / "pairs.parquet", rows, prompts=spec.prompts)
    summary = {
        "sources": {
            source.name: {
                "read": count.read,
                "accepted": count.accepted,
                "rejected": count.rejected,
                "pairs": count.pairs,
                "reasons": dict(sorted(count.reasons.items())),
                "grouped_by": source.group or "image",
                **count.searches.summary(source, is_keyed=key is not None),
            }
            for source, count in zip(spec.sources, counts, strict=True)
        },
        "pairs": len(groups),
        "groups": len(set(groups)),
        "group_ids": "keyed" if key else "clear",
        "largest_group": max(Counter(groups).values(), default=0),
        "joins": joins,
        "splits": dict(sorted(Counter(splits).items())),
    }
    write_json(draft / "summary.json", summary)
    write_data_report(
        draft / "pairs.parquet", draft / "rejects.jsonl", summary, draft / "report.html"
    )
    return summary


def _accepted_pairs(
    results: Iterator[Result],
    spec: SourcesFile,
    key: bytes | None,
    counts: list[SourceCounts],
    collected: _Collected,
    rejects: TextIO,
) -> Iterator[Pair]:
    """The accepted pairs of all sources; rejected rows are counted and written to `rejects`."""
    ids: set[str] = set()
    contents: set[str] = set()
    clearers = [Clearer(source, key) for source in spec.sources]
    for result in results:
        pair, count = result.pair, counts[result.source]
        count.searches.add(result.search)
        rejected = list(result.rejected)
        if pair is not None:
            content = content_hash(pair)
            if content in contents:
                reason = ("duplicate", "the same images, question and text came before")
            elif pair.id in ids:
                reason = ("duplicate_id", f"the id {pair.id!r} came before")
            else:
                reason = None
            if reason is not None:
                rejected += [(number, *reason) for number in result.taken]
                pair = None
        count.read += len(result.taken) + len(result.rejected)
        count.rejected += len(rejected)
        for number, reason_code, detail in rejected:
            count.reasons[reason_code] += 1
            name = spec.sources[result.source].name
            detail = clearers[result.source].detail(reason_code, detail)
            line = {"source": name, "row": number, "reason": reason_code, "detail": detail}
            rejects.write(json.dumps(line, ensure_ascii=False) + "\n")
        if pair is None:
            continue
        ids.add(pair.id)
        contents.add(content)
        count.accepted += len(result.taken)
        count.pairs += 1
        collected.groups.append(pair.group_id)
        collected.hashes.append([image.stored.sha256 for image in pair.images])
        collected.phashes.append([image.stored.phash for image in pair.images])
        collected.splits.append(pair.split)
        yield pair


def _whole_rows(
    draft: Path, groups: list[str], splits: list[str], withheld: set[str]
) -> Iterator[dict[str, Any]]:
    """The complete rows of pairs.parquet, images read back from spools or original files."""
    with ExitStack() as stack, (draft / "records.jsonl").open(encoding="utf-8") as records:
        spools: dict[str, BinaryIO] = {}

        def content_of(file: str, offset: int, length: int, modified: int | None) -> bytes:
            if modified is not None:
                source = record["source"]
                shown = f"one of source {source}" if source in withheld else file
                return _unchanged(Path(file), length, modified, shown)
            if file not in spools:
                spools[file] = stack.enter_context((draft / file).open("rb"))
            spools[file].seek(offset)
            return spools[file].read(length)

        for line, group, split in zip(records, groups, splits, strict=True):
            record = json.loads(line)
            images = [
                {"bytes": content_of(*where), "path": name} for name, *where in record["images"]
            ]
            yield {**record, "images": images, "group_id": group, "split": split}


def _unchanged(path: Path, length: int, modified: int, shown: str) -> bytes:
    """The content of an original image file; raises if it was modified since it was hashed."""
    try:
        with path.open("rb") as file:
            content = file.read()
            if len(content) == length and os.fstat(file.fileno()).st_mtime_ns == modified:
                return content
    except OSError:
        pass
    raise DataError(
        f"expected the images to stay as they are until pairs.parquet is written, {shown} was "
        f"changed meanwhile: prepare again"
    )


def _results(
    spec: SourcesFile, root: Path, draft: Path, key: bytes | None
) -> Generator[Result, None, None]:
    """The workers' results for all rows, in the order of the tasks."""
    has_affinity = hasattr(os, "sched_getaffinity")  # not on every system
    workers = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    room, stopped = threading.Semaphore(IN_FLIGHT * workers), threading.Event()

    def tasks() -> Iterator[Task]:
        for index, source in enumerate(spec.sources):
            for task in _tasks(index, source, root, spec.split):
                room.acquire()
                if stopped.is_set():
                    return
                yield task

    progress = tqdm(desc="rows", unit=" rows", disable=not sys.stderr.isatty())
    context = multiprocessing.get_context("fork")
    with context.Pool(workers, _start_worker, (spec, root, draft, key)) as pool, progress:
        try:
            for number, result in enumerate(pool.imap(_work, tasks(), chunksize=CHUNK), start=1):
                room.release()
                progress.update()
                if number % 5000 == 0 and progress.disable:
                    logger.info("%s rows", number)
                yield result
        finally:  # the pool waits for the thread that hands out tasks, which may wait for room
            stopped.set()
            room.release(IN_FLIGHT * workers)


def _tasks(
    index: int, source: SourceSection, root: Path, split: SplitSection | OwnSplitSection
) -> Iterator[Task]:
    rows = enumerate(source_rows(source, root, split), start=1)
    if source.study is None:
        for number, row in rows:
            if isinstance(row, Rejected) or takes(row, source.where):
                yield Task(index, [(number, row)])
        return
    studies: dict[str, list[tuple[int, TableRow | Rejected]]] = {}
    for number, row in rows:
        if isinstance(row, Rejected):
            yield Task(index, [(number, row)])
        elif takes(row, source.where):
            study = text_of(row.get(source.study)) or f"row {number} of no study"
            studies.setdefault(study, []).append((number, row))
    for members in studies.values():
        yield Task(index, members)


_worker: list[Maker] = []


def _start_worker(spec: SourcesFile, root: Path, draft: Path, key: bytes | None) -> None:
    spool = (draft / f"images-{os.getpid()}").open("wb")
    _worker[:] = [Maker(source, spec, root, spool, key) for source in spec.sources]


def _work(task: Task) -> Result:
    return _worker[task.source].result(task)


def _check_rejects(
    spec: SourcesFile, counts: list[SourceCounts], max_rejects: float, path: Path
) -> None:
    for source, count in zip(spec.sources, counts, strict=True):
        broken = count.rejected - count.reasons["duplicate"]
        if count.read == 0:
            raise DataError(
                f"expected rows in source {source.name}, found none: check where and the file"
            )
        if broken > max_rejects * count.read:
            common = ", ".join(f"{reason} {n}" for reason, n in count.reasons.most_common(3))
            raise DataError(
                f"expected at most {max_rejects:.0%} of the rows of source {source.name} to be "
                f"rejected, {broken} of {count.read} were ({common}): see {path}, or raise "
                f"--max-rejects"
            )
