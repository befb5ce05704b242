"""Progress bars of a run: trials and rounds, the time left, and the mean PSNR, within 80 columns."""

import sys
from typing import Any

from tqdm import tqdm

WIDTH = 80


class Bar:
    """One line with a description, the time spent and left, and a text. Work is counted in units and parts of units."""

    def __init__(self, units: int, done: int = 0) -> None:
        self.finished = float(done)
        self.running: dict[Any, float] = {}  # unit under way -> the part of it that is done
        self.live = sys.stderr.isatty()
        self.bar = tqdm(
            total=float(units),
            initial=float(done),
            bar_format="{desc} [{elapsed}<{remaining}]{postfix}",
            mininterval=0.1 if self.live else 10,
            ncols=WIDTH,
        )

    def update(self, unit: Any, share: float, description: str, text: str = "") -> None:
        """Unit `unit` is done to `share`."""
        self.running[unit] = min(share, 1.0)
        self._show(description, text)

    def finish(self, unit: Any, description: str, text: str = "") -> None:
        """Unit `unit` is done."""
        self.running.pop(unit, None)
        self.finished += 1
        self._show(description, text)

    def _show(self, description: str, text: str) -> None:
        self.bar.set_description_str(description, refresh=False)
        self.bar.set_postfix_str(text[: max(0, WIDTH - len(description) - len(" [00:00<00:00], "))], refresh=False)
        step = self.finished + sum(self.running.values()) - self.bar.n
        if step > 0:
            self.bar.update(step)
        elif self.live:
            self.bar.refresh()

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.close()
