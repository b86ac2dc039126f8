"""The processes that decode images: wide ones beforehand, then the pairs of all rows in order."""

import logging
import multiprocessing
import os
import resource
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from pathlib import Path
from typing import Any

from tqdm import tqdm

from medft.data.bit_depth import GrayScale, WideImages
from medft.data.draft_guard import without_interrupts
from medft.data.pairing import Maker, Result, Task
from medft.data.pairs import batched
from medft.data.source_section import SourceSection
from medft.data.sources import SourcesFile, source_rows
from medft.data.study_order import in_order
from medft.data.table_row import TableCounts
from medft.data.tables import Rejected, TableRow, takes
from medft.data.template import text_of
from medft.data.wide_images import NamedImage, add_wide_image, named_images
from medft.errors import RunError

CHUNK = 16
"""Tasks that a worker takes at a time."""

NAMES = 256
"""Images that a worker looks at beforehand at a time."""

PORTION_BYTES = 2**24
"""Content of images that a worker takes beforehand at a time."""

CHUNKS = 4
"""Chunks per worker that may be queued, in progress or not yet consumed; bounds the memory."""

BYTES_PER_PIXEL = 64
"""Memory that a worker may take for an image of images.max_pixels: its file, and its pixels as
RGBA, as floats and at their final size."""

SPARE_BYTES = 2**29
"""Memory that a worker may take beside."""

logger = logging.getLogger(__name__)


class Workers:
    """Worker processes for a draft; used in a with statement, they end before it does."""

    def __init__(self, spec: SourcesFile, root: Path, draft: Path, *, key: bytes | None) -> None:
        """Create the pool; its processes start with the first work.

        Args:
            spec: SOURCES.yaml.
            root: its folder.
            draft: folder for the spools of images.
            key: that group ids are hashed with.
        """
        self.spec, self.root, self.draft = spec, root, draft
        has_affinity = hasattr(os, "sched_getaffinity")  # not on every system
        self._count = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
        context = multiprocessing.get_context("fork")
        arguments = (spec, root, draft, key)
        self._pool = ProcessPoolExecutor(self._count, context, _start_worker, arguments)
        self._processes: list[multiprocessing.process.BaseProcess] = []

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *error: object) -> None:
        try:
            self._pool.shutdown(cancel_futures=True)
        except BaseException:  # interrupted once more: it would wait for them for ever
            for process in self._processes:
                process.kill()
            raise

    def wide_images(self) -> list[WideImages]:
        """What a pass over the images of each source finds about the wide ones.

        Raises:
            RunError: a worker was stopped from outside.
        """
        found = [WideImages() for _ in self.spec.sources]
        for index, source in enumerate(self.spec.sources):
            if source.kind != "dicom":
                images = named_images(source, self.root, self.spec.split)
                portions = ((index, some) for some in _portions(images))
                for part in self._in_order(_measure, portions):
                    found[index].merge(part)
        return found

    def results(
        self, scales: Sequence[GrayScale], counts: Sequence[TableCounts]
    ) -> Iterator[Result]:
        """The results for all rows, in the order of the tables.

        Args:
            scales: of the images of each source with more than 8 bits a pixel.
            counts: of each source's tables; filled meanwhile.

        Raises:
            RunError: a worker was stopped from outside.
        """
        tasks = (
            task
            for index, source in enumerate(self.spec.sources)
            for task in _tasks(index, source, self.root, self.spec, counts[index])
        )
        chunks = ((list(scales), chunk) for chunk in batched(tasks, CHUNK))
        progress = tqdm(desc="rows", unit=" rows", disable=not sys.stderr.isatty())
        number = 0
        with progress:
            for results in self._in_order(_work, chunks):
                for result in results:
                    number += 1
                    progress.update()
                    if number % 5000 == 0 and progress.disable:
                        logger.info("%s rows", number)
                    yield result

    def _in_order(
        self, work: Callable[..., Any], arguments: Iterable[tuple[Any, ...]]
    ) -> Iterator[Any]:
        """What the work returns for each, in their order; few are queued, or not yet consumed."""
        waiting: deque[Future[Any]] = deque()
        try:
            for each in arguments:
                with without_interrupts():  # the parent decides what one means
                    waiting.append(self._pool.submit(work, *each))
                self._processes = self._processes or multiprocessing.active_children()
                if len(waiting) == CHUNKS * self._count:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool as error:
            self._pool.shutdown()
            read = _read_by(self._processes, self.draft)
            raise RunError(
                f"expected the processes that decode images to run to the end, one was stopped"
                f"{read}, as for lack of memory or room on the disk: "
                f"prepare again with more, or set images.max_pixels lower"
            ) from error


def _portions(images: Iterable[NamedImage]) -> Iterator[list[NamedImage]]:
    """The images in parts of NAMES, or of PORTION_BYTES where their content is given."""
    portion: list[NamedImage] = []
    size = 0
    for number, image in images:
        portion.append((number, image))
        size += len(image) if isinstance(image, bytes) else 0
        if len(portion) == NAMES or size > PORTION_BYTES:
            yield portion
            portion, size = [], 0
    if portion:
        yield portion


def _read_by(processes: Iterable[multiprocessing.process.BaseProcess], draft: Path) -> str:
    """What the process that was stopped first was reading; the pool then terminates the others."""
    for process in processes:
        if process.exitcode not in (None, 0, -signal.SIGTERM):
            with suppress(OSError):
                place = (draft / f"reading-{process.pid}").read_text(encoding="utf-8").strip()
                return f" while it read {place}" if place else ""
    return ""


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


class _Worker:
    """What a worker process holds."""

    makers: list[Maker]
    reading: int
    """Descriptor of the file that says which row it reads."""


def _start_worker(spec: SourcesFile, root: Path, draft: Path, key: bytes | None) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _limit_memory(BYTES_PER_PIXEL * spec.images.max_pixels + SPARE_BYTES)
    spool = (draft / f"images-{os.getpid()}").open("wb")
    _Worker.makers = [Maker(source, spec, root, spool, key) for source in spec.sources]
    flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC
    _Worker.reading = os.open(draft / f"reading-{os.getpid()}", flags, 0o600)


def _limit_memory(further: int) -> None:
    """Let this process take so many bytes more; beyond them it gets a MemoryError."""
    status = Path("/proc/self/statm")
    if status.exists():  # of Linux
        taken = int(status.read_text().split()[5]) * resource.getpagesize()
        _, most = resource.getrlimit(resource.RLIMIT_DATA)
        allowed = taken + further
        if most != resource.RLIM_INFINITY:
            allowed = min(allowed, most)
        resource.setrlimit(resource.RLIMIT_DATA, (allowed, most))


def _end_with_parent() -> None:
    """End this process once its parent is gone, whose lock on the folder it would keep."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGKILL)


def _note(source: int, first: int, last: int) -> None:
    """Write which rows are read now, where it is found if this process is killed."""
    rows = f"row {first}" if first == last else f"rows {first} to {last}"
    place = f"{rows} of source {_Worker.makers[source].source.name}"
    os.pwrite(_Worker.reading, place.encode().ljust(500)[:500], 0)


def _measure(source: int, images: list[NamedImage]) -> WideImages:
    reader = _Worker.makers[source].images
    found = WideImages()
    for number, image in images:
        _note(source, number, number)
        add_wide_image(found, image, reader.folder, max_pixels=reader.limits.max_pixels)
    return found


def _work(scales: list[GrayScale], tasks: list[Task]) -> list[Result]:
    results = []
    for task in tasks:
        _note(task.source, task.rows[0][0], task.rows[-1][0])
        maker = _Worker.makers[task.source]
        maker.images.scale = scales[task.source]
        results.append(maker.result(task))
    return results
