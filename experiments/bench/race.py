"""A race: PSNR and the share of victims identified over seconds, ours against Inverting Gradients as breaching runs it.

Each victim is one image with a network of its own. All racers attack the same gradient with the same inferred labels,
in a process of their own with one thread. Ours runs as by default and with convolutions in float32. The peer is
breaching 0.1.2 with its configuration `invertinggradients` where it is installed, and the same algorithm from the
paper's equations (reference.py) otherwise. Its learning-rate schedule ends within its budget of iterations, and its
weight of total variation is chosen on tuning victims. Every finished run is stored: the same command goes on where it
stopped.
"""

import csv
import json
import math
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from core.hyperparameters import hp, hyperparameters
from core.paths import ROOT
from evaluation.intervals import mean_interval
from experiments.bench.speed import machine
from report import style
from report.tables import number, table
from runner.cli import fail, run_script
from utils.files import digest, write_json

Run = Mapping[str, Any]
PEER = "breaching_annealed" if find_spec("breaching") is not None else "reference_annealed"
LEVELS = (20.0, 25.0)  # dB
FIRST_VICTIM = {"reporting": 0, "tuning": 1000}  # seed


@hyperparameters
class Flags:
    models: tuple[str, ...] = hp(("convnet64",), "networks, untrained")
    dataset: str = hp("leaves", "data set")
    base_datadir: Path = hp(ROOT / "datasets", "folder of the data sets")
    image_size: int | None = hp(None, "side of the images in pixels")
    normalize: str = hp("none", "input of the networks: none, dataset or half")
    victims: int = hp(5, "number of reporting victims, each with a network of its own", ge=1)
    tuning_victims: int = hp(2, "number of tuning victims, on which the peer's total variation is chosen", ge=1)
    tvs: tuple[float, ...] = hp((1e-4, 1e-2, 0.2), "weights of total variation that are tried")
    peer_iterations: tuple[int, ...] = hp((300, 1000), "budgets of the peer")
    iterations: int = hp(300, "budget of ours", ge=1)
    out: Path = hp(ROOT / "results" / "race", "folder of race.md, race.csv, a plot for each network, and the runs")


def run_engine(engine: str, iterations: int, flags: Sequence[str]) -> Run:
    """One victim by one engine of engines.py, in a process of its own with one thread."""
    command = [sys.executable, str(ROOT / "experiments/bench/engines.py"), engine, str(iterations), "alone", "grad"]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [*command, *flags],
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        fail(f"{engine} failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    return json.loads(done.stdout.splitlines()[-1])["victims"][0]  # type: ignore[no-any-return]


def attack(flags: Flags, model: str, engine: str, iterations: int, part: str, victim: int, more: Sequence[str]) -> Run:
    """The run of one engine on one victim: the stored one, if there is one."""
    words = ["ig_single", "--model", model, "--dataset", flags.dataset, "--base-datadir", str(flags.base_datadir)]
    words += ["--normalize", flags.normalize, "--victims", part, "--seed", str(FIRST_VICTIM[part] + victim)]
    words += ["--trials", "1", "--threads", "1", *more]
    words += ["--image-size", str(flags.image_size)] if flags.image_size else []
    key = {"engine": engine, "iterations": iterations, "flags": [w for w in words if w != str(flags.base_datadir)]}
    path = flags.out / "runs" / f"{digest(key)}.json"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        found = run_engine(engine, iterations, words)
        write_json(path, {**key, "result": {k: found[k] for k in ("seconds", "iterations", "scores")}})
    return json.loads(path.read_text(encoding="utf-8"))["result"]  # type: ignore[no-any-return]


def tuned_tv(flags: Flags, model: str, iterations: int) -> float:
    """The weight of total variation with the highest mean final PSNR on tuning victims."""
    if len(flags.tvs) == 1:
        return flags.tvs[0]
    means = {}
    for tv in flags.tvs:
        runs = [
            attack(flags, model, PEER, iterations, "tuning", v, ["--paper", "--tv", str(tv)])
            for v in range(flags.tuning_victims)
        ]
        means[tv] = sum(final(run)[1] for run in runs)
    return max(means, key=lambda tv: means[tv])


def final(run: Run) -> Sequence[Any]:
    """(seconds, PSNR, identified) at the end of a run."""
    return run["scores"][-1]  # type: ignore[no-any-return]


def at(run: Run, seconds: float, entry: int) -> float | None:
    """Entry 1 (PSNR) or 2 (identified) of the newest image at that time; None before the first one."""
    values = [score[entry] for score in run["scores"] if score[0] <= seconds]
    return float(values[-1]) if values else None


def mean_curve(runs: Sequence[Run], entry: int, points: int = 200) -> tuple[list[float], list[float]]:
    """Seconds and the mean over victims, from when all have an image until the last one is done."""
    first = max(run["scores"][0][0] for run in runs)
    last = max(run["scores"][-1][0] for run in runs)
    times = [first * (last / first) ** (k / (points - 1)) for k in range(points)]
    values = [[at(run, t * (1 + 1e-9), entry) for run in runs] for t in times]
    return times, [sum(v for v in own if v is not None) / len(own) for own in values]


def reaches(runs: Sequence[Run], decibels: float) -> float | None:
    """The first second at which the mean PSNR is that high."""
    pairs = zip(*mean_curve(runs, 1), strict=True)
    return next((t for t, value in pairs if value >= decibels), None)


def draw(path: Path, title: str, racers: Mapping[str, Sequence[Run]]) -> None:
    """PSNR above, share identified below, over seconds on a logarithmic axis."""
    with style.pyplot() as plt:
        size = (style.WIDTH, 1.4 * style.HEIGHT)
        figure, axes = plt.subplots(2, 1, figsize=size, sharex=True, layout="constrained")
        for place, (name, runs) in enumerate(racers.items()):
            for ax, entry in zip(axes, (1, 2), strict=True):
                ax.plot(*mean_curve(runs, entry), color=style.COLORS[place % len(style.COLORS)], marker="", label=name)
        axes[0].set(ylabel="mean PSNR (dB)", title=title)
        axes[1].set(xlabel="seconds of one thread", ylabel="share identified", ylim=(-0.03, 1.03), xscale="log")
        axes[0].legend()
        style.save(figure, path)


HEADER = ["network", "racer", "TV", "n", "s/victim", "final PSNR dB", "identified", "s to 20 dB", "s to 25 dB"]
HEADER += ["s to the peer's best", "x ours"]


def race(flags: Flags, model: str) -> tuple[dict[str, list[Run]], dict[str, str]]:
    """The runs of each racer on the reporting victims, and the weight of total variation of each."""
    entries = {"ours": ("ours", flags.iterations, [], "ours")}
    entries["ours, float32"] = ("ours", flags.iterations, ["--precision", "float32"], "ours")
    name = PEER.split("_")[0] if PEER.startswith("breaching") else "Inverting Gradients"
    for count in flags.peer_iterations:
        tv = str(tuned_tv(flags, model, count))
        entries[f"{name}, {count} iterations"] = (PEER, count, ["--paper", "--tv", tv], tv)
    runs = {}
    for racer, (engine, count, more, _) in entries.items():
        runs[racer] = [attack(flags, model, engine, count, "reporting", v, more) for v in range(flags.victims)]
        print(f"{model}, {racer}: {number(sum(final(r)[1] for r in runs[racer]) / flags.victims)} dB", flush=True)
    return runs, {racer: entry[3] for racer, entry in entries.items()}


def lines(model: str, racers: Mapping[str, Sequence[Run]], tvs: Mapping[str, str]) -> list[list[str]]:
    """A row for each racer."""
    peers = {name: runs for name, runs in racers.items() if not name.startswith("ours")}
    means = {name: sum(final(run)[1] for run in runs) / len(runs) for name, runs in racers.items()}
    best = max((means[name] for name in peers), default=math.inf)
    seconds = {name: reaches(runs, best) for name, runs in racers.items()}
    rows = []
    for name, runs in racers.items():
        spread = mean_interval([final(run)[1] for run in runs], range(len(runs)))
        psnr = number(spread["mean"])
        if spread["low"] is not None:
            psnr += f" [{number(spread['low'])}, {number(spread['high'])}]"
        own, theirs = seconds["ours"], seconds[name]
        rows.append(
            [
                *(
                    model,
                    name,
                    tvs[name],
                    str(len(runs)),
                    number(sum(run["seconds"] for run in runs) / len(runs)),
                    psnr,
                ),
                number(sum(final(run)[2] for run in runs) / len(runs)),
                *(number(reaches(runs, level)) for level in LEVELS),
                number(theirs),
                number(theirs / own) if own and theirs else "-",
            ]
        )
    return rows


def main(flags: Flags) -> None:
    flags.out.mkdir(parents=True, exist_ok=True)
    rows = []
    for model in flags.models:
        racers, tvs = race(flags, model)
        rows += lines(model, racers, tvs)
        draw(flags.out / f"race_{model}.png", f"{model}, {flags.dataset}, {flags.victims} victims", racers)
    peer = "breaching 0.1.2" if PEER.startswith("breaching") else "its algorithm from the paper's equations"
    note = f"{machine()}, one thread each; peer: {peer}; TV chosen on {flags.tuning_victims} tuning victims"
    text = "\n".join([table(HEADER, rows), "", note])
    (flags.out / "race.md").write_text(text + "\n", encoding="utf-8")
    with (flags.out / "race.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([HEADER, *rows])
    print(f"\n{text}\n{flags.out / 'race.md'}, race.csv, race_<network>.png")


if __name__ == "__main__":
    run_script(Flags, main, __doc__)
