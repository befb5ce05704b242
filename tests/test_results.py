"""Every table between comments in README and docs follows from docs/results.json, and can be measured again."""

import json
import re
import shlex

import pytest

from attacks import ATTACKS
from experiments import results
from runner import cli
from runner.flags import Fed, Grad
from tests.conftest import ROOT

STORED = json.loads(results.STORED.read_text()) if results.STORED.exists() else {}


@pytest.mark.parametrize("name", results.TABLES)
def test_a_table_has_one_place(name: str) -> None:
    text = (ROOT / results.TABLES[name].file).read_text()
    assert len(re.findall(results.marks(name), text, re.S)) == 1


@pytest.mark.parametrize("name", STORED)
def test_a_table_is_what_its_runs_say(name: str) -> None:
    assert results.marked(name, STORED[name]) in (ROOT / results.TABLES[name].file).read_text()


def test_every_number_of_a_table_was_measured_on_one_commit() -> None:
    for name, stored in STORED.items():
        assert stored["commit"] and not stored["commit"].endswith("+"), f"{name}: {stored['commit']}"
        assert [row["own"] for row in stored["rows"]] == [
            row.flags for row in results.TABLES[name].rows if not stored["quick"] or row.quick
        ]


@pytest.mark.parametrize("name", results.TABLES)
def test_the_commands_of_a_table_can_be_parsed(name: str) -> None:
    entry = results.TABLES[name]
    for row in entry.rows:
        mode, script = row.run.split("/")
        attack = script.removesuffix(".sh")
        assert (ROOT / "experiments" / mode / script).exists()
        words = [attack, *shlex.split(entry.flags), *shlex.split(row.flags), "--trials", str(row.trials)]
        (command,) = cli.parse(words, Grad if mode == "grad" else Fed, ATTACKS, "page")
        assert command.flags.trials == row.trials
