"""SOURCES.yaml: the source tables, the meaning of their columns, and their rows."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from medft.config.strict_yaml import Section, StrictYaml, errors_of, nearest
from medft.data.dicom import dicom_rows
from medft.data.encoding import check_encoding
from medft.data.images import MAX_PIXELS
from medft.data.splits import SOURCE, OwnSplitSection, SplitSection
from medft.data.table_row import ReadOptions, TableCounts
from medft.data.tables import Rejected, TableRow, first_row, tables_rows
from medft.data.template import IMAGE_PLACEHOLDER, template_names, text_of
from medft.errors import DataError, RecipeError

ColumnName = Annotated[dict[Literal["column"], str], Field(min_length=1)]

DEFAULT_PROMPTS = ["Describe this medical image."]

NA_VALUES = ["", "NULL", "nan", "NaN", "N/A", "None", "-"]
LANGUAGE = "language"
"""Name of a row's language in `fields`."""


class SourceSection(Section):
    """One table and the meaning of its columns.

    Kinds: csv with a header row; json, a list of objects; jsonl, one object per line; parquet;
    imagefolder, a folder with metadata.csv, .jsonl or .parquet; dicom, a folder of .dcm files.
    """

    name: str
    """Name of the source, in pairs.parquet and reports."""

    kind: Literal["csv", "json", "jsonl", "parquet", "imagefolder", "dicom"]
    """Format: a table file, or a folder (imagefolder: images and metadata; dicom: .dcm files)."""

    path: str
    """The table or folder, relative to SOURCES.yaml; tables may be several: data/train-*.csv."""

    encoding: str | None = None
    """Codec of the text of the source, such as cp1252; default: UTF-8, with or without BOM."""

    na_values: list[str] = Field(NA_VALUES)
    """Stripped texts of cells that count as empty, before anything else is done with them."""

    table: str | None = None
    """dicom: CSV file with reports; without it, NAME.txt beside NAME.dcm is column `text`."""

    join: dict[Literal["tag", "column"], str] | None = None
    """dicom: the tag and the column of the table whose values must be equal."""

    where: dict[str, Any] | None = None
    """Rows to take: value or list of values, by column or DICOM tag."""

    frames: Literal["middle", "every"] = "middle"
    """dicom: middle frame or every frame of a multi-frame file."""

    images: str | None = None
    """Root of image paths, relative to SOURCES.yaml; default: its folder; imagefolder: `path`."""

    image: str | Annotated[list[str], Field(min_length=1)] | None = None
    """Columns, one per image, of paths (or bytes, in Parquet); imagefolder default: file_name."""

    study: str | None = None
    """Column; rows with the same value become one pair with several images."""

    text: str
    """A column, or a template such as "{findings} {impression}"."""

    question: str | None = None
    """A column or a template; text is then the answer."""

    keep: list[str] = Field([])
    """Columns copied into `fields`."""

    language: Annotated[str, Field(min_length=1)] | ColumnName | None = None
    """Language of the rows, copied into `fields`: a constant, or {column: NAME}."""

    prompts: list[str] | None = Field(None, min_length=1)
    """Prompts of this source instead of the common ones."""

    group: str | None = None
    """Column; rows of one group, such as a patient, are always in one split, over all sources."""

    group_namespace: str | None = Field(None, pattern=r"^[^/\s]+$")
    """A name; values of `group` mean the same only among sources with it; default: one for all."""

    group_form: Literal["as_written", "loose"] | None = None
    """Whether values that differ in zeros before, '.0', case or separators alone are one group."""

    group_map: str | None = None
    """CSV of two columns, this source's values of `group` and those of the other sources."""

    empty_group: Literal["reject", "image"] = "reject"
    """Whether a row without value of `group` is rejected, or grouped by its first image."""

    id: str | None = None
    """Column; default: a hash of the content."""

    license: str | ColumnName | None = None
    """License of the rows: a constant, or {column: NAME}."""

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
        further = {"group_namespace", "group_form", "group_map", "empty_group"}
        if self.group is None and (given := sorted(further & self.model_fields_set)):
            raise ValueError(f"a key group beside {given[0]}")
        if self.group_namespace in ("group", "image"):
            raise ValueError(f"another group_namespace than {self.group_namespace}")
        if self.kind == "parquet" and self.encoding is not None:
            raise ValueError("no key encoding for parquet, which is UTF-8")
        return self

    @field_validator("encoding")
    @classmethod
    def _is_a_codec(cls, encoding: str | None) -> str | None:
        if encoding is not None:
            check_encoding(encoding)
        return encoding

    @model_validator(mode="after")
    def _takes_no_value_that_counts_as_empty(self) -> Self:
        for column, wanted in (self.where or {}).items():
            for value in wanted if isinstance(wanted, list) else [wanted]:
                if text_of(value) and text_of(value) in self._empty_texts:
                    raise ValueError(
                        f"no {value!r} in where of {column}, which is a text of na_values: "
                        f"write '' for empty cells, or na_values without it"
                    )
        return self

    @property
    def _empty_texts(self) -> frozenset[str]:
        return frozenset(value.strip() for value in self.na_values)

    def image_root(self, root: Path) -> Path:
        """The folder that image paths start from, in that of SOURCES.yaml."""
        folder = self.images or (self.path if self.kind == "imagefolder" else ".")
        return root / folder

    def tables(self, root: Path) -> list[Path]:
        """The files of the source, in the order of their names.

        Args:
            root: folder of SOURCES.yaml.

        Raises:
            DataError: a pattern matches no file.
        """
        if "*" not in self.path:
            return [root / self.path]
        found = sorted(root.glob(self.path))
        if not found:
            raise DataError(
                f"expected files that match {self.path} in {root}, found none: correct source "
                f"{self.name}"
            )
        return found

    def read_options(self, root: Path) -> ReadOptions:
        """How its table is read.

        Args:
            root: folder of SOURCES.yaml.
        """
        folder = self.image_root(root)

        def names_image(row: TableRow) -> bool:
            names = (text_of(row.get(column)) for column in self.image_columns)
            return any(name and os.path.isfile(folder / name) for name in names)

        return ReadOptions(
            encoding=self.encoding,
            na_values=self._empty_texts,
            names_image=None if self.kind == "dicom" else names_image,
        )

    @model_validator(mode="after")
    def _gives_each_field_and_question_once(self) -> Self:
        if self.language is not None and LANGUAGE in self.keep:
            raise ValueError(f"the key {LANGUAGE} or a column of that name in keep, not both")
        if self.prompts is not None and self.question is not None:
            raise ValueError("prompts or question, since every row has a question of its own")
        return self

    @property
    def image_columns(self) -> list[str]:
        """The columns with images."""
        if self.image is None:
            return ["path"] if self.kind == "dicom" else ["file_name"]
        return [self.image] if isinstance(self.image, str) else self.image

    @property
    def columns(self) -> list[str]:
        """Every column that the source reads, except those with images."""
        names = [*columns_of(self.text), *self.keep, *(self.where or {})]
        names += columns_of(self.question) if self.question else []
        names += [name for name in (self.study, self.group, self.id) if name]
        given = (self.license, self.language)
        names += [value["column"] for value in given if isinstance(value, dict)]
        return list(dict.fromkeys(names))

    @property
    def field_names(self) -> list[str]:
        """The names in `fields`."""
        return self.keep if self.language is None else [*self.keep, LANGUAGE]


class ImagesSection(Section):
    """Limits on images."""

    max_pixels: int = Field(MAX_PIXELS, ge=1)
    """Pixels (width times height) at most; larger images are rejected before decoding."""

    max_side: int | None = Field(None, ge=1)
    """Pixels of the longer side at most; larger images are shrunk, antialiased."""


class SourcesFile(Section):
    """The content of SOURCES.yaml."""

    sources: list[SourceSection] = Field(min_length=1)
    prompts: list[str] = Field(DEFAULT_PROMPTS, min_length=1)
    """Templates over `fields` for rows without question; a row's id selects one."""

    images: ImagesSection = ImagesSection()
    split: SplitSection | OwnSplitSection = SplitSection()
    """Fractions of the accepted rows, or the column with the tables' own split."""

    @model_validator(mode="after")
    def _decides_forms_once(self) -> Self:
        forms: dict[str | None, set[str]] = {}
        for source in self.sources:
            if source.group_form:
                forms.setdefault(source.group_namespace, set()).add(source.group_form)
        if any(len(found) > 1 for found in forms.values()):
            raise ValueError("the same group_form in all sources whose groups are compared")
        return self

    def prompts_of(self, source: SourceSection) -> list[str]:
        """The templates for rows of a source without question."""
        return self.prompts if source.prompts is None else source.prompts


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


def source_rows(
    source: SourceSection,
    root: Path,
    split: SplitSection | OwnSplitSection,
    counts: TableCounts | None = None,
) -> Iterator[TableRow | Rejected]:
    """The rows of a source, cells of na_values empty; only for dicom is `where` applied already.

    Args:
        source: its section.
        root: folder of SOURCES.yaml.
        split: the section of that name; the tables' own split is a column or tag to read.
        counts: what is counted while the table is read.

    Raises:
        DataError: the table cannot be read.
    """
    options = source.read_options(root)
    if source.kind != "dicom":
        return tables_rows(source.kind, source.tables(root), options, counts)
    return dicom_rows(
        root / source.path,
        table=root / source.table if source.table else None,
        join=source.join,
        where=source.where,
        tags=[name for name in _columns_read(source, split) if name != "text"],
        options=options,
        counts=TableCounts() if counts is None else counts,
    )


def _columns_read(source: SourceSection, split: SplitSection | OwnSplitSection) -> list[str]:
    own = [split.column] if isinstance(split, OwnSplitSection) else []
    return list(dict.fromkeys([*source.columns, *(name for name in own if name != SOURCE)]))


def columns_of(template: str) -> list[str]:
    """The columns that a column name or a template reads."""
    return template_names(template) if "{" in template else [template]


def check_prompts(prompts: list[str], source: SourceSection) -> None:
    """Raise for prompts that the rows of a source without question cannot be asked.

    Raises:
        RecipeError: a prompt is no template, names a column that is not in `fields`, or holds
            `<image>`.
    """
    if source.question is not None:
        return
    for prompt in prompts:
        missing = [name for name in template_names(prompt) if name not in source.field_names]
        if missing:
            raise RecipeError(
                f"expected the columns of the prompt {prompt!r} in keep of source {source.name}, "
                f"{', '.join(missing)} is missing: add it to keep"
            )
        if IMAGE_PLACEHOLDER in prompt:
            raise RecipeError(
                f"expected the prompt {prompt!r} of source {source.name} without "
                f"{IMAGE_PLACEHOLDER}: remove it, the images stand before the prompt"
            )


def check_columns(source: SourceSection, root: Path, split: SplitSection | OwnSplitSection) -> None:
    """Raise for a source whose table lacks a column that it names.

    Raises:
        DataError: the table cannot be read, has no rows, or lacks a column.
    """
    if source.kind == "dicom":  # tags and columns are checked where the two are joined
        next(source_rows(source, root, split), None)
        return
    wanted = dict.fromkeys([*_columns_read(source, split), *source.image_columns])
    for table in source.tables(root):
        first = first_row(source.kind, table, source.read_options(root))
        missing = [name for name in wanted if name not in first]
        if missing:
            raise DataError(
                f"expected the columns {', '.join(missing)} in {table}, it has "
                f"{', '.join(first)}: correct source {source.name}"
            )
