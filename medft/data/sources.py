"""Raw tables and their pictures -> pairs.parquet, with a reason for every row that did not make it.

SOURCES.yaml says where the tables lie and what their columns mean. Every row that is read ends in
pairs.parquet or in rejects.jsonl: accepted + rejected = rows read, for each source. Pictures are
decoded and hashed by worker processes; the order of the rows is that of the tables. What is
written appears when all of it is whole.
"""

import hashlib
import json
import logging
import multiprocessing
import os
import shutil
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal, Self

import numpy as np
from pydantic import Field, model_validator
from tqdm import tqdm

from medft.data.dicom import dicom_rows, open_dicom
from medft.data.images import MAX_PIXELS
from medft.data.pairs import StoredImage, store_image, store_picture, write_pairs
from medft.data.report import write_data_report
from medft.data.splits import (
    OwnSplitSection,
    SplitSection,
    assign_splits,
    check_no_overlap,
    join_groups,
)
from medft.data.tables import Rejected, Row, first_row, table_rows, takes
from medft.data.template import fill_template, template_names, text_of
from medft.errors import DataError, RecipeError
from medft.files import check_folder_for_output, write_json
from medft.strict_yaml import Section, StrictYaml, errors_of, nearest

DEFAULT_PROMPTS = ["Describe this medical image."]

IN_FLIGHT = 256
"""Rows that may wait for a worker or for the file at the same time; bounds the memory."""

_BUFFER = 2**20

logger = logging.getLogger(__name__)


class SourceSection(Section):
    """One table and what its columns mean."""

    name: str
    """Of the source, in reports."""

    kind: Literal["csv", "json", "jsonl", "parquet", "imagefolder", "dicom"]
    """csv: with a header line; json: a list of objects; jsonl: one object a line; imagefolder: a
    folder with metadata.csv or .jsonl; dicom: a folder of .dcm files."""

    path: str
    """The table or folder, relative to SOURCES.yaml."""

    table: str | None = None
    """dicom: the csv with reports; without it NAME.txt beside NAME.dcm is column `text`."""

    join: dict[Literal["tag", "column"], str] | None = None
    """dicom: which tag equals which column of the table."""

    where: dict[str, Any] | None = None
    """Column or DICOM tag: value or list of values; rows to take."""

    frames: Literal["middle", "every"] = "middle"
    """dicom: which frame of a multi-frame file."""

    images: str | None = None
    """Root of the image paths, relative to SOURCES.yaml; default: its folder, or `path` of an
    imagefolder."""

    image: str | Annotated[list[str], Field(min_length=1)] | None = None
    """Columns with the path (or, in Parquet, the bytes) of an image; several: one row has several
    images. imagefolder: file_name by default."""

    study: str | None = None
    """Column; rows with the same value become one pair with several images."""

    text: str
    """A column, or a template such as "{findings} {impression}"."""

    question: str | None = None
    """A column or a template; then text is the answer."""

    keep: list[str] = Field([])
    """Columns carried into `fields`."""

    group: str | None = None
    """Column; rows of one group never land in different splits."""

    id: str | None = None
    """Column; default: a hash of the content."""

    license: str | dict[Literal["column"], str] | None = None
    """A constant, or {column: NAME}."""

    @model_validator(mode="after")
    def _has_what_its_kind_needs(self) -> Self:
        if self.kind == "dicom":
            if self.image is not None:
                raise ValueError("no key image for dicom, where the files are the images")
            if (self.table is None) != (self.join is None):
                raise ValueError("table and join together, or neither")
            if self.join is not None and set(self.join) != {"tag", "column"}:
                raise ValueError("join with tag and column")
        elif self.image is None and self.kind != "imagefolder":
            raise ValueError("a key image that names the column with the image")
        if self.kind != "dicom" and (self.table or self.join):
            raise ValueError("table and join with kind dicom only")
        return self

    @property
    def image_columns(self) -> list[str]:
        """The columns that name images."""
        if self.image is None:
            return ["path"] if self.kind == "dicom" else ["file_name"]
        return [self.image] if isinstance(self.image, str) else self.image

    @property
    def columns(self) -> list[str]:
        """Every column that the source reads, images aside."""
        names = [*columns_of(self.text), *self.keep, *(self.where or {})]
        names += columns_of(self.question) if self.question else []
        names += [name for name in (self.study, self.group, self.id) if name]
        names += [self.license["column"]] if isinstance(self.license, dict) else []
        return list(dict.fromkeys(names))


class ImagesSection(Section):
    """What pictures may be like."""

    max_pixels: int = Field(MAX_PIXELS, ge=1)
    """Width times height; larger pictures are rejected before they are decoded."""

    max_side: int | None = Field(None, ge=1)
    """Pixels; larger pictures are shrunk, antialiased."""


class SourcesFile(Section):
    """SOURCES.yaml."""

    sources: list[SourceSection] = Field(min_length=1)
    prompts: list[str] = Field(DEFAULT_PROMPTS, min_length=1)
    """Templates over `fields` for rows without question; a row's id chooses."""

    images: ImagesSection = ImagesSection()
    split: SplitSection | OwnSplitSection = SplitSection()
    """Shares of the accepted rows, or the column of the tables' own split."""


def load_sources(path: Path) -> SourcesFile:
    """The content of SOURCES.yaml.

    Raises:
        RecipeError: it cannot be read, or anything in it is wrong.
    """
    source = StrictYaml.read(path)
    errors = errors_of(lambda: SourcesFile.model_validate(source.raw))
    problems = source.describe(errors, _explain)
    if problems:
        raise RecipeError(*problems)
    return SourcesFile.model_validate(source.raw)


def _explain(error: dict[str, Any]) -> str | None:
    if error["type"] != "extra_forbidden":
        return None
    *inner, key = error["loc"]
    splits = {**SplitSection.model_fields, **OwnSplitSection.model_fields}
    known = {
        "sources": SourceSection.model_fields,
        "images": ImagesSection.model_fields,
        "split": splits,
    }
    names = known[inner[0]] if inner else SourcesFile.model_fields
    place = ".".join(str(part) for part in error["loc"] if not str(part).endswith("Section"))
    return f"unknown key {place}: {nearest(str(key), names)}"


@dataclass(slots=True)
class SourceCounts:
    """What became of the rows of a source."""

    read: int = 0
    accepted: int = 0
    rejected: int = 0
    pairs: int = 0
    reasons: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True, kw_only=True, slots=True)
class SpooledImage:
    """A picture whose bytes wait in a worker's file until the row is written."""

    file: str
    """Name of the worker's file in the draft folder."""

    offset: int
    length: int
    name: str | None
    width: int
    height: int
    sha256: str
    phash: str
    thumbnail: bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """A row that is taken, its pictures in the spool."""

    id: str
    images: list[SpooledImage]
    text: str
    question: str | None
    fields: dict[str, str]
    source: str
    group_id: str
    license: str | None
    split: str
    """As the table has it; empty where medft splits."""

    def record(self) -> dict[str, Any]:
        """The columns of pairs.parquet but for split, with places instead of pictures."""
        return {
            "id": self.id,
            "images": [
                [image.file, image.offset, image.length, image.name] for image in self.images
            ],
            "width": [image.width for image in self.images],
            "height": [image.height for image in self.images],
            "sha256": [image.sha256 for image in self.images],
            "phash": [image.phash for image in self.images],
            "text": self.text,
            "question": self.question,
            "fields": json.dumps(self.fields, sort_keys=True, ensure_ascii=False),
            "source": self.source,
            "group_id": self.group_id,
            "license": self.license,
        }


@dataclass(frozen=True, slots=True)
class _Task:
    """Rows that become one pair: one row, or those of a study."""

    source: int
    rows: list[tuple[int, Row | Rejected]]


@dataclass(frozen=True, slots=True)
class _Result:
    """A pair, or none, and the rows that did not make it into it."""

    source: int
    pair: Pair | None
    taken: list[int]
    rejected: list[tuple[int, str, str]]


@dataclass(slots=True)
class _Collected:
    """What of all pairs is kept in memory: names and hashes, no pictures."""

    ids: list[str] = field(default_factory=list)
    groups: list[str] = field(default_factory=list)
    hashes: list[list[str]] = field(default_factory=list)
    phashes: list[list[str]] = field(default_factory=list)
    splits: list[str] = field(default_factory=list)


def prepare(sources_path: Path, out: Path, *, max_rejects: float = 0.2) -> dict[str, Any]:
    """Write pairs.parquet, rejects.jsonl, summary.json and report.html; returns the summary.

    Args:
        sources_path: SOURCES.yaml.
        out: folder; earlier files in it are replaced once the new ones are whole.
        max_rejects: share of a source's rows that may be rejected; duplicates do not count.

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
    check_folder_for_output(out, allow_content=True)
    draft = out / ".draft"
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    try:
        summary = _prepare_into(draft, spec, root, max_rejects, out)
        for name in ("rejects.jsonl", "summary.json", "report.html", "pairs.parquet"):
            os.replace(draft / name, out / name)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return summary


def _prepare_into(
    draft: Path, spec: SourcesFile, root: Path, max_rejects: float, out: Path
) -> dict[str, Any]:
    counts = [SourceCounts() for _ in spec.sources]
    collected = _Collected()
    with (
        (draft / "rejects.jsonl").open("w", encoding="utf-8") as rejects,
        (draft / "thumbnails").open("wb", buffering=_BUFFER) as thumbnails,
        (draft / "records.jsonl").open("w", buffering=_BUFFER, encoding="utf-8") as records,
    ):
        for pair in _accepted_pairs(spec, root, draft, counts, collected, rejects):
            thumbnails.write(b"".join(image.thumbnail for image in pair.images))
            records.write(json.dumps(pair.record(), ensure_ascii=False) + "\n")
    try:
        _check_rejects(spec, counts, max_rejects, out / "rejects.jsonl")
    except DataError:
        os.replace(draft / "rejects.jsonl", out / "rejects.jsonl")
        raise
    pixels = np.zeros((0, 1024), np.uint8)
    if collected.ids:
        pixels = np.memmap(draft / "thumbnails", np.uint8, "r").reshape(-1, 1024)
    groups, joins = join_groups(collected.groups, collected.hashes, collected.phashes, pixels)
    splits = collected.splits
    if isinstance(spec.split, SplitSection):
        splits = assign_splits(groups, spec.split)
    check_no_overlap(groups, splits)
    rows = _whole_rows(draft, groups, splits)
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
            }
            for source, count in zip(spec.sources, counts, strict=True)
        },
        "pairs": len(groups),
        "groups": len(set(groups)),
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
    spec: SourcesFile,
    root: Path,
    draft: Path,
    counts: list[SourceCounts],
    collected: _Collected,
    rejects: Any,
) -> Iterator[Pair]:
    """The pairs of all sources; what is rejected is written, counted and passed over."""
    ids: set[str] = set()
    contents: set[str] = set()
    for result in _results(spec, root, draft):
        pair, count = result.pair, counts[result.source]
        rejected = list(result.rejected)
        if pair is not None:
            content = _content_hash(pair)
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
            line = {"source": name, "row": number, "reason": reason_code, "detail": detail}
            rejects.write(json.dumps(line, ensure_ascii=False) + "\n")
        if pair is None:
            continue
        ids.add(pair.id)
        contents.add(content)
        count.accepted += len(result.taken)
        count.pairs += 1
        collected.ids.append(pair.id)
        collected.groups.append(pair.group_id)
        collected.hashes.append([image.sha256 for image in pair.images])
        collected.phashes.append([image.phash for image in pair.images])
        collected.splits.append(pair.split)
        yield pair


def _whole_rows(draft: Path, groups: list[str], splits: list[str]) -> Iterator[dict[str, Any]]:
    """The rows of pairs.parquet, their pictures read back from the workers' files."""
    with ExitStack() as stack, (draft / "records.jsonl").open(encoding="utf-8") as records:
        files: dict[str, BinaryIO] = {}

        def picture(name: str, offset: int, length: int) -> bytes:
            if name not in files:
                files[name] = stack.enter_context((draft / name).open("rb"))
            files[name].seek(offset)
            return files[name].read(length)

        for line, group, split in zip(records, groups, splits, strict=True):
            record = json.loads(line)
            images = [
                {"bytes": picture(file, offset, length), "path": name}
                for file, offset, length, name in record["images"]
            ]
            yield {**record, "images": images, "group_id": group, "split": split}


def _results(spec: SourcesFile, root: Path, draft: Path) -> Iterator[_Result]:
    """What the workers made of all rows, in the order of the rows."""
    room = threading.Semaphore(IN_FLIGHT)

    def tasks() -> Iterator[_Task]:
        for index, source in enumerate(spec.sources):
            for task in _tasks(index, source, root):
                room.acquire()
                yield task

    workers = len(os.sched_getaffinity(0))
    progress = tqdm(desc="rows", unit=" rows", disable=not sys.stderr.isatty())
    context = multiprocessing.get_context("fork")
    with context.Pool(workers, _start_worker, (spec, root, draft)) as pool, progress:
        for number, result in enumerate(pool.imap(_work, tasks(), chunksize=8), start=1):
            room.release()
            progress.update()
            if number % 5000 == 0 and progress.disable:
                logger.info("%s rows", number)
            yield result


def _tasks(index: int, source: SourceSection, root: Path) -> Iterator[_Task]:
    rows = enumerate(source_rows(source, root), start=1)
    if source.study is None:
        for number, row in rows:
            if isinstance(row, Rejected) or takes(row, source.where):
                yield _Task(index, [(number, row)])
        return
    studies: dict[str, list[tuple[int, Row | Rejected]]] = {}
    for number, row in rows:
        if isinstance(row, Rejected):
            yield _Task(index, [(number, row)])
        elif takes(row, source.where):
            study = text_of(row.get(source.study)) or f"row {number} of no study"
            studies.setdefault(study, []).append((number, row))
    for study in studies.values():
        yield _Task(index, study)


def source_rows(source: SourceSection, root: Path) -> Iterator[Row | Rejected]:
    """The rows of a source, before `where`.

    Raises:
        DataError: the table cannot be read.
    """
    if source.kind != "dicom":
        return table_rows(source.kind, root / source.path)
    return dicom_rows(
        root / source.path,
        table=root / source.table if source.table else None,
        join=source.join,
        where=source.where,
        tags=[name for name in source.columns if name != "text"],
    )


_worker: list["_Maker"] = []


def _start_worker(spec: SourcesFile, root: Path, draft: Path) -> None:
    spool = (draft / f"images-{os.getpid()}").open("wb")
    _worker[:] = [_Maker(source, spec, root, spool) for source in spec.sources]


def _work(task: _Task) -> _Result:
    return _worker[task.source].result(task)


class _Maker:
    """Makes pairs of a source's rows; a picture that several rows name is decoded once."""

    CACHED_PICTURES = 10_000

    def __init__(
        self, source: SourceSection, spec: SourcesFile, root: Path, spool: BinaryIO
    ) -> None:
        self.source = source
        self.limits = spec.images
        self.split = spec.split
        self.spool = spool
        folder = source.images or (source.path if source.kind == "imagefolder" else ".")
        self.folder = (root / folder).resolve()
        self._cache: dict[Path, SpooledImage] = {}

    def result(self, task: _Task) -> _Result:
        """The pair of a row or a study, and what of it was rejected."""
        images: list[SpooledImage] = []
        good: list[tuple[int, Row]] = []
        rejected: list[tuple[int, str, str]] = []
        for number, row in task.rows:
            try:
                if isinstance(row, Rejected):
                    raise row
                images += self._images(row)
                good.append((number, row))
            except Rejected as verdict:
                rejected.append((number, verdict.reason, verdict.detail))
        pair = None
        if good:
            try:
                pair = self._pair([row for _, row in good], images)
            except Rejected as verdict:
                rejected += [(number, verdict.reason, verdict.detail) for number, _ in good]
        taken = [number for number, _ in good] if pair else []
        return _Result(task.source, pair, taken, rejected)

    def _pair(self, rows: list[Row], images: list[SpooledImage]) -> Pair:
        source, first = self.source, rows[0]
        texts = list(dict.fromkeys(filter(None, (_filled(source.text, row) for row in rows))))
        if not texts:
            raise Rejected("empty_text", f"{source.text} is empty")
        if len(texts) > 1:
            raise Rejected("different_texts", f"{len(texts)} texts in one study")
        question = None
        if source.question is not None:
            question = _filled(source.question, first)
            if not question:
                raise Rejected("empty_question", f"{source.question} is empty")
        license_name = source.license
        if isinstance(license_name, dict):
            license_name = text_of(first.get(license_name["column"])) or None
        pair = Pair(
            id="",
            images=images,
            text=texts[0],
            question=question,
            fields={name: text_of(first.get(name)) for name in source.keep},
            source=source.name,
            group_id="",
            license=license_name,
            split=self._own_split(rows),
        )
        given = text_of(first.get(source.id)) if source.id else ""
        group = text_of(first.get(source.group)) if source.group else ""
        return replace(
            pair,
            id=given or _content_hash(pair)[:16],
            group_id=f"{source.name}/{group}" if group else f"image/{images[0].sha256}",
        )

    def _own_split(self, rows: list[Row]) -> str:
        if isinstance(self.split, SplitSection):
            return ""
        values = {text_of(row.get(self.split.column)) for row in rows}
        splits = {self.split.split_of(value) for value in values}
        if len(splits) > 1 or None in splits:
            raise Rejected("no_split", f"{self.split.column} is {', '.join(sorted(values))!r}")
        return splits.pop()

    def _images(self, row: Row) -> list[SpooledImage]:
        if self.source.kind == "dicom":
            every = self.source.frames == "every"
            pictures = open_dicom(row["path"], max_pixels=self.limits.max_pixels, every_frame=every)
            name, side = row["path"].name, self.limits.max_side
            return [
                self._spooled(store_image(picture, name=name, max_side=side))
                for picture in pictures
            ]
        return [self._image(row.get(name), name) for name in self.source.image_columns]

    def _image(self, value: Any, column: str) -> SpooledImage:
        if isinstance(value, dict):  # the layout of datasets.Image
            value = value.get("bytes") or value.get("path")
        if isinstance(value, bytes):
            return self._stored(value, None, column)
        name = text_of(value)
        if not name:
            raise Rejected("no_image", f"{column} is empty")
        try:
            path = (self.folder / name).resolve()
            if not path.is_relative_to(self.folder):
                raise Rejected("outside_root", f"{name} leaves the image root")
            if not path.is_file():
                raise Rejected("missing_image", f"no file {name}")
            if path not in self._cache:
                if len(self._cache) == self.CACHED_PICTURES:
                    self._cache.clear()
                self._cache[path] = self._stored(path.read_bytes(), path.name, name)
            return self._cache[path]
        except (OSError, ValueError) as error:  # a name too long, a null byte, no permission
            reason = getattr(error, "strerror", None) or "not a path"
            raise Rejected("missing_image", f"{name[:200]!r}: {reason}") from error

    def _stored(self, content: bytes, name: str | None, shown: str) -> SpooledImage:
        limits = self.limits
        try:
            stored = store_picture(
                content, name=name, max_pixels=limits.max_pixels, max_side=limits.max_side
            )
        except DataError as error:
            raise Rejected("bad_image", f"{shown}: {error}") from error
        return self._spooled(stored)

    def _spooled(self, stored: StoredImage) -> SpooledImage:
        values = {key: getattr(stored, key) for key in StoredImage.__slots__ if key != "content"}
        offset = self.spool.tell()
        self.spool.write(stored.content)
        self.spool.flush()
        length = len(stored.content)
        return SpooledImage(file=Path(self.spool.name).name, offset=offset, length=length, **values)


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


def _content_hash(pair: Pair) -> str:
    content = [[image.sha256 for image in pair.images], pair.question, pair.text]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def columns_of(template: str) -> list[str]:
    """The columns that a column name or a template reads."""
    return template_names(template) if "{" in template else [template]


def _filled(template: str, row: Row) -> str:
    if "{" not in template:
        return text_of(row.get(template))
    return fill_template(template, {name: row.get(name) for name in template_names(template)})


def check_prompts(prompts: list[str], source: SourceSection) -> None:
    """Refuse prompts over columns that a source without questions does not keep.

    Raises:
        RecipeError: a prompt names such a column.
    """
    if source.question is not None:
        return
    for prompt in (prompt for prompt in prompts if "{" in prompt):
        missing = [name for name in template_names(prompt) if name not in source.keep]
        if missing:
            raise RecipeError(
                f"expected the columns of the prompt {prompt!r} in keep of source {source.name}, "
                f"{', '.join(missing)} is missing: add it to keep"
            )


def check_columns(source: SourceSection, root: Path, split: SplitSection | OwnSplitSection) -> None:
    """Refuse a source whose table lacks a column that it names.

    Raises:
        DataError: the table cannot be read, has no rows, or lacks a column.
    """
    if source.kind == "dicom":  # tags and columns are checked where the two are joined
        next(source_rows(source, root), None)
        return
    first = first_row(source.kind, root / source.path)
    wanted = [*source.columns, *source.image_columns]
    wanted += [split.column] if isinstance(split, OwnSplitSection) else []
    missing = [name for name in dict.fromkeys(wanted) if name not in first]
    if missing:
        raise DataError(
            f"expected the columns {', '.join(missing)} in {root / source.path}, it has "
            f"{', '.join(first)}: correct source {source.name}"
        )
