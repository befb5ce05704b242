"""What an attack costs as things grow: batch, image side, local steps, and trials over jobs."""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

from experiments.bench.speed import failed, machine, run, write
from utils.cli import ROOT, hp, settings
from utils.report import number
from utils.run import page


@settings
class Flags:
    """Cost against batch size, image size, local steps, trials and jobs."""

    model: str = hp("convnet64", "network of ig_single and ig_multi")
    batch_size: tuple[int, ...] = hp((1, 2, 4, 8, 16), "images behind a gradient")
    image_size: tuple[int, ...] = hp((32, 64, 128, 224), "sides in pixels, of one image")
    local_steps: tuple[int, ...] = hp((1, 2, 5, 10), "of a client with one image, unrolled")
    trials: tuple[int, ...] = hp((2, 8), "of dlg")
    dlg_iterations: int = hp(800, "at the most, of each trial of dlg", least=1)
    jobs: tuple[int, ...] = hp((1, 2), "at once")
    iterations: int = hp(10, "timed, of each", least=3)
    base_datadir: Path = hp(ROOT / "datasets", "where data sets lie")
    dataset: str = hp("photos", "whose images")
    out: Path = hp(ROOT / "results" / "bench", "where scale.md and scale.csv go")


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
        "relative: to the first of its axis; of trials, the efficiency against the first number of jobs",
    ]
    write(flags.out, "scale", ["axis", "size", "cost", "relative", "peak MB"], rows, notes)


def command(words: list[str]) -> float:
    """Seconds of `main_grad.py words`, start-up and scoring included."""
    with tempfile.TemporaryDirectory() as out:
        page = [sys.executable, str(ROOT / "main_grad.py"), *words, "--out", out]
        start = time.perf_counter()
        done = subprocess.run(page, capture_output=True, text=True)
        took = time.perf_counter() - start
    if done.returncode:
        failed(f"main_grad.py {' '.join(words)}", done.stderr)
    return took


if __name__ == "__main__":
    page(Flags, main, __doc__)
