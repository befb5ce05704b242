"""Every command we print is one that parses: in the README, in the scripts' headers, in --help."""

import importlib
import json
import os
import re
import shlex
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import tyro

import data
import main_fed
import main_grad
import models
from attacks.base import discover
from tests.conftest import ROOT
from utils import cli

SCRIPTS = sorted(
    p.relative_to(ROOT).as_posix() for p in (ROOT / "experiments").rglob("*.sh") if p.name != "env.sh"
)  # env.sh is sourced by all others
PAGES = {"main_grad.py": (cli.Grad, main_grad.GradScene), "main_fed.py": (cli.Fed, main_fed.FedScene)}


def readme_commands() -> list[str]:
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    text = "\n".join(blocks).replace("\\\n", " ")
    found = [line.split("#")[0].strip() for line in text.splitlines()]
    return [line for line in found if line and not line.startswith(("git ", "cd "))]


@pytest.fixture(scope="module")
def recorder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python that runs everything but our pages, whose arguments it writes down."""
    path = tmp_path_factory.mktemp("bin") / "python"
    path.write_text(
        f"#!{sys.executable}\n"
        "import json, os, subprocess, sys\n"
        "if sys.argv[1:] and (sys.argv[1].endswith('.py') or sys.argv[1] == '-m'):\n"
        "    print(json.dumps(sys.argv[1:]))\n"
        "else:\n"
        f"    sys.exit(subprocess.call([{sys.executable!r}, *sys.argv[1:]]))\n"
    )
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def what_it_runs(command: list[str], recorder: Path, cwd: Path) -> list[list[str]]:
    environment = os.environ | {"PYTHON": str(recorder)}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]


def assert_parses(arguments: list[str]) -> None:
    """The page's own parser and its own checks accept the arguments."""
    page, *flags = arguments
    run_cls, scene_cls = PAGES[Path(page).name]
    points = cli.parse(flags, run_cls, discover(), page)
    for command in {id(c): c for c in (points[0], points[-1])}.values():
        scene_cls("any", command)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_runs_a_command_that_parses(script: str, recorder: Path, tmp_path: Path) -> None:
    calls = what_it_runs(["sh", str(ROOT / script)], recorder, tmp_path)
    assert calls, f"{script} runs nothing of ours"
    for page, *flags in calls:
        assert Path(page).is_file()
        if Path(page).name in PAGES:
            assert_parses([page, *flags])
        elif "experiments" in Path(page).parts:
            module = ".".join(Path(page).relative_to(ROOT).with_suffix("").parts)
            tyro.cli(importlib.import_module(module).Flags, args=flags)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_names_itself_in_its_header(script: str) -> None:
    assert f"# sh {script}" in (ROOT / script).read_text()


@pytest.mark.parametrize("command", readme_commands())
def test_a_command_of_the_readme_parses(command: str, recorder: Path) -> None:
    words = shlex.split(command)
    while re.fullmatch(r"[A-Z_]+=.*", words[0]):  # BASE_DATADIR=... sh ...: the data is the user's, not here
        words.pop(0)
    if words[0] == "sh":
        assert (ROOT / words[1]).is_file(), f"{words[1]} is not there"
        for call in what_it_runs(words, recorder, ROOT):
            if Path(call[0]).name in PAGES:
                assert_parses(call)
    elif words[0] == "python" and words[1] in PAGES:
        if words[2:] != ["--help"]:
            assert_parses(words[1:])
    else:
        assert words[:3] == ["python", "-m", "utils.report"], f"who runs this? {command}"


def test_the_readme_has_a_quick_start_and_a_test_command() -> None:
    commands = readme_commands()
    assert "sh experiments/grad/dlg.sh" in commands
    assert "sh tests/run.sh" in commands


def test_the_readme_is_filled_in_and_its_links_lead_somewhere() -> None:
    text = (ROOT / "README.md").read_text()
    assert "@@" not in text
    for target in re.findall(r"\]\(([^)]+)\)", text):
        assert target.startswith("https://") or (ROOT / target).is_file(), target
    for name in discover():
        assert f"`{name}`" in text, f"the README does not name {name}"


def test_help_names_every_dataset_model_and_attack(capsys: pytest.CaptureFixture[str]) -> None:
    for page, (run_cls, _) in PAGES.items():
        with pytest.raises(SystemExit) as stop:
            cli.parse(["--help"], run_cls, discover(), page)
        assert stop.value.code == 0
        words = set(re.findall(r"[\w]+", capsys.readouterr().out))
        assert set(data.DATASETS) <= words
        assert set(models.MODELS) <= words
        assert set(discover()) <= words


def test_paper_switches_to_the_authors_values_and_explicit_flags_win() -> None:
    (ours,) = cli.parse(["dlg"], cli.Grad, discover(), "page")
    (paper,) = cli.parse(["dlg", "--paper"], cli.Grad, discover(), "page")
    (mixed,) = cli.parse(["dlg", "--paper", "--iterations", "7"], cli.Grad, discover(), "page")
    assert ours.attack.line_search == "strong_wolfe"
    assert paper.attack.line_search == mixed.attack.line_search == "none"
    assert (paper.attack.iterations, mixed.attack.iterations) == (6000, 7)


def test_hyphens_and_underscores_are_one() -> None:
    (a,) = cli.parse(["dlg", "--batch_size", "2"], cli.Grad, discover(), "page")
    (b,) = cli.parse(["dlg", "--batch-size", "2"], cli.Grad, discover(), "page")
    assert a == b


def test_help_waits_for_nothing_it_does_not_use() -> None:
    """Libraries that take long to import and that only some runs need."""
    heavy = ("torchvision", "matplotlib", "skimage", "lpips", "scipy", "ray")
    told = f"import sys; sys.argv = ['main_grad.py', '--help']; exec(open({str(ROOT / 'main_grad.py')!r}).read())"
    after = f"import atexit, sys; atexit.register(lambda: print([m for m in {heavy} if m in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", f"{after}; {told}"], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]", done
