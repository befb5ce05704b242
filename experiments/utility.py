"""Accuracy of federated runs with and without an attack's block: the mean of each run's last rounds, seed by seed."""

import json
import statistics
from pathlib import Path

from utils.cli import ROOT, fail, hp, settings
from utils.report import number, table
from utils.run import page


@settings
class Flags:
    out: Path = hp(ROOT / "results" / "utility", "where the finished runs of both lie")
    last: int = hp(5, "rounds at the end of each run whose accuracy counts", least=1)


def main(flags: Flags) -> None:
    runs = []
    for config in sorted(flags.out.glob("fed/*/*/config.json")):
        if not (config.parent / "done").exists():
            continue
        told, summary = (json.loads((config.parent / name).read_text()) for name in ("config.json", "summary.json"))
        rounds = [json.loads(line)["accuracy"] for line in (config.parent / "rounds.jsonl").read_text().splitlines()]
        success = summary["success_rate"]
        runs.append((told["attack"], told["flags"]["seed"], statistics.fmean(rounds[-flags.last :]), success))
    names = sorted({name for name, *_ in runs})
    if "baseline" not in names or len(names) < 2:
        fail(f"{flags.out} holds no finished runs of baseline and of an attack to compare it with")
    rows = []
    clean = [accuracy for name, _, accuracy, _ in runs if name == "baseline"]
    for name in names:
        values, found = zip(*[(accuracy, success) for n, _, accuracy, success in runs if n == name], strict=True)
        spread = statistics.stdev(values) if len(values) > 1 else None
        difference = statistics.fmean(values) - statistics.fmean(clean)
        cells = (statistics.fmean(values), spread, difference, statistics.fmean(found))
        rows.append([name, str(len(values)), *(number(v, 3) for v in cells)])
    text = table(["attack", "seeds", "accuracy", "sd", "difference", "images recovered"], rows)
    (flags.out / "table.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    page(Flags, main)
