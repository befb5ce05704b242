"""The numbers of a run, from the rows of its images and the records of its trials."""

import math
import statistics
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np

from evaluation.intervals import chance_p_value, mean_interval, share_interval
from evaluation.metrics import PSNR_CAP

RECOVERED_PSNR = 20.0  # dB; recognisable at 32x32
THRESHOLDS = (20.0, 30.0, 60.0)  # dB
QUANTILES = (5, 25, 50, 75, 95)  # percent

Row = Mapping[str, Any]


def unit_of(row: Row, number: int = 0) -> Hashable:
    """The independent unit of a row: its `unit`, else its client, else its trial, else row `number` itself."""
    return next((row[key] for key in ("unit", "client", "trial") if key in row), f"row {number}")


def is_recovered(row: Row, threshold: float = RECOVERED_PSNR) -> bool:
    """Whether a true example has a reconstruction of its own whose PSNR reaches `threshold`."""
    return row["match"] is not None and row["psnr"] >= threshold


def summarize(rows: Sequence[Row], trials: Sequence[Row], thresholds: Sequence[float] = THRESHOLDS) -> dict[str, Any]:
    """The numbers of summary.json.

    rows: one for each true example, as in rows.jsonl; none if the truth is unknown. trials: one for each attacked
    update, as in trials.jsonl. thresholds: PSNRs in dB of the shares under `recovered`. An entry is None where a row
    has no value, rather than a mean over some of the rows. Entries that only some attacks have are left out for others.
    Intervals are 95% intervals over independent units (`unit_of`).
    """
    recovered = [r["psnr"] for r in rows if is_recovered(r)]
    units = [unit_of(r, number) for number, r in enumerate(rows)]
    labelled = [(bool(r["label_ok"]), unit) for r, unit in zip(rows, units, strict=True) if r["label_ok"] is not None]
    psnr = _distribution(rows, "psnr")
    if psnr is not None:
        interval = mean_interval([r["psnr"] for r in rows], units)
        high = interval["high"]
        psnr |= {"low": interval["low"], "high": None if high is None else min(high, PSNR_CAP)}
    return {
        "images": len(rows),
        "units": len(set(units)),
        "unit": unit_kind(rows),
        "psnr": psnr,
        "psnr_quantiles": quantiles([r["psnr"] for r in rows], QUANTILES) if psnr else None,
        "most_exposed": _most_exposed(rows) if psnr else None,
        "ssim": _distribution(rows, "ssim"),
        "lpips": _distribution(rows, "lpips"),
        "label_accuracy": _mean([float(ok) for ok, _ in labelled]),
        "labels": _share([ok for ok, _ in labelled], [unit for _, unit in labelled]),
        "success_rate": _mean([float(is_recovered(r)) for r in rows]),
        "recovered": {f"{t:g}": _share([is_recovered(r, t) for r in rows], units) for t in thresholds} if rows else {},
        "identified": identified_share(rows, units),
        "null": _null(rows, trials),
        "over_null": gain(rows, units, "psnr", "null_psnr"),
        "baseline_psnr": _complete_mean(rows, "baseline_psnr"),
        "class_baseline_psnr": _complete_mean(rows, "class_baseline_psnr"),
        "over_class_mean": gain(rows, units, "psnr", "class_baseline_psnr"),
        "seconds": sum(t["seconds"] for t in trials),
        "missed": sum(r["match"] is None for r in rows),
        "status": dict(sorted(Counter(t["status"] for t in trials).items())),
        "objective": _objective(trials),
        "recovered_psnr": statistics.median(recovered) if recovered else None,
        **_optional_mean(rows, "ceiling"),
        **_certificates(rows, trials, units),
        **_optional_mean(trials, "candidates"),
        **_optional_mean(trials, "control"),
        **_optional_mean(rows, "oracle_corr"),
        **_optional_mean(rows, "oracle_affine_psnr"),
        **_optional_mean(rows, "oracle_floor_psnr"),
        **_optional_mean(rows, "companion_psnr"),
        **_over_companion(rows, units),
        **_optional_mean(rows, "sign_ok"),
    }


def thin(trace: Sequence[float], points: int = 200) -> list[list[float | None]]:
    """At most `points` entries of a trace as [iteration, value], evenly spaced, the first and the last among them.

    Iterations count from 0. A value that is not finite becomes None, which JSON can hold.
    """
    assert points >= 2, f"{points} points cannot hold the first and the last entry"
    last = len(trace) - 1
    if last < points:
        chosen = list(range(len(trace)))
    else:
        chosen = [round(k * last / (points - 1)) for k in range(points)]
    return [[i, float(trace[i]) if math.isfinite(trace[i]) else None] for i in chosen]


def gain(rows: Sequence[Row], units: Sequence[Hashable], key: str, over: str) -> dict[str, Any] | None:
    """The mean of the score `key` minus the score `over`, row by row, with its 95% interval over units.

    low and high are None for fewer than three units. None without rows, and where `over` is None.
    """
    if not rows or any(r.get(over) is None for r in rows):
        return None
    return mean_interval([r[key] - r[over] for r in rows], units)


def mean_of(rows: Sequence[Row], units: Sequence[Hashable], key: str) -> dict[str, Any] | None:
    """The mean of the score `key` with its interval, standard deviation and median; None if a row has no score."""
    values = [r[key] for r in rows if r.get(key) is not None]
    if not values or len(values) < len(rows):
        return None
    return mean_interval(values, units) | {"std": statistics.pstdev(values), "median": statistics.median(values)}


def null_of(trials: Sequence[Row], *keys: str) -> dict[str, Any] | None:
    """The means over trials of what reconstructions score against other records; None if a trial has no null."""
    nulls = [t["null"] for t in trials if t.get("null") is not None]
    if not nulls or len(nulls) < len(trials):
        return None
    return {
        **{key: statistics.fmean(value for null in nulls for value in null[key]) for key in keys},
        "recovered": statistics.fmean(null["recovered"] for null in nulls),
        "same_labels": all(null["labels"] for null in nulls),
    }


def _over_companion(rows: Sequence[Row], units: Sequence[Hashable]) -> dict[str, Any]:
    """What an attack gains over the one it is compared with; empty without one."""
    compared = bool(rows) and "companion_psnr" in rows[0]
    return {"over_companion": gain(rows, units, "psnr", "companion_psnr")} if compared else {}


def _objective(trials: Sequence[Row]) -> dict[str, float | None] | None:
    """The medians over updates of the attack's objective at its answer and at the truth; None without one."""
    found = [t["objective"] for t in trials if t.get("objective") is not None]
    if not found:
        return None
    medians = {}
    for place in ("answer", "truth"):
        values = [entry[place] for entry in found if entry[place] is not None]
        medians[place] = statistics.median(values) if values else None
    return medians


def _certificates(rows: Sequence[Row], trials: Sequence[Row], units: Sequence[Hashable]) -> dict[str, Any]:
    """The share of examples whose reconstruction is certified, and the number of wrong certificates; empty without any.

    A certificate is wrong if no true example of its update is within 20 dB of the reconstruction.
    """
    if not rows or any("certified" not in r for r in rows):
        return {}
    share = share_interval([bool(r["certified"]) for r in rows], units)
    return {"certified": {**share, "wrong": sum(t["certified_wrong"] for t in trials)}}


def _share(hits: Sequence[bool], units: Sequence[Hashable]) -> dict[str, Any] | None:
    return share_interval(hits, units) if hits else None


def identified_share(rows: Sequence[Row], units: Sequence[Hashable]) -> dict[str, Any] | None:
    """The share of victims at rank 1, its interval, what chance gives, and the p-value against it.

    chance: the mean of 1 / candidates. by_class: whether all candidates of each victim were of its own class. None if
    some victim had no candidates.
    """
    if not rows or any(r.get("identified") is None for r in rows):
        return None
    hits = [bool(r["identified"]) for r in rows]
    chance = statistics.fmean(1 / r["candidates_n"] for r in rows)
    return {
        **share_interval(hits, units),
        "chance": chance,
        "p_value": chance_p_value(hits, units, chance),
        "candidates": round(1 / chance),
        "by_class": all(r["candidates_class"] for r in rows),
    }


def _null(rows: Sequence[Row], trials: Sequence[Row]) -> dict[str, Any] | None:
    """What the reconstructions score against other examples of the same labels."""
    nulls = [t.get("null") for t in trials]
    values = [value for null in nulls if null is not None for value in null["psnr"]]
    mean = _complete_mean(rows, "null_psnr")
    if mean is None or not values:
        return None
    weights = [len(null["psnr"]) for null in nulls if null is not None]
    shares = [null["recovered"] for null in nulls if null is not None]
    return {
        "psnr": {"mean": mean, "p95": float(np.quantile(values, 0.95))},
        "recovered": sum(share * weight for share, weight in zip(shares, weights, strict=True)) / sum(weights),
        "same_labels": all(null["labels"] for null in nulls if null is not None),
    }


def quantiles(values: Sequence[float], percents: Sequence[int]) -> dict[str, float]:
    return {str(p): float(np.quantile(values, p / 100)) for p in percents}


def _most_exposed(rows: Sequence[Row]) -> dict[str, Any]:
    """The victim with the highest PSNR: the worst case of a privacy audit."""
    worst = max(rows, key=lambda r: r["psnr"])
    return {"psnr": worst["psnr"], "trial": worst.get("trial", 0), "image": worst.get("image", 0)}


def unit_kind(rows: Sequence[Row]) -> str | None:
    """What an independent unit of these rows is, in one word."""
    if not rows:
        return None
    if "unit" in rows[0]:
        return str(rows[0]["unit"]).split(" ")[0]
    return next((name for name in ("client", "trial") if name in rows[0]), "image")


def _distribution(rows: Sequence[Row], key: str) -> dict[str, Any] | None:
    values = [r[key] for r in rows]
    if not values or None in values:
        return None
    return {
        "mean": statistics.fmean(values),
        "std": statistics.pstdev(values),
        "median": statistics.median(values),
    }


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


def _complete_mean(rows: Sequence[Row], key: str) -> float | None:
    values = [r.get(key) for r in rows]
    return None if None in values else _mean([v for v in values if v is not None])


def _optional_mean(entries: Sequence[Row], key: str) -> dict[str, float]:
    """The mean of a key that only some attacks have, by that key; empty without it."""
    values = [e[key] for e in entries if e.get(key) is not None]
    return {key: statistics.fmean(values)} if values else {}
