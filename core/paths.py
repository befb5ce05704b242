"""The root of the repository, below which the default folders for data, results and checkpoints lie."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
