"""The numbers of a run, from the rows of its images and the records of its trials."""

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

RECOVERED_PSNR = 20.0  # dB; recognisable at 32x32

Row = Mapping[str, Any]


def is_recovered(row: Row) -> bool:
    """Whether a true example has a reconstruction of its own that reaches `RECOVERED_PSNR`."""
    return row["match"] is not None and row["psnr"] >= RECOVERED_PSNR


def summarize(rows: Sequence[Row], trials: Sequence[Row]) -> dict[str, Any]:
    """The numbers of summary.json.

    rows: one for each true example, as in rows.jsonl; none if the truth is unknown. trials: one for each attacked
    update, as in trials.jsonl. An entry is None where a row has no value, rather than a mean over some of the rows.
    Entries that only some attacks have are left out for others.
    """
    recovered = [r["psnr"] for r in rows if is_recovered(r)]
    return {
        "images": len(rows),
        "psnr": _distribution(rows, "psnr"),
        "ssim": _distribution(rows, "ssim"),
        "lpips": _distribution(rows, "lpips"),
        "label_accuracy": _mean([float(r["label_ok"]) for r in rows if r["label_ok"] is not None]),
        "success_rate": _mean([float(is_recovered(r)) for r in rows]),
        "baseline_psnr": _complete_mean(rows, "baseline_psnr"),
        "class_baseline_psnr": _complete_mean(rows, "class_baseline_psnr"),
        "over_class_mean": gain_over(rows, "class_baseline_psnr"),
        "seconds": sum(t["seconds"] for t in trials),
        "missed": sum(r["match"] is None for r in rows),
        "status": dict(sorted(Counter(t["status"] for t in trials).items())),
        "recovered_psnr": statistics.median(recovered) if recovered else None,
        **_optional_mean(rows, "ceiling"),
        **_optional_mean(trials, "candidates"),
        **_optional_mean(trials, "control"),
        **_optional_mean(rows, "oracle_corr"),
        **_optional_mean(rows, "oracle_affine_psnr"),
        **_optional_mean(rows, "oracle_floor_psnr"),
        **_optional_mean(rows, "companion_psnr"),
        **({"over_companion": gain_over(rows, "companion_psnr")} if rows and "companion_psnr" in rows[0] else {}),
        **_optional_mean(rows, "sign_ok"),
    }


def gain_over(rows: Sequence[Row], key: str) -> dict[str, float] | None:
    """The mean of PSNR minus the PSNR under `key`, in dB, with its 95% interval by Student's t.

    The difference is taken example by example. Examples of one update, or of one client over the rounds, are not
    independent: their mean counts as one observation. None for fewer than two observations, and where `key` is None.

    Over "class_baseline_psnr" this is what the examples reveal beyond their label.
    """
    from scipy.special import stdtrit

    if any(r[key] is None for r in rows):
        return None
    groups: dict[Any, list[float]] = {}
    for number, r in enumerate(rows):
        groups.setdefault(r.get("client", r.get("trial", f"row {number}")), []).append(r["psnr"] - r[key])
    gains = [statistics.fmean(group) for group in groups.values()]
    if len(gains) < 2:
        return None
    mean = statistics.fmean(gains)
    half = float(stdtrit(len(gains) - 1, 0.975)) * statistics.stdev(gains) / math.sqrt(len(gains))
    return {"mean": mean, "low": mean - half, "high": mean + half}


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


def _distribution(rows: Sequence[Row], key: str) -> dict[str, float] | None:
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
    values = [r[key] for r in rows]
    return None if None in values else _mean(values)


def _optional_mean(entries: Sequence[Row], key: str) -> dict[str, float]:
    """The mean of a key that only some attacks have, by that key; empty without it."""
    values = [e[key] for e in entries if e.get(key) is not None]
    return {key: statistics.fmean(values)} if values else {}
