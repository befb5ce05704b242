"""Tables that fit a terminal and numbers that fit a program; plots in which every run of a grid is a point."""

import csv
import dataclasses
import io
import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from core.domain import ImageDomain
from core.errors import UsageError
from core.protocol import Batch, Reconstruction, image_task
from evaluation.baselines import Baselines
from evaluation.candidates import Candidates, Pool
from evaluation.evaluator import ScoringContext, score_trial
from evaluation.objective import Objectives
from evaluation.summary import summarize
from evaluation.verdict import outcome
from report import figures, style
from report.compare import Comparison, compare_folders, write_comparison
from report.tables import ENTRIES, METRIC_HELP, RECOVERED, interval, mean_std, number, one_run, share, table, verdict
from tests.conftest import ROOT


def scored(gain: list[float], attack: str = "dlg", **more: Any) -> dict[str, Any]:
    """The summary of a run with one image in each trial, whose class mean has 15 dB."""
    rows = [
        {
            "trial": k,
            "match": 0,
            "psnr": 15 + g,
            "ssim": 0.5,
            "lpips": None,
            "label_ok": True,
            "baseline_psnr": 12.0,
            "class_baseline_psnr": 15.0,
        }
        for k, g in enumerate(gain)
    ]
    numbers = summarize(rows, [{"seconds": 1.0, "status": "solved"}] * len(rows))
    return {"mode": "grad", "attack": attack, "dataset": "photos", "model": "lenet", **numbers, "oracle": [], **more}


@pytest.mark.parametrize(
    ("grid", "panels"),
    [
        ({"local_lr": ["0.01", "0.1"], "attack": ["dlg", "sme"]}, 1),
        ({"local_epochs": ["1", "5", "20"], "local_lr": ["0.01", "0.1"], "attack": ["dlg", "sme"]}, 2),
        ({"images": ["1", "4"], "epochs": ["1", "5", "20"], "lr": ["0.01", "0.1"], "attack": ["dlg", "sme"]}, 4),
        ({"images": ["1", "4"], "epochs": ["1", "5"], "lr": ["0.01", "0.1", "1"]}, 2),
        ({"attack": ["dlg", "idlg", "sme"]}, 1),
        ({"defense": ["none", "clip=1", "gauss=0.1"]}, 1),
    ],
)
def test_every_run_of_a_grid_is_in_its_plot(
    grid: dict[str, list[str]], panels: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    drawn_figures: list[Any] = []
    monkeypatch.setattr(style, "save", lambda figure, path: drawn_figures.append(figure))
    points = [dict(zip(grid, cell, strict=True)) for cell in itertools.product(*grid.values())]
    scores = [float(i) for i in range(len(points))]
    summaries = [
        {"psnr": {"mean": s, "std": 0.0}, "baseline_psnr": 12.0, "attack": "any", "dataset": "photos"} for s in scores
    ]
    figures.comparison_plot(tmp_path / "plot.png", points, summaries)
    (figure,) = drawn_figures
    assert len(figure.axes) == panels
    drawn = [y for ax in figure.axes for bars in ax.containers for y in bars.lines[0].get_ydata()]
    assert sorted(drawn) == scores
    titles = " | ".join(ax.get_title() for ax in figure.axes)
    assert panels == 1 or len({ax.get_title() for ax in figure.axes}) == panels, titles


def test_names_are_not_joined_by_a_line_and_numbers_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(style, "save", lambda figure, path: drawn.append(figure))
    for values in (["none", "clip=1"], ["0.1", "1"]):
        figures.comparison_plot(tmp_path / "plot.png", [{"x": v} for v in values], [scored([1.0]), scored([2.0])])
    assert [figure.axes[0].containers[0].lines[0].get_linestyle() for figure in drawn] == ["None", "-"]


def test_a_share_of_recovered_images_is_plotted_below_its_oracle(tmp_path: Path) -> None:
    points = [{"bins": b} for b in ("16", "64")]
    summaries = [scored([1.0], "rtf", ceiling=0.8, training_loss=loss) for loss in (None, 1.5)]
    figures.comparison_plot(tmp_path / "plot.png", points, summaries)
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_a_grid_renders_any_channels_missed_images_and_file_names(channels: int, tmp_path: Path) -> None:
    domain = ImageDomain((channels, 8, 8), (0.0,) * channels, (1.0,) * channels)
    images = torch.rand(12, channels, 8, 8)
    rows = [{"match": None if i == 3 else i, "psnr": 20.0 + i} for i in range(12)]
    names = [f"cats/a rather long name {i} for $1.png" for i in range(12)]
    figures.grid(tmp_path / "grid.png", images, images, rows, domain, names, most=11)
    assert (tmp_path / "grid.png").read_bytes().startswith(b"\x89PNG")


def test_a_learning_curve_of_one_round_is_drawn(tmp_path: Path) -> None:
    figures.learning_curve(tmp_path / "accuracy.png", [{"round": 0, "accuracy": 0.5, "loss": None}])
    assert (tmp_path / "accuracy.png").exists()


KNOWLEDGE = {"threat": "honest-but-curious", "knows": ["number of images", "labels (granted)"]}


def full_summary() -> dict[str, Any]:
    """A summary with every entry there is."""
    task = image_task((3, 16, 16), 4)
    images = torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    others = torch.rand(400, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    candidates = Candidates([Pool(torch.arange(400) % 4, lambda indices: others[indices])], seed=0)
    context = ScoringContext(
        task, Baselines(Batch(images, torch.arange(8) % 4)), {"lpips": lambda truth, guess: 0.12345}, candidates
    )
    rows: list[dict[str, Any]] = []
    records = []
    for trial in range(2):
        truth = Batch(images[4 * trial : 4 * trial + 4], torch.arange(4))
        proofs = torch.tensor([True, True, False])
        rec = Reconstruction(truth.examples[:3], truth.labels[:3], (1.0,), 1, sources=truth.examples[:3])
        rec = dataclasses.replace(rec, certified=proofs)
        mask = torch.tensor([True] * 4)
        score = score_trial(
            truth,
            rec,
            context,
            comparison=rec,
            projection=truth.examples,
            recoverable=mask,
            unrelated=images.flip(3),
            found=Objectives(1e-3, 1e-9, 0.5),
        )
        rows += [{"trial": trial, **row} for row in score.rows]
        records.append({"seconds": 12345.678, **score.record})
    more = {"mode": "fed", "attack": "ig_weight", "dataset": "tiny_imagenet", "model": "convnet64"}
    fed: dict[str, Any] = {"accuracy": 0.512, "training_loss": 1.234, "companion": "ig_single"}
    fed["guarantee"] = {"unit": "client", "epsilon": 1234.5, "delta": 1e-5}
    fed["identified_bound"] = 0.123
    fed["van_trees"] = {"psnr": 23.4, "exceeded": False}
    notes = [f"folder: {'12 files, ' * 20}"]
    return more | summarize(rows, records) | fed | {"oracle": ["labels"], "notes": notes} | KNOWLEDGE


@pytest.mark.parametrize("summary", [scored([1.0, 2.0, 3.0]), scored([8.0]), full_summary()])
def test_a_run_ends_with_a_table_that_fits_a_terminal_and_a_sentence(summary: dict[str, Any]) -> None:
    lines = one_run(summary).splitlines()
    assert max(map(len, lines)) <= 80
    rows = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines if line.startswith("| ")]
    assert rows[0][0] == "metric"
    assert all(len(row) == 2 and row[1] not in ("", "-", "None") for row in rows)
    assert {label for label, _ in rows[1:]} <= set(METRIC_HELP)
    assert lines[-1].endswith(".")
    assert RECOVERED in METRIC_HELP


def test_the_full_table_shows_every_entry() -> None:
    text = one_run(full_summary())
    assert [e.label for e in ENTRIES if f"| {e.label} " not in text] == []
    assert all(METRIC_HELP[e.label] for e in ENTRIES)


def test_unknown_values_are_left_out_of_the_table_of_a_run() -> None:
    text = one_run(scored([1.0, 2.0]))
    assert "SSIM" in text
    assert not any(word in text for word in ("LPIPS", "granted", "oracle", "missed", "candidates", "identified"))


def identified(share: float, count: int, p_value: float, by_class: bool = True) -> dict[str, Any]:
    found = {"share": share, "low": 0.0, "high": 1.0, "n": count, "chance": 0.01, "p_value": p_value}
    return {"identified": found | {"candidates": 100, "by_class": by_class}}


def test_the_sentence_begins_with_one_of_three_verdicts() -> None:
    assert verdict(scored([5.0, 6.0, 7.0, 5.5, 6.5])).startswith("Leaks: 5 of 5 images recovered (PSNR >= 20 dB)")
    assert verdict(scored([-3.0, -4.0, -3.5, -3.2, -3.1])).startswith("No leak found by this attack")
    assert verdict(scored([-3.0, 2.0, -3.5, 2.0, -3.1])).startswith("No leak found by this attack")
    assert verdict(scored([0.2, -0.1, 0.1, 0.0, 0.1])).startswith("No leak found by this attack")
    assert verdict(scored([8.0, -2.0])).startswith("Too few updates to tell (2 trials)")
    assert verdict(scored([28.0])).startswith("Too few updates to tell (1 trial)")


def test_one_identified_victim_is_a_leak_and_a_baseline_never_is() -> None:
    """The gains of two updates may have an interval from -88 to +144 dB; that both victims are nearest decides."""
    two = scored([48.0, 8.0], **identified(1.0, 2, 1e-4))
    assert verdict(two).startswith("Leaks: 2 of 2 images")
    assert "2 identified among 100 candidates of its class (chance 0.010, p = 0.0001)" in verdict(two)
    assert verdict(scored([48.0], **identified(1.0, 1, 0.01))).startswith("Leaks")
    assert verdict(scored([-4.0], **identified(0.0, 1, 1.0))).startswith("No leak found by this attack")
    of_all_classes = scored([-4.0], **identified(1.0, 1, 0.01, by_class=False))
    assert outcome(of_all_classes) == "leaks"
    assert outcome(of_all_classes | {"oracle": ["labels"]}) == "no leak found by this attack"
    assert outcome(scored([5.0, 6.0, 5.5], "baseline", **identified(1.0, 3, 1e-6))) == "no leak found by this attack"


def test_the_gain_counts_over_the_null_where_its_labels_are_the_victims() -> None:
    gain = {"mean": 2.0, "low": 1.0, "high": 3.0, "n": 5}
    null = {"psnr": {"mean": 12.0, "p95": 15.0}, "recovered": 0.0, "same_labels": True}
    below_class_mean = scored([-3.0, -4.0, -3.5, -3.2, -3.1], over_null=gain, null=null)
    assert outcome(below_class_mean) == "leaks"
    assert outcome(below_class_mean | {"null": null | {"same_labels": False}}) == "no leak found by this attack"
    assert outcome(below_class_mean | {"over_null": gain | {"low": 0.0}}) == "no leak found by this attack"
    assert outcome(below_class_mean | {"over_null": gain | {"low": -1.0, "high": 5.0}}) == "too few updates to tell"


def test_no_verdict_without_an_attack_or_without_truth() -> None:
    assert verdict(scored([-3.0] * 6, "baseline")).startswith("No attack ran")
    assert "true images are unknown" in verdict(scored([]))
    assert outcome(scored([])) is None
    assert "true images are unknown" in one_run(scored([]))


def test_a_comparison_attack_is_named_with_its_interval() -> None:
    gain = {"mean": 1.5, "low": -1.0, "high": 4.0}
    summary = scored([5.0] * 6, companion="ig_single", companion_psnr=18.5, over_companion=gain)
    assert "1.50 dB better than ig_single" in verdict(summary)
    assert "may be chance" in verdict(summary)
    assert "may be chance" not in verdict(summary | {"over_companion": gain | {"low": 0.5}})


def test_cells() -> None:
    assert number(None) == mean_std(None) == interval(None) == "-"
    assert mean_std({"mean": 1, "std": 0.5}) == "1.00 ± 0.50"
    assert mean_std({"mean": 1, "std": 0.5, "low": 0, "high": 2}) == "1.00 ± 0.50 [0.00, 2.00]"
    assert interval({"mean": 1, "low": -1, "high": 3}) == "+1.00 [-1.00, +3.00]"
    assert interval({"mean": -1e-9, "low": None, "high": None}) == "+0.00"
    assert share({"share": 0.5, "low": 0.25, "high": 0.75}) == "0.50 [0.25, 0.75]"
    assert len({len(line) for line in table(["a", "bcd"], [["123", "4"], ["5", "6"]]).splitlines()}) == 1


def test_a_csv_holds_numbers_and_empty_cells(tmp_path: Path) -> None:
    runs = [scored([1.0, 2.0]), full_summary(), scored([3.0])]
    text = write_comparison(tmp_path, [{"batch-size": b} for b in "124"], runs)
    assert text + "\n" == (tmp_path / "table.md").read_text()
    assert (tmp_path / "plot.png").exists()
    rows = list(csv.DictReader(io.StringIO((tmp_path / "table.csv").read_text())))
    words = {"attack", "mode", "dataset", "model", "companion", "oracle", "unit", "threat", "knows", "guarantee_unit"}
    for row, run in zip(rows, runs, strict=True):
        for key, value in row.items():
            assert key in words or value == "" or float(value) is not None
        assert float(row["psnr_mean"]) == run["psnr"]["mean"]
        assert float(row["psnr_std"]) == run["psnr"]["std"]
        assert row["attack"] == run["attack"]
    assert float(rows[1]["null_psnr_mean"]) == runs[1]["null"]["psnr"]["mean"]
    assert rows[0]["lpips_mean"] == rows[0]["ceiling"] == rows[2]["objective_answer"] == ""
    assert [row["status_solved"] for row in rows] == ["2", "0", "1"]


def test_a_comparison_of_attacks_has_a_column_for_them(tmp_path: Path) -> None:
    text = write_comparison(tmp_path, [{}, {}], [scored([1.0], "dlg"), scored([2.0], "idlg")])
    assert [line.split("|")[1].strip() for line in text.splitlines()] == ["attack", "-" * 8, "dlg", "idlg"]
    named = [{"attack": "dlg"}, {"attack": "idlg"}]
    again = write_comparison(tmp_path, named, [scored([1.0], "dlg"), scored([2.0], "idlg")])
    assert again == text
    assert (tmp_path / "table.csv").read_text().splitlines()[0].split(",").count("attack") == 1
    assert Comparison([{"x": "1"}], [scored([1.0])]).varied() == ["x"]


def write_run(folder: Path, attack: str, flags: dict[str, Any], own: dict[str, Any], done: bool = True) -> Path:
    folder.mkdir(parents=True)
    config = {"flags": {"model": "lenet", "seed": 0} | flags, "weights": None, "hyperparameters": own}
    (folder / "config.json").write_text(json.dumps(config))
    if done:
        (folder / "summary.json").write_text(json.dumps(scored([1.0, 2.0], attack)))
        (folder / "done").touch()
    return folder


def test_folders_are_compared_by_what_differs(tmp_path: Path) -> None:
    write_run(tmp_path / "dlg" / "b", "dlg", {"local_epochs": 10}, {"iterations": 5, "lr": 1.0})
    write_run(tmp_path / "dlg" / "a", "dlg", {"local_epochs": 2}, {"iterations": 7, "lr": 1.0})
    write_run(tmp_path / "ig" / "c", "ig", {"local_epochs": 2}, {"iterations": 9, "tv": 0.1})
    unfinished = write_run(tmp_path / "ig" / "d", "ig", {}, {}, done=False)
    (tmp_path / "dlg" / "sweep-1").mkdir()
    comparison, left_out = compare_folders([tmp_path])
    assert left_out == [unfinished]
    assert comparison.varied() == ["attack", "local-epochs", "iterations"]
    assert comparison.runs == ["a", "b", "c"]
    assert [point["iterations"] for point in comparison.points] == ["7", "5", "9"]
    header = comparison.markdown().splitlines()[0]
    assert [c.strip() for c in header.strip("|").split("|")][-1] == "run"
    with pytest.raises(UsageError, match="no finished run"):
        compare_folders([unfinished])


def command(*flags: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, "-m", "report", *flags], cwd=ROOT, capture_output=True, text=True)


def test_the_command_prints_one_table_and_writes_it(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name, "dlg", {"local_epochs": k}, {}) for k, name in enumerate("ab")]
    ran = command("--to", str(tmp_path / "out"), *map(str, runs))
    assert ran.returncode == 0, ran.stderr
    assert len(ran.stdout.strip().splitlines()) == 4
    assert "local-epochs" in ran.stdout.splitlines()[0]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["plot.png", "table.csv", "table.md"]
    explained = " ".join(command("--help").stdout.split())
    assert all(f"{entry.label}: {entry.help}" in explained for entry in ENTRIES)
    for flags in ((), (str(tmp_path / "missing"),)):
        failed = command(*flags)
        assert failed.returncode == 2
        assert failed.stderr.startswith("error: ")
        assert len(failed.stderr.splitlines()) == 1
