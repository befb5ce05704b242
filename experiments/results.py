"""Measures the tables of README.md and docs/results.md and writes them there.

docs/results.json stores what every table is made of: the summary of each run, and the commit and machine it was
measured on. A table stands between the comments `<!-- table: NAME -->` and `<!-- end of table -->`.
"""

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from core.errors import UsageError
from core.hyperparameters import hp, hyperparameters
from core.paths import ROOT
from report.tables import STATUSES, interval, number, share, table
from runner.cli import run_script
from runner.experiment import commit
from utils.files import write_bytes

STORED = ROOT / "docs" / "results.json"
STORED_KEYS = (  # entries of summary.json that a table may show
    *("attack", "dataset", "model", "images", "units", "psnr", "null", "over_null", "over_class_mean", "recovered"),
    *("identified", "label_accuracy", "status", "objective", "seconds", "verdict", "oracle_floor_psnr"),
    *("companion_psnr", "exact", "token_accuracy", "bag_recall", "cells_right", "surest", "domain", "records"),
    *("ceiling", "certified"),
    *("baseline_token_accuracy", "baseline_bag_recall", "baseline_cells_right", "class_baseline_cells_right"),
)

REPORTING = ("--victims", "reporting")  # no default was chosen on them

Row = Mapping[str, Any]  # run, flags, own (flags without those of the table), summary


def _status(summary: Row) -> str:
    return ", ".join(f"{summary['status'][word]} {word}" for word in STATUSES if word in summary["status"])


def _objective(summary: Row) -> str:
    found = summary.get("objective")
    if found is None:
        return "-"
    return " / ".join("-" if found[place] is None else f"{found[place]:.0e}" for place in ("answer", "truth"))


def _right(summary: Row, key: str) -> str:
    """A share of tokens or cells, with its interval, and what mean and mode score."""
    found, by_mode = summary[key], summary[f"baseline_{key}"]
    text = f"{found['mean']:.2f}"
    text += "" if found.get("low") is None else f" [{max(found['low'], 0.0):.2f}, {min(found['high'], 1.0):.2f}]"
    return f"{text}; mode {number(by_mode)}"


def _surest(found: Row | None) -> str:
    return "-" if found is None else f"{found['right']:.2f} ({found['claimed']:.2f}), {found['least']:.2f}"


def _null(row: Row) -> str:
    null = row["summary"]["null"]
    return "-" if null is None else number(null["psnr"]["mean"], 1)


def _mean(values: Mapping[str, float]) -> str:
    text = f"{values['mean']:.1f}"
    return text if values.get("low") is None else f"{text} [{values['low']:.1f}, {values['high']:.1f}]"


def _flag(name: str, default: str = "-") -> Callable[[Row], str]:
    def show(row: Row) -> str:
        words = shlex.split(row["flags"])
        return words[words.index(name) + 1] if name in words else default

    return show


COLUMNS: dict[str, tuple[str, Callable[[Row], str]]] = {
    "command": ("command", lambda row: f"`{' '.join(filter(None, [row['run'], row['own']]))}`"),
    "network": ("network", lambda row: row["summary"]["model"]),
    "data": ("data", lambda row: row["summary"]["dataset"]),
    "settings": ("settings", lambda row: "the authors'" if "--paper" in row["flags"].split() else "ours"),
    "differs": ("flags", lambda row: f"`{row['own']}`" if row["own"] else "the attacker knows the recipe"),
    "norm": ("normalisation", _flag("--norm")),
    "dropout": ("dropout", _flag("--dropout")),
    "mode": ("mode", _flag("--model-mode")),
    "images": ("n (units)", lambda row: f"{row['summary']['images']} ({row['summary']['units']})"),
    "psnr": ("PSNR dB", lambda row: _mean(row["summary"]["psnr"])),
    "null": ("null dB", _null),
    "over_null": ("above the null dB", lambda row: interval(row["summary"]["over_null"])),
    "over_class_mean": ("above the class mean dB", lambda row: interval(row["summary"]["over_class_mean"])),
    "recovered": ("recovered (20 dB)", lambda row: share((row["summary"]["recovered"] or {}).get("20"))),
    "identified": ("identified", lambda row: share(row["summary"]["identified"])),
    "labels": ("labels", lambda row: number(row["summary"]["label_accuracy"])),
    "status": ("status", lambda row: _status(row["summary"])),
    "objective": ("objective: answer / truth", lambda row: _objective(row["summary"])),
    "oracle": ("oracle projection dB", lambda row: number(row["summary"].get("oracle_floor_psnr"), 1)),
    "comparison": ("`ig_single` dB", lambda row: number(row["summary"].get("companion_psnr"), 1)),
    "exact": ("exact", lambda row: share(row["summary"]["exact"])),
    "tokens": ("tokens right", lambda row: _right(row["summary"], "token_accuracy")),
    "bag": ("bag of words", lambda row: _right(row["summary"], "bag_recall")),
    "cells": ("cells right", lambda row: _right(row["summary"], "cells_right")),
    "class_cells": ("of the class", lambda row: number(row["summary"]["class_baseline_cells_right"])),
    "surest": ("surest quarter (claimed), least sure", lambda row: _surest(row["summary"].get("surest"))),
    "alone": ("alone", lambda row: number(row["summary"]["ceiling"])),
    "certified": ("certified", lambda row: share(row["summary"].get("certified"))),
    "wrong": ("wrong certificates", lambda row: str(row["summary"].get("certified", {}).get("wrong", "-"))),
    "verdict": ("verdict", lambda row: row["summary"]["verdict"] or "-"),
    "seconds": ("s / update", lambda row: f"{row['summary']['seconds'] / sum(row['summary']['status'].values()):.1f}"),
}


@dataclass(frozen=True)
class Command:
    """A row: a shell file of experiments/, its flags, and the number of trials; `quick` None: not with --quick."""

    run: str
    flags: str
    trials: int
    quick: int | None


@dataclass(frozen=True)
class Table:
    """columns: names of COLUMNS. flags: of all its rows."""

    file: str
    columns: tuple[str, ...]
    flags: str
    rows: tuple[Command, ...]


TABLES = {
    "leaks": Table(
        "README.md",
        ("command", "network", "data", "images", "psnr", "over_null", "recovered", "identified", "labels", "status"),
        "",
        (
            Command("grad/dlg.sh", "", 50, 10),
            Command("grad/dlg.sh", "--dataset leaves", 50, 10),
            Command("grad/dlg.sh", "--batch-size 4", 20, 4),
            Command("grad/ig_single.sh", "", 20, 4),
            Command("grad/ig_single.sh", "--dataset leaves", 20, 4),
            Command("grad/ig_single.sh", "--model resnet18", 10, 2),
            Command("grad/ig_single.sh", "--model cnn --dataset leaves", 50, 6),
            Command("grad/ggl.sh", "--comparison-iterations 0", 50, 6),
            Command("grad/cpa.sh", "", 20, 5),
            Command("grad/cpa.sh", "--dataset leaves", 20, 5),
            Command("grad/spear.sh", "", 10, 3),
            Command("grad/analytic.sh", "", 9, 9),
            Command("grad/trap.sh", "", 9, 9),
            Command("grad/rtf.sh", "", 4, 4),
            Command("grad/rtf.sh", "--dataset leaves", 10, 5),
            Command("fed/rtf.sh", "--clients 4", 4, 4),
        ),
    ),
    "nulls": Table(
        "docs/results.md",
        ("command", "data", "images", "psnr", "null", "over_null", "recovered", "identified", "verdict"),
        "",
        (
            Command("grad/baseline.sh", "", 200, 200),
            Command("grad/baseline.sh", "--grant labels", 200, 200),
            Command("grad/baseline.sh", "--grant labels --batch-size 4", 60, 60),
            Command("grad/baseline.sh", "--grant labels --batch-size 16", 18, 18),
            Command("grad/baseline.sh", "--grant labels --batch-size 64", 4, 4),
            Command("grad/baseline.sh", "--dataset leaves", 200, 200),
            Command("grad/baseline.sh", "--dataset leaves --grant labels --batch-size 4", 60, 60),
            Command("grad/baseline.sh", "--dataset leaves --grant labels --batch-size 16", 20, 10),
            Command("grad/baseline.sh", "--dataset leaves --grant labels --batch-size 64", 10, 4),
            Command("grad/baseline.sh", "--dataset faces", 40, 40),
        ),
    ),
    "papers": Table(
        "docs/results.md",
        ("command", "settings", "network", "images", "psnr", "recovered", "identified", "status", "seconds"),
        "",
        (
            Command("grad/dlg.sh", "", 20, 4),
            Command("grad/dlg.sh", "--paper", 20, 4),
            Command("grad/idlg.sh", "", 20, None),
            Command("grad/idlg.sh", "--paper", 20, None),
            Command("grad/ig_single.sh", "--model cnn", 20, 4),
            Command("grad/ig_single.sh", "--model cnn --paper", 20, None),
            Command("fed/sme.sh", "--batch-size 4 --local-epochs 5", 10, 4),
            Command("fed/sme.sh", "--batch-size 4 --local-epochs 5 --paper", 10, 4),
            Command("grad/ggl.sh", "--comparison-iterations 0", 20, None),
            Command("grad/ggl.sh", "--comparison-iterations 0 --paper", 20, None),
            Command("grad/cpa.sh", "", 10, 5),
            Command("grad/cpa.sh", "--paper", 5, None),
            Command("grad/trap.sh", "", 9, 9),
            Command("grad/trap.sh", "--paper", 9, 9),
            Command("grad/rtf.sh", "", 4, 4),
            Command("grad/rtf.sh", "--paper", 4, 4),
        ),
    ),
    "trained": Table(
        "docs/results.md",
        ("command", "network", "images", "psnr", "over_null", "identified", "labels", "objective", "status"),
        "--dataset leaves",
        (
            Command("grad/ig_single.sh", "--model cnn", 10, None),
            Command("grad/ig_single.sh", "--model cnn --pretrain-epochs 5", 10, None),
            Command("grad/ig_single.sh", "--model cnn --pretrain-epochs 20", 10, 4),
            Command("grad/ig_single.sh", "--model cnn --pretrain-epochs 20 --feature-weight 0", 10, 4),
            Command("grad/ig_single.sh", "--model cnn --pretrain-epochs 20 --batch-size 8", 5, None),
            Command("grad/ig_single.sh", "--pretrain-epochs 5", 10, None),
            Command("grad/ig_single.sh", "--pretrain-epochs 20", 10, None),
            Command("fed/sme.sh", "--client-images 1 --batch-size 1 --local-epochs 5 --pretrain-epochs 20", 10, None),
            Command("grad/cpa.sh", "--pretrain-epochs 5", 10, 4),
            Command("grad/cpa.sh", "--pretrain-epochs 20", 10, 4),
        ),
    ),
    "labels": Table(
        "docs/results.md",
        ("command", "images", "labels"),
        "--model cnn --dataset leaves --iterations 1",
        tuple(
            Command("grad/ig_single.sh", flags, 10, 5)
            for flags in (
                "--batch-size 8",
                "--batch-size 8 --defense clip=0.05",
                "--batch-size 32 --defense clip=0.05",
                "--batch-size 4 --pretrain-epochs 5",
                "--batch-size 8 --pretrain-epochs 5",
                "--batch-size 4 --pretrain-epochs 20",
                "--batch-size 8 --pretrain-epochs 20",
            )
        ),
    ),
    "certificates": Table(
        "docs/results.md",
        ("command", "data", "images", "recovered", "alone", "certified", "wrong"),
        "",
        (
            Command("grad/rtf.sh", "--batch-size 14 --bins 64", 20, 20),
            Command("grad/rtf.sh", "--dataset leaves --batch-size 32", 20, 20),
            Command("grad/trap.sh", "--dataset leaves --neurons 3", 20, 20),
        ),
    ),
    "imprint": Table(
        "docs/results.md",
        ("command", "network", "images", "psnr", "recovered", "alone", "identified", "status"),
        "--dataset leaves --clients 4",
        (
            *(
                Command("fed/rtf.sh", f"--local-lr {lr} --local-epochs {epochs}", 4, 4)
                for lr in (0.001, 0.01, 0.1)
                for epochs in (1, 5)
            ),
            Command("fed/rtf.sh", "--model convnet64 --local-lr 0.01 --local-epochs 1", 4, None),
            Command("fed/rtf.sh", "--model convnet64 --local-lr 0.1 --local-epochs 5", 4, None),
        ),
    ),
    "steps": Table(
        "docs/results.md",
        ("command", "images", "psnr", "over_null", "identified", "objective", "status", "seconds"),
        "--model cnn --dataset leaves",
        (
            Command("fed/ig_single.sh", "--client-images 1 --batch-size 1 --local-epochs 20", 10, 4),
            Command("fed/sme.sh", "--client-images 1 --batch-size 1 --local-epochs 5", 10, 4),
            Command("fed/sme.sh", "--client-images 1 --batch-size 1 --local-epochs 20", 10, 4),
            Command("fed/sme.sh", "--client-images 4 --batch-size 4 --local-epochs 20", 10, 4),
            Command("fed/sme.sh", "--client-images 4 --batch-size 4 --local-epochs 20 --local-lr 0.1", 10, None),
            Command("fed/sme.sh", "--client-images 4 --batch-size 2 --local-epochs 10", 10, 4),
            Command("fed/ig_multi.sh", "--client-images 4 --batch-size 4 --local-epochs 20", 10, None),
            Command("fed/dlf.sh", "--local-epochs 5 --client-images 4 --batch-size 2", 10, None),
        ),
    ),
    "beliefs": Table(
        "docs/results.md",
        ("differs", "images", "psnr", "over_null", "identified", "objective", "status"),
        "--model cnn --client-images 4 --batch-size 4 --local-epochs 5 --local-lr 0.05",
        (
            Command("fed/sme.sh", "", 10, 4),
            Command("fed/sme.sh", "--believe local-lr=0.005", 10, None),
            Command("fed/sme.sh", "--believe local-lr=0.025", 10, 4),
            Command("fed/sme.sh", "--believe local-lr=0.1", 10, 4),
            Command("fed/sme.sh", "--believe local-lr=0.5", 10, None),
            Command("fed/sme.sh", "--believe local-epochs=1", 10, None),
            Command("fed/sme.sh", "--believe local-epochs=10", 10, 4),
            Command("fed/sme.sh", "--believe batch-size=2", 10, 4),
            Command("fed/sme.sh", "--believe client-images=3", 10, None),
            Command("fed/sme.sh", "--believe client-images=5", 10, 4),
            Command("fed/sme.sh", "--believe defense=clip=0.01", 10, None),
            Command("fed/sme.sh", "--defense clip=0.05", 10, None),
            Command("fed/sme.sh", "--defense clip=0.05 --believe defense=none", 10, 4),
        ),
    ),
    "others": Table(
        "docs/results.md",
        ("command", "network", "images", "psnr", "over_null", "recovered", "identified", "status", "seconds"),
        "",
        (
            Command("grad/idlg.sh", "--dataset leaves", 50, 6),
            Command("grad/april.sh", "", 20, 6),
            Command("grad/fgla.sh", "", 20, 6),
            Command("grad/lti.sh", "", 20, 6),
            Command("fed/ig_multi.sh", "--dataset leaves --batch-size 4", 10, 4),
            Command("fed/ig_weight.sh", "--dataset leaves", 10, 4),
            Command("fed/dlf.sh", "--dataset leaves", 10, None),
            Command("grad/gias.sh", "--comparison-iterations 0", 20, None),
        ),
    ),
    "generators": Table(
        "docs/results.md",
        ("command", "images", "psnr", "oracle", "comparison", "over_class_mean", "over_null", "identified"),
        "--model cnn",
        (
            Command("grad/ggl.sh", "", 50, 4),
            Command("grad/ggl.sh", "--public other --comparison-iterations 0", 50, 4),
            Command("grad/ggl.sh", "--defense gauss=0.1", 50, None),
            Command("grad/ggl.sh", "--defense clip=0.3 --comparison-iterations 0", 50, None),
            Command("grad/ggl.sh", "--pretrain-epochs 20", 50, 4),
            Command("grad/gias.sh", "--comparison-iterations 0", 20, None),
        ),
    ),
    "sentences": Table(
        "docs/text.md",
        ("command", "network", "images", "exact", "tokens", "bag", "status", "seconds"),
        "",
        (
            Command("grad/dager.sh", "", 20, 10),
            Command("grad/dager.sh", "--batch-size 8", 10, 3),
            Command("grad/dager.sh", "--batch-size 16 --width 256", 5, None),
            Command("grad/dager.sh", "--model gpt_tied", 20, 5),
            Command("grad/dager.sh", "--model bert --batch-size 1", 20, 5),
            Command("grad/dager.sh", "--model bert --batch-size 2", 20, 5),
            Command("grad/dager.sh", "--model gpt_lora", 20, 5),
            Command("grad/dager.sh", "--model gpt_lora --pretrain-epochs 1", 20, 5),
            Command("fed/dager.sh", "--local-lr 0.001", 10, 3),
            Command("fed/dager.sh", "--local-lr 0.01", 10, 3),
            Command("grad/dager.sh", "--batch-size 2 --defense gauss=0.00001", 20, 5),
            Command("grad/dager.sh", "--batch-size 2 --defense gauss=0.0001", 20, 5),
            Command("grad/dager.sh", "--batch-size 2 --defense gauss=0.001", 20, 5),
        ),
    ),
    "records": Table(
        "docs/tables.md",
        ("command", "network", "images", "cells", "class_cells", "surest", "identified", "status", "seconds"),
        "",
        (
            Command("grad/spear.sh", "--dataset photostats --model mlp --normalize none --batch-size 8", 10, 5),
            Command("grad/cpa.sh", "--dataset photostats --model mlp --batch-size 8", 10, 5),
            Command("grad/tableak.sh", "--batch-size 8", 10, 3),
            Command("grad/tableak.sh", "", 9, 3),
        ),
    ),
    "sums": Table(
        "docs/aggregation.md",
        ("command", "network", "images", "psnr", "over_null", "recovered", "identified", "status"),
        "",
        (
            *(
                Command(f"grad/{name}.sh", f"{flags} --aggregate {clients}", trials, quick)
                for name, flags, trials, quick in (
                    ("analytic", "--model fc2 --batch-size 1", 9, 9),
                    ("spear", "--model fc2 --batch-size 1", 9, 3),
                    ("cpa", "--model fc2 --batch-size 1", 9, 3),
                    ("dlg", "--batch-size 1 --iterations 100", 9, 4),
                    ("ig_single", "--model lenet --batch-size 1", 9, None),
                    ("rtf", "--batch-size 1", 9, 9),
                )
                for clients in (1, 4, 16)
            ),
            Command("grad/suppress.sh", "", 9, 4),
            Command("grad/fishing.sh", "", 9, 9),
            Command("grad/fishing.sh", "--aggregate 4", 2, 2),
            Command("grad/rtf.sh", "--batch-size 16", 18, 18),
            Command("grad/rtf.sh", "--batch-size 16 --aggregate 10", 1, 1),
            Command("grad/loki.sh", "", 1, 1),
            Command("grad/loki.sh", "--dataset leaves --trials 2", 2, 2),
        ),
    ),
    "statistics": Table(
        "docs/results.md",
        ("command", "network", "images", "psnr", "over_null", "identified", "status"),
        "--norm batch --model-mode train",
        tuple(
            Command(run, flags + weight, trials, quick)
            for run, flags, trials, quick in (
                ("grad/dlg.sh", "--dropout 0", 20, 4),
                ("grad/ig_single.sh", "--dataset leaves --model cnn --batch-size 4", 10, 4),
                ("grad/ig_single.sh", "--dataset leaves --model cnn --batch-size 8", 10, None),
                ("grad/ig_single.sh", "--dataset leaves --model resnet18 --batch-size 4", 5, None),
                ("fed/sme.sh", "--dataset leaves --batch-size 4 --local-epochs 5 --local-lr 0.05", 10, 4),
                ("fed/ig_multi.sh", "--dataset leaves --batch-size 4 --local-epochs 5 --local-lr 0.05", 10, None),
            )
            for weight in (" --statistics-weight 0", "")
        ),
    ),
    "mode": Table(
        "docs/results.md",
        ("norm", "dropout", "mode", "images", "psnr", "identified", "status"),
        "",
        (
            Command("grad/dlg.sh", "--norm none --dropout 0 --model-mode train", 20, 4),
            Command("grad/dlg.sh", "--norm none --dropout 0.5 --model-mode eval", 20, 4),
            Command("grad/dlg.sh", "--norm none --dropout 0.5 --model-mode train", 20, 4),
            Command("grad/dlg.sh", "--norm batch --dropout 0 --model-mode eval", 20, 4),
            Command("grad/dlg.sh", "--norm batch --dropout 0 --model-mode train", 20, 4),
        ),
    ),
}


@hyperparameters
class Flags:
    quick: bool = hp(False, "fewer victims: half an hour on two cores instead of hours")
    tables: tuple[str, ...] = hp((), f"tables to measure, of {', '.join(TABLES)}; default: all")
    render: bool = hp(False, "the tables of docs/results.json written again, without a run")
    out: Path = hp(ROOT / "results" / "tables", "folder of the runs")


def main(flags: Flags) -> None:
    if unknown := sorted(set(flags.tables) - set(TABLES)):
        raise UsageError(f"`tables`: {unknown[0]} is none of {', '.join(TABLES)}")
    stored = json.loads(STORED.read_text()) if STORED.exists() else {}
    measured_on = commit()  # before a table is written
    for name in flags.tables or TABLES:
        if not flags.render:
            stored[name] = measure(TABLES[name], flags.quick, flags.out) | {"commit": measured_on}
            write_bytes(STORED, (json.dumps(stored, indent=1, sort_keys=True) + "\n").encode())
        write_table(name, stored)


def measure(entry: Table, quick: bool, out: Path) -> dict[str, Any]:
    """Run the commands of a table; what docs/results.json stores of it."""
    rows = []
    for row in entry.rows:
        trials = row.quick if quick else row.trials
        if trials is None:
            continue
        words = [*shlex.split(entry.flags), *shlex.split(row.flags), "--trials", str(trials), *REPORTING]
        summary = run(row.run, words, out)
        shown = {k: summary[k] for k in STORED_KEYS if k in summary}
        rows.append({"run": row.run, "flags": shlex.join(words), "own": row.flags, "summary": shown})
    return {"rows": rows, "quick": quick, "torch": torch.__version__, "cores": os.cpu_count()}


def run(script: str, words: Sequence[str], out: Path) -> dict[str, Any]:
    """The summary of one command, whose output goes to the terminal."""
    command = ["sh", str(ROOT / "experiments" / script), *words, "--out", str(out)]
    print(f"\n$ sh experiments/{script} {shlex.join(words)}", flush=True)
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHON": sys.executable})
    print(done.stdout, end="", flush=True)
    if done.returncode:
        raise SystemExit(done.returncode)
    finished = re.search(r"^already done \((.*?); ", done.stdout, re.M)
    folder = Path(finished[1]) if finished else Path(done.stdout.split()[-1]).parent  # the last line is its grid.png
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return summary


def render(name: str, stored: Mapping[str, Any]) -> str:
    """The Markdown of a table and the line below it."""
    shown = [COLUMNS[column] for column in TABLES[name].columns]
    rows = [[show(row) for _, show in shown] for row in stored["rows"]]
    extent = " --quick" if stored["quick"] else ""
    below = (
        f"(`sh experiments/results.sh{extent} --tables {name}`; commit `{stored['commit']}`, torch {stored['torch']}, "
        f"{stored['cores']} CPU cores.)"
    )
    return f"{table([title for title, _ in shown], rows)}\n\n{below}"


def write_table(name: str, stored: Mapping[str, Any]) -> None:
    """Replace the table between its comments. Raises UsageError if its file has none, or nothing is stored."""
    if name not in stored:
        raise UsageError(f"docs/results.json has no table {name}: leave out `render`")
    replace_marked(ROOT / TABLES[name].file, name, render(name, stored[name]))


def replace_marked(path: Path, name: str, content: str) -> None:
    """Replace what stands between the comments of table `name`. Raises UsageError if the file has none."""
    text, count = re.subn(marks(name), lambda _: between_marks(name, content), path.read_text("utf-8"), flags=re.S)
    if not count:
        raise UsageError(f"{path.relative_to(ROOT)} has no place for the table {name}: <!-- table: {name} -->")
    write_bytes(path, text.encode())


def marks(name: str) -> str:
    return rf"<!-- table: {name} -->.*?<!-- end of table -->"


def between_marks(name: str, content: str) -> str:
    return f"<!-- table: {name} -->\n{content}\n<!-- end of table -->"


def marked(name: str, stored: Mapping[str, Any]) -> str:
    return between_marks(name, render(name, stored))


if __name__ == "__main__":
    run_script(Flags, main, __doc__)
