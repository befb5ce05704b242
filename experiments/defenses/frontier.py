"""Attacks x defences x strengths: what leaks to an attacker who does and does not know the defence, at what accuracy.

Every cell is an ordinary run of main_fed.py in which each of a few clients takes one local step on its own images and
is attacked once. The static attacker believes that there is no defence; the adaptive one knows it. `identify` names
the victim among candidates, which is what differential privacy bounds. A cell counts only if the same attack on the
same victims without a defence, its control, recovers at least half of the images. Accuracy comes from a federation that
trains for some rounds under the defence. Runs that have finished are not repeated.

Verdicts, by the share of images recovered (the worse of both attackers) over that of the control, each minus the share
that other images of the same labels would be: broken (at least half), weak (at least a tenth, or more victims are
identified than by chance), holds (less). Thresholds are constants here.
"""

import contextlib
import csv
import io
import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from attacks.base import ATTACKS
from core.errors import UsageError
from core.hyperparameters import hp, hyperparameters
from core.paths import ROOT
from core.protocol import Batch, Observation
from core.rng import stream
from evaluation.guarantees import guarantee, identified_bound
from evaluation.intervals import chance_p_value, share_interval
from evaluation.likelihood import Identification
from evaluation.verdict import identifies
from federated.client import train
from report import style
from report.tables import number, table
from runner import cli
from runner.experiment import Experiment
from runner.flags import Fed
from runner.run import execute
from runner.sources import federated_source
from utils.files import digest, write_json

CONTROL, BROKEN, WEAK = 0.5, 0.5, 0.1  # shares of images recovered: of the control; of a cell, relative to its control
DEFENSES: dict[str, tuple[str, ...]] = {
    "gauss": ("gauss(sigma=0.0001)", "gauss(sigma=0.001)", "gauss(sigma=0.01)"),
    "dpsgd": ("dpsgd(bound=1.0, sigma=0.001)", "dpsgd(bound=1.0, sigma=0.03)", "dpsgd(bound=1.0, sigma=1.0)"),
    "topk": ("topk(share=0.3)", "topk(share=0.1)", "topk(share=0.01)"),
    "qsgd": ("qsgd(levels=127)", "qsgd(levels=7)", "qsgd(levels=1)"),
    "sign": ("topk(share=0.5)+sign()", "sign()", "topk(share=0.1)+sign()"),
    "soteria": ("soteria(share=0.1)", "soteria(share=0.5)", "soteria(share=0.9)"),
    "precode": ("precode(units=256)", "precode(units=64)", "precode(units=16)"),
    "oasis": ("oasis(copies=flips)", "oasis(copies=rotations)", "oasis(copies=both)"),
    "censor": ("censor(trials=1)", "censor()", "censor(version=code)"),
    "outpost": ("outpost(noise=0.08)", "outpost()", "outpost(noise=8.0)"),
}
DEFAULT = ("gauss", "dpsgd", "topk", "qsgd", "sign", "soteria", "precode", "oasis")
# attack -> images of a client, and flags; then what the adaptive attacker changes besides believing in the defence
CELLS: dict[str, tuple[int, tuple[str, ...], dict[str, tuple[str, ...]]]] = {
    "dlg": (1, ("--model", "lenet"), {}),
    "ig_single": (1, ("--model", "lenet"), {}),
    "rtf": (8, ("--model", "lenet"), {"oasis": ("--direction", "random")}),
    "cpa": (4, ("--model", "fc2"), {}),
    "lti": (1, ("--model", "lenet"), {}),
    "identify": (1, ("--model", "lenet"), {}),  # evaluation/likelihood.py: no reconstruction
}
CANDIDATES, UPDATES = 100, 60  # of identify: candidates, and updates in a cell
# with which the controls of tuning victims succeed, at 16x16 pixels
BUDGETS: dict[str, tuple[str, ...]] = {
    "dlg": ("--iterations", "80", "--restarts", "1"),
    "ig_single": ("--iterations", "100"),
    "lti": ("--simulations", "2000", "--epochs", "20", "--features", "1024", "--units", "256"),
}
QUICK: dict[str, tuple[str, ...]] = {
    **BUDGETS,
    "lti": ("--simulations", "600", "--epochs", "15", "--features", "1024", "--units", "256"),
}
QUICK_TRIALS, QUICK_ROUNDS = 2, 8


@hyperparameters
class Flags:
    dataset: str = hp("photos", "data set")
    base_datadir: Path = hp(ROOT / "datasets", "folder of the data sets")
    out: Path = hp(ROOT / "results" / "frontier", "folder of the runs, the tables and the picture")
    attacks: tuple[str, ...] = hp(tuple(CELLS), "attacks")
    defenses: tuple[str, ...] = hp(
        DEFAULT, f"defences, three strengths each; also {', '.join(d for d in DEFENSES if d not in DEFAULT)}"
    )
    image_size: int = hp(16, "side of the images in pixels", ge=4)
    victims: str = hp("reporting", "private images that may be attacked: reporting, tuning or all")
    trials: int = hp(8, "number of attacked clients in a cell", ge=1)
    local_lr: float = hp(0.1, "learning rate of the clients", gt=0)
    rounds: int = hp(30, "rounds of training before accuracy is measured", ge=1)
    pretrain_epochs: tuple[int, ...] = hp((0, 3), "epochs of training before the attack, a column of cells for each")
    jobs: int = hp(0, "runs at the same time; 0: one for each core", ge=0)
    seed: int = hp(0, "random seed", ge=0)
    quick: bool = hp(False, "two clients in a cell, the first column only, fewer rounds and simulations")


@dataclass(frozen=True)
class Cell:
    """One run. defense: of the clients. adaptive: whether the attacker knows it. strength: its position in the list."""

    attack: str
    defense: str
    name: str
    strength: int
    adaptive: bool
    epochs: int
    words: tuple[str, ...]


def cells(flags: Flags) -> list[Cell]:
    """Controls, static and adaptive runs, and the runs that measure accuracy (attack "baseline")."""
    common = ["--dataset", flags.dataset, "--base-datadir", str(flags.base_datadir), "--out", str(flags.out)]
    common += ["--victims", flags.victims, "--seed", str(flags.seed), "--local-lr", str(flags.local_lr), "--jobs", "1"]
    common += ["--image-size", str(flags.image_size)]
    quick = (QUICK_TRIALS, flags.pretrain_epochs[:1], min(flags.rounds, QUICK_ROUNDS))
    trials, columns, rounds = quick if flags.quick else (flags.trials, flags.pretrain_epochs, flags.rounds)
    chosen = [("none", "none", 0)]
    chosen += [(name, text, k) for name in flags.defenses for k, text in enumerate(DEFENSES[name])]
    found = []
    for name, text, strength in chosen:
        words = [*common, "--defense", text, "--model", "lenet"]
        training = [
            "--rounds",
            str(rounds),
            "--eval-every",
            str(rounds),
            "--clients",
            "10",
            "--client-images",
            "32",
            "--batch-size",
            "8",
        ]
        found.append(Cell("baseline", text, name, strength, False, 0, ("baseline", *words, *training, "--trials", "1")))
        for attack in flags.attacks:
            images, own, counters = CELLS[attack]
            own += (QUICK if flags.quick else BUDGETS).get(attack, ())
            federation = ["--rounds", "1", "--clients", str(trials), "--trials", str(trials)]
            for epochs in columns:
                words = [attack, *common, *own, "--defense", text, *federation, "--client-images", str(images)]
                words += ["--pretrain-epochs", str(epochs)]
                static = ["--believe", "defense=none"] if name != "none" else []
                found.append(Cell(attack, text, name, strength, False, epochs, (*words, *static)))
                if name != "none":
                    more = counters.get(name, ())
                    found.append(Cell(attack, text, name, strength, True, epochs, (*words, *more)))
    return found


def run_cell(words: Sequence[str]) -> dict[str, Any]:
    """The summary of `python main_fed.py WORDS`, or {"refused": why} where the attack does not apply."""
    try:
        if words[0] == "identify":
            return identify(words)
        (command,) = cli.parse(list(words), Fed, ATTACKS, "frontier")
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            return execute(Experiment("fed", command, federated_source))
    except UsageError as error:
        return {"refused": str(error)}


def identify(words: Sequence[str]) -> dict[str, Any]:
    """The share of updates whose sender's image an attacker with CANDIDATES candidates names, as success_rate."""
    (command,) = cli.parse(["baseline", *words[1:]], Fed, ATTACKS, "frontier")
    experiment = Experiment("fed", command, federated_source)
    path = command.flags.out / "identify" / f"{digest(experiment.key())}.json"
    if path.exists():
        return dict(json.loads(path.read_text(encoding="utf-8")))
    experiment.pretrain(lambda step, total, loss: None)
    private, model, recipe = experiment.dataset.private, experiment.model, experiment.source.recipe
    chosen = torch.randperm(len(private), generator=stream(experiment.seed, "candidates"))[:CANDIDATES]
    pool = private.take(chosen)
    known, found = experiment.beliefs.about(recipe), None
    ranks = []
    for trial in range(UPDATES):
        victim, rng = trial % len(pool.labels), stream(experiment.seed, "identify", trial)
        truth = Batch(pool.examples[victim : victim + 1], pool.labels[victim : victim + 1])
        update, _ = train(model, truth, experiment.task, recipe, rng)
        found = found or Identification(Observation(experiment.task, known, model, update), pool)
        ranks.append(found.rank(update, victim))
    hits = [rank == 1 for rank in ranks]
    share: dict[str, Any] = {**share_interval(hits, list(range(UPDATES))), "candidates": len(pool.labels)}
    share["p_value"] = chance_p_value(hits, list(range(UPDATES)), 1 / len(pool.labels))
    summary = {
        "attack": "identify",
        "success_rate": share["share"],
        "psnr": None,
        "identified": share | {"by_class": True},
    }
    proven = guarantee(recipe, "delta")
    if proven is not None:
        summary |= {"guarantee": proven, **identified_bound(proven, share)}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, summary)
    return summary


def run_all(found: Sequence[Cell], jobs: int) -> list[dict[str, Any]]:
    summaries = []
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        for done, summary in enumerate(pool.map(run_cell, [cell.words for cell in found]), 1):
            summaries.append(summary)
            print(f"\r{done}/{len(found)} runs", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return summaries


def lines_of(found: Sequence[Cell], summaries: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One line for each attack on each strength of a defence, with both attackers side by side."""
    by_key = {(c.attack, c.defense, c.adaptive, c.epochs): s for c, s in zip(found, summaries, strict=True)}
    lines = []
    for cell in found:
        if not cell.adaptive:
            continue
        control = by_key[cell.attack, "none", False, cell.epochs]
        static, adaptive = (by_key[cell.attack, cell.defense, known, cell.epochs] for known in (False, True))
        accuracy = by_key["baseline", cell.defense, False, 0]
        line: dict[str, Any] = {
            "defense": cell.name,
            "strength": cell.defense,
            "attack": cell.attack,
            "pretrain_epochs": cell.epochs,
            "accuracy": accuracy.get("accuracy"),
        }
        for label, summary in (("control", control), ("static", static), ("adaptive", adaptive)):
            line[f"{label}_psnr"] = summary["psnr"]["mean"] if summary.get("psnr") else None
            line[f"{label}_recovered"] = summary.get("success_rate")
            line[f"{label}_excess"] = None if "refused" in summary else excess(summary)
        line["verdict"] = verdict(control, (static, adaptive))
        known = static.get("guarantee") or {}
        line["epsilon"], line["bound"] = known.get("epsilon"), static.get("identified_bound")
        line["guarantee"] = f"per {known['unit']}" if known.get("unit") else "no formal guarantee"
        lines.append(line)
    return lines


def excess(summary: Mapping[str, Any]) -> float:
    """The share of images recovered minus the share that other images of the same labels would be (the null)."""
    null = summary.get("null")
    return max(0.0, float(summary["success_rate"]) - (null["recovered"] if null else 0.0))


def verdict(control: Mapping[str, Any], attacked: Iterable[Mapping[str, Any]]) -> str:
    """broken, weak or holds, by the better of the attackers; or why the cell says nothing."""
    attacked = list(attacked)
    if "refused" in control or all("refused" in summary for summary in attacked):
        return "does not apply"
    if control["success_rate"] < CONTROL or not excess(control):
        return "control failed"
    ran = [summary for summary in attacked if "refused" not in summary]
    share = max(map(excess, ran)) / excess(control)
    if share >= BROKEN:
        return "broken"
    return "weak" if share >= WEAK or any(identifies(summary) for summary in ran) else "holds"


def leakage(lines: Sequence[Mapping[str, Any]]) -> dict[str, tuple[str, float, float]]:
    """Strength -> its defence, accuracy, and the largest share recovered by an attack whose control counts."""
    points: dict[str, tuple[str, float, float]] = {}
    for line in lines:
        if line["verdict"] in ("does not apply", "control failed") or line["accuracy"] is None:
            continue
        if line["attack"] == "identify":  # a share of updates identified is no share of images recovered
            continue
        shares = [line[key] for key in ("static_excess", "adaptive_excess") if line[key] is not None]
        worst = max(max(shares), points.get(line["strength"], ("", 0.0, 0.0))[2])
        points[line["strength"]] = (line["defense"], line["accuracy"], worst)
    return points


def pareto(points: Mapping[str, tuple[str, float, float]]) -> set[str]:
    """The strengths that no other one beats in accuracy without leaking more, or in leakage without costing more."""
    return {
        name
        for name, (_, accuracy, leaked) in points.items()
        if not any(a >= accuracy and s <= leaked and (a > accuracy or s < leaked) for _, a, s in points.values())
    }


def draw(path: Path, points: Mapping[str, tuple[str, float, float]], control: tuple[float, float] | None) -> None:
    """The share recovered over accuracy: a line for each defence, rings around the Pareto front."""
    front = pareto(points)
    with style.pyplot() as plt:
        figure, ax = plt.subplots(figsize=(1.5 * style.WIDTH, 1.2 * style.HEIGHT), layout="constrained")
        for k, name in enumerate(dict.fromkeys(name for name, _, _ in points.values())):
            own = [(accuracy, share) for other, accuracy, share in points.values() if other == name]
            color, marker = style.COLORS[k % len(style.COLORS)], style.MARKERS[k % len(style.MARKERS)]
            ax.plot(*zip(*own, strict=True), color=color, marker=marker, label=name)
            for size, point in enumerate(own):
                ax.plot(*point, color=color, marker=marker, markersize=5 + 3 * size, alpha=0.8)
        if points:
            ring = sorted((points[name][1], points[name][2]) for name in front)
            ax.plot(
                *zip(*ring, strict=True),
                linestyle="none",
                marker="o",
                markersize=17,
                markerfacecolor="none",
                markeredgecolor=style.COLORS[7],
                label="Pareto front",
            )
        if control is not None:
            grey = style.REFERENCE["color"]
            ax.plot(*control, linestyle="none", marker="*", markersize=14, color=grey, label="no defence")
        ax.set_xlabel("accuracy of the trained model on held-out images (further right is better)")
        ax.set_ylabel("share of images recovered, above the null\n(best attack, PSNR >= 20 dB; lower is better)")
        right = max([accuracy for _, accuracy, _ in points.values()] + [control[0] if control else 0.0])
        ax.set_xlim(0, 1.15 * right or 1.0)
        ax.set_ylim(-0.05, 1.08)
        ax.set_title("What each defence costs and prevents; the larger a marker, the stronger the defence")
        figure.legend(loc="outside right center")
        style.save(figure, path)


def main(flags: Flags) -> None:
    for given, known, what in ((flags.attacks, CELLS, "attacks"), (flags.defenses, DEFENSES, "defenses")):
        for name in given:
            if name not in known:
                raise UsageError(f"`{what}`: unknown {name!r}; choose from {', '.join(known)}")
    found = cells(flags)
    summaries = run_all(found, flags.jobs or os.cpu_count() or 1)
    lines = lines_of(found, summaries)
    if not lines:
        raise UsageError("`defenses` names no defence")
    flags.out.mkdir(parents=True, exist_ok=True)
    with open(flags.out / "frontier.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)
    header = ["defence", "attack", "epochs", "control", "static", "adaptive", "verdict", "accuracy", "epsilon", "bound"]
    cells_of = [
        [
            *(line["strength"], line["attack"], str(line["pretrain_epochs"])),
            *(_shown(line, label) for label in ("control", "static", "adaptive")),
            *(line["verdict"], number(line["accuracy"], 3)),
            *(number(line["epsilon"]) if line["epsilon"] else "no formal guarantee", number(line["bound"], 3)),
        ]
        for line in lines
    ]
    text = table(header, cells_of)
    (flags.out / "table.md").write_text(text + "\n", encoding="utf-8")
    plain = [s for c, s in zip(found, summaries, strict=True) if c.name == "none"]
    shares = [excess(s) for s in plain if s.get("attack") not in ("baseline", "identify") and "refused" not in s]
    trained = next((s.get("accuracy") for s in plain if s.get("attack") == "baseline"), None)
    control = (trained, max(shares)) if shares and trained is not None else None
    draw(flags.out / "frontier.png", leakage(lines), control)
    print(text)
    print("PSNR in dB (share recovered; for identify: identified) of the control, the static and the adaptive attacker")
    print(f"{flags.out}: table.md, frontier.csv, frontier.png")


def _shown(line: Mapping[str, Any], label: str) -> str:
    psnr, share = line[f"{label}_psnr"], line[f"{label}_recovered"]
    if share is None:
        return "-"
    return f"({share:.2f})" if psnr is None else f"{psnr:.1f} ({share:.2f})"


if __name__ == "__main__":
    cli.run_script(Flags, main, __doc__)
