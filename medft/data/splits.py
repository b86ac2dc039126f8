"""Which rows are trained on and which are kept back, so that no patient stands on both sides.

Pure functions over group names and hashes. The result does not depend on the order of the rows.
"""

import hashlib
import math
from collections import Counter
from collections.abc import Sequence
from typing import Self

from pydantic import Field, model_validator

from medft.strict_yaml import Section


class SplitSection(Section):
    """How many rows are kept back."""

    validation: float = Field(0.05, ge=0, lt=1)
    """Share of the accepted rows."""

    test: float = Field(0.0, ge=0, lt=1)
    """Share of the accepted rows."""

    seed: int = 17

    @model_validator(mode="after")
    def _leaves_something_to_train(self) -> Self:
        if self.validation + self.test >= 1:
            raise ValueError("validation and test together below 1")
        return self


def join_groups(rows: Sequence[tuple[str, Sequence[str]]]) -> list[str]:
    """The group of each row, groups joined where rows share a picture.

    Args:
        rows: for each row its own group and the hashes of its pictures.

    Returns:
        A name per row: of the groups that were joined, the smallest.
    """
    parent: dict[str, str] = {}

    def root(name: str) -> str:
        parent.setdefault(name, name)
        while parent[name] != name:
            parent[name] = parent[parent[name]]
            name = parent[name]
        return name

    for group, hashes in rows:
        for other in (f"sha256/{digest}" for digest in hashes):
            first, second = sorted((root(f"group/{group}"), root(other)))
            parent[second] = first
    return [root(f"group/{group}").removeprefix("group/") for group, _ in rows]


def assign_splits(groups: Sequence[str], split: SplitSection) -> list[str]:
    """The split of each row; whole groups only.

    Test and then validation are filled with groups in an order drawn from the seed, up to
    floor(share * rows + 0.5) rows; a group that no longer fits is passed over.
    """
    sizes = Counter(groups)
    order = sorted(sizes, key=lambda group: _draw(split.seed, group))
    chosen: dict[str, str] = {}
    for name, share in (("test", split.test), ("validation", split.validation)):
        room = math.floor(share * len(groups) + 0.5)
        for group in order:
            if group not in chosen and sizes[group] <= room:
                chosen[group] = name
                room -= sizes[group]
    return [chosen.get(group, "train") for group in groups]


def _draw(seed: int, group: str) -> str:
    return hashlib.sha256(f"{seed}/{group}".encode()).hexdigest()
