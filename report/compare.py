"""Comparisons of runs: what differs between them beside how they scored, as a table, as numbers, and as a plot."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.errors import UsageError
from report.figures import comparison_plot
from report.tables import STATUSES, Summary, cell, entries_of, sort_key, table
from utils.files import is_sealed, read_json, write_bytes

Point = Mapping[str, str]  # what was varied, by name, in the order of the columns


@dataclass(frozen=True)
class Comparison:
    """Finished runs, each with the values that set it apart.

    runs: the names of their folders, shown as the last column; empty to leave it out.
    """

    points: Sequence[Point]
    summaries: Sequence[Summary]
    runs: Sequence[str] = ()

    def varied(self) -> list[str]:
        return list(dict.fromkeys(key for point in self.points for key in point))

    def markdown(self) -> str:
        """A table for people."""
        varied, entries = self.varied(), entries_of(self.summaries, compared=True)
        rows = [
            [point.get(key, "-") for key in varied] + [cell(summary, entry) for entry in entries]
            for point, summary in zip(self.points, self.summaries, strict=True)
        ]
        header = [*varied, *(entry.label for entry in entries)]
        if self.runs:
            header.append("run")
            rows = [[*row, run] for row, run in zip(rows, self.runs, strict=True)]
        return table(header, rows)

    def csv(self) -> str:
        """A table for programs: a number in each cell, or nothing where there is none.

        Columns are named after the keys of summary.json; an entry with several numbers has a column for each, such as
        psnr_mean and psnr_std.
        """
        varied, flat = self.varied(), [_flat(summary) for summary in self.summaries]
        names = [name for name in dict.fromkeys(name for row in flat for name in row) if name not in varied]
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow([*varied, *names, *(["run"] if self.runs else [])])
        for i, (point, row) in enumerate(zip(self.points, flat, strict=True)):
            values = [point.get(key, "") for key in varied] + [row.get(name, "") for name in names]
            writer.writerow([*values, *self.runs[i : i + 1]])
        return out.getvalue()

    def write(self, folder: Path) -> None:
        """Write table.md, table.csv and plot.png in `folder`, which is made if it does not exist."""
        folder.mkdir(parents=True, exist_ok=True)
        write_bytes(folder / "table.md", (self.markdown() + "\n").encode())
        write_bytes(folder / "table.csv", self.csv().encode())
        comparison_plot(folder / "plot.png", self.points, self.summaries)


def write_comparison(folder: Path, points: Sequence[Point], summaries: Sequence[Summary]) -> str:
    """Write the comparison of a sweep in `folder`, as `Comparison.write`, and return the table for people.

    points: the swept flags of each run. Several attacks make a column of their own.
    """
    if len({s["attack"] for s in summaries}) > 1:
        points = [{"attack": s["attack"], **point} for point, s in zip(points, summaries, strict=True)]
    comparison = Comparison(points, summaries)
    comparison.write(folder)
    return comparison.markdown()


def compare_folders(paths: Sequence[Path]) -> tuple[Comparison, list[Path]]:
    """The comparison of the finished runs in these folders, and the folders that hold an unfinished one.

    A folder that is no run itself stands for all runs below it. The points are the flags and hyperparameters in which
    the runs differ; hyperparameters are compared among runs of one attack, because another attack has others anyway.
    Raises UsageError if there is no finished run.
    """
    folders = list(dict.fromkeys(folder for path in paths for folder in _run_folders(path)))
    found = {folder: _load(folder) for folder in folders}
    unfinished = [folder for folder, run in found.items() if run is None]
    loaded = [run for run in found.values() if run is not None]
    if not loaded:
        raise UsageError(f"there is no finished run in {', '.join(map(str, paths))}")
    flag_names = _differing([flags for flags, *_ in loaded])
    own_names: dict[str, None] = {}
    for attack in dict.fromkeys(summary["attack"] for _, _, summary, _ in loaded):
        own_names |= dict.fromkeys(_differing([own for _, own, summary, _ in loaded if summary["attack"] == attack]))
    several = len({summary["attack"] for _, _, summary, _ in loaded}) > 1
    points = [
        ({"attack": summary["attack"]} if several else {})
        | {_as_flag(key): str(flags.get(key, "-")) for key in flag_names}
        | {_as_flag(key): str(own.get(key, "-")) for key in own_names}
        for flags, own, summary, _ in loaded
    ]
    order = sorted(range(len(points)), key=lambda i: [sort_key(value) for value in points[i].values()])
    ordered = Comparison([points[i] for i in order], [loaded[i][2] for i in order], [loaded[i][3] for i in order])
    return ordered, unfinished


def _load(folder: Path) -> tuple[dict[str, Any], dict[str, Any], Summary, str] | None:
    """Flags, hyperparameters, summary and name of a finished run; None if it is not finished or damaged."""
    if not (folder / "done").is_file():
        return None
    if (folder / "done").stat().st_size and not is_sealed(folder, "done"):  # earlier versions left it empty
        return None
    config, summary = read_json(folder / "config.json"), read_json(folder / "summary.json")
    flags, own, psnr = config.get("flags"), config.get("hyperparameters"), summary.get("psnr")
    if not (isinstance(flags, dict) and isinstance(own, dict) and isinstance(summary.get("attack"), str)):
        return None
    if psnr is not None and not (isinstance(psnr, dict) and {"mean", "std", "median"} <= psnr.keys()):
        return None
    return {"weights": config.get("weights")} | flags, own, summary, folder.name


def _run_folders(path: Path) -> list[Path]:
    """The folder itself if it is a run, else every run below it."""
    if (path / "config.json").exists() or not path.is_dir():
        return [path]
    return sorted(config.parent for config in path.rglob("config.json"))


def _differing(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """The names whose values differ, in the order of the first setting that has them."""
    names = dict.fromkeys(name for setting in settings for name in setting)
    return [name for name in names if len({str(setting.get(name)) for setting in settings}) > 1]


def _as_flag(name: str) -> str:
    """A setting as it is typed: local_epochs -> local-epochs."""
    return name.replace("_", "-")


def _flat(summary: Summary) -> dict[str, Any]:
    """The entries of a summary, one value each: {"psnr": {"mean": 1}} -> {"psnr_mean": 1}; None -> no entry."""
    flat: dict[str, Any] = {}
    for key, value in summary.items():
        if key == "notes":  # sentences
            continue
        if key == "status":  # updates by status: a status that did not occur has none
            flat |= {f"status_{name}": value.get(name, 0) for name in STATUSES}
        elif isinstance(value, Mapping):
            flat |= {f"{key}_{name}": part for name, part in _flat(value).items()}
        elif isinstance(value, list):
            flat[key] = " ".join(map(str, value))
        elif value is not None:
            flat[key] = int(value) if isinstance(value, bool) else value
    return flat
