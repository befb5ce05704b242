"""95% intervals over independent units, and a test against chance.

Images of one unit (an update, a client, a photograph) are not independent. Every function takes the unit of each value
and makes no assumption about the dependence inside a unit, except where a unit holds one value.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence
from typing import Any

LEVEL = 0.95
LEAST_UNITS = 3  # the t interval of two units is 13 times as wide as their standard error


def mean_interval(values: Sequence[float], units: Sequence[Hashable]) -> dict[str, Any]:
    """{mean, low, high, n}: the mean over all values, its interval by Student's t, and the number n of units.

    The variance is that of the units' sums of residuals (cluster-robust), with n - 1 degrees of freedom; for units of
    equal size this is the t interval of their means. `low` and `high` are None for fewer than three units.
    """
    from scipy.special import stdtrit

    mean, count = _mean(values), len(set(units))
    if count < LEAST_UNITS:
        return {"mean": mean, "low": None, "high": None, "n": count}
    half = float(stdtrit(count - 1, (1 + LEVEL) / 2)) * math.sqrt(_variance_of_mean(values, units))
    return {"mean": mean, "low": mean - half, "high": mean + half, "n": count}


def share_interval(hits: Sequence[bool], units: Sequence[Hashable]) -> dict[str, Any]:
    """{share, low, high, n}: the share of hits and its interval; n is the number of values.

    Where each unit holds one value the interval is the exact binomial one (Clopper and Pearson 1934). Otherwise it is
    the same with the effective number of values (Korn and Graubard 1998): share (1 - share) / variance, between the
    number of units and the number of values; the number of units if all values are equal.
    """
    from scipy.special import betaincinv, stdtrit

    share, total, count = _mean([float(hit) for hit in hits]), len(hits), len(set(units))
    size = float(total)
    if count < total:
        size = float(count)
        if count > 1 and 0 < share < 1:
            variance = _variance_of_mean([float(hit) for hit in hits], units)
            t_ratio = float(stdtrit(total - 1, (1 + LEVEL) / 2) / stdtrit(count - 1, (1 + LEVEL) / 2))
            effective = share * (1 - share) * t_ratio**2 / max(variance, 1e-12)
            size = min(max(effective, float(count)), float(total))
    k, tail = share * size, (1 - LEVEL) / 2
    low = 0.0 if share == 0 else float(betaincinv(k, size - k + 1, tail))
    high = 1.0 if share == 1 else float(betaincinv(k + 1, size - k, 1 - tail))
    return {"share": share, "low": low, "high": high, "n": total}


def chance_p_value(hits: Sequence[bool], units: Sequence[Hashable], chance: float) -> float:
    """The probability of at least as large a share of hits if each value is a hit with probability `chance`.

    Where each unit holds one value this is the exact binomial tail. Otherwise it is Hoeffding's bound (1963, theorem 1)
    for the mean s of the units' shares, exp(-n KL(s || chance)), which holds for any dependence inside a unit.
    """
    from scipy.special import bdtrc

    counts = Counter(units)
    if len(counts) == len(hits):
        successes = sum(hits)
        return 1.0 if successes == 0 else float(bdtrc(successes - 1, len(hits), chance))
    by_unit: dict[Hashable, list[float]] = defaultdict(list)
    for hit, unit in zip(hits, units, strict=True):
        by_unit[unit].append(float(hit))
    share = _mean([_mean(group) for group in by_unit.values()])
    if share <= chance:
        return 1.0
    divergence = share * math.log(share / chance)
    if share < 1:
        divergence += (1 - share) * math.log((1 - share) / (1 - chance))
    return math.exp(-len(by_unit) * divergence)


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _variance_of_mean(values: Sequence[float], units: Sequence[Hashable]) -> float:
    """The variance of the mean from the units' sums of residuals; at least two units."""
    mean = _mean(values)
    sums: dict[Hashable, float] = defaultdict(float)
    for value, unit in zip(values, units, strict=True):
        sums[unit] += value - mean
    count = len(sums)
    return count / (count - 1) * math.fsum(s * s for s in sums.values()) / len(values) ** 2
