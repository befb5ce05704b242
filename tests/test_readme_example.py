"""The attack printed in CONTRIBUTING.md keeps every promise of the contract tests."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

from runner.experiment import SOURCE_DIRS
from tests.conftest import ROOT


def printed_attack() -> tuple[str, str]:
    """The example's code and the name it registers."""
    text = (ROOT / "CONTRIBUTING.md").read_text().split("## Add an attack")[1]
    (code,) = re.findall(r"```python\n(.*?)```", text, re.S)
    (name,) = re.findall(r'@register\("(\w+)"\)', code)
    return code, name


def test_it_passes_the_contract_tests_as_printed(tmp_path: Path) -> None:
    code, name = printed_attack()
    for folder in (*SOURCE_DIRS, "experiments", "tests"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("main_grad.py", "main_fed.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / file, tmp_path)
    (tmp_path / "attacks" / f"{name}.py").write_text(code)
    for mode in ("grad", "fed"):
        script = (tmp_path / "experiments" / mode / "ig_single.sh").read_text()
        (tmp_path / "experiments" / mode / f"{name}.sh").write_text(script.replace("ig_single", name))
    command = [sys.executable, "-m", "pytest", "tests/test_contract.py", "-k", name, "-n", "0"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout[-3000:]
    assert int(re.findall(r"(\d+) passed", done.stdout)[0]) >= 15


def test_a_broken_attack_file_breaks_only_itself(tmp_path: Path) -> None:
    """Other commands run, and --help and a command that names it say what is wrong."""
    for folder in SOURCE_DIRS:
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "main_grad.py", tmp_path)
    (tmp_path / "attacks" / "broken.py").write_text("import no_such_module\n")

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(tmp_path / "main_grad.py"), *words]
        environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)

    overview = run("--help")
    assert overview.returncode == 0
    assert "attacks/broken.py cannot be imported: ModuleNotFoundError" in overview.stdout
    assert run("dlg", "--help").returncode == 0
    named = run("broken", "--trials", "1")
    assert named.returncode == 2
    assert named.stderr.startswith("error: attacks/broken.py cannot be imported")
    assert named.stderr.count("\n") == 1
