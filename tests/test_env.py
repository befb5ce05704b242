"""Which interpreter experiments/env.sh chooses, and what requirements_met.py installs if none has the requirements."""

import ast
import os
import shutil
import subprocess
import sys
import time
import venv
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

from experiments import requirements_met

ROOT = Path(__file__).resolve().parent.parent
SHELLS = [shell for shell in ("dash", "bash") if shutil.which(shell)] or ["sh"]
SCRIPTS = sorted([*ROOT.glob("experiments/**/*.sh"), *ROOT.glob("tests/*.sh")])

# Stands in for a Python: answers for requirements_met.py, writes down each such call, and prints the others.
FAKE = """#!/bin/sh
here=$(cd "$(dirname "$0")/.." && pwd)
case "$2 $3" in
*"requirements_met.py --install")
    echo install >>"$LOG"
    [ -z "$FAKE_REFUSES" ] || { echo "refused: no network" >&2; exit 2; }
    if [ ! -d "$here/lib" ]; then
        mkdir -p "$5/bin" "$5/lib/python3.12/site-packages" && cp "$0" "$5/bin/python" && here=$5
    fi
    touch "$here/installed" && echo "$here/bin/python" ;;
*requirements_met.py*) echo check >>"$LOG"; [ -e "$here/installed" ] || exit 3 ;;
*) printf '%s\\n' "$0" "$@" ;;
esac
"""

# Stands in for pip in a real environment.
PIP = """
import os, pathlib, signal, sys, time
with open(os.environ["LOG"], "a") as log:
    print("pip", file=log)
info = pathlib.Path(__file__).parents[1] / "tiny-1.0.dist-info"
info.mkdir(exist_ok=True)
if os.environ.get("TOY_KILLS"):
    os.kill(os.getppid(), signal.SIGKILL)
time.sleep(float(os.environ.get("TOY_SLEEPS", 0)))
if os.environ.get("TOY_KILLS") or os.environ.get("TOY_FAILS"):
    sys.exit("ERROR: no such package")
(info / "METADATA").write_text("Metadata-Version: 2.1\\nName: tiny\\nVersion: 1.0\\n")
"""


@pytest.fixture(params=SHELLS)
def shell(request):
    return request.param


@pytest.fixture
def root(tmp_path):
    """The shell files, one made-up requirement, and a main_grad.py that prints its interpreter and flags."""
    root = tmp_path / "a clone of it"
    for file in ("experiments/env.sh", "experiments/requirements_met.py", "experiments/grad/dlg.sh", "tests/run.sh"):
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / file, root / file)
    (root / "requirements.txt").write_text("tiny>=1  # made up\n")
    (root / "tests/requirements.txt").write_text("-r ../requirements.txt\n")
    (root / "main_grad.py").write_text("import sys\nprint(sys.executable, *sys.argv[1:], sep='\\n')\n")
    return root


def fake(folder, name="python3"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(FAKE)
    (folder / name).chmod(0o755)
    return folder / name


def real(folder):
    """A virtual environment with the stand-in for pip."""
    venv.create(folder, symlinks=True)
    (site,) = (folder / "lib").glob("python3*/site-packages")
    (site / "pip-1.0.dist-info").mkdir()
    (site / "pip-1.0.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: pip\nVersion: 1.0\n")
    (site / "pip").mkdir()
    (site / "pip/__init__.py").touch()
    (site / "pip/__main__.py").write_text(PIP)
    return folder / "bin/python"


def environment(root, **variables):
    """The fake Python first on the PATH, and nothing that would lead to another one."""
    keep = {k: v for k, v in os.environ.items() if k not in ("PYTHON", "VIRTUAL_ENV", "CONDA_PREFIX", "REQUIREMENTS")}
    keep = {k: v for k, v in keep.items() if k not in ("BASE_DATADIR", "DATASET", "CI") and not k.startswith("PIP_")}
    path = f"{root.parent / 'fake bin'}:{os.environ['PATH']}"
    return {**keep, "PATH": path, "LOG": str(root / "log"), **{k: str(v) for k, v in variables.items()}}


def run(shell, root, *flags, script="experiments/grad/dlg.sh", cwd=None, **variables):
    return subprocess.run(
        [shell, str(root / script), *flags],
        cwd=cwd or root.parent,
        env=environment(root, **variables),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )


def done(root):
    """What the stand-ins did, in order; forgotten once told."""
    log = root / "log"
    lines = log.read_text().splitlines() if log.exists() else []
    log.write_text("")
    return lines


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_syntax(script, shell):
    subprocess.run([shell, "-n", str(script)], check=True)


@pytest.mark.parametrize("script", sorted(ROOT.glob("experiments/*/*.sh")), ids=lambda p: f"{p.parent.name}/{p.name}")
def test_a_script_starts_with_what_the_user_edits(script):
    lines = [line for line in script.read_text().splitlines() if line and not line.startswith("#")]
    assert lines[0].startswith("BASE_DATADIR=${BASE_DATADIR:-")
    assert lines[1].startswith("DATASET=${DATASET:-")
    assert lines[2] == 'ROOT=$(dirname "$0")/../.. && . "$ROOT/experiments/env.sh"'


# ---- an interpreter that has the requirements is used as it is


def test_flags_and_defaults(shell, root):
    (root / "requirements.txt").write_text("pytest>=1\n")
    ran = run(shell, root, "--out", "my results", "*", PYTHON=sys.executable)
    assert (ran.returncode, ran.stderr) == (0, "")
    flags = ["dlg", "--dataset", "photos", "--base-datadir", f"{root}/datasets", "--out", "my results", "*"]
    assert ran.stdout.splitlines() == [sys.executable, *flags]
    assert not (root / ".venv").exists()


def test_the_environment_wins_and_directories_stay(shell, root):
    (root / "requirements.txt").write_text("pytest>=1\n")
    (root / "main_grad.py").write_text("import os, sys\nprint(os.getcwd(), *sys.argv[1:6], sep='\\n')\nsys.exit(7)\n")
    stand = root / "experiments/grad"
    (stand / "random.py").write_text("raise SystemExit('this is not the standard library')\n")
    variables = {"PYTHON": sys.executable, "BASE_DATADIR": "../my data", "DATASET": "mnist", "CDPATH": root.parent}
    ran = run(shell, stand, script="dlg.sh", cwd=stand, **variables)
    assert ran.stdout.splitlines() == [str(stand), "dlg", "--dataset", "mnist", "--base-datadir", "../my data"]
    assert (ran.returncode, ran.stderr) == (7, "")


def test_pytest_gets_its_flags(shell, root):
    (root / "requirements.txt").write_text("pytest>=1\n")
    (root / "tests/test_it.py").write_text("def test_one(): pass\ndef test_two(): assert 0\n")
    ran = run(shell, root, "-k", "test_one", "-p", "no:hypothesispytest", script="tests/run.sh", PYTHON=sys.executable)
    assert ran.returncode == 0 and "1 passed" in ran.stdout, ran


def test_order_of_preference(shell, root):
    """Given, then active, then .venv, then the PATH; one that lacks requirements gives way to one that has them."""
    chosen = fake(root.parent / "chosen/bin", "python")
    active = fake(root.parent / "active/bin", "python")
    conda = fake(root.parent / "conda/bin", "python")
    local = fake(root / ".venv/bin", "python")
    path = fake(root.parent / "fake bin")
    (root.parent / "active/lib").mkdir()
    for python in (chosen, active, conda, local, path):
        (python.parent.parent / "installed").touch()
    variables = {"PYTHON": chosen, "VIRTUAL_ENV": active.parent.parent, "CONDA_PREFIX": conda.parent.parent}
    assert run(shell, root, **variables).stdout.splitlines()[0] == str(chosen)
    del variables["PYTHON"]
    for expected in (active, conda, local, path):
        assert run(shell, root, **variables).stdout.splitlines()[0] == str(expected)
        (expected.parent.parent / "installed").unlink()
    assert "install" not in done(root)
    assert run(shell, root, **variables).stdout.splitlines()[0] == str(active)
    assert done(root)[-1] == "install" and not (conda.parent.parent / "installed").exists()


# ---- otherwise it is installed, once, and never into the system's


def test_a_system_python_gets_a_venv_once(shell, root):
    fake(root.parent / "fake bin")
    first, second = run(shell, root), run(shell, root)
    assert first.returncode == second.returncode == 0
    assert first.stdout == second.stdout and second.stderr == ""
    assert first.stdout.splitlines()[0] == f"{root}/.venv/bin/python"
    assert done(root).count("install") == 1 and not (root.parent / "installed").exists()


def test_a_given_system_python_is_not_changed_and_the_user_is_told(shell, root):
    given = fake(root.parent / "given", "python")
    ran = run(shell, root, PYTHON=given)
    assert ran.returncode == 0 and ran.stdout.splitlines()[0] == f"{root}/.venv/bin/python"
    assert ran.stderr == f"PYTHON={given} did not meet the requirements: using {root}/.venv/bin/python.\n"


def test_no_python_starts_to_check_a_venv_until_something_changes(shell, root):
    fake(root.parent / "fake bin")
    assert run(shell, root).returncode == 0
    done(root)
    run(shell, root)
    assert done(root) == []
    time.sleep(0.01)
    (root / ".venv/lib/python3.12/site-packages/tiny.dist-info").mkdir()  # a package came, or went
    run(shell, root)
    assert done(root) == ["check"]
    run(shell, root)
    assert done(root) == []
    (root / "requirements.txt").write_text("tiny>=1\nother\n")
    run(shell, root)
    assert done(root) == ["check"]


def test_an_environment_is_completed_in_place(root):
    active = real(root.parent / "my env")
    first = run("sh", root, VIRTUAL_ENV=root.parent / "my env")
    assert first.returncode == 0 and f"Installing into {root.parent}/my env: tiny>=1" in first.stderr
    assert "PYTHON=" in first.stderr and "GB" not in first.stderr
    second = run("sh", root, VIRTUAL_ENV=root.parent / "my env")
    assert second.stdout == first.stdout and second.stderr == ""
    assert first.stdout.splitlines()[0] == str(active)
    assert done(root) == ["pip"] and not (root / ".venv").exists()


def test_killed_in_pip_and_finished_by_the_next_run(shell, root):
    python = real(root / ".venv")
    killed = run(shell, root, TOY_KILLS=1)
    assert killed.returncode == 2 and killed.stdout == ""
    assert not list((root / ".venv").glob(".satisfies*"))
    again = run(shell, root)
    assert again.returncode == 0 and again.stdout.splitlines()[0] == str(python)
    assert done(root) == ["pip", "pip"]


def test_two_first_runs_install_once(root):
    real(root / ".venv")
    command, variables = [SHELLS[0], str(root / "experiments/grad/dlg.sh")], environment(root, TOY_SLEEPS=1)
    runs = [subprocess.Popen(command, env=variables, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [r.communicate(timeout=30)[1] for r in runs]
    assert [r.returncode for r in runs] == [0, 0]
    assert done(root) == ["pip"]
    assert sum("waiting" in s for s in said) == 1, said


@pytest.mark.parametrize("left", ["nothing", "a dead link", "a Python that does not run", "no configuration"])
def test_a_half_made_venv_is_made_again(left, root, monkeypatch):
    python = root / ".venv/bin/python"
    if left == "a dead link":
        python.parent.mkdir(parents=True)
        python.symlink_to("/nowhere/python3")
    elif left != "nothing":
        real(root / ".venv")
        if left == "no configuration":
            (root / ".venv/pyvenv.cfg").unlink()
        else:
            python.unlink()
            python.write_text("#!/bin/sh\nexit 1\n")
            python.chmod(0o755)
    calls = []
    monkeypatch.setattr(requirements_met, "environment", lambda: None)
    monkeypatch.setattr(requirements_met, "lock", lambda _: -1)
    monkeypatch.setattr(requirements_met, "call", lambda *command, **_: calls.append(command[1:]) or True)
    monkeypatch.setattr(os, "execv", lambda python, _: sys.exit(python))
    for _ in range(2):
        with pytest.raises(SystemExit, match=str(python)):
            requirements_met.install(str(root / "requirements.txt"), str(root / ".venv"))
        shutil.rmtree(root / ".venv", ignore_errors=True)
        real(root / ".venv")
    assert calls == [("-m", "venv", "--clear", str(root / ".venv"))]


@pytest.mark.parametrize("left", ["no record", "lost modules"])
def test_a_half_made_pip_is_made_again(left, root):
    python = real(root / ".venv")
    (site,) = (root / ".venv/lib").glob("python3*/site-packages")
    made = root.parent / "modules"
    shutil.copytree(site / "pip", made / "made pip")
    (made / "ensurepip.py").write_text(
        "import pathlib, shutil, sysconfig\nhere = pathlib.Path(__file__).parent\n"
        "shutil.copytree(here / 'made pip', sysconfig.get_paths()['purelib'] + '/pip')\n"
    )
    if left == "no record":
        shutil.rmtree(site / "pip-1.0.dist-info")
    else:
        (site / "pip/__init__.py").write_text("from pip import lost")
    ran = run("sh", root, PYTHONPATH=made)
    assert ran.returncode == 0 and ran.stdout.splitlines()[0] == str(python), ran.stderr
    assert done(root) == ["pip"] and not (site / "pip-1.0.dist-info").exists()


@pytest.mark.skipif(find_spec("ensurepip") is None, reason="needs ensurepip")
def test_for_real_without_a_network(root):
    """A system Python makes the environment in place of half a one, and pip installs a wheel, then a newer one."""
    wheels = root.parent / "wheels"
    wheels.mkdir()
    for version in ("0.9", "1.5"):
        info = f"tiny-{version}.dist-info"
        with zipfile.ZipFile(wheels / f"tiny-{version}-py3-none-any.whl", "w") as wheel:
            wheel.writestr("tiny.py", f"version = '{version}'\n")
            wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: tiny\nVersion: {version}\n")
            wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            wheel.writestr(f"{info}/RECORD", f"tiny.py,,\n{info}/METADATA,,\n{info}/WHEEL,,\n{info}/RECORD,,\n")
    (root / "main_grad.py").write_text("import sys, tiny\nprint(sys.prefix, tiny.version)\n")
    offline = {"PIP_NO_INDEX": 1, "PIP_FIND_LINKS": wheels}
    python = root / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    system = root.parent / "fake bin/python3"
    system.parent.mkdir()
    system.symlink_to(Path(sys.base_prefix, "bin", f"python3.{sys.version_info.minor}"))
    python.symlink_to(system)  # and no pyvenv.cfg

    (root / "requirements.txt").write_text("tiny<1\n")
    first = run("sh", root, **offline)
    assert (first.returncode, first.stdout) == (0, f"{root}/.venv 0.9\n"), first.stderr
    assert f"Making {root}/.venv" in first.stderr

    (root / "requirements.txt").write_text("tiny>=1\n")
    second = run("sh", root, **offline)
    assert (second.returncode, second.stdout) == (0, f"{root}/.venv 1.5\n"), second.stderr
    third = run("sh", root)
    assert (third.stdout, third.stderr) == (second.stdout, "")


# ---- or refused, in one line that says what to do


def refused(ran, *words):
    assert ran.returncode == 2 and ran.stdout == ""
    line = ran.stderr.splitlines()[-1]
    assert all(word in line for word in words), line
    return ran


def test_refusals(shell, root):
    fake(root.parent / "fake bin")
    lines = [
        refused(run(shell, root, PYTHON="/nowhere/python"), "PYTHON=/nowhere/python", "does not run"),
        refused(run(shell, root, PYTHON="false"), "PYTHON=false does not run"),
        refused(run(shell, root, FAKE_REFUSES=1), "no network"),
    ]
    assert all(ran.stderr.count("\n") == 1 for ran in lines)
    assert not (root / ".venv").exists()
    assert run(shell, root).returncode == 0


def test_pip_fails(root):
    real(root / ".venv")
    failed = refused(run("sh", root, TOY_FAILS=1), "pip could not install", "Running again continues")
    assert "ERROR: no such package" in failed.stderr


def test_no_python_at_all(root):
    (root.parent / "bare bin").mkdir()
    for tool in ("dirname", "cat", "cksum", "cut", "find"):
        (root.parent / "bare bin" / tool).symlink_to(shutil.which(tool))
    refused(run(shutil.which(SHELLS[0]), root, PATH=root.parent / "bare bin"), "No python3")


def main(monkeypatch, capsys, *arguments):
    """Exit code and standard error of requirements_met.py, run in this process."""
    monkeypatch.setattr(sys, "argv", ["requirements_met.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        requirements_met.main()
    return stop.value.code or 0, capsys.readouterr().err


def test_an_old_python_and_one_without_venv_are_refused(monkeypatch, capsys, root):
    install = ("--install", root / "requirements.txt", root / ".venv")
    monkeypatch.setattr(requirements_met, "environment", lambda: None)
    monkeypatch.setattr(requirements_met, "works", lambda *_: False)
    code, error = main(monkeypatch, capsys, *install)
    assert code == 2 and "apt install python3." in error and error.count("\n") == 1
    (root / "requirements.txt").write_text("")
    assert main(monkeypatch, capsys, root / "requirements.txt")[0] == 0
    monkeypatch.setattr(sys, "version_info", (3, 8, 1))
    assert main(monkeypatch, capsys, root / "requirements.txt") == (requirements_met.NOT_MET, "")
    code, error = main(monkeypatch, capsys, *install)
    assert code == 2 and "is Python 3.8, and 3.10 or newer" in error and error.count("\n") == 1


def test_an_old_python_can_read_the_file():
    ast.parse((ROOT / "experiments/requirements_met.py").read_text(), feature_version=(3, 8))


# ---- what counts as met


@pytest.mark.parametrize("file", ["requirements.txt", "tests/requirements.txt", "experiments/bench/requirements.txt"])
def test_every_requirement_of_ours_can_be_read(file):
    lines = [line for _, _, line in requirements_met.requirements(str(ROOT / file))]
    assert len(lines) == len(set(lines)) >= 10


@pytest.mark.parametrize(
    ("version", "bounds", "met"),
    [
        ("2.13.0+cpu", ">=2.13,<3", True),
        ("2.9.0a0+145a3a7", ">=2.9", True),  # builds of NVIDIA's containers
        ("2.10.1", ">=2.9,<3", True),
        ("2.10.1", ">=2.9,<2.10", False),
        ("2.8.1", ">=2.9", False),
        ("3.0.0", ">=2.9,<3", False),
        ("0.1.2", "==0.1.2", True),
        ("0.1.3", "==0.1.2", False),
        ("1", "!=1.0", False),
        ("1.0.1", ">1,<=1.1", True),
        ("7", "", True),
    ],
)
def test_bounds(version, bounds, met, tmp_path, monkeypatch):
    (tmp_path / "r.txt").write_text(f"# a comment\nname {bounds}  # why\n")
    monkeypatch.setattr(requirements_met, "installed", {"name": version}.get)
    assert requirements_met.missing(str(tmp_path / "r.txt")) == ([] if met else [f"name {bounds}".strip()])
    monkeypatch.setattr(requirements_met, "installed", {}.get)
    assert requirements_met.missing(str(tmp_path / "r.txt"))


def test_a_line_that_cannot_be_read_is_refused(tmp_path, monkeypatch, capsys):
    (tmp_path / "r.txt").write_text("name @ https://example.org/name.whl\n")
    code, error = main(monkeypatch, capsys, tmp_path / "r.txt")
    assert code == 2 and "name @" in error
