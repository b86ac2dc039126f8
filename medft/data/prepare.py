"""Raw tables and their images -> pairs.parquet, with a reason for every rejected row.

Every row that is read ends in pairs.parquet or in rejects.jsonl: accepted + rejected = rows read,
for each source. Images are decoded and hashed by worker processes; the order of the rows is that
of the tables. Output files appear only when all of them are complete.
"""

import json
import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from medft.data.accounting import SourceCounts, accepted_pairs, check_rejects
from medft.data.assign import Collected, Known, assign
from medft.data.clearing import Clearer
from medft.data.draft_guard import removed_if_killed
from medft.data.pairs import write_pairs
from medft.data.report import write_data_report
from medft.data.source_file import open_regular
from medft.data.sources import SourcesFile, check_columns, check_prompts, load_sources
from medft.data.statistics import blank_images
from medft.data.table_row import Rejected
from medft.data.workers import Workers
from medft.errors import DataError, RecipeError
from medft.files import check_folder_for_output, check_place, complete_files, write_json

OUTPUTS = ("pairs.parquet", "rejects.jsonl", "summary.json", "report.html")

_BUFFER = 2**20


def prepare(sources_path: Path, out: Path, *, max_rejects: float = 0.2) -> dict[str, Any]:
    """Write pairs.parquet, rejects.jsonl, summary.json and report.html; returns the summary.

    Args:
        sources_path: SOURCES.yaml.
        out: folder; earlier files in it are replaced at once, when the new ones are complete.
        max_rejects: largest rejected fraction of a source's rows; `duplicate` does not count.

    Raises:
        RecipeError: SOURCES.yaml is wrong.
        DataError: a table or a column is missing, groups are written in several ways, or too many
            rows were rejected.
        RunError: another process writes the folder, or its disk is full.
    """
    spec = load_sources(sources_path)
    root = sources_path.parent
    if len({source.name for source in spec.sources}) < len(spec.sources):
        raise RecipeError(f"{sources_path}: expected a different name for each source")
    for source in spec.sources:
        check_prompts(spec.prompts_of(source), source)
        check_columns(source, root, spec.split)
    known = Known.read(spec, root)
    check_folder_for_output(out, allow_content=True)
    for name in OUTPUTS:
        check_place(out / name, "file")
    try:
        with ExitStack() as ends_last, complete_files(out) as draft:
            ends_last.enter_context(removed_if_killed(draft))
            summary = _prepare_into(draft, spec, root, max_rejects, known)
            for path in draft.iterdir():
                if path.name not in OUTPUTS:
                    path.unlink()
    except OSError as error:
        raise DataError(
            f"expected to read the sources and write into {out}, it failed ({error}): make room or "
            f"check the permissions, and prepare again"
        ) from error
    return summary


def _prepare_into(
    draft: Path, spec: SourcesFile, root: Path, max_rejects: float, known: Known
) -> dict[str, Any]:
    counts = [SourceCounts() for _ in spec.sources]
    collected = Collected()
    bit_depth = spec.images.bit_depth
    with (
        (draft / "rejects.jsonl").open("w", encoding="utf-8", errors="backslashreplace") as rejects,
        (draft / "thumbnails").open("wb", buffering=_BUFFER) as thumbnails,
        (draft / "records.jsonl").open("w", buffering=_BUFFER, encoding="utf-8") as records,
        Workers(spec, root, draft, key=known.key) as workers,
    ):
        for count, wide in zip(counts, workers.wide_images(), strict=True):
            count.wide = wide
        scales = [count.wide.scale(bit_depth) for count in counts]
        results = workers.results(scales, [count.table for count in counts])
        pairs = accepted_pairs(results, spec, counts, collected, rejects, key=known.key)
        for pair in pairs:
            thumbnails.write(b"".join(image.stored.thumbnail for image in pair.images))
            records.write(json.dumps(pair.record(), ensure_ascii=False) + "\n")
    check_rejects(spec, counts, max_rejects)
    pixels = np.zeros((0, 1024), np.uint8)
    if collected.groups:
        pixels = np.memmap(draft / "thumbnails", np.uint8, "r").reshape(-1, 1024)
    assigned = assign(spec, collected, pixels, known)
    blank = blank_images(pixels, [len(hashes) for hashes in collected.hashes])
    for row, places in blank.items():
        counts[collected.sources[row]].blank_images += len(places)
    withheld = {s.name for s in spec.sources if Clearer(s, known.key).withholds}
    rows = _whole_rows(draft, assigned.groups, assigned.splits, withheld)
    prompts = {source.name: spec.prompts_of(source) for source in spec.sources}
    write_pairs(draft / "pairs.parquet", rows, prompts=prompts, groups=assigned.facts)
    summary = {
        "sources": {
            source.name: {
                **count.summary(source, is_keyed=known.key is not None),
                **count.wide.summary(bit_depth),
                "blank_images": count.blank_images,
                "grouped_by": source.group or "image",
                "empty_group": source.empty_group if source.group else None,
                "empty_groups": count.reasons["empty_group"] or assigned.named.empty[index],
                "not_in_group_map": assigned.named.not_in_map[index],
            }
            for index, (source, count) in enumerate(zip(spec.sources, counts, strict=True))
        },
        "pairs": len(assigned.groups),
        "group_ids": "keyed" if known.key else "clear",
        **assigned.summary,
    }
    write_json(draft / "summary.json", summary)
    inputs = draft / "pairs.parquet", draft / "rejects.jsonl"
    write_data_report(*inputs, summary, draft / "report.html", blank=blank)
    return summary


def _whole_rows(
    draft: Path, groups: list[str], splits: list[str], withheld: set[str]
) -> Iterator[dict[str, Any]]:
    """The complete rows of pairs.parquet, images read back from spools or original files."""
    with ExitStack() as stack, (draft / "records.jsonl").open(encoding="utf-8") as records:
        spools: dict[str, BinaryIO] = {}

        def content_of(file: str, offset: int, length: int, modified: int | None) -> bytes:
            if modified is not None:
                source = record["source"]
                shown = f"one of source {source}" if source in withheld else file
                return _unchanged(Path(file), length, modified, shown)
            if file not in spools:
                spools[file] = stack.enter_context((draft / file).open("rb"))
            spools[file].seek(offset)
            return spools[file].read(length)

        for line, group, split in zip(records, groups, splits, strict=True):
            record = json.loads(line)
            images = [
                {"bytes": content_of(*where), "path": name} for name, *where in record["images"]
            ]
            yield {**record, "images": images, "group_id": group, "split": split}


def _unchanged(path: Path, length: int, modified: int, shown: str) -> bytes:
    """The content of an original image file; raises if it was modified since it was hashed."""
    try:
        with open_regular(path, max_bytes=length) as file:
            content = file.read()
            if len(content) == length and os.fstat(file.fileno()).st_mtime_ns == modified:
                return content
    except (OSError, Rejected):
        pass
    raise DataError(
        f"expected the images to stay as they are until pairs.parquet is written, {shown} was "
        f"changed meanwhile: prepare again"
    )
