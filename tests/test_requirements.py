"""The lower bounds: tests/oldest.txt pins exactly what the requirements files promise."""

from experiments.requirements_met import release, requirements
from tests.conftest import ROOT


def bounds(file: str, operator: str) -> dict[str, list[int]]:
    """The release that each line gives with an operator; a line without it fails."""
    return {name: release(dict(given)[operator]) for name, given, _ in requirements(str(ROOT / file))}


def test_the_oldest_set_is_the_lower_bounds() -> None:
    assert bounds("tests/oldest.txt", "==") == bounds("tests/requirements.txt", ">=")
