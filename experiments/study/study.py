"""Every claim of the field, measured: attacks x observations x states x networks x data sets, and what else matters.

Writes table.md, runs.csv, claims.csv and report.html into --out. Runs that have finished are only read, so a killed
study continues where it stopped. claims.json lists the claims, and says which rows and which threshold decide each.
"""

import csv
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

import data
from attacks.base import ATTACKS
from core.errors import UsageError
from core.hyperparameters import hp, hyperparameters
from core.paths import ROOT
from experiments.results import replace_marked
from experiments.study import claims
from experiments.study.runs import (
    OBSERVATIONS,
    SETTINGS,
    SIDE,
    STATES,
    UTILITY,
    Plan,
    attack_names,
    cells,
    common_flags,
    run_all,
)
from report.page import write_page
from report.tables import number, table
from runner.cli import run_script
from runner.experiment import commit
from runner.workers import cores
from utils.files import write_bytes, write_json

STORED, PAGE, README = ROOT / "docs" / "study.json", ROOT / "docs" / "study.md", ROOT / "README.md"
FACTS = ("table", "attack", "network", "dataset", "observation", "state", "setting")
QUORUMS = {"most": ", for more than half of the attacks", "all": ", for every attack"}
PARTS = ("claims", "observations", "settings", "utility")  # tables of docs/study.md


@hyperparameters
class Flags:
    datasets: tuple[str, ...] = hp(("photos", "leaves"), "data sets of images")
    base_datadir: Path = hp(ROOT / "datasets", "folder of the data sets")
    out: Path = hp(ROOT / "results" / "study", "folder of the runs, the tables and the page")
    attacks: tuple[str, ...] = hp((), "attacks; default: all, with --quick without the slow variants")
    victims: int = hp(3, "attacked updates of a cell", ge=1)
    seeds: int = hp(0, "federations that measure accuracy; 0: 3 with --quick, 5 without", ge=0)
    jobs: int = hp(0, "runs at the same time; 0: one for each core", ge=0)
    backend: Literal["local", "ray"] = hp("local", "executor: processes, or runs in turn, each on Ray")
    quick: bool = hp(False, "one network for each attack and few iterations: minutes instead of hours")
    docs: bool = hp(False, "docs/study.json and docs/study.md written anew from these runs")
    render: bool = hp(False, "docs/study.md written again from docs/study.json, without a run")


def main(flags: Flags) -> None:
    if flags.render:
        write_docs(json.loads(STORED.read_text(encoding="utf-8")))
        return
    if unknown := sorted(set(flags.attacks) - set(ATTACKS)):
        raise UsageError(f"`attacks`: {unknown[0]} is none of {', '.join(ATTACKS)}")
    for name in flags.datasets:  # one line for a data set that is not there, before anything runs
        data.load(name, base_datadir=flags.base_datadir, image_size=SIDE, victims="reporting")
    plan = Plan(
        datasets=flags.datasets,
        attacks=flags.attacks or attack_names(flags.quick),
        victims=flags.victims,
        seeds=flags.seeds or (3 if flags.quick else 5),
        rounds=10 if flags.quick else 20,
        quick=flags.quick,
        common=common_flags(flags.base_datadir, flags.out, flags.backend),
    )
    measured_on = commit()  # before a table is written
    found = cells(plan)
    rows = run_all(found, 1 if flags.backend == "ray" else flags.jobs or cores())
    folders = [Path(row["folder"]) for row in rows if "folder" in row]
    if not folders:
        raise UsageError("none of these `attacks` applies to these `datasets`")
    stored = {
        "commit": measured_on,
        "torch": torch.__version__,
        "cores": os.cpu_count(),
        "quick": flags.quick,
        "victims": plan.victims,
        "rows": [_stored(row) for row in rows],
    }
    write_results(flags.out, stored)
    write_page(list(dict.fromkeys(folders)), flags.out / "report.html")
    if flags.docs:
        write_bytes(STORED, (json.dumps(stored, indent=None, sort_keys=True) + "\n").encode())
        write_docs(stored)
    print(render("claims", stored))
    print(f"\n{flags.out}: table.md, runs.csv, claims.csv, report.html")


def _stored(row: Mapping[str, Any]) -> dict[str, Any]:
    """What a row's tables and claims are made of."""
    kept = {name: row[name] for name in (*FACTS, "refused", "command", "units") if name in row}
    units = row.get("units", {})
    kept["units"] = {unit: {name: round(value, 6) for name, value in values.items()} for unit, values in units.items()}
    if "refused" in row:
        del kept["units"]
    else:
        kept |= {"verdict": row["summary"].get("verdict"), "seconds": round(row["summary"]["seconds"], 1)}
    return kept


def write_results(out: Path, stored: Mapping[str, Any]) -> None:
    """table.md, runs.csv (a line for each run) and claims.csv."""
    text = "\n\n".join(f"## {title}\n\n{render(part, stored)}" for part, title in TITLES.items())
    write_bytes(out / "table.md", (text + "\n").encode())
    scores = ("rebuilt", "identified", "recovered", "psnr", "gain", "accuracy")
    lines = []
    for row in stored["rows"]:
        line: dict[str, Any] = {name: row[name] for name in FACTS}
        for score in scores:
            interval = claims.pooled([row], score) if "units" in row else {"value": None, "low": None, "high": None}
            line |= {score: interval["value"], f"{score}_low": interval["low"], f"{score}_high": interval["high"]}
        line |= {"units": len(row.get("units", ())), "images": sum(u["n"] for u in row.get("units", {}).values())}
        line |= {name: row.get(name) for name in ("verdict", "seconds", "command", "refused")}
        lines.append(line)
    _write_csv(out / "runs.csv", lines)
    judged = [(claim, claims.judge(claim, stored["rows"])) for claim in claims.load()]
    _write_csv(
        out / "claims.csv",
        [
            {
                **{name: claim[name] for name in ("name", "claim", "source", "score", "comparison", "threshold")},
                **{name: found.get(name) for name in ("verdict", "value", "low", "high", "n")},
                **{name: " ".join(found.get(name, ())) for name in ("yes", "no", "open")},
            }
            for claim, found in judged
        ],
    )
    write_json(out / "claims.json", {claim["name"]: found for claim, found in judged})


def _write_csv(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)


# --- tables ---------------------------------------------------------------------------------------------------------


def render(part: str, stored: Mapping[str, Any]) -> str:
    """The Markdown of one of PARTS."""
    rows: Sequence[claims.Row] = stored["rows"]
    return {"claims": _claims, "observations": _observations, "settings": _settings, "utility": _utility}[part](rows)


def _claims(rows: Sequence[claims.Row]) -> str:
    lines = []
    for claim in claims.load():
        found = claims.judge(claim, rows)
        lines.append([claim["claim"], f"**{found['verdict']}**", _evidence(claim, found), _rule(claim)])
    return table(["claim", "verdict", "evidence", "decided by"], lines)


def _evidence(claim: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    if "yes" in found:
        parts = [("yes", "for"), ("no", "against"), ("open", "undecided")]
        words = [f"{len(found[key])} {word} ({', '.join(found[key])})" for key, word in parts if found[key]]
        return "; ".join(words) or "no run"
    if found["value"] is None:
        return "no run"
    return f"{_interval(found)}, n = {found['n']}"


def _rule(claim: Mapping[str, Any]) -> str:
    what = {"psnr": "PSNR in dB", "accuracy": "test accuracy"}.get(claim["score"], f"share {claim['score']}")
    if "against" in claim:
        what = f"difference in {what}"
    quorum = QUORUMS.get(claim.get("quorum", ""), "")
    return f"{what} {claim['comparison'].replace('>=', '≥').replace('<=', '≤')} {claim['threshold']:g}{quorum}"


def _interval(found: Mapping[str, Any], digits: int = 2) -> str:
    text = number(found["value"], digits)
    return text if found["low"] is None else f"{text} [{number(found['low'], digits)}, {number(found['high'], digits)}]"


def _observations(rows: Sequence[claims.Row]) -> str:
    """The share of rebuilt images: a line for each attack and state, a column for each observation."""
    lines = []
    grid = [row for row in rows if row["table"] == "grid" and "units" in row]
    for attack in sorted({row["attack"] for row in grid}):
        for state in STATES:
            own = [row for row in grid if row["attack"] == attack and row["state"] == state]
            if own:
                networks = ", ".join(dict.fromkeys(row["network"] for row in own))
                shares = [_share([row for row in own if row["observation"] == name]) for name in OBSERVATIONS]
                lines.append([f"`{attack}`", state, networks, *shares])
    return table(["attack", "network is", "networks", *OBSERVATIONS], lines)


def _share(rows: Sequence[claims.Row]) -> str:
    if not rows:
        return "-"
    found = claims.pooled(rows, "rebuilt")
    if found["value"] is None:  # no images: the verdicts of the runs
        return ", ".join(sorted({str(row["verdict"]) for row in rows}))
    return f"{_interval(found)} ({found['n']})"


def _settings(rows: Sequence[claims.Row]) -> str:
    lines = []
    for name, (attack, _, _, settings) in SETTINGS.items():
        for setting in settings:
            own = [row for row in rows if row["table"] == name and row["setting"] == setting and "units" in row]
            if own:
                psnr, share = claims.pooled(own, "psnr"), claims.pooled(own, "rebuilt")
                cells = [_interval(psnr, 1), _interval(share), str(psnr["n"])]
                lines.append([name, f"`{attack}`", own[0]["network"], setting, *cells])
    return table(["setting", "attack", "network", "value", "PSNR dB", "rebuilt", "units"], lines)


def _utility(rows: Sequence[claims.Row]) -> str:
    lines = []
    for dataset in dict.fromkeys(row["dataset"] for row in rows if row["table"] == "utility"):
        for setting in UTILITY:
            own = [row for row in rows if row["table"] == "utility" and row["setting"] == setting and "units" in row]
            found = claims.pooled([row for row in own if row["dataset"] == dataset], "accuracy")
            lines.append([dataset, setting, _interval(found, 3), str(found["n"])])
    return table(["data", "federation", "test accuracy", "seeds"], lines)


TITLES = {
    "claims": "Claims",
    "observations": "Share of images rebuilt",
    "settings": "What else matters",
    "utility": "What Robbing the Fed costs",
}
assert tuple(TITLES) == PARTS


# --- docs/study.md --------------------------------------------------------------------------------------------------


def write_docs(stored: Mapping[str, Any]) -> None:
    """Replace the tables of docs/study.md and the list in README. Raises UsageError if one has no place."""
    for part in PARTS:
        replace_marked(PAGE, f"study {part}", block(part, stored))
    replace_marked(README, "study verdicts", verdict_block(stored))


def verdict_block(stored: Mapping[str, Any]) -> str:
    """How many claims are confirmed, refuted and not shown, and a list of those that are refuted."""
    judged = [(claim, claims.judge(claim, stored["rows"])) for claim in claims.load()]
    count = Counter(found["verdict"] for _, found in judged)
    counts = ", ".join(f"{count[verdict]} {verdict}" for verdict in ("confirmed", "refuted", "not shown"))
    refuted = [(claim, found) for claim, found in judged if found["verdict"] == "refuted"]
    lines = [f"- {claim['claim']} ({_evidence(claim, found)})" for claim, found in refuted]
    first = f"{len(judged)} claims: {counts}." + (" Refuted:" if refuted else "")
    return "\n".join([first, "", *lines, *([""] if lines else []), _source(stored)])


def block(part: str, stored: Mapping[str, Any]) -> str:
    """A table and the line below it."""
    return f"{render(part, stored)}\n\n{_source(stored)}"


def _source(stored: Mapping[str, Any]) -> str:
    machine = f"torch {stored['torch']}, {stored['cores']} CPU cores"
    return f"(`{command(stored)}`; commit `{stored['commit']}`, {machine}.)"


def command(stored: Mapping[str, Any]) -> str:
    """The command that measures a stored study. Attacks are named if the study has others today."""
    attacks = list(dict.fromkeys(row["attack"] for row in stored["rows"] if row["table"] == "grid"))
    own = "" if set(attacks) == set(attack_names(stored["quick"])) else f" --attacks {' '.join(sorted(attacks))}"
    return f"sh experiments/study.sh{' --quick' if stored['quick'] else ''}{own} --docs"


if __name__ == "__main__":
    run_script(Flags, main, __doc__)
