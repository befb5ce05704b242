"""Every command in the README and in the scripts parses, and --help is complete."""

import dataclasses
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

import data
import models
from attacks.base import ATTACKS
from core.errors import UsageError
from models.inspection import REQUIREMENTS
from runner import cli
from runner.experiment import Experiment
from runner.flags import Fed, Grad
from runner.sources import federated_source, gradient_source
from runner.subjects import Audit
from tests.conftest import ROOT
from utils.flags import Parser, add_flags, given

SCRIPTS = sorted(
    p.relative_to(ROOT).as_posix() for p in (ROOT / "experiments").rglob("*.sh") if p.name != "env.sh"
)  # env.sh is sourced by all others
TOOLS = ("defenses.detect", "evaluation.inspect")  # modules that are run with python -m and have flags
PAGES = {"main_grad.py": (Grad, gradient_source), "main_fed.py": (Fed, federated_source)}


def readme_commands() -> list[str]:
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    blocks = [block for page in pages for block in re.findall(r"```sh\n(.*?)```", page.read_text(), re.S)]
    text = "\n".join(blocks).replace("\\\n", " ")
    found = [line.split("#")[0].strip() for line in text.splitlines()]
    return [line for line in found if line and not line.startswith(("git ", "cd "))]


@pytest.fixture(scope="module")
def recorder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python that prints the arguments of our scripts instead of running them."""
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
    """The script's own parser and its own checks accept the arguments."""
    page, *flags = arguments
    if "flower" in flags:
        pytest.importorskip("flwr")
        pytest.importorskip("ray")
    flags_cls, source = PAGES[Path(page).name]
    points = cli.parse(flags, flags_cls, ATTACKS, page)
    for command in {id(c): c for c in (points[0], points[-1])}.values():
        Experiment("any", command, source)


def assert_flags_parse(flags_cls: type, words: list[str]) -> None:
    parser = Parser()
    add_flags(parser, flags_cls, lambda cls, field: field.metadata["help"])
    flags_cls(**given(flags_cls, parser.parse(words)))


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_runs_a_command_that_parses(script: str, recorder: Path, tmp_path: Path) -> None:
    calls = what_it_runs(["sh", str(ROOT / script)], recorder, tmp_path)
    assert calls, f"{script} runs nothing of ours"
    for page, *flags in calls:
        if page == "-m":
            assert flags[0] in ("report", "experiments.results")
            continue
        assert Path(page).is_file()
        if Path(page).name in PAGES:
            assert_parses([page, *flags])
        elif "experiments" in Path(page).parts:
            module = ".".join(Path(page).relative_to(ROOT).with_suffix("").parts)
            assert_flags_parse(importlib.import_module(module).Flags, flags)


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
        if "--help" not in words:
            assert_parses(words[1:])
    elif words[:2] == ["python", "main_audit.py"]:
        assert_flags_parse(Audit, words[2:])
    else:
        assert words[:2] == ["python", "-m"] and words[2] in ("report", *TOOLS), f"who runs this? {command}"
        if words[2] in TOOLS:
            model = [] if words[3].startswith("-") else ["--model"]
            assert_flags_parse(importlib.import_module(words[2]).Flags, [*model, *words[3:]])


def test_the_readme_has_a_quick_start_and_a_test_command() -> None:
    commands = readme_commands()
    assert "sh experiments/grad/dlg.sh" in commands
    assert "sh tests/run.sh" in commands


def test_the_readme_is_filled_in_and_its_links_lead_somewhere() -> None:
    text = (ROOT / "README.md").read_text()
    assert "@@" not in text
    for target in re.findall(r"\]\(([^)]+)\)", text):
        assert target.startswith("https://") or (ROOT / target).is_file(), target
    for name in ATTACKS:
        assert f"`{name}`" in text, f"the README does not name {name}"


@pytest.mark.parametrize("name", sorted(ATTACKS))
def test_the_readme_has_the_row_of_every_attack(name: str) -> None:
    """What the README says an attack requires is what its class declares."""
    cls = ATTACKS[name]
    needs = ", ".join(r.summary for key, r in REQUIREMENTS.items() if key in cls.requires) or "any model"
    paper = f"[{cls.citation}]({cls.link})" if cls.link else cls.citation
    assert f"| `{name}` | {paper} | {cls.threat} | {needs} |" in (ROOT / "README.md").read_text().splitlines()


def test_help_names_every_dataset_model_and_attack(capsys: pytest.CaptureFixture[str]) -> None:
    for page, (flags_cls, _) in PAGES.items():
        with pytest.raises(SystemExit) as stop:
            cli.parse(["--help"], flags_cls, ATTACKS, page)
        assert stop.value.code == 0
        words = set(re.findall(r"[\w]+", capsys.readouterr().out))
        assert set(data.DATASETS) <= words
        assert set(models.MODELS) <= words
        assert set(ATTACKS) <= words


@pytest.mark.parametrize("name", sorted(ATTACKS))
def test_help_of_an_attack_has_every_flag(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.parse([name, "--help"], Grad, ATTACKS, "page")
    assert stop.value.code == 0
    out = capsys.readouterr().out
    for field in (*dataclasses.fields(ATTACKS[name]), *dataclasses.fields(Grad)):
        assert f"--{field.name.replace('_', '-')}" in out
    assert "{datasets}" not in out


def one(*words: str) -> cli.Command:
    (command,) = cli.parse(list(words), Grad, ATTACKS, "page")
    return command


def test_paper_selects_the_authors_values_and_explicit_flags_win() -> None:
    ours, paper, mixed = one("dlg"), one("dlg", "--paper"), one("dlg", "--paper", "--iterations", "7")
    assert ours.attack.line_search == "strong_wolfe"
    assert paper.attack.line_search == mixed.attack.line_search == "none"
    assert (paper.attack.iterations, mixed.attack.iterations) == (6000, 7)


def test_hyphens_and_underscores_are_equal() -> None:
    assert one("dlg", "--batch_size", "2") == one("dlg", "--batch-size", "2") == one("dlg", "--batch_size=2")


@pytest.mark.parametrize(("attack", "old"), [(a, old) for a, flags in cli.RENAMED.items() for old in flags])
def test_a_renamed_flag_is_refused_with_its_new_name(attack: str, old: str) -> None:
    new = cli.RENAMED[attack][old]
    for word in (old, old.replace("-", "_").replace("__", "--", 1), f"{old}=1"):
        with pytest.raises(UsageError, match=f"is now {new}"):
            one(attack, word, "1")
    fields = {"--" + f.name.replace("_", "-") for f in dataclasses.fields(ATTACKS[attack])}
    assert new.split()[0] in fields
    assert old not in fields


def test_arguments_in_backticks_become_flags() -> None:
    assert cli.as_flags("lower `batch_size` or set `model=fc2`") == "lower --batch-size or set --model fc2"
    assert cli.as_flags("`partition=dirichlet`, and `x`") == "--partition dirichlet, and --x"


def test_a_sweep_over_attacks_and_defences() -> None:
    commands = cli.parse(
        ["dlg", "--sweep", "attack=dlg,idlg", "defense=none,clip(bound=1.0)+gauss(sigma=0.1)"], Grad, ATTACKS, "page"
    )
    assert [(c.attack_name, c.flags.defense) for c in commands] == [
        ("dlg", "none"),
        ("dlg", "clip(bound=1.0)+gauss(sigma=0.1)"),
        ("idlg", "none"),
        ("idlg", "clip(bound=1.0)+gauss(sigma=0.1)"),
    ]


def test_both_spellings_of_a_defence_are_the_same_run() -> None:
    keys = [
        Experiment("grad", one("baseline", "--defense", defense), gradient_source).key()
        for defense in ("clip=1.0+gauss=0.5", "clip(bound=1.0)+gauss(sigma=0.5)")
    ]
    assert keys[0] == keys[1]


def test_help_imports_nothing_it_does_not_use() -> None:
    """Libraries that take long to import and that only some runs need."""
    heavy = ("torchvision", "matplotlib", "skimage", "lpips", "scipy", "ray", "cma")
    script = f"import sys; sys.argv = ['main_grad.py', '--help']; exec(open({str(ROOT / 'main_grad.py')!r}).read())"
    after = f"import atexit, sys; atexit.register(lambda: print([m for m in {heavy} if m in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", f"{after}; {script}"], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]", done
