"""A row of a table, or the rows of a study -> one pair. Runs in worker processes."""

import hashlib
import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

from medft.data.chosen_images import chosen_images
from medft.data.clearing import Clearer, Search, Written
from medft.data.row_images import ImageReader, SpooledImage
from medft.data.source_section import LANGUAGE, SourceSection, columns_of
from medft.data.sources import SourcesFile
from medft.data.splits import SOURCE, SplitSection
from medft.data.tables import Rejected, TableRow
from medft.data.template import IMAGE_PLACEHOLDER, fill_template, template_names, text_of


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """An image-text pair, its images spooled."""

    id: str
    images: list[SpooledImage]
    text: str
    question: str | None
    fields: dict[str, str]
    source: str
    group: str
    """Value of the source's `group`; empty if there is none."""

    license: str | None
    split: str
    """Split given by the table; empty where medft splits."""

    content: str = ""
    """What `content_hash` gives."""

    def record(self) -> dict[str, Any]:
        """The columns of pairs.parquet but group and split, with file locations for images."""
        stored = [image.stored for image in self.images]
        return {
            "id": self.id,
            "images": [
                [i.stored.name, i.file, i.offset, i.length, i.modified] for i in self.images
            ],
            "width": [one.width for one in stored],
            "height": [one.height for one in stored],
            "sha256": [one.sha256 for one in stored],
            "phash": [one.phash for one in stored],
            "text": self.text,
            "question": self.question,
            "fields": json.dumps(self.fields, sort_keys=True, ensure_ascii=False),
            "source": self.source,
            "license": self.license,
        }


@dataclass(frozen=True, slots=True)
class Task:
    """Rows that become one pair: one row, or those of a study."""

    source: int
    rows: list[tuple[int, TableRow | Rejected]]


@dataclass(frozen=True, slots=True)
class Result:
    """A pair or None, its rows, the rejected rows, what the search found, images left out."""

    source: int
    pair: Pair | None
    taken: list[int]
    rejected: list[tuple[int, str, str]]
    search: Search | None = None
    links: list[tuple[str, list[str]]] = field(default_factory=list)
    """The value of `group` and the images of each row that has both."""
    left_out: int = 0


class Maker:
    """Makes pairs from a source's rows."""

    def __init__(
        self,
        source: SourceSection,
        spec: SourcesFile,
        root: Path,
        spool: BinaryIO,
        key: bytes | None,
    ) -> None:
        self.source = source
        self.clearer = Clearer(source, key)
        self.images = ImageReader(source, spec.images, root, spool)
        self.split = spec.split
        self._search: Search | None = None

    def result(self, task: Task) -> Result:
        """The pair of a row or a study, and its rejected rows."""
        self._search = None
        images: list[SpooledImage] = []
        good: list[tuple[int, TableRow]] = []
        rejected: list[tuple[int, str, str]] = []
        links: list[tuple[str, list[str]]] = []
        choice, left_out = chosen_images(task.rows, self.source, self.images.limits.max_pixels)
        for (number, row), chosen in zip(task.rows, choice, strict=True):
            try:
                if isinstance(row, Rejected):
                    raise row
                images += (own := self.images.read(row, chosen))
                good.append((number, row))
                if self.source.group and (group := text_of(row.get(self.source.group))):
                    links.append((group, [image.stored.sha256 for image in own]))
            except Rejected as verdict:
                rejected.append((number, verdict.reason, verdict.detail))
        pair = None
        if good:
            try:
                if not images:
                    raise Rejected("no_image", "none of those that max_images takes can be used")
                pair = self._pair([row for _, row in good], images)
            except Rejected as verdict:
                rejected += [(number, verdict.reason, verdict.detail) for number, _ in good]
        taken = [number for number, _ in good] if pair else []
        return Result(task.source, pair, taken, rejected, self._search, links, left_out)

    def _pair(self, rows: list[TableRow], images: list[SpooledImage]) -> Pair:
        source, first = self.source, rows[0]
        text = _agreed("texts", source.text, rows)
        if not text:
            raise Rejected("empty_text", f"{source.text} is empty")
        question = None
        if source.question is not None:
            question = _agreed("questions", source.question, rows)
            if not question:
                raise Rejected("empty_question", f"{source.question} is empty")
        license_name = source.license
        if isinstance(license_name, dict):
            license_name = _agreed("licenses", license_name["column"], rows) or None
        group = _agreed("groups", source.group, rows) if source.group else ""
        if source.group and not group and source.empty_group == "reject":
            raise Rejected("empty_group", f"{source.group} is empty")
        pair = Pair(
            id=_filled(source.id, first) if source.id else "",
            images=images,
            text=text,
            question=question,
            fields=self._fields(rows),
            source=source.name,
            group=group,
            license=license_name,
            split=self._own_split(rows),
        )
        pair = self._cleared(pair, rows)
        content = content_hash(pair)
        pair = replace(pair, id=pair.id or content[:16], content=content)
        _check_encodable(pair)
        if IMAGE_PLACEHOLDER in pair.text or IMAGE_PLACEHOLDER in (pair.question or ""):
            raise Rejected("image_placeholder", f"a text holds {IMAGE_PLACEHOLDER}")
        return pair

    def _fields(self, rows: list[TableRow]) -> dict[str, str]:
        """The kept columns and the language, each with all different values of the rows."""
        columns = {name: name for name in self.source.keep}
        fields = {}
        if isinstance(self.source.language, str):
            fields[LANGUAGE] = self.source.language
        elif self.source.language:
            columns[LANGUAGE] = self.source.language["column"]
        return fields | {
            name: "; ".join(_different(column, rows)) for name, column in columns.items()
        }

    def _cleared(self, pair: Pair, rows: list[TableRow]) -> Pair:
        """The pair without the identifiers of its rows and, with a key, without its clear group."""
        fields = {f"field {name}": value for name, value in pair.fields.items()}
        texts = {"text": pair.text, "question": pair.question or "", **fields}
        if isinstance(self.source.license, dict):
            texts["license"] = pair.license or ""
        names = [image.stored.name for image in pair.images]
        written = Written(id=pair.id, texts=texts, names=names)
        cleared, self._search = self.clearer.cleared(written, rows)
        if self._search is None:
            return pair
        self.clearer.check(cleared, self._search)
        return replace(
            pair,
            id=cleared.id,
            images=[
                replace(image, stored=replace(image.stored, name=name))
                for image, name in zip(pair.images, cleared.names, strict=True)
            ],
            text=cleared.texts["text"],
            question=cleared.texts["question"] or None,
            fields={name: cleared.texts[f"field {name}"] for name in pair.fields},
            license=cleared.texts.get("license", pair.license) or None,
        )

    def _own_split(self, rows: list[TableRow]) -> str:
        if isinstance(self.split, SplitSection):
            return ""
        column, name = self.split.column, self.source.name
        values = {name} if column == SOURCE else {text_of(row.get(column)) for row in rows}
        split, *others = {self.split.split_of(value) for value in values}
        if split is None or others:
            raise Rejected("no_split", f"{column} is {', '.join(sorted(values))!r}")
        return split


def content_hash(pair: Pair) -> str:
    """SHA-256 of a pair's images, question and text, independent of ids and file names.

    The same content in another split of a table's own is another pair.
    """
    content = [[image.stored.sha256 for image in pair.images], pair.question, pair.text]
    content += [pair.split] if pair.split else []
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


_KINDS = {list: "a list", dict: "an object", bytes: "bytes"}
"""Cells of JSON and Parquet that are no text, which Python would write in its own syntax."""


def _check_encodable(pair: Pair) -> None:
    """Reject a lone surrogate, as a cut emoji leaves, which UTF-8 cannot encode."""
    own = [pair.id, pair.group, pair.text, pair.question or "", pair.license or ""]
    for text in [*own, *pair.fields.values()]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise Rejected("bad_text", f"{text[:100]!r}: {error.reason}") from error


def _agreed(name: str, template: str, rows: list[TableRow]) -> str:
    """What a column or template gives for the rows of one pair; empty rows take the others'.

    Raises:
        Rejected: they differ.
    """
    found = _different(template, rows)
    if len(found) > 1:
        raise Rejected(f"different_{name}", f"{len(found)} {name} in one study")
    return found[0] if found else ""


def _different(template: str, rows: list[TableRow]) -> list[str]:
    """The different texts that a column or template gives for rows, without empty ones."""
    return list(dict.fromkeys(filter(None, (_filled(template, row) for row in rows))))


def _filled(template: str, row: TableRow) -> str:
    for column in columns_of(template):
        if isinstance(cell := row.get(column), list | dict | bytes):
            raise Rejected("not_text", f"{column} holds {_KINDS[type(cell)]}")
    if "{" not in template:
        return text_of(row.get(template))
    return fill_template(template, {name: row.get(name) for name in template_names(template)})
