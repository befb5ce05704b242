"""The cost of an attack over batch size, image side, local steps, and trials over jobs."""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

from core.hyperparameters import hp, hyperparameters
from core.paths import ROOT
from experiments.bench.speed import failed, machine, run, write
from report.tables import number
from runner.cli import run_script


@hyperparameters
class Flags:
    model: str = hp("convnet64", "network of ig_single and ig_multi")
    batch_size: tuple[int, ...] = hp((1, 2, 4, 8, 16), "numbers of images behind a gradient")
    image_size: tuple[int, ...] = hp((32, 64, 128, 224), "sides of a single image in pixels")
    local_steps: tuple[int, ...] = hp((1, 2, 5, 10), "numbers of local steps of a client with one image")
    trials: tuple[int, ...] = hp((2, 8), "numbers of trials in the timing of dlg")
    dlg_iterations: int = hp(800, "largest number of iterations in a trial of dlg", ge=1)
    jobs: tuple[int, ...] = hp((1, 2), "numbers of worker processes")
    iterations: int = hp(10, "number of timed iterations", ge=3)
    base_datadir: Path = hp(ROOT / "datasets", "folder of the data sets")
    dataset: str = hp("photos", "data set")
    out: Path = hp(ROOT / "results" / "bench", "folder of scale.md and scale.csv")


def main(flags: Flags) -> None:
    flags.out.mkdir(parents=True, exist_ok=True)
    data = ["--dataset", flags.dataset, "--base-datadir", str(flags.base_datadir)]
    grad = ["grad", "ig_single", "--model", flags.model, "--trials", "1", *data]
    fed = ["fed", "ig_multi", "--model", flags.model, "--trials", "1", *data]
    points = [("batch", n, [*grad, "--batch-size", str(n)]) for n in flags.batch_size]
    points += [("image side", n, [*grad, "--image-size", str(n)]) for n in flags.image_size]
    points += [("local steps", n, [*fed, "--local-epochs", str(n)]) for n in flags.local_steps]
    rows, first = [], {}
    for axis, n, flags_of in points:
        found = run("ours", flags.iterations, flags_of)["victims"][0]
        per = 1e3 * (found["times"][-1] - found["times"][0]) / (len(found["times"]) - 1)
        first.setdefault(axis, per)
        rows.append([axis, str(n), f"{per:.3g} ms/iteration", number(per / first[axis], 2), f"{found['peak']:.0f}"])
    for trials in flags.trials:
        alone = None
        for jobs in flags.jobs:
            took = command(
                ["dlg", "--iterations", str(flags.dlg_iterations), "--trials", str(trials), "--jobs", str(jobs), *data]
            )
            alone = alone or jobs * took
            rows.append(["trials x jobs", f"{trials} x {jobs}", f"{took:.1f} s", number(alone / took / jobs, 2), "-"])
    notes = [
        machine(),
        "relative: cost over the axis's first row; of trials: parallel efficiency over the first number of jobs",
    ]
    write(flags.out, "scale", ["axis", "size", "cost", "relative", "peak MB"], rows, notes)


def command(words: list[str]) -> float:
    """Seconds of `main_grad.py words`, start-up and scoring included."""
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, str(ROOT / "main_grad.py"), *words, "--out", out]
        start = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True)
        took = time.perf_counter() - start
    if done.returncode:
        failed(f"main_grad.py {' '.join(words)}", done.stderr)
    return took


if __name__ == "__main__":
    run_script(Flags, main, __doc__)
