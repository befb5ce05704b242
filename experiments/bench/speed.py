"""How fast, against the papers' own loops and against breaching 0.1.2: same gradient, model, labels and machine.

Each engine runs in a process of its own, at its own default threads, and they take turns, A B C A B C; a ratio is of
neighbours, and its least, middle and largest are shown. Then each runs as long as it would: ours to its end, the peer
for a number of iterations, and the paper's loop for its budget, reckoned from its speed where that would take long.
"""

import csv
import json
import os
import platform
import statistics
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from experiments.bench.reference import BUDGET
from utils.cli import ROOT, fail, hp, settings
from utils.report import number, table
from utils.run import page

CASES = {  # flags of main_grad; what an iteration of a round costs differs a hundredfold
    "dlg": ["grad", "dlg", "--trials", "1"],
    "ig_convnet64_1": ["grad", "ig_single", "--model", "convnet64", "--trials", "1"],
    "ig_convnet64_8": ["grad", "ig_single", "--model", "convnet64", "--trials", "1", "--batch-size", "8"],
    "ig_resnet18_1": ["grad", "ig_single", "--model", "resnet18", "--trials", "1"],
    "ig_resnet18_8": ["grad", "ig_single", "--model", "resnet18", "--trials", "1", "--batch-size", "8"],
    "rtf": ["grad", "rtf", "--model", "cnn", "--trials", "1", "--batch-size", "64"],
    "cpa": ["grad", "cpa", "--model", "fc2", "--trials", "1", "--batch-size", "8"],
}
Run = dict[str, Any]


@settings
class Flags:
    """Speed of attacks against the papers' loops and a peer."""

    cases: tuple[str, ...] = hp(("dlg", "ig_convnet64_1", "ig_convnet64_8", "rtf", "cpa"), f"of {', '.join(CASES)}")
    rounds: int = hp(3, "turns of each engine", least=1)
    iterations: int = hp(40, "of each engine in a turn; batches of 8 a quarter", least=2)
    peer_iterations: int = hp(1000, "of breaching in its one long run; 0: none", least=0)
    long: bool = hp(True, "also run ours to its end, and the peer")
    base_datadir: Path = hp(ROOT / "datasets", "where data sets lie")
    dataset: str = hp("photos", "whose images")
    image_size: int | None = hp(None, "side in pixels")
    seed: int = hp(0, "of victims and models", least=0)
    out: Path = hp(ROOT / "results" / "bench", "where speed.md, speed.csv and speed.json go")


def run(engine: str, iterations: int, seconds: float, flags: list[str]) -> Run:
    command = [
        sys.executable,
        str(ROOT / "experiments/bench/engines.py"),
        engine,
        str(iterations),
        str(seconds),
        *flags,
    ]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(f"{engine} on {' '.join(flags)} failed: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def reaches(found: Run, decibels: float) -> float | None:
    """Seconds until the images are that near, as best so far."""
    return next((t for t, psnr in found["scores"] if psnr >= decibels), None)


def ratios(above: list[float], below: list[float]) -> str:
    """min-median-max of a / b over the rounds."""
    found = [a / b for a, b in zip(above, below, strict=True)]
    return f"{min(found):.2f}-{statistics.median(found):.2f}-{max(found):.2f}"


def measure(name: str, flags: Flags, engines: list[str]) -> list[list[str]]:
    case = [*CASES[name], "--seed", str(flags.seed), "--dataset", flags.dataset]
    case += ["--base-datadir", str(flags.base_datadir)]
    case += [] if flags.image_size is None else ["--image-size", str(flags.image_size)]
    attack, batch = case[1], 8 if name.endswith("_8") else 1
    mine = [e for e in engines if e != "breaching" or attack == "ig_single"]
    turns = flags.iterations // 4 if batch > 1 else flags.iterations
    budget = max(2, {"dlg": turns // 10, "rtf": 1}.get(attack, turns))
    rounds: dict[str, list[Run]] = {e: [] for e in mine}
    for _ in range(flags.rounds):
        for engine in mine:
            rounds[engine].append(run(engine, budget if engine != "ours" or attack == "ig_single" else 0, 0, case))
    whole = {e: r[-1] for e, r in rounds.items()}
    if flags.long and attack == "ig_single":
        whole["ours"] = run("ours", 0, 0, case)
        if "breaching" in mine and flags.peer_iterations and batch == 1:
            whole["breaching"] = run("breaching", flags.peer_iterations, 0, case)
    (flags.out / f"speed_{name}.json").write_text(json.dumps({"rounds": rounds, "whole": whole}))
    rows = []
    for engine in mine:
        found, per = whole[engine], [r["per_iteration"] for r in rounds[engine]]
        seconds, how = found["seconds"], ""
        if engine == "reference":
            seconds, how = BUDGET[attack] * statistics.median(per), " (reckoned)" if BUDGET[attack] > budget else ""
        elif engine == "breaching":
            how = f" ({found['iterations']} its)"
        best = max(psnr for _, psnr in found["scores"])
        when = next(t for t, psnr in found["scores"] if psnr == best)
        peaks = [r["peak"] for r in rounds[engine]]
        ours = [r["per_iteration"] for r in rounds["ours"]]
        rows.append(
            [
                name,
                engine,
                str(found["threads"]),
                f"{1e3 * statistics.median(per):.3g}",
                "1" if engine == "ours" else ratios(per, ours) if attack == "ig_single" else "-",
                f"{seconds:.3g}{how}",
                "1" if engine == "ours" else f"{seconds / whole['ours']['seconds']:.3g}",
                number(reaches(found, 20), 1),
                number(reaches(found, 25), 1),
                f"{best:.1f} at {when:.3g} s" + ("" if engine != "reference" else f" ({found['iterations']} its)"),
                f"{statistics.median(peaks):.0f}",
                number(found.get("corr"), 3),
            ]
        )
    return rows


HEADER = ["case", "engine", "threads", "ms/iteration", "x ours", "s/victim", "x ours", "s to 20 dB", "s to 25 dB"]
HEADER += ["best PSNR dB", "peak MB", "corr"]


def machine() -> str:
    """Processor, cores, torch: what a number belongs to."""
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
        print(table(HEADER, rows[-len(engines) :]), flush=True)
    notes.append(
        "x ours: least-middle-largest of a turn's ratio; then whole runs, the paper's reckoned as speed x budget"
    )
    write(flags.out, "speed", HEADER, rows, notes)


if __name__ == "__main__":
    page(Flags, main, __doc__)
