"""The pairs of all rows, made by worker processes, in the order of the tables."""

import logging
import multiprocessing
import os
import sys
import threading
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path

from tqdm import tqdm

from medft.data.pairing import Maker, Result, Task
from medft.data.source_section import SourceSection
from medft.data.sources import SourcesFile, source_rows
from medft.data.splits import OwnSplitSection, SplitSection
from medft.data.table_row import TableCounts
from medft.data.tables import Rejected, TableRow, takes
from medft.data.template import text_of

CHUNK = 16
"""Tasks that a worker takes at a time."""

IN_FLIGHT = 4 * CHUNK
"""Tasks per worker that may be queued, in progress or not yet consumed; bounds the memory."""

logger = logging.getLogger(__name__)


def results_of(
    spec: SourcesFile,
    root: Path,
    draft: Path,
    *,
    key: bytes | None,
    counts: Sequence[TableCounts],
) -> Generator[Result, None, None]:
    """The results for all rows; close the generator to end the workers.

    Args:
        spec: SOURCES.yaml.
        root: its folder.
        draft: folder for the spools of images.
        key: that group ids are hashed with.
        counts: of each source's tables; filled meanwhile.
    """
    has_affinity = hasattr(os, "sched_getaffinity")  # not on every system
    workers = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    room, stopped = threading.Semaphore(IN_FLIGHT * workers), threading.Event()

    def tasks() -> Iterator[Task]:
        for index, source in enumerate(spec.sources):
            for task in _tasks(index, source, root, spec.split, counts[index]):
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
    index: int,
    source: SourceSection,
    root: Path,
    split: SplitSection | OwnSplitSection,
    counts: TableCounts,
) -> Iterator[Task]:
    rows = enumerate(source_rows(source, root, split, counts), start=1)
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
