"""An audit: every attack that applies to a model and a recipe, or to a captured update, within a time limit.

The answer is audit.json, and audit.md and report.html for people: a verdict with its thresholds, the worst case, what
was tried and failed, what is proven, and the weakest setting that would pass. The exit code is 1 if more records are
recovered than the user allows.
"""

import argparse
import dataclasses
import platform
import shlex
import sys
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from attacks.base import ATTACKS
from core.errors import UsageError
from core.hyperparameters import help_of
from core.paths import ROOT
from defenses.base import canonical
from report.audit import markdown
from report.page import audit_page
from report.page.images import Pair, png, select_pairs
from report.page.render import PICTURES
from runner import cli
from runner.battery import ORDER, Battery, Outcome, with_subject
from runner.conclusions import entry_of, formal, harm, nearest_rows, verdict_of, worst_case
from runner.experiment import SOURCE_DIRS, commit
from runner.store import source_digest
from runner.subjects import Audit, simulated, subject_of
from runner.workers import cores
from utils.files import digest, write_atomically, write_bytes, write_json
from utils.flags import FlagError, Parser, add_flags, given

# what does not apply to an audit, which runs several attacks once, in this process
NOT_HERE = ("sweep", "paper", "force", "backend", "jobs")
NOISE = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # standard deviations of the settings that are tried as a recommendation


def main() -> None:
    """Run the audit of the command line; exit code 0 or 1 by the verdict, 2 for a mistake of the user."""
    with cli.user_errors():
        parser = Parser(prog="main_audit.py", description="Every attack that applies, within a time limit.")
        add_flags(parser, Audit, lambda cls, field: cli.choices(help_of(cls, field)), switches_only=True)
        for action in parser._actions:
            if action.dest in NOT_HERE:
                action.help = argparse.SUPPRESS
        try:
            flags = Audit(**given(Audit, parser.parse(sys.argv[1:])))
        except FlagError as error:
            raise UsageError(str(error)) from None
        result, folder = audit(flags, sys.argv[1:])
    print(result["verdict"]["sentence"])
    print(f"{folder / 'report.html'}, audit.md, audit.json")
    raise SystemExit(result["verdict"]["exit_code"])


def audit(flags: Any, words: list[str] | None = None) -> tuple[dict[str, Any], Path]:
    """The audit as audit.json has it, and the folder it was written to. `words` are the command line, to repeat it."""
    defaults = Audit()
    for name in NOT_HERE:
        if getattr(flags, name) != getattr(defaults, name):
            raise UsageError(f"`{name}` does not apply to an audit")
    if flags.truth is not None and flags.update is None:
        raise UsageError("`truth` belongs to `update`: the truth of simulated clients is known")
    for name in flags.attacks:
        ATTACKS.find(name)
    subject = subject_of(flags)
    torch.set_num_threads(flags.threads or 1)  # a second one costs more than it brings where cores are shared
    code = source_digest(ROOT, SOURCE_DIRS)
    folder = flags.out / "audit" / digest({"flags": dataclasses.asdict(flags), "code": code})
    folder.mkdir(parents=True, exist_ok=True)  # before the work: a folder that cannot be written costs no time
    battery = Battery(flags, subject)
    outcomes = battery.all()
    result = conclude(battery, outcomes, words or [], code)
    _write(folder, battery, outcomes, result)
    return result, folder


def conclude(battery: Battery, outcomes: list[Outcome], words: list[str], code: str) -> dict[str, Any]:
    """Everything that audit.json holds."""
    subject, flags = battery.subject, battery.flags
    scored = subject.context is not None
    leaking = sorted((o for o in outcomes if o.share > flags.threshold), key=lambda o: -o.share)
    entries = [entry_of(o, flags.thresholds) for o in outcomes]
    worst = worst_case(outcomes)
    agreement = None if scored else battery.agreement(outcomes)
    controlled = control(battery, outcomes) if scored else None
    advice = None
    if leaking and not flags.verdict_only and flags.update is None:
        advice = recommendation(battery, leaking)
    verdict = verdict_of(flags, subject, entries, worst, agreement)
    parameters = sum(p.numel() for p in subject.model.parameters())
    return {
        "verdict": verdict,
        "scope": {
            **subject.scope,
            "model": flags.model,
            "parameters": parameters,
            "weights": _weights_digest(subject.model),
            "recipe": dataclasses.asdict(subject.recipe),
            "kind": subject.kind,
            "records_per_update": subject.num_examples,
            "updates": flags.trials if flags.update is None else 1,
            "seed": flags.seed,
            "commit": commit(),
            "code": code,
            "torch": torch.__version__,
            "hardware": f"{platform.machine()}, {cores()} cores, {subject.device.type}",
            "date": time.strftime("%Y-%m-%d"),
        },
        "threat_model": {
            "server": flags.threat,
            "knows": ["model", "recipe", "update", *(["public examples"] if subject.public is not None else [])],
            "granted": list(subject.granted),
            "beliefs": list(flags.believe),
        },
        "worst_case": worst,
        "attacks": entries,
        "agreement": agreement,
        "control": controlled,
        "formal": formal(subject, entries),
        "inspection": battery.inspection.as_dict(),
        "recommendation": advice,
        "harm": harm(subject, worst),
        "reproduce": {"command": shlex.join(["python", "main_audit.py", *words])},
        "minutes": round((time.monotonic() - battery.start) / 60, 2),
    }


def recommendation(battery: Battery, leaking: list[Outcome]) -> dict[str, Any]:
    """The weakest noise, added to the recipe, under which no attack that leaks now leaks more than allowed.

    Bisection: a setting is tried only if none that was tried decides it, as more noise never helps the attacker.
    """
    base, threshold = battery.subject.recipe.defense, battery.flags.threshold
    settings = [canonical(("" if base == "none" else f"{base}+") + f"gauss(sigma={sigma:g})") for sigma in NOISE]
    tried: dict[int, dict[str, float]] = {}  # shares by position in `settings`
    weakest, below = len(settings), -1  # the weakest that passed, and the strongest that failed
    while weakest - below > 1 and battery.left() > leaking[0].seconds:
        position = (weakest + below) // 2
        shares = tried[position] = _shares(battery, leaking, settings[position])
        passed = len(shares) == len(leaking) and all(share <= threshold for share in shares.values())
        weakest, below = (position, below) if passed else (weakest, position)
    found = settings[weakest] if weakest < len(settings) else None
    decided = weakest - below == 1
    return {
        "setting": found,
        "weakest": decided,
        "tried": [{"defense": settings[position], "recovered": tried[position]} for position in sorted(tried)],
        "reason": "" if found else "no setting that was tried passes" if decided else "the time limit was reached",
    }


def _shares(battery: Battery, leaking: list[Outcome], setting: str) -> dict[str, float]:
    """The share of records that each attack recovers under a defence, up to the first that recovers too many."""
    subject = simulated(dataclasses.replace(battery.flags, defense=setting))
    shares: dict[str, float] = {}
    for position, outcome in enumerate(leaking):
        attack: Any = outcome.attack
        own = dataclasses.replace(attack, **outcome.changed)
        jobs = subject.jobs(own)[: len(outcome.found)]
        again = with_subject(battery, subject).run(own, jobs, battery.left() / (len(leaking) - position))
        if again.status != "ran":
            break
        shares[own.name] = again.share
        if again.share > battery.flags.threshold:
            break
    return shares


def control(battery: Battery, outcomes: list[Outcome]) -> dict[str, Any] | None:
    """What the strongest attack recovers without the defence; None for a recipe without one."""
    ran = [o for o in outcomes if o.status == "ran"]
    if battery.subject.recipe.defense == "none" or battery.flags.update is not None or not ran or battery.left() < 10:
        return None
    subject = simulated(dataclasses.replace(battery.flags, defense="none"))
    best = max(ran, key=lambda o: (o.share, -ORDER.index(o.attack.name) if o.attack.name in ORDER else -99))
    attack: Any = best.attack
    own = dataclasses.replace(attack, **best.changed)
    found = with_subject(battery, subject).run(own, subject.jobs(own), battery.left() / 2)
    return {"attack": own.name, "recovered": found.share, "defended": best.share, "status": found.status}


def _write(folder: Path, battery: Battery, outcomes: list[Outcome], result: Mapping[str, Any]) -> None:
    """audit.json, rows, reconstructions and the page as Markdown and HTML.

    Pictures are on the page if the user asks for them, or if no truth exists.
    """
    found = {
        f"{o.attack.name}:{record['trial']}": rec.examples.contiguous()
        for o in outcomes
        for record, rec in zip(o.records, o.found, strict=True)
    }
    if found:
        write_atomically(folder / "reconstructions.safetensors", lambda path: save_file(found, path))
    write_json(folder / "rows.json", [row for o in outcomes for row in o.rows])
    write_json(folder / "audit.json", result)
    text = markdown(result)
    write_atomically(folder / "audit.md", lambda path: path.write_text(text, encoding="utf-8"))
    rows = nearest_rows(outcomes)
    scored = battery.subject.context is not None
    pairs = _pairs(outcomes, rows) if scored and battery.flags.show_victims else None
    page = audit_page(result, rows, pairs, {} if scored else _shots(outcomes))
    write_bytes(folder / "report.html", page.encode("utf-8", "replace"))


def _pairs(outcomes: list[Outcome], rows: list[dict[str, Any]]) -> list[Pair]:
    """The records of these rows beside their reconstructions."""
    places = {id(row): (o, k) for o in outcomes for k, row in enumerate(o.rows)}

    def pictures(which: str, place: int) -> Tensor:
        outcome, k = places[id(rows[place])]
        return torch.cat(getattr(outcome, which))[k]

    return select_pairs(rows, partial(pictures, "truths"), partial(pictures, "rebuilt"), PICTURES)


def _shots(outcomes: list[Outcome]) -> dict[str, list[str]]:
    """Pictures of what each attack returned for the first update."""
    ran = [o for o in outcomes if o.status == "ran" and o.found[0].examples.ndim == 4]
    return {o.attack.name: [png(x) for x in o.found[0].examples] for o in ran if len(o.found[0].examples)}


def _weights_digest(model: nn.Module) -> str:
    """A digest of the weights as broadcast."""
    sums = [(name, float(p.detach().double().sum()), list(p.shape)) for name, p in model.named_parameters()]
    return digest(sums)
