import os
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """As the commands do: small nets are fastest on one thread."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _nothing_from_outside(tmp_path_factory: pytest.TempPathFactory) -> None:
    """LPIPS must not fetch its backbone in the middle of a test, nor must a test find what the user has trained."""
    os.environ["CHECKPOINTS"] = str(tmp_path_factory.mktemp("checkpoints"))
    os.environ["TORCH_HOME"] = str(tmp_path_factory.mktemp("hub"))
    os.environ["PYTHONPATH"] = os.pathsep.join(p for p in (str(ROOT), os.environ.get("PYTHONPATH")) if p)
    assert str(ROOT) in sys.path
