"""Plots of comparisons: every run of a grid is a point somewhere, and panels say which."""

import itertools
from pathlib import Path
from typing import Any

import pytest

from utils import report


@pytest.mark.parametrize(
    ("grid", "panels"),
    [
        ({"local_lr": ["0.01", "0.1"], "attack": ["dlg", "sme"]}, 1),
        ({"local_epochs": ["1", "5", "20"], "local_lr": ["0.01", "0.1"], "attack": ["dlg", "sme"]}, 2),
        ({"images": ["1", "4"], "epochs": ["1", "5", "20"], "lr": ["0.01", "0.1"], "attack": ["dlg", "sme"]}, 4),
        ({"images": ["1", "4"], "epochs": ["1", "5"], "lr": ["0.01", "0.1", "1"]}, 2),
    ],
)
def test_every_run_of_a_grid_is_in_its_plot(
    grid: dict[str, list[str]], panels: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    figures: list[Any] = []
    monkeypatch.setattr(report, "_save", lambda figure, path: figures.append(figure))
    points = [dict(zip(grid, cell, strict=True)) for cell in itertools.product(*grid.values())]
    scores = [float(i) for i in range(len(points))]
    summaries = [
        {"psnr": {"mean": s, "std": 0.0}, "baseline_psnr": 12.0, "attack": "any", "dataset": "photos"} for s in scores
    ]
    report._plot(tmp_path / "plot.png", points, summaries)
    (figure,) = figures
    assert len(figure.axes) == panels
    drawn = [y for ax in figure.axes for bars in ax.containers for y in bars.lines[0].get_ydata()]
    assert sorted(drawn) == scores
    titles = " | ".join(ax.get_title() for ax in figure.axes)
    assert panels == 1 or len({ax.get_title() for ax in figure.axes}) == panels, titles
