"""Leakage over rounds: what one update of a client gives away as training goes on, and what several give together.

An attacker who attacks one client in several rounds has a reconstruction of the same examples from each. Which of them
is best, only the truth could tell. The attacker takes the one with the lowest objective of the attack: the one whose
simulated update is nearest to the observed update.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from evaluation.summary import RECOVERED_PSNR, is_recovered

Row = Mapping[str, Any]


def over_rounds(rows: Sequence[Row], trials: Sequence[Row]) -> list[dict[str, Any]] | None:
    """One entry for each attacked round, from 1; None if no client was attacked in two rounds.

    rows, trials: as in rows.jsonl and trials.jsonl. psnr, null_psnr, recovered: means over the examples attacked in the
    round, recovered at 20 dB. accumulated: None if the attack has no objective; else `psnr` and `recovered` of the same
    clients when of each the update with the lowest objective so far is taken.
    """
    updates = {t["trial"]: t for t in trials if "round" in t and "client" in t}
    by_trial: dict[int, list[Row]] = {}
    for row in rows:
        by_trial.setdefault(row["trial"], []).append(row)
    attacked = [(t["round"], t["client"]) for t in updates.values()]
    if len({client for _, client in attacked}) == len(attacked) or any("psnr" not in row for row in rows):
        return None
    best: dict[int, Row] = {}  # by client, the update with the lowest objective
    entries = []
    for number in sorted({number for number, _ in attacked}):
        now = [t for t in updates.values() if t["round"] == number]
        own = [row for t in now for row in by_trial.get(t["trial"], ())]
        for t in now:
            value, earlier = _objective(t), best.get(t["client"])
            if value is not None and (earlier is None or value < (_objective(earlier) or 0.0)):
                best[t["client"]] = t
        chosen = [row for t in now for row in _rows_of(best.get(t["client"]), by_trial)]
        nulls = [row["null_psnr"] for row in own if row.get("null_psnr") is not None]
        entries.append(
            {
                "round": number + 1,
                "images": len(own),
                **_scores(own),
                "null_psnr": sum(nulls) / len(nulls) if nulls else None,
                "accumulated": _scores(chosen) if len(chosen) == len(own) else None,
            }
        )
    return entries


def _objective(trial: Row) -> float | None:
    found = trial.get("objective")
    value = None if found is None else found["answer"]
    return None if value is None else float(value)


def _rows_of(trial: Row | None, by_trial: Mapping[int, list[Row]]) -> Sequence[Row]:
    return () if trial is None else by_trial.get(trial["trial"], ())


def _scores(rows: Sequence[Row]) -> dict[str, float]:
    return {
        "psnr": sum(row["psnr"] for row in rows) / len(rows),
        "recovered": sum(is_recovered(row, RECOVERED_PSNR) for row in rows) / len(rows),
    }
