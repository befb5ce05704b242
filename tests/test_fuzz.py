"""Random damage to folders of results and to input files: equal rows or one line, never anything else."""

import contextlib
import io
import random
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from experiments.abuses import damage
from experiments.abuses.fuzz import damage_some
from tests.commands import in_process, only_run, rows
from tests.test_bad_input import folder_of_images
from tests.test_store import FLAGS, flags, prepared  # noqa: F401

FEW = settings(max_examples=6, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None)


def command(words: list[str]) -> tuple[int, str]:
    """The exit code and standard error of a command."""
    error = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(error):
        return in_process("main_grad.py", words, patch), error.getvalue()


@pytest.mark.parametrize("state", ["half", "finished"])
@FEW
@given(seed=st.integers(0, 2**32))
def test_results_that_are_damaged_anywhere_end_in_equal_rows(state: str, seed: int, prepared: Path) -> None:  # noqa: F811
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "out")
        shutil.copytree(prepared / state, out)
        done = damage_some(only_run(out), str(seed))
        code, error = command(flags(prepared, out))
        assert code == 0, (done, error)
        assert rows(only_run(out)) == rows(only_run(prepared / "finished")), done


@settings(FEW, max_examples=15)
@given(seed=st.integers(0, 2**32))
@example(seed=1)
def test_an_image_that_is_damaged_anywhere_is_read_or_refused_in_one_line(seed: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        images = folder_of_images(Path(folder, "images"))
        kind = damage.anything(random.Random(seed), images / "class0" / "0.png")
        words = [*FLAGS, "--base-datadir", str(images), "--out", str(Path(folder, "out"))]
        code, error = command([*words, "--trials", "1"])
        assert code in (0, 2), (kind, error)
        assert code == 0 or (error.startswith("error: ") and error.count("\n") == 1), (kind, error)
