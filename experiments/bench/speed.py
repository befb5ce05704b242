"""Speed against the papers' own loops and against breaching 0.1.2: same gradient, model, labels and machine.

Each engine runs in a process of its own, with its own default threads. Where an iteration is the same work in all of
them (ig_single), they take single iterations in turn, A B C C B A, so that other load on the machine affects all alike;
ratios are of neighbouring iterations, and their minimum, median and maximum are shown. Then each engine runs alone:
ours to its end, breaching for a number of iterations, and the paper's loop for some iterations or, with --whole-loops,
for its budget. The seconds of a loop that was cut short are extrapolated from its speed, and its images are not scored.
"""

import csv
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

from attacks.base import ATTACKS
from core.hyperparameters import hp, hyperparameters
from core.paths import ROOT
from experiments.bench.reference import budget
from report.tables import number, table
from runner.cli import fail, run_script

CASES = {  # flags of main_grad
    "dlg": ["dlg"],
    "ig_convnet64_1": ["ig_single", "--model", "convnet64"],
    "ig_convnet64_8": ["ig_single", "--model", "convnet64", "--batch-size", "8"],
    "ig_resnet18_1": ["ig_single", "--model", "resnet18"],
    "ig_resnet18_8": ["ig_single", "--model", "resnet18", "--batch-size", "8"],
    "rtf": ["rtf", "--model", "cnn", "--batch-size", "64"],
    "cpa": ["cpa", "--model", "fc2", "--batch-size", "8"],
}
Run = dict[str, Any]


@hyperparameters
class Flags:
    cases: tuple[str, ...] = hp(("dlg", "ig_convnet64_1", "ig_convnet64_8", "rtf", "cpa"), f"cases: {', '.join(CASES)}")
    victims: int = hp(1, "number of victims in each case, attacked one after the other", ge=1)
    turns: int = hp(20, "number of single iterations taken in turn; a quarter of it for batches of 8", ge=8)
    iterations: int = hp(40, "iterations of a paper's loop that is cut short", ge=2)
    peer_iterations: int = hp(1000, "iterations of breaching's long run on a single image; 0: none", ge=0)
    long: bool = hp(True, "runs of each engine alone; attacks without comparable iterations always have them")
    whole_loops: bool = hp(False, "papers' loops with their whole budget: hours")
    base_datadir: Path = hp(ROOT / "datasets", "folder of the data sets")
    dataset: str = hp("photos", "data set")
    image_size: int | None = hp(None, "side of the images in pixels")
    seed: int = hp(0, "random seed for victims and models", ge=0)
    out: Path = hp(ROOT / "results" / "bench", "folder of speed.md, speed.csv and speed_<case>.json")


class Engine:
    """A process of engines.py."""

    def __init__(self, name: str, iterations: int, how: str, case: list[str]) -> None:
        command = [sys.executable, str(ROOT / "experiments/bench/engines.py"), name, str(iterations), how, *case]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        self.what = f"{name} on {' '.join(case)}"
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  lives as long as the process
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.errors}
        self.process = subprocess.Popen(command, text=True, env=environment, **pipes)

    def turn(self) -> None:
        """One iteration."""
        try:
            print(file=self.process.stdin, flush=True)
        except BrokenPipeError:
            self.end()
        if self.process.stdout.readline() != ".\n":
            self.end()
            fail(f"{self.what} ended before its turns did: fewer --turns")

    def end(self) -> Run:
        """The result of the process, which ends or is told to stop taking turns."""
        output = self.process.communicate()[0].splitlines()
        self.errors.seek(0)
        if self.process.returncode:
            failed(self.what, self.errors.read())
        return json.loads(output[-1])


def failed(what: str, errors: str) -> NoReturn:
    """End with the last line that a process wrote on standard error."""
    fail(f"{what} failed: {(errors.strip().splitlines() or ['no message'])[-1]}")


def run(name: str, iterations: int, case: list[str]) -> Run:
    """An engine alone, on all victims of the case."""
    return Engine(name, iterations, "alone", case).end()


def take_turns(names: list[str], turns: int, case: list[str]) -> dict[str, Run]:
    """Single iterations of each engine, one of each at a time; what comes before its second is not counted."""
    engines = {name: Engine(name, 0, "turns", case) for name in names}
    for engine in engines.values():
        engine.process.stdout.readline()
    for turn in range(turns + 1):
        for engine in [*engines.values()][:: -1 if turn % 2 else 1]:
            engine.turn()
    return {name: engine.end() for name, engine in engines.items()}


def reaches(found: Run, decibels: float) -> float | None:
    """Seconds until the PSNR first reaches `decibels`."""
    return next((t for t, psnr, *_ in found["scores"] if psnr >= decibels), None)


def extrapolated(found: Run, iterations: int) -> float:
    """Seconds of so many iterations, by the speed of those after the first."""
    first, *_, last = found["times"]
    return first + (last - first) / (len(found["times"]) - 1) * (iterations - 1)


def best(found: Run) -> tuple[float, float]:
    """The best (PSNR, seconds)."""
    psnr = max(p for _, p, *_ in found["scores"])
    return psnr, next(t for t, p, *_ in found["scores"] if p == psnr)


def min_median_max(values: list[float], digits: int) -> str:
    """min-median-max, or the value if there is one."""
    shown = (min(values), statistics.median(values), max(values)) if len(values) > 1 else values
    return "-".join(f"{v:.{digits}f}" for v in shown)


def median(values: list[float | None], digits: int = 1) -> str:
    """The median over victims; "-" if one has none."""
    return "-" if None in values else number(statistics.median(values), digits)


def measure(name: str, flags: Flags, engines: list[str]) -> list[list[str]]:
    case = ["grad", *CASES[name], "--trials", str(flags.victims), "--seed", str(flags.seed)]
    case += ["--dataset", flags.dataset, "--base-datadir", str(flags.base_datadir)]
    case += [] if flags.image_size is None else ["--image-size", str(flags.image_size)]
    attack, batched = case[1], name.endswith("_8")
    alike = attack == "ig_single"
    there = [e for e in engines if alike or e != "breaching"]
    full = budget(ATTACKS[attack])
    cut = {"ours": 0, "reference": full if flags.whole_loops else min(full, flags.iterations)}
    if flags.peer_iterations and not batched:
        cut["breaching"] = flags.peer_iterations
    turns = take_turns(there, flags.turns // 4 if batched else flags.turns, case) if alike else {}
    whole = {e: run(e, cut[e], case) for e in there if e in cut} if flags.long or not alike else {}
    (flags.out / f"speed_{name}.json").write_text(json.dumps({"turns": turns, "whole": whole}))
    steps = {e: r["victims"][0]["times"][2:] for e, r in turns.items()}
    rows = []
    for engine in there:
        row = dict.fromkeys(HEADER, "-") | {"case": name, "engine": engine}
        runs = [r[engine] for r in (turns, whole) if engine in r]
        if alike:
            ratios = [a / b for a, b in zip(steps[engine], steps["ours"], strict=True)]
            row["ms/iteration"] = f"{1e3 * statistics.median(steps[engine]):.3g}"
            row["x ours"] = "1" if engine == "ours" else min_median_max(ratios, 2)
        if engine in whole:
            found = whole[engine]["victims"]
            short = engine == "reference" and cut[engine] < full
            seconds = statistics.mean(extrapolated(v, full) if short else v["seconds"] for v in found)
            row["s/victim"] = f"{seconds:.3g}{' (extrapolated)' if short else ''}"
            ours = statistics.mean(v["seconds"] for v in whole["ours"]["victims"])
            if engine != "breaching":  # whose budget is ours to choose
                row["x ours, whole"] = "1" if engine == "ours" else f"{seconds / ours:.3g}"
            if alike:
                row["iterations"] = str(full) if short else median([v["iterations"] for v in found], 0)
            if not short:
                for decibels in (20, 25):
                    row[f"s to {decibels} dB"] = median([reaches(v, decibels) for v in found])
                row["best PSNR dB"] = min_median_max([best(v)[0] for v in found], 1)
                row["s to it"] = median([best(v)[1] for v in found])
                row["final PSNR dB"] = min_median_max([v["scores"][-1][1] for v in found], 1)
                row["corr"] = median([v.get("corr") for v in found], 3)
        row["threads"] = str(runs[0]["threads"])
        row["peak MB"] = f"{max(v['peak'] for r in runs for v in r['victims']):.0f}"
        rows.append(list(row.values()))
    return rows


HEADER = ["case", "engine", "threads", "ms/iteration", "x ours", "s/victim", "x ours, whole", "iterations"]
HEADER += ["s to 20 dB", "s to 25 dB", "best PSNR dB", "s to it", "final PSNR dB", "peak MB", "corr"]


def machine() -> str:
    """Processor, cores and torch version, for the notes below a table."""
    import torch

    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        name = next(
            (x.split(":")[1].strip() for x in info.read_text().splitlines() if x.startswith("model name")), name
        )
    return f"{name}, {os.cpu_count()} cores, torch {torch.__version__}"


def write(out: Path, name: str, header: list[str], rows: list[list[str]], notes: list[str]) -> None:
    """Table and notes as Markdown, on the screen too, and the rows as CSV."""
    text = "\n".join([table(header, rows), "", *notes])
    (out / f"{name}.md").write_text(text + "\n")
    with (out / f"{name}.csv").open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    print(f"\n{text}\n{out / name}.md, {name}.csv")


def main(flags: Flags) -> None:
    for name in flags.cases:
        if name not in CASES:
            fail(f"no case {name}; there are {', '.join(CASES)}")
    flags.out.mkdir(parents=True, exist_ok=True)
    engines, notes = ["ours", "reference"], [machine()]
    if find_spec("breaching") is not None:
        engines.append("breaching")
    else:
        notes.append(
            "breaching is not installed, its rows are left out: pip install -r experiments/bench/requirements.txt"
        )
    rows = []
    for name in flags.cases:
        rows += measure(name, flags, engines)
        print(table(HEADER, [r for r in rows if r[0] == name]), flush=True)
    notes.append(
        "x ours: minimum-median-maximum over neighbouring iterations; x ours, whole: seconds per victim, the paper's "
        "loop with its whole budget; seconds to a PSNR and to the best are medians over victims, the best is selected "
        "by truth; peak memory is of the process; ours keeps freed memory (utils/memory.py), the others do not"
    )
    write(flags.out, "speed", HEADER, rows, notes)


if __name__ == "__main__":
    run_script(Flags, main, __doc__)
