"""The pairs of all rows, made by worker processes, in the order of the tables."""

import logging
import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from tqdm import tqdm

from medft.data.pairing import Maker, Result, Task
from medft.data.pairs import batched
from medft.data.source_section import SourceSection
from medft.data.sources import SourcesFile, source_rows
from medft.data.study_order import in_order
from medft.data.table_row import TableCounts
from medft.data.tables import Rejected, TableRow, takes
from medft.data.template import text_of
from medft.errors import RunError

CHUNK = 16
"""Tasks that a worker takes at a time."""

CHUNKS = 4
"""Chunks per worker that may be queued, in progress or not yet consumed; bounds the memory."""

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

    Raises:
        RunError: a worker was stopped from outside.
    """
    has_affinity = hasattr(os, "sched_getaffinity")  # not on every system
    workers = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    tasks = (
        task
        for index, source in enumerate(spec.sources)
        for task in _tasks(index, source, root, spec, counts[index])
    )
    progress = tqdm(desc="rows", unit=" rows", disable=not sys.stderr.isatty())
    context = multiprocessing.get_context("fork")
    pool = ProcessPoolExecutor(workers, context, _start_worker, (spec, root, draft, key))
    with progress:
        try:
            for number, result in enumerate(_in_order(pool, tasks, CHUNKS * workers), start=1):
                progress.update()
                if number % 5000 == 0 and progress.disable:
                    logger.info("%s rows", number)
                yield result
        except BrokenProcessPool as error:
            raise RunError(
                "expected the processes that decode images to run to the end, one was stopped, as "
                "for lack of memory or room on the disk: prepare again with more, or set "
                "images.max_pixels lower"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)  # no worker may outlive the draft that it writes


def _in_order(pool: Executor, tasks: Iterable[Task], ahead: int) -> Iterator[Result]:
    """The results of tasks in their order, at most `ahead` chunks of them not yet consumed."""
    waiting: deque[Future[list[Result]]] = deque()
    for chunk in batched(tasks, CHUNK):
        waiting.append(pool.submit(_work, chunk))
        if len(waiting) == ahead:
            yield from waiting.popleft().result()
    while waiting:
        yield from waiting.popleft().result()


def _tasks(
    index: int, source: SourceSection, root: Path, spec: SourcesFile, counts: TableCounts
) -> Iterator[Task]:
    found = source_rows(source, root, spec.split, counts, max_pixels=spec.images.max_pixels)
    rows = enumerate(found, start=1)
    if source.study is None:
        for number, row in rows:
            if isinstance(row, Rejected) or takes(row, source.where):
                yield Task(index, [(number, row)])
        return
    studies: dict[str, list[tuple[int, TableRow]]] = {}
    for number, row in rows:
        if isinstance(row, Rejected):
            yield Task(index, [(number, row)])
        elif takes(row, source.where):
            study = text_of(row.get(source.study)) or f"row {number} of no study"
            studies.setdefault(study, []).append((number, row))
    for members in studies.values():
        yield Task(index, list(in_order(members, source.order_columns)))


_worker: list[Maker] = []


def _start_worker(spec: SourcesFile, root: Path, draft: Path, key: bytes | None) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    spool = (draft / f"images-{os.getpid()}").open("wb")
    _worker[:] = [Maker(source, spec, root, spool, key) for source in spec.sources]


def _end_with_parent() -> None:
    """End this process once its parent is gone, whose lock on the folder it would keep."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGKILL)


def _work(tasks: list[Task]) -> list[Result]:
    return [_worker[task.source].result(task) for task in tasks]
