"""The pages of the attacks are what the code and the stored measurements say: `python -m experiments.attack_pages`."""

import re
from pathlib import Path

import pytest

from attacks import ATTACKS
from experiments import attack_pages
from tests.conftest import ROOT

PAGES = sorted(attack_pages.FOLDER.glob("*.md"))


def test_every_attack_has_a_page_and_every_page_an_attack() -> None:
    assert {path.stem for path in PAGES} == set(ATTACKS), "run: python -m experiments.attack_pages"


@pytest.mark.parametrize("name", sorted(ATTACKS))
def test_a_page_is_up_to_date(name: str) -> None:
    text = attack_pages.page_of(name).read_text()
    for block, content in attack_pages.blocks_of(name).items():
        assert attack_pages.is_current(text, f"{block} {name}", content), "run: python -m experiments.attack_pages"
    assert f"experiments/grad/{name}.sh" in text


def test_the_table_of_cases_is_up_to_date() -> None:
    text = attack_pages.CASES.read_text()
    for block, content in (("cases", attack_pages.cases()), ("attacks", attack_pages.overview())):
        assert attack_pages.is_current(text, block, content), "run: python -m experiments.attack_pages"


def test_every_attack_fits_some_case() -> None:
    text = attack_pages.cases()
    for name in set(ATTACKS) - attack_pages.NO_ATTACK:
        assert f"[`{name}`]" in text


@pytest.mark.parametrize("path", [*PAGES, *sorted((ROOT / "docs").glob("*.md"))], ids=lambda path: path.name)
def test_links_lead_to_files(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", re.sub(r"```.*?```", "", path.read_text(), flags=re.S)):
        assert target.startswith("https://") or (path.parent / target).exists(), f"{path.name}: {target}"


def test_commands_of_the_pages_are_scripts() -> None:
    """tests/test_commands.py runs every script of experiments/ without flags."""
    for path in PAGES:
        for line in "\n".join(re.findall(r"```sh\n(.*?)```", path.read_text(), re.S)).splitlines():
            command = line.split("#")[0].split()
            assert command[0] == "sh" and len(command) == 2
            assert (ROOT / command[1]).is_file()


def test_a_missing_page_is_written_with_all_its_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attack_pages, "FOLDER", tmp_path)
    monkeypatch.setattr(attack_pages.results, "ROOT", tmp_path)
    attack_pages.write_page("dlg")
    text = attack_pages.page_of("dlg").read_text()
    assert text.startswith("# `dlg`\n")
    for block, content in attack_pages.blocks_of("dlg").items():
        assert attack_pages.is_current(text, f"{block} dlg", content)
