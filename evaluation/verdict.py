"""Whether an update leaks its examples, from the summary of a run."""

from collections.abc import Mapping
from typing import Any, Literal

Outcome = Literal["leaks", "no leak found by this attack", "too few updates to tell"]

P_VALUE = 0.025  # for each of the two ways to "leaks": 5% of false alarms in all
LEAST_GAIN = 0.01  # dB; what a table shows
UNDECIDED = 3.0  # dB, half the squared error: an interval from zero to beyond this decides nothing


def outcome(summary: Mapping[str, Any]) -> Outcome | None:
    """What the run showed; None if nothing was scored or nothing to compare with exists.

    leaks: the 95% interval of the gain lies above zero, or more victims are identified than chance allows (p < 0.025).
    too few updates to tell: the gain is positive, and its interval reaches beyond 3 dB or does not exist. no leak found
    by this attack: everything else, and always for `baseline`, which does not look at the update.

    The gain is PSNR minus the null, and also minus the means of the true classes where the null could not be drawn from
    examples of the same labels; both must then be positive.
    """
    gains, identified = _gains(summary), summary.get("identified")
    if not summary["images"] or not (gains or identified):
        return None
    if summary.get("attack") == "baseline":
        return "no leak found by this attack"
    if identifies(summary) or (gains and all(g["low"] is not None and g["low"] >= LEAST_GAIN for g in gains)):
        return "leaks"
    if gains and all(g["mean"] > 0 and (g["high"] is None or g["high"] > UNDECIDED) for g in gains):
        return "too few updates to tell"
    return "no leak found by this attack"


def identifies(summary: Mapping[str, Any]) -> bool:
    """Whether more victims are identified than by chance, beyond what granted labels explain."""
    found = summary.get("identified")
    if found is None or found["p_value"] >= P_VALUE:
        return False
    return found["by_class"] or "labels" not in summary.get("oracle", ())


def _gains(summary: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The gains that must be positive, with `low` and `high` None for fewer than three units."""
    over_null, null = summary.get("over_null"), summary.get("null")
    if over_null is not None and null is not None and null["same_labels"]:
        return [over_null]
    return [gain for gain in (over_null, summary.get("over_class_mean")) if gain is not None]
