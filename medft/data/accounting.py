"""Every row is accounted for: accepted into a pair, or rejected with its reason."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TextIO

from medft.data.assign import Collected
from medft.data.bit_depth import WideImages
from medft.data.clearing import Clearer, SearchCounts
from medft.data.pairing import Pair, Result
from medft.data.source_section import SourceSection
from medft.data.sources import SourcesFile
from medft.data.table_row import TableCounts
from medft.errors import DataError


@dataclass(slots=True)
class SourceCounts:
    """Numbers of a source's rows by outcome, and of its pairs."""

    read: int = 0
    accepted: int = 0
    rejected: int = 0
    pairs: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    """The first row and detail by reason."""
    table: TableCounts = field(default_factory=TableCounts)
    wide: WideImages = field(default_factory=WideImages)
    """Of the pass over the images before."""

    blank_images: int = 0
    searches: SearchCounts = field(default_factory=SearchCounts)

    def summary(self, source: SourceSection, *, is_keyed: bool) -> dict[str, Any]:
        """The source's entry in summary.json, but for its groups.

        Args:
            source: its section.
            is_keyed: whether group ids are hashed with a key.
        """
        return {
            "read": self.read,
            "accepted": self.accepted,
            "rejected": self.rejected,
            "pairs": self.pairs,
            "reasons": dict(sorted(self.reasons.items())),
            **self.table.summary(),
            **self.searches.summary(source, is_keyed=is_keyed),
        }


def accepted_pairs(
    results: Iterator[Result],
    spec: SourcesFile,
    counts: Sequence[SourceCounts],
    collected: Collected,
    rejects: TextIO,
    *,
    key: bytes | None,
) -> Iterator[Pair]:
    """The accepted pairs of all sources.

    Args:
        results: of all rows.
        spec: SOURCES.yaml.
        counts: of each source; filled meanwhile.
        collected: filled meanwhile.
        rejects: rejects.jsonl, to which rejected rows are written.
        key: that group ids are hashed with.
    """
    clearers = [Clearer(source, key) for source in spec.sources]
    ids: set[str] = set()
    contents: set[str] = set()
    for result in results:
        pair, count = result.pair, counts[result.source]
        count.searches.add(result.search)
        rejected = list(result.rejected)
        if pair is not None:
            if pair.content in contents:
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
            detail = clearers[result.source].detail(reason_code, detail)
            count.examples.setdefault(reason_code, f"row {number}: {detail}")
            name = spec.sources[result.source].name
            line = {"source": name, "row": number, "reason": reason_code, "detail": detail}
            rejects.write(json.dumps(line, ensure_ascii=False) + "\n")
        if pair is None:
            collected.rejected += [(result.source, *link) for link in result.links]
            continue
        ids.add(pair.id)
        contents.add(pair.content)
        count.accepted += len(result.taken)
        count.pairs += 1
        if spec.sources[result.source].max_images is not None:
            count.table.images_left_out = (count.table.images_left_out or 0) + result.left_out
        collected.sources.append(result.source)
        collected.groups.append(pair.group)
        collected.hashes.append([image.stored.sha256 for image in pair.images])
        collected.phashes.append([image.stored.phash for image in pair.images])
        collected.splits.append(pair.split)
        yield pair


def check_rejects(spec: SourcesFile, counts: Sequence[SourceCounts], max_rejects: float) -> None:
    """Raise for a source without rows, or with too many rejected ones.

    Args:
        spec: SOURCES.yaml.
        counts: of each source.
        max_rejects: largest rejected fraction of a source's rows; `duplicate` does not count.

    Raises:
        DataError: there is one.
    """
    for source, count in zip(spec.sources, counts, strict=True):
        broken = count.rejected - count.reasons["duplicate"]
        if count.read == 0:
            raise DataError(
                f"expected rows in source {source.name}, found none: check where and the file"
            )
        if broken > max_rejects * count.read:
            common = "; ".join(
                f"{reason} {n}, {count.examples[reason]}"
                for reason, n in count.reasons.most_common(3)
            )
            raise DataError(
                f"expected at most {max_rejects:.0%} of the rows of source {source.name} to be "
                f"rejected, {broken} of {count.read} were ({common}): raise --max-rejects, which "
                f"also writes rejects.jsonl with every row and its reason"
            )
