"""SOURCES.yaml: its sources, what is common to them, and their rows."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, Tag, model_validator

from medft.config.strict_yaml import Section, StrictYaml, errors_of, nearest
from medft.data.bit_depth import LEAST, MOST
from medft.data.dicom import dicom_rows
from medft.data.images import MAX_PIXELS
from medft.data.source_section import SourceSection
from medft.data.splits import SOURCE, OwnSplitSection, SplitSection
from medft.data.table_row import TableCounts
from medft.data.tables import Rejected, TableRow, first_row, tables_rows
from medft.data.template import IMAGE_PLACEHOLDER, template_names
from medft.errors import DataError, RecipeError

DEFAULT_PROMPTS = ["Describe this medical image."]

_SHARES, _COLUMN = "split by shares", "split by a column"
"""Tags of the two forms of split, in the places of pydantic's errors."""


def _form_of(split: Any) -> str:
    is_own = isinstance(split, dict) and not split.keys().isdisjoint(("column", "train"))
    return _COLUMN if is_own or isinstance(split, OwnSplitSection) else _SHARES


class ImagesSection(Section):
    """Limits on images."""

    max_pixels: int = Field(MAX_PIXELS, ge=1)
    """Pixels (width times height) at most; larger images are rejected before decoding."""

    max_side: int | None = Field(None, ge=1)
    """Pixels of the longer side at most; larger images are shrunk, antialiased."""

    bit_depth: Literal["auto", "percentile"] | Annotated[int, Field(ge=LEAST, le=MOST)] = "auto"
    """Bits that become 0..255, of images with more than 8 bits a pixel; DICOM has its window.

    auto: the least number that holds every image of the source; percentile: of each image alone.
    """


class SourcesFile(Section):
    """The content of SOURCES.yaml."""

    sources: list[SourceSection] = Field(min_length=1)
    prompts: list[str] = Field(DEFAULT_PROMPTS, min_length=1)
    """Templates over `fields` for rows without question; a row's id selects one."""

    images: ImagesSection = ImagesSection()
    split: Annotated[
        Annotated[SplitSection, Tag(_SHARES)] | Annotated[OwnSplitSection, Tag(_COLUMN)],
        Discriminator(_form_of),
    ] = SplitSection()
    """Fractions of the accepted rows, or the column with the tables' own split."""

    group_key: str | None = None
    """File with a secret, relative to SOURCES.yaml: group ids become hashes with this key."""

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
    tagged = errors_of(lambda: SourcesFile.model_validate(source.raw))
    form = OwnSplitSection if any(_COLUMN in error["loc"] for error in tagged) else SplitSection
    errors = [
        {**error, "loc": tuple(part for part in error["loc"] if part not in (_SHARES, _COLUMN))}
        for error in tagged
    ]
    problems = source.describe(errors, lambda error: _explain(error, form))
    if problems:
        raise RecipeError(*problems)
    return SourcesFile.model_validate(source.raw)


def _explain(error: dict[str, Any], split: type[Section]) -> str | None:
    if error["type"] != "extra_forbidden":
        return None
    *inner, key = error["loc"]
    known = {
        "sources": SourceSection.model_fields,
        "images": ImagesSection.model_fields,
        "split": split.model_fields,
    }
    names = known[inner[0]] if inner else SourcesFile.model_fields
    place = ".".join(map(str, error["loc"]))
    return f"unknown key {place}: {nearest(str(key), names)}"


def source_rows(
    source: SourceSection,
    root: Path,
    split: SplitSection | OwnSplitSection,
    counts: TableCounts | None = None,
    *,
    max_pixels: int = MAX_PIXELS,
) -> Iterator[TableRow | Rejected]:
    """The rows of a source, cells of na_values empty; only for dicom is `where` applied already.

    Args:
        source: its section.
        root: folder of SOURCES.yaml.
        split: the section of that name; the tables' own split is a column or tag to read.
        counts: what is counted while the table is read.
        max_pixels: of an image, which bounds what is read of a DICOM file.

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
        max_pixels=max_pixels,
        options=options,
        counts=TableCounts() if counts is None else counts,
    )


def _columns_read(source: SourceSection, split: SplitSection | OwnSplitSection) -> list[str]:
    own = [split.column] if isinstance(split, OwnSplitSection) else []
    return list(dict.fromkeys([*source.columns, *(name for name in own if name != SOURCE)]))


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
