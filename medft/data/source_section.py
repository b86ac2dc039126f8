"""A source in SOURCES.yaml: a table, or several, and the meaning of its columns."""

import os
from glob import glob
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from medft.config.strict_yaml import Section
from medft.data.encoding import check_encoding
from medft.data.table_row import ReadOptions
from medft.data.tables import TableRow
from medft.data.template import template_names, text_of
from medft.errors import DataError

ColumnName = Annotated[dict[Literal["column"], str], Field(min_length=1)]

NA_VALUES = ["", "NULL", "nan", "NaN", "N/A", "None", "-"]
LANGUAGE = "language"
"""Name of a row's language in `fields`."""


class SourceSection(Section):
    """One table and the meaning of its columns.

    Kinds: csv with a header row; json, a list of objects; jsonl, one object per line; parquet;
    imagefolder, a folder with metadata.csv, .jsonl or .parquet; dicom, a folder of DICOM
    files, whatever their names.
    """

    name: str
    """Name of the source, in pairs.parquet and reports."""

    kind: Literal["csv", "json", "jsonl", "parquet", "imagefolder", "dicom"]
    """Format: a table file, or a folder (imagefolder: images and metadata; dicom: DICOM files)."""

    path: str
    """The table or folder, relative to SOURCES.yaml; tables may be several: data/train-*.csv."""

    encoding: str | None = None
    """Codec of the text of the source, such as cp1252; default: UTF-8, with or without BOM."""

    na_values: list[str] = Field(NA_VALUES)
    """Stripped texts of cells that count as empty, before anything else is done with them."""

    table: str | None = None
    """dicom: CSV with reports; without it, NAME.txt beside NAME.dcm or NAME is column `text`."""

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
    """Column or DICOM tag; rows with the same value become one pair with several images."""

    order_by: str | Annotated[list[str], Field(min_length=1)] | None = None
    """Columns or DICOM tags that order the rows of a study; default: as the table has them."""

    max_images: int | None = Field(None, ge=1)
    """Images of a study at most, taken evenly over its order; columns and frames count each."""

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

    identifiers: list[str] = Field([])
    """Columns or tags whose values must not stand in the row's texts, fields and file names."""

    on_identifier: Literal["reject", "mask"] = "reject"
    """What becomes of a row in which such a value stands."""

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
        if self.study is None and (self.order_by or self.max_images):
            raise ValueError(f"a key study beside {'order_by' if self.order_by else 'max_images'}")
        further = {"group_namespace", "group_form", "group_map", "empty_group"}
        if self.group is None and (given := sorted(further & self.model_fields_set)):
            raise ValueError(f"a key group beside {given[0]}")
        if self.group_namespace in ("group", "image"):
            raise ValueError(f"another group_namespace than {self.group_namespace}")
        if "*" in self.path and self.kind in ("imagefolder", "dicom"):
            raise ValueError(
                f"a path without *, since {self.kind} is one folder: a source for each"
            )
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

    @model_validator(mode="after")
    def _gives_each_field_and_question_once(self) -> Self:
        if self.language is not None and LANGUAGE in self.keep:
            raise ValueError(f"the key {LANGUAGE} or a column of that name in keep, not both")
        if self.prompts is not None and self.question is not None:
            raise ValueError("prompts or question, since every row has a question of its own")
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
        # of glob, since Path.glob raises for absolute patterns and for ** inside a name
        found = sorted({root / name for name in glob(self.path, root_dir=root, recursive=True)})
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

    @property
    def image_columns(self) -> list[str]:
        """The columns with images."""
        if self.image is None:
            return ["path"] if self.kind == "dicom" else ["file_name"]
        return [self.image] if isinstance(self.image, str) else self.image

    @property
    def order_columns(self) -> list[str]:
        """The columns that order the rows of a study."""
        return [self.order_by] if isinstance(self.order_by, str) else self.order_by or []

    @property
    def columns(self) -> list[str]:
        """Every column that the source reads, except those with images."""
        names = [*columns_of(self.text), *self.keep, *(self.where or {}), *self.identifiers]
        names += self.order_columns
        names += columns_of(self.question) if self.question else []
        names += [name for name in (self.study, self.group, self.id) if name]
        given = (self.license, self.language)
        names += [value["column"] for value in given if isinstance(value, dict)]
        return list(dict.fromkeys(names))

    @property
    def field_names(self) -> list[str]:
        """The names in `fields`."""
        return self.keep if self.language is None else [*self.keep, LANGUAGE]


def columns_of(template: str) -> list[str]:
    """The columns that a column name or a template reads."""
    return template_names(template) if "{" in template else [template]
