"""The tutorial's cells run one after the other, as printed but for the number of iterations."""

import contextlib
import io
import re
import shutil
from typing import Any

import pytest

from tests.conftest import ROOT


def test_every_cell_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    cells = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "tutorial.md").read_text(), re.S)
    short = [cell.replace("iterations=ITERATIONS", "iterations=8, feature_iterations=0") for cell in cells]
    assert len(cells) >= 6
    assert short != cells
    names: dict[str, Any] = {"__name__": "tutorial"}
    with contextlib.redirect_stdout(io.StringIO()) as output:
        for number, cell in enumerate(short, 1):
            exec(compile(cell, f"cell {number} of docs/tutorial.md", "exec"), names)
    shutil.rmtree(names["folder"])
    text = output.getvalue()
    assert re.search(r"^-?\d+\.\d dB, others at most", text, re.M)
    assert re.search(r"^after five local steps: -?\d+\.\d dB$", text, re.M)
    assert "private" in text
    assert re.search(r"^sme +works", text, re.M)
