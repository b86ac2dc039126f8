"""Metric values with bootstrap confidence intervals over groups of rows (patients).

Pure functions: arrays in, numbers out.

Shape letters in this file:
    N  rows of the evaluation
    G  groups (patients) with at least one counted row
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

_UNDEFINED_SHARE = 0.05
"""Largest fraction of undefined resamples for which an interval is given."""


@dataclass(frozen=True, kw_only=True)
class Scorer:
    """A metric on fixed rows, to be evaluated under any row weights."""

    rows: np.ndarray
    """[N] booleans: the counted rows."""

    score: Callable[[np.ndarray], float]
    """Value for [N] weights, how often each row is drawn; NaN where undefined."""

    undefined: str
    """Reason to give where the value is undefined."""

    @property
    def n(self) -> int:
        """Number of counted rows."""
        return int(np.count_nonzero(self.rows))


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A metric's value with its 95 % confidence interval, ready for JSON."""

    value: float | None
    low: float | None
    high: float | None

    n: int
    """Number of counted rows."""

    groups: int
    """Number of groups with at least one counted row."""

    reason: str | None
    """Reason for a missing value or interval."""


def ratio(
    numerators: np.ndarray, denominators: np.ndarray, rows: np.ndarray, undefined: str
) -> Scorer:
    """A scorer of the weighted sum of numerators over that of denominators.

    Args:
        numerators: [N].
        denominators: [N], non-negative; the value is undefined where their weighted sum is 0.
        rows: [N] booleans: the counted rows; others have 0 in both.
        undefined: reason to give where the value is undefined.
    """
    parts = np.stack([numerators, denominators], axis=1).astype(np.float64)

    def score(weights: np.ndarray) -> float:
        above, below = weights @ parts
        return float(above / below) if below > 0 else float("nan")

    return Scorer(rows=np.asarray(rows, dtype=bool), score=score, undefined=undefined)


def mean(values: np.ndarray, undefined: str) -> Scorer:
    """A scorer of the weighted mean of [N] values; every row is counted."""
    rows = np.ones(len(values), dtype=bool)
    return ratio(values, rows, rows, undefined)


def difference(one: Scorer, other: Scorer) -> Scorer:
    """A scorer of the paired difference: `one` minus `other` on the same resampled rows.

    Raises:
        ValueError: the two count different rows, so they cannot be paired.
    """
    if not np.array_equal(one.rows, other.rows):
        raise ValueError(
            f"expected two scorers of the same rows, got {one.n} of {len(one.rows)} and {other.n} "
            f"of {len(other.rows)}, or others: score both against the same references"
        )
    return Scorer(
        rows=one.rows,
        score=lambda weights: one.score(weights) - other.score(weights),
        undefined=" or ".join(dict.fromkeys([one.undefined, other.undefined])),
    )


def estimate(
    scorer: Scorer, groups: Sequence[str], *, resamples: int = 1000, seed: int = 17
) -> Estimate:
    """A metric's value on all rows and its 95 % percentile interval over resampled groups.

    A resample draws G complete groups with replacement, so that rows of one patient stay together;
    groups without a counted row are not drawn. Undefined resamples are excluded from the interval;
    with more than 5 % of them there is no interval. The order of the rows does not matter, up to
    rounding.

    Args:
        scorer: of N rows.
        groups: [N] names.
        resamples: number of resamples.
        seed: equal seeds draw equal groups.

    Returns:
        None for what is undefined, with the reason; no interval for fewer than two groups.

    Raises:
        ValueError: groups and rows differ in number.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, section 13.3; resampling
    of clusters as in Davison and Hinkley, Bootstrap Methods and their Application, 1997,
    section 3.8.
    """
    counted = {group for group, row in zip(groups, scorer.rows, strict=True) if row}
    value = scorer.score(np.ones(len(groups))) if counted else float("nan")
    low = high = reason = None
    if np.isnan(value):
        reason = scorer.undefined
    elif len(counted) < 2:
        reason = "one group"
    else:
        drawn = _resampled(scorer, groups, sorted(counted), resamples, seed)
        defined = drawn[~np.isnan(drawn)]
        if len(drawn) - len(defined) > _UNDEFINED_SHARE * len(drawn):
            reason = f"not defined in {len(drawn) - len(defined)} of {len(drawn)} resamples"
        else:
            low, high = (float(edge) for edge in np.quantile(defined, [0.025, 0.975]))
    return Estimate(
        value=None if np.isnan(value) else float(value),
        low=low,
        high=high,
        n=scorer.n,
        groups=len(counted),
        reason=reason,
    )


def _resampled(
    scorer: Scorer, groups: Sequence[str], names: list[str], resamples: int, seed: int
) -> np.ndarray:
    """[resamples] values, each on len(names) groups drawn from names with replacement."""
    place = {name: index for index, name in enumerate(names)}
    never = len(names)
    places = np.array([place.get(group, never) for group in groups])
    random = np.random.default_rng(seed)
    values = np.empty(resamples)
    for index in range(resamples):
        times = np.bincount(random.integers(never, size=never), minlength=never + 1)
        values[index] = scorer.score(times[places].astype(np.float64))
    return values
