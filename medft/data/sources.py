"""SOURCES.yaml: the source tables, the meaning of their columns, and their rows."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from medft.config.strict_yaml import Section, StrictYaml, errors_of, nearest
from medft.data.dicom import dicom_rows
from medft.data.images import MAX_PIXELS
from medft.data.splits import OwnSplitSection, SplitSection
from medft.data.tables import Rejected, TableRow, first_row, table_rows
from medft.data.template import template_names
from medft.errors import DataError, RecipeError

DEFAULT_PROMPTS = ["Describe this medical image."]


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
    """The table or folder, relative to SOURCES.yaml."""

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

    group: str | None = None
    """Column; rows of one group are always in one split."""

    identifiers: list[str] = Field([])
    """Columns or tags whose values must not stand in the row's texts, fields and file names."""

    on_identifier: Literal["reject", "mask"] = "reject"
    """What becomes of a row in which such a value stands."""

    id: str | None = None
    """Column; default: a hash of the content."""

    license: str | dict[Literal["column"], str] | None = None
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
        names = [*columns_of(self.text), *self.keep, *(self.where or {}), *self.identifiers]
        names += columns_of(self.question) if self.question else []
        names += [name for name in (self.study, self.group, self.id) if name]
        names += [self.license["column"]] if isinstance(self.license, dict) else []
        return list(dict.fromkeys(names))


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

    group_key: str | None = None
    """File with a secret, relative to SOURCES.yaml: group ids become hashes with this key."""


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
    source: SourceSection, root: Path, split: SplitSection | OwnSplitSection
) -> Iterator[TableRow | Rejected]:
    """The rows of a source; only for dicom is `where` applied already.

    Args:
        source: its section.
        root: folder of SOURCES.yaml.
        split: the section of that name; the tables' own split is a column or tag to read.

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
        tags=[name for name in _columns_read(source, split) if name != "text"],
    )


def _columns_read(source: SourceSection, split: SplitSection | OwnSplitSection) -> list[str]:
    own = [split.column] if isinstance(split, OwnSplitSection) else []
    return list(dict.fromkeys([*source.columns, *own]))


def columns_of(template: str) -> list[str]:
    """The columns that a column name or a template reads."""
    return template_names(template) if "{" in template else [template]


def check_prompts(prompts: list[str], source: SourceSection) -> None:
    """Raise for prompts over columns that a source without question does not keep.

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
    """Raise for a source whose table lacks a column that it names.

    Raises:
        DataError: the table cannot be read, has no rows, or lacks a column.
    """
    if source.kind == "dicom":  # tags and columns are checked where the two are joined
        next(source_rows(source, root, split), None)
        return
    first = first_row(source.kind, root / source.path)
    wanted = dict.fromkeys([*_columns_read(source, split), *source.image_columns])
    missing = [name for name in wanted if name not in first]
    if missing:
        raise DataError(
            f"expected the columns {', '.join(missing)} in {root / source.path}, it has "
            f"{', '.join(first)}: correct source {source.name}"
        )
