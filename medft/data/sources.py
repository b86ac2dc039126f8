"""Raw tables and their pictures -> pairs.parquet, with a reason for every row that did not make it.

SOURCES.yaml says where the tables lie and what their columns mean. Every row that is read ends in
pairs.parquet or in rejects.jsonl: accepted + rejected = rows read, for each source.
"""

import csv
import hashlib
import io
import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from PIL import Image
from pydantic import Field

from medft.data.images import MAX_PIXELS, open_image
from medft.data.pairs import Pair, StoredImage, rewrite_splits, store_image, write_pairs
from medft.data.splits import SplitSection, assign_splits, join_groups
from medft.data.template import fill_template, template_names, text_of
from medft.errors import DataError, RecipeError
from medft.files import check_folder_for_output, write_json
from medft.strict_yaml import Section, StrictYaml, errors_of, nearest

DEFAULT_PROMPTS = ["Describe this medical image."]


class SourceSection(Section):
    """One table and what its columns mean."""

    name: str
    """Of the source, in reports."""

    kind: Literal["csv", "json", "jsonl"]
    """csv: with a header line; json: a list of objects; jsonl: one object a line."""

    path: str
    """The table, relative to SOURCES.yaml."""

    where: dict[str, Any] | None = None
    """Column: value or list of values; rows to take."""

    images: str = "."
    """Root of the image paths, relative to SOURCES.yaml."""

    image: str | Annotated[list[str], Field(min_length=1)]
    """Columns with the path of an image below the root; several: one row has several images."""

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
    split: SplitSection = SplitSection()


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
    sections = {"sources": SourceSection, "images": ImagesSection, "split": SplitSection}
    section = sections[inner[0]] if inner else SourcesFile
    name = ".".join(map(str, error["loc"]))
    return f"unknown key {name}: {nearest(str(key), section.model_fields)}"


@dataclass(slots=True)
class SourceCounts:
    """What became of the rows of a source."""

    read: int = 0
    accepted: int = 0
    rejected: int = 0
    reasons: Counter[str] = field(default_factory=Counter)


class Rejected(Exception):
    """A row that is not taken: a reason code and what was found."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


@dataclass(slots=True)
class _Light:
    """What of a pair is needed to split: everything but the pictures."""

    id: str
    group_id: str
    sha256: list[str]


def prepare(sources_path: Path, out: Path, *, max_rejects: float = 0.2) -> dict[str, Any]:
    """Write pairs.parquet, rejects.jsonl and summary.json into `out`; returns the summary.

    Args:
        sources_path: SOURCES.yaml.
        out: folder; an earlier pairs.parquet in it is replaced once the new one is whole.
        max_rejects: share of a source's rows that may be rejected; duplicates do not count.

    Raises:
        RecipeError: SOURCES.yaml is wrong.
        DataError: a table or a column is missing, or too many rows were rejected
            (rejects.jsonl is written then).
    """
    spec = load_sources(sources_path)
    root = sources_path.parent
    tables = {source.name: root / source.path for source in spec.sources}
    if len(tables) < len(spec.sources):
        raise RecipeError(f"{sources_path}: expected a different name for each source")
    for source in spec.sources:
        check_prompts(spec.prompts, source)
        check_columns(source, tables[source.name])
    check_folder_for_output(out, allow_content=True)
    out.mkdir(parents=True, exist_ok=True)
    counts = {source.name: SourceCounts() for source in spec.sources}
    lights: list[_Light] = []
    rejects_path, draft = out / "rejects.jsonl", out / ".pairs.unsplit.draft"
    with rejects_path.with_suffix(".draft").open("w", encoding="utf-8") as rejects:
        pairs = _accepted_pairs(spec, root, counts, lights, rejects)
        write_pairs(draft, pairs, prompts=spec.prompts)
    os.replace(rejects_path.with_suffix(".draft"), rejects_path)
    try:
        _check_rejects(counts, max_rejects, rejects_path)
        groups = join_groups([(light.group_id, light.sha256) for light in lights])
        splits = assign_splits(groups, spec.split)
        rewrite_splits(draft, out / "pairs.parquet", groups, splits)
    finally:
        draft.unlink(missing_ok=True)
    summary = {
        "sources": {
            name: {
                "read": count.read,
                "accepted": count.accepted,
                "rejected": count.rejected,
                "reasons": dict(sorted(count.reasons.items())),
            }
            for name, count in counts.items()
        },
        "rows": len(lights),
        "splits": dict(sorted(Counter(splits).items())),
        "groups": len(set(groups)),
        "grouped_by": {source.name: source.group or "image" for source in spec.sources},
    }
    write_json(out / "summary.json", summary)
    return summary


def _accepted_pairs(
    spec: SourcesFile,
    root: Path,
    counts: dict[str, SourceCounts],
    lights: list[_Light],
    rejects: Any,
) -> Iterator[Pair]:
    """The pairs of all sources; what is rejected is written, counted and passed over."""
    seen: set[str] = set()
    content_seen: set[str] = set()
    for source in spec.sources:
        count = counts[source.name]
        store = ImageStore(root / source.images, spec.images)
        for number, row in read_rows(source, root / source.path):
            count.read += 1
            try:
                if isinstance(row, Rejected):
                    raise row
                pair = make_pair(source, row, store)
                content = _content_hash(pair)
                if content in content_seen:
                    raise Rejected("duplicate", "the same images, question and text came before")
                if pair.id in seen:
                    raise Rejected("duplicate_id", f"the id {pair.id!r} came before")
            except Rejected as verdict:
                count.rejected += 1
                count.reasons[verdict.reason] += 1
                line = {
                    "source": source.name,
                    "row": number,
                    "reason": verdict.reason,
                    "detail": verdict.detail,
                }
                rejects.write(json.dumps(line, ensure_ascii=False) + "\n")
                continue
            seen.add(pair.id)
            content_seen.add(content)
            count.accepted += 1
            lights.append(_Light(pair.id, pair.group_id, [image.sha256 for image in pair.images]))
            yield pair


def _check_rejects(counts: dict[str, SourceCounts], max_rejects: float, path: Path) -> None:
    for name, count in counts.items():
        broken = count.rejected - count.reasons["duplicate"]
        if count.read == 0:
            raise DataError(f"expected rows in source {name}, found none: check where and the file")
        if broken > max_rejects * count.read:
            common = ", ".join(f"{reason} {n}" for reason, n in count.reasons.most_common(3))
            raise DataError(
                f"expected at most {max_rejects:.0%} of the rows of source {name} to be rejected, "
                f"{broken} of {count.read} were ({common}): see {path}, or raise --max-rejects"
            )


class ImageStore:
    """Pictures below one root, decoded once as long as they fit into memory."""

    CACHE_BYTES = 256 * 2**20

    def __init__(self, folder: Path, limits: ImagesSection) -> None:
        self.folder = folder.resolve()
        self.limits = limits
        self._kept: dict[Path, StoredImage] = {}
        self._kept_bytes = 0

    def get(self, value: Any, column: str) -> StoredImage:
        """The picture that a cell names.

        Raises:
            Rejected: there is none, it lies outside the root, or it cannot be used.
        """
        name = text_of(value)
        if not name:
            raise Rejected("no_image", f"{column} is empty")
        if "\0" in name:
            raise Rejected("missing_image", f"{column} holds a null byte")
        path = (self.folder / name).resolve()
        if not path.is_relative_to(self.folder):
            raise Rejected("outside_root", f"{name} leaves the image root")
        if path not in self._kept:
            stored = self._read(path, name)
            if self._kept_bytes + len(stored.content) > self.CACHE_BYTES:
                return stored
            self._kept[path] = stored
            self._kept_bytes += len(stored.content)
        return self._kept[path]

    def _read(self, path: Path, name: str) -> StoredImage:
        if not path.is_file():
            raise Rejected("missing_image", f"no file {name}")
        try:
            image = open_image(path, max_pixels=self.limits.max_pixels)
        except DataError as error:
            raise Rejected("bad_image", str(error).replace(str(path), name)) from error
        side = self.limits.max_side
        if side and max(image.size) > side:
            image.thumbnail((side, side), Image.Resampling.LANCZOS)
        return store_image(image, name=path.name)


def make_pair(source: SourceSection, row: dict[str, Any], store: ImageStore) -> Pair:
    """The pair of a row.

    Raises:
        Rejected: the text is empty or an image cannot be used.
    """
    text = _filled(source.text, row)
    if not text:
        raise Rejected("empty_text", f"{source.text} is empty")
    question = None
    if source.question is not None:
        question = _filled(source.question, row)
        if not question:
            raise Rejected("empty_question", f"{source.question} is empty")
    columns = [source.image] if isinstance(source.image, str) else source.image
    images = [store.get(row[name], name) for name in columns]
    license_name = source.license
    if isinstance(license_name, dict):
        license_name = text_of(row[license_name["column"]]) or None
    pair = Pair(
        id="",
        images=images,
        text=text,
        question=question,
        fields={name: row[name] for name in source.keep},
        source=source.name,
        group_id="",
        license=license_name,
    )
    given = text_of(row[source.id]) if source.id else ""
    group = text_of(row[source.group]) if source.group else ""
    return replace(
        pair,
        id=given or _content_hash(pair)[:16],
        group_id=f"{source.name}/{group}" if group else f"image/{images[0].sha256}",
    )


def _content_hash(pair: Pair) -> str:
    content = [[image.sha256 for image in pair.images], pair.question, pair.text]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def columns_of(template: str) -> list[str]:
    """The columns that a column name or a template reads."""
    return template_names(template) if "{" in template else [template]


def _filled(template: str, row: dict[str, Any]) -> str:
    return fill_template(template, row) if "{" in template else text_of(row[template])


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


def check_columns(source: SourceSection, table: Path) -> None:
    """Refuse a source whose table lacks a column that it names.

    Raises:
        DataError: the table cannot be read, has no rows, or lacks a column.
    """
    wanted = [*columns_of(source.text), *source.keep, *(source.where or {})]
    wanted += [source.image] if isinstance(source.image, str) else source.image
    wanted += columns_of(source.question) if source.question else []
    wanted += [name for name in (source.group, source.id) if name]
    wanted += [source.license["column"]] if isinstance(source.license, dict) else []
    rows = (row for row in _all_rows(source.kind, table) if isinstance(row, dict))
    first = next(rows, None)
    if first is None:
        raise DataError(f"expected rows in {table}, found none: check the file")
    missing = [name for name in dict.fromkeys(wanted) if name not in first]
    if missing:
        raise DataError(
            f"expected the columns {', '.join(missing)} in {table}, it has "
            f"{', '.join(map(str, first))}: correct source {source.name}"
        )


def read_rows(
    source: SourceSection, table: Path
) -> Iterator[tuple[int, dict[str, Any] | Rejected]]:
    """Rows of a table that `where` takes, with their number in the file, from 1."""
    conditions = {
        column: {text_of(value) for value in (wanted if isinstance(wanted, list) else [wanted])}
        for column, wanted in (source.where or {}).items()
    }
    for number, row in enumerate(_all_rows(source.kind, table), start=1):
        if isinstance(row, Rejected):
            yield number, row
        elif all(text_of(row.get(column)) in values for column, values in conditions.items()):
            yield number, _Row(row)


class _Row(dict):
    """A row in which a column that other rows have is empty where this one lacks it."""

    def __missing__(self, key: str) -> None:
        return None


def _all_rows(kind: str, table: Path) -> Iterator[dict[str, Any] | Rejected]:
    try:
        text = _decoded(table.read_bytes())
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise DataError(
            f"expected a table at {table}, could not read it ({reason}): check the path"
        ) from error
    if kind == "csv":
        yield from _csv_rows(text, table)
        return
    try:
        rows = json.loads(text) if kind == "json" else map(json.loads, filter(None, _lines(text)))
        if not isinstance(rows, list | map):
            raise DataError(
                f"expected a list of objects in {table}, got {type(rows).__name__}: check its kind"
            )
        for row in rows:
            if not isinstance(row, dict):
                raise DataError(
                    f"expected objects in {table}, got {type(row).__name__}: check its kind"
                )
            yield row
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"expected {kind} in {table}, could not parse it ({error}): check its kind"
        ) from error


def _lines(text: str) -> Iterator[str]:
    return (line.strip() for line in io.StringIO(text))


def _csv_rows(text: str, table: Path) -> Iterator[dict[str, Any] | Rejected]:
    try:
        dialect: Any = csv.Sniffer().sniff(text[:65536].partition("\n")[0], delimiters=",;\t|")
        delimiter = dialect.delimiter
    except csv.Error:
        delimiter = ","
    csv.field_size_limit(1 << 30)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True)
    header = [name.strip() for name in next(reader, [])]
    if len(set(header)) < len(header):
        raise DataError(f"expected different column names in {table}, got {', '.join(header)}")
    for cells in reader:
        further = [cell for cell in cells[len(header) :] if cell.strip()]
        if cells and (further or len(cells) < len(header)):
            yield Rejected("wrong_cell_count", f"{len(cells)} cells for {len(header)} columns")
        elif cells:
            yield dict(zip(header, cells, strict=False))


def _decoded(content: bytes) -> str:
    """Text of a file in UTF-8, with or without mark, else latin-1, which takes every byte."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return content.decode("latin-1")
