"""What was counted about groups, identifiers and files, in sentences for terminal and page."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

SHOWN_NAMES = 3
"""Sources that a sentence names, and combinations of sources; tables of the page have all."""

_ODD_KINDS = ("no suffix", "other suffix", "not regular", "linked folder")
"""Of files that may be images after all."""


@dataclass(frozen=True, slots=True)
class Sentence:
    """A sentence on what was counted."""

    text: str
    needs_look: bool
    """Whether it names something that somebody has to judge."""

    topic: str = ""
    """What sentences of several sources have in common; empty where there is one for all."""

    count: int = 0
    """What the sentence counts of its topic."""


def file_sentences(summary: Mapping[str, Any]) -> list[Sentence]:
    """Sentences on files that are no DICOM images, and on images that max_images leaves out.

    Args:
        summary: as in summary.json.
    """
    sentences = []
    for name, counts in summary["sources"].items():
        if other := counts.get("other_files"):
            most = sorted(other.items(), key=lambda one: -one[1])
            kinds = ", ".join(f"{kind} {count:,}" for kind, count in most)
            total = sum(other.values())
            text = f"{name}: {total:,} files of its folder are no DICOM images: {kinds}."
            is_odd = not other.keys().isdisjoint(_ODD_KINDS)
            sentences.append(Sentence(text, is_odd, "files that are no DICOM images", total))
        if left_out := counts.get("images_left_out"):
            text = f"{name}: max_images leaves out {left_out:,} images of its studies."
            sentences.append(Sentence(text, False))
    return sentences


def group_sentences(summary: Mapping[str, Any]) -> list[Sentence]:
    """Sentences on groups in several splits, shared by sources, empty, not mapped, and kept.

    Args:
        summary: as in summary.json.
    """
    divided, kept = summary["shared_between_splits"], summary["kept"]
    sentences = [Sentence("No group stands in two splits.", False)]
    if divided["groups"]:
        text = (
            f"{divided['groups']:,} groups ({divided['pairs']:,} pairs) stand in several splits, "
            f"as the table's split has them."
        )
        sentences = [Sentence(text, True)]
    sentences += _of_sources_together(summary)
    for name, counts in summary["sources"].items():
        sentences += _missing_groups(name, counts)
    if kept:
        text = (
            f"{kept['groups']:,} groups ({kept['pairs']:,} pairs) keep the split of the earlier "
            f"file, {kept['not_found']:,} of its groups are not among the rows."
        )
        sentences.append(Sentence(text, kept["not_found"] > 0))
    return sentences


def identifier_sentences(summary: Mapping[str, Any]) -> list[Sentence]:
    """Sentences on the search for identifiers, and on how group ids are written.

    Args:
        summary: as in summary.json.
    """
    sentences, unnamed = [], []
    for name, counts in summary["sources"].items():
        if counts["identifiers"]:
            sentences.append(_searched(name, counts))
        else:
            unnamed.append(name)
    if unnamed:
        whose = _listed(unnamed, "; ") if sentences else "Every source"
        text = f"{whose}: no identifiers are named, so none were searched for."
        sentences.append(Sentence(text, False))
    return [*sentences, Sentence(_how_group_ids_stand(summary), False)]


def _how_group_ids_stand(summary: Mapping[str, Any]) -> str:
    if summary["group_ids"] == "clear":
        return "Group ids stand in the clear in pairs.parquet; group_key makes them keyed hashes."
    sources = summary["sources"].values()
    ids, names = (sum(c[key] for c in sources) for key in ("keyed_ids", "dropped_file_names"))
    return (
        f"Group ids are keyed hashes, as are {ids:,} ids that held a group or an identifier; "
        f"{names:,} file names that held a group were dropped."
    )


def _of_sources_together(summary: Mapping[str, Any]) -> list[Sentence]:
    sources, sentences = summary["sources"], []
    by_image = [name for name, counts in sources.items() if counts["grouped_by"] == "image"]
    if len(sources) - len(by_image) > 1:
        most = sorted(summary["shared_by_sources"].items(), key=lambda one: -one[1])
        between = _listed([f"{names} {n:,}" for names, n in most], "; ")
        text = (
            f"{summary['shared_group_values']:,} group values stand in several sources"
            f"{f' ({between})' if between else ''}; a patient who has others there is not found."
        )
        sentences.append(Sentence(text, True))
    if by_image:
        text = (
            f"{_listed(by_image, ', ')} {'are' if len(by_image) > 1 else 'is'} split by image: "
            f"without a group column, whether a patient stands in two splits cannot be checked."
        )
        sentences.append(Sentence(text, True))
    return sentences


def _missing_groups(name: str, counts: Mapping[str, Any]) -> list[Sentence]:
    sentences, column = [], counts["grouped_by"]
    empty, unmapped = counts["empty_groups"], counts["not_in_group_map"]
    if empty:
        became = "rejected" if counts["empty_group"] == "reject" else "grouped by image"
        text = f"{name}: {empty:,} rows have no {column} and were {became}."
        sentences.append(Sentence(text, True, "rows without group", empty))
    if unmapped:
        text = f"{name}: {unmapped:,} values of {column} are not in its group_map."
        sentences.append(Sentence(text, True, "values that are not in a group_map", unmapped))
    return sentences


def _searched(name: str, counts: Mapping[str, Any]) -> Sentence:
    columns = counts["identifiers"]
    became = "rejected" if counts["on_identifier"] == "reject" else "masked"
    parts = []
    for key, then in (("found", f" ({became})"), ("not_searched", ""), ("empty", "")):
        some = ", ".join(f"{column} {one[key]:,}" for column, one in columns.items() if one[key])
        parts += [f"{key.replace('_', ' ')}: {some}{then}"] if some else []
    outcome = "; ".join(parts) or f"none of {', '.join(columns)} found"
    text = f"{name}: {counts['searched']:,} pairs were searched for identifiers; {outcome}."
    return Sentence(text, bool(parts), "pairs searched for identifiers", counts["searched"])


def _listed(names: Sequence[str], separator: str) -> str:
    """The first few, and the number of the others."""
    others = len(names) - SHOWN_NAMES
    if others < 2:
        return separator.join(names)
    return f"{separator.join(names[:SHOWN_NAMES])} and {others:,} others"
