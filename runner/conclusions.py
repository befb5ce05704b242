"""What an audit concludes from the attacks that ran: entries of audit.json, the worst case and the verdict."""

import statistics
from collections.abc import Iterable, Mapping
from typing import Any

from evaluation.summary import RECOVERED_PSNR, is_recovered, summarize
from evaluation.verdict import outcome
from runner.battery import THREATS, Outcome
from runner.subjects import Subject

CANDIDATES = (2, 10, 100)  # among which the bound on identification is stated


def entry_of(o: Outcome, thresholds: tuple[float, ...]) -> dict[str, Any]:
    """What audit.json holds of one attack."""
    entry: dict[str, Any] = {
        "attack": o.attack.name,
        "threat": o.attack.threat,
        "paper": o.attack.citation,
        "status": o.status,
        "reason": o.reason,
        "updates": len(o.found),
        "changed": o.changed,
        "seconds": round(o.seconds, 1),
        "diverged": sum(found.status == "diverged" for found in o.found),
        "mismatch": _mean_of(o.records, "mismatch"),
        "mismatch_at_truth": _mean_of(o.records, "mismatch_at_truth"),
    }
    if o.rows:
        summary = summarize(o.rows, o.records, thresholds)
        summary["attack"] = o.attack.name
        entry |= {"verdict": outcome(summary), "recovered": o.share, "summary": summary, "failure": _failure(o, entry)}
    return entry


def _failure(o: Outcome, entry: Mapping[str, Any]) -> str | None:
    """Why an attack did not recover everything, as far as update mismatches tell; None if they do not."""
    found, true = entry["mismatch"], entry["mismatch_at_truth"]
    if o.share == 1 or found is None or true is None:
        return None
    if found > 1.05 * true + 1e-6:
        return "optimisation: the true records match the update better"
    return "ambiguity: other records match the update as well as the true ones"


def _mean_of(records: list[dict[str, Any]], key: str) -> float | None:
    values = [record[key] for record in records if record.get(key) is not None]
    return statistics.fmean(values) if values else None


def nearest_rows(outcomes: Iterable[Outcome]) -> list[dict[str, Any]]:
    """Of each record, the row of the attack that came nearest to it."""
    best: dict[tuple[int, int], dict[str, Any]] = {}
    for row in (row for o in outcomes for row in o.rows):
        key = (row["trial"], row["image"])
        if key not in best or row["psnr"] > best[key]["psnr"]:
            best[key] = row
    return list(best.values())


def worst_case(outcomes: list[Outcome]) -> dict[str, Any] | None:
    """Over all attacks: the share of records that some attack recovers, and the strongest attack of each server."""
    best = nearest_rows(outcomes)
    if not best:
        return None
    summary = summarize(best, [])
    strongest = {}
    for threat in THREATS:
        ran = [o for o in outcomes if o.rows and o.attack.threat == threat]
        if ran:
            top = max(ran, key=lambda o: (o.share, statistics.fmean(row["psnr"] for row in o.rows)))
            strongest[threat] = {"attack": top.attack.name, "recovered": top.share}
    exposed = sorted(best, key=lambda row: -row["psnr"])[:5]
    return {
        "records": len(best),
        "recovered": sum(map(is_recovered, best)),
        "share": summary["success_rate"],
        "interval": summary["recovered"].get("20"),
        "mean_psnr": summary["psnr"]["mean"] if summary["psnr"] else None,
        "max_psnr": max(row["psnr"] for row in best),
        "mean_image_psnr": summary["baseline_psnr"],
        "class_mean_psnr": summary["class_baseline_psnr"],
        "strongest": strongest,
        "most_exposed": [{k: row[k] for k in ("attack", "trial", "image", "psnr")} for row in exposed],
    }


def verdict_of(
    flags: Any,
    subject: Subject,
    entries: list[dict[str, Any]],
    worst: dict[str, Any] | None,
    agreement: dict[str, Any] | None,
) -> dict[str, Any]:
    """The sentence, the light and the exit code, with the thresholds that decide them."""
    ran = [e["attack"] for e in entries if e["status"] == "ran"]
    who = {
        "honest-but-curious": "the server, which follows the protocol,",
        "malicious-parameters": "a server that sends weights of its choice",
        "malicious-architecture": "a server that changes the model",
    }
    share, leaks = 0.0, [e for e in entries if e.get("verdict") == "leaks"]
    if not ran:
        light, sentence = "none", "No attack ran: nothing can be said about this update."
    elif worst is not None:
        share = worst["share"]
        if worst["recovered"]:
            top = max((e for e in entries if e.get("recovered")), key=lambda e: e["recovered"])
            light = "red" if share > flags.threshold else "amber"
            sentence = (
                f"{who[top['threat']].capitalize()} recovers {worst['recovered']} of {worst['records']} records from "
                f"their updates ({top['attack']}: {top['recovered']:.0%})."
            )
        elif leaks:
            light = "amber"
            sentence = (
                f"No record was recovered, but {', '.join(e['attack'] for e in leaks)} learnt more about them than "
                "their labels."
            )
        else:
            light, sentence = "no leak found", f"No leak found by {len(ran)} attack(s) in {flags.minutes:g} minutes."
    else:
        assert agreement is not None
        agreed, n = agreement["agreed_records"], subject.num_examples
        share = agreed / n
        light = "red" if share > flags.threshold else "no leak found"
        sentence = (
            f"Independent attacks agree on {agreed} of {n} records: this content is in the update."
            if agreed
            else f"No two of {len(ran)} attack(s) agree on a record in {flags.minutes:g} minutes; without the truth "
            "nothing else can be scored."
        )
    return {
        "sentence": sentence,
        "light": light,
        "share": share,
        "threshold": flags.threshold,
        "exit_code": int(share > flags.threshold or not ran),  # a check that checked nothing has not passed
        "thresholds": {
            "recovered": f"PSNR of at least {RECOVERED_PSNR:g} dB",
            "red": f"more than {flags.threshold:.0%} of the records recovered (or, without truth, agreed on)",
            "amber": "records recovered, but no more than allowed; or none, and a significant gain over the null",
            "no leak found": "neither; another attack, more time or another attacker may find one",
        },
    }


def formal(subject: Subject, entries: list[dict[str, Any]]) -> dict[str, Any]:
    """What is proven about one update, rather than measured, beside what the attacks measured.

    bounds: the largest probability with which any attack finds a record (or a client, by the unit of the guarantee)
    among so many candidates. identified: per attack the measured share, the number of candidates and the bound there.
    """
    from evaluation.guarantees import guarantee, success_bound  # scipy: not while flags are parsed

    found = guarantee(subject.recipe, subject.kind)
    bounds: list[dict[str, float]] = []
    if found is None:
        text = "The recipe bounds no record's influence on the update: there is no (epsilon, delta) guarantee."
    elif found["unit"] is None:
        text = f"The attacker knows the defence {subject.recipe.defense}: {found['reason']}."
    else:
        text = (
            f"The defence {subject.recipe.defense} is differentially private: epsilon {found['epsilon']:.3g} at delta "
            f"{found['delta']:g} for one update, neighbours differing in one {found['unit']}. Each further update adds "
            "to it."
        )
        bounds = [{"candidates": n, "chance": 1 / n, "bound": success_bound(1 / n, found["mu"])} for n in CANDIDATES]
    return {"guarantee": found, "text": text, "bounds": bounds, "identified": _identified(found, entries)}


def _identified(found: Mapping[str, Any] | None, entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What each attack identified, with the bound on it where the recipe is differentially private."""
    from evaluation.guarantees import identified_bound

    measured = []
    for entry in entries:
        share = entry.get("summary", {}).get("identified")
        if share is not None:
            bound = {} if found is None else identified_bound(found, share)
            own = {key: share[key] for key in ("share", "low", "high", "chance", "candidates")}
            measured.append({"attack": entry["attack"], **own, "bound": bound.get("identified_bound")})
    return measured


def harm(subject: Subject, worst: dict[str, Any] | None) -> dict[str, Any]:
    """Records expected to be recovered from one update."""
    share = worst["share"] if worst is not None else None
    expected = None if share is None else share * subject.num_examples
    return {"records_per_update": subject.num_examples, "expected_recovered_per_update": expected}
