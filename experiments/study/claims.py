"""What the measurements say of each claim: confirmed, refuted, or not shown.

claims.json lists the claims (JSON, because tomllib needs Python 3.11): the sentence, its source, the rows that decide
it, the score, the comparison and the threshold. They are written before the runs.

    rows, against   fact -> value, or a list of values; with `against`, the score is the difference, unit by unit
    pairs           facts that two rows of a difference share; scores are averaged over all other facts
    given           only attacks that reach `least` on these other rows
    each, quorum    one decision for each attack (`against`: each of that side), and how many must agree: most, all
"""

import json
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from evaluation.intervals import LEAST_UNITS, mean_interval, share_interval
from experiments.study.runs import SCORES

CLAIMS = Path(__file__).parent / "claims.json"
VERDICTS = ("confirmed", "refuted", "not shown")
LEAST_ATTACKS = 3  # that a claim about most attacks needs
NOT_ATTACKS = ("baseline",)  # learns nothing from an update

Row = Mapping[str, Any]  # a measurement: facts, and units or `refused`
Values = list[tuple[Hashable, float, float]]  # unit, sum of the score over its images, images


def load() -> list[dict[str, Any]]:
    """The claims, in the order of their file."""
    found: list[dict[str, Any]] = json.loads(CLAIMS.read_text(encoding="utf-8"))
    return found


def judge(claim: Mapping[str, Any], rows: Sequence[Row]) -> dict[str, Any]:
    """{verdict, value, low, high, n} of a mean or difference, or {verdict, yes, no, open}: attacks by their verdict."""
    chosen = _select(rows, claim["rows"])
    against = _select(rows, claim["against"]) if "against" in claim else None
    each = claim.get("each")
    if each is None:
        return _decided(claim, chosen, against)
    side = chosen if each == "attack" else against
    assert side is not None, f"claim {claim['name']}: each attack of which side?"
    names = sorted({row["attack"] for row in side} - {claim["rows"].get("attack")})
    names = [name for name in names if _reaches(claim, rows, name)]
    found: dict[str, list[str]] = {verdict: [] for verdict in VERDICTS}
    for name in names:
        own = [row for row in side if row["attack"] == name]
        single = _decided(claim, own, None) if each == "attack" else _decided(claim, chosen, own)
        found[single["verdict"]].append(name)
    verdict = _majority(claim["quorum"], *(len(found[name]) for name in VERDICTS))
    return {"verdict": verdict, "yes": found["confirmed"], "no": found["refuted"], "open": found["not shown"]}


def _majority(quorum: str, yes: int, no: int, undecided: int) -> str:
    """The verdict of several attacks: `most` needs more than half of them, `all` needs every one."""
    total = yes + no + undecided
    if total < LEAST_ATTACKS:
        return "not shown"
    if total and (yes == total if quorum == "all" else 2 * yes > total):
        return "confirmed"
    if no and (quorum == "all" or 2 * no >= total):
        return "refuted"
    return "not shown"


def _reaches(claim: Mapping[str, Any], rows: Sequence[Row], attack: str) -> bool:
    given = claim.get("given")
    if given is None:
        return True
    own = [row for row in _select(rows, given["rows"]) if row["attack"] == attack]
    values = _values(own, claim["score"])
    return bool(values) and sum(v for _, v, _ in values) / sum(n for *_, n in values) >= given["least"]


def _select(rows: Iterable[Row], facts: Mapping[str, Any]) -> list[Row]:
    wanted = {name: value if isinstance(value, list) else [value] for name, value in facts.items()}
    found = [row for row in rows if "units" in row and all(row[name] in values for name, values in wanted.items())]
    return [row for row in found if row["table"] != "grid" or row["attack"] not in NOT_ATTACKS]


def _decided(claim: Mapping[str, Any], rows: Sequence[Row], against: Sequence[Row] | None) -> dict[str, Any]:
    """The interval of the score, and on which side of the threshold it lies."""
    score = claim["score"]
    if against is None:
        interval = pooled(rows, score)
    else:
        interval = difference(rows, against, score, claim["pairs"])
    low, high, threshold = interval["low"], interval["high"], claim["threshold"]
    verdict = "not shown"
    if low is not None and high is not None and interval["n"] >= LEAST_UNITS:
        above = claim["comparison"] == ">="
        if low >= threshold if above else high <= threshold:
            verdict = "confirmed"
        elif high < threshold if above else low > threshold:
            verdict = "refuted"
    return {"verdict": verdict, **interval}


def pooled(rows: Sequence[Row], score: str) -> dict[str, Any]:
    """{value, low, high, n}: the mean of a score and its 95% interval; n independent units.

    The same victim attacked through two networks is one unit.
    """
    values = _values(rows, score)
    if not values:
        return {"value": None, "low": None, "high": None, "n": 0}
    if score in SCORES:
        hits = [k < round(total) for _, total, n in values for k in range(round(n))]
        units = [unit for unit, _, n in values for _ in range(round(n))]
        share = share_interval(hits, units)
        return {"value": share["share"], "low": share["low"], "high": share["high"], "n": len(set(units))}
    each = [(unit, total / n) for unit, total, n in values for _ in range(round(n))]
    mean = mean_interval([value for _, value in each], [unit for unit, _ in each])
    return {"value": mean["mean"], "low": mean["low"], "high": mean["high"], "n": mean["n"]}


def difference(rows: Sequence[Row], against: Sequence[Row], score: str, pairs: Sequence[str]) -> dict[str, Any]:
    """{value, low, high, n}: the mean difference of a score over units that both sides have, and its 95% interval."""
    left, right = (_by_pair(side, score, pairs) for side in (rows, against))
    both = [(key, left[key] - right[key]) for key in left if key in right]
    if not both:
        return {"value": None, "low": None, "high": None, "n": 0}
    found = mean_interval([value for _, value in both], [key[-1] for key, _ in both])
    return {"value": found["mean"], "low": found["low"], "high": found["high"], "n": found["n"]}


def _by_pair(rows: Sequence[Row], score: str, pairs: Sequence[str]) -> dict[tuple[Hashable, ...], float]:
    """(the facts of `pairs`, unit) -> the mean score of the unit's images."""
    sums: dict[tuple[Hashable, ...], list[float]] = defaultdict(lambda: [0.0, 0.0])
    for row in rows:
        for unit, total, n in _values([row], score):
            entry = sums[(*(row[name] for name in pairs), unit)]
            entry[0] += total
            entry[1] += n
    return {key: total / n for key, (total, n) in sums.items()}


def _values(rows: Sequence[Row], score: str) -> Values:
    return [
        ((row["dataset"], unit), values[score], values["n"])
        for row in rows
        for unit, values in row["units"].items()
        if score in values
    ]
