"""Accuracy of federated runs with and without an attack's block: the mean of each run's last rounds, over seeds.

The difference is paired by seed; intervals are those of Student's t over seeds.
"""

import json
import statistics
from pathlib import Path

from core.errors import UsageError
from core.hyperparameters import hp, hyperparameters
from core.paths import ROOT
from evaluation.intervals import mean_interval
from report.tables import number, table
from runner.cli import run_script


@hyperparameters
class Flags:
    out: Path = hp(ROOT / "results" / "utility", "folder of the finished runs, with and without the attack")
    last: int = hp(5, "number of rounds at the end of a run over which accuracy is averaged", ge=1)


def main(flags: Flags) -> None:
    runs = []
    for path in sorted(flags.out.glob("fed/*/*/config.json")):
        if not (path.parent / "done").exists():
            continue
        config, summary = (json.loads((path.parent / name).read_text()) for name in ("config.json", "summary.json"))
        rounds = [json.loads(line)["accuracy"] for line in (path.parent / "rounds.jsonl").read_text().splitlines()]
        accuracy = statistics.fmean(rounds[-flags.last :])
        runs.append((config["attack"], config["flags"]["seed"], accuracy, summary["success_rate"]))
    names = sorted({name for name, *_ in runs})
    if "baseline" not in names or len(names) < 2:
        raise UsageError(f"{flags.out} holds no finished runs of baseline and of an attack to compare it with")
    rows = []
    baseline = {seed: accuracy for name, seed, accuracy, _ in runs if name == "baseline"}
    for name in names:
        found = {seed: (accuracy, rate) for n, seed, accuracy, rate in runs if n == name}
        accuracies = [accuracy for accuracy, _ in found.values()]
        paired = [accuracy - baseline[seed] for seed, (accuracy, _) in found.items() if seed in baseline]
        difference = mean(paired, "+") if paired and name != "baseline" else "-"
        recovered = statistics.fmean(rate for _, rate in found.values())
        count = str(len(found)) + ("" if len(paired) == len(found) else f", {len(paired)} paired")
        rows.append([name, count, mean(accuracies), difference, number(recovered)])
    text = table(["attack", "seeds", "accuracy", "difference", "recovered"], rows)
    (flags.out / "table.md").write_text(text + "\n")
    print(text)


def mean(values: list[float], sign: str = "") -> str:
    found = mean_interval(values, range(len(values)))
    text = f"{found['mean']:{sign}.3f}"
    return text if found["low"] is None else f"{text} [{found['low']:{sign}.3f}, {found['high']:{sign}.3f}]"


if __name__ == "__main__":
    run_script(Flags, main, __doc__)
