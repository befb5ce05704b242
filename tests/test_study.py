"""The study: its claims are decided by intervals, its commands run, and its page follows from what it stores."""

import dataclasses
import json
import re
from typing import Any

import pytest

from attacks import ATTACKS
from core.errors import UsageError
from experiments import results
from experiments.study import claims, runs, study
from runner import cli
from tests.conftest import ROOT

STORED = json.loads(study.STORED.read_text()) if study.STORED.exists() else None
PLAN = runs.Plan(("photos", "leaves"), tuple(ATTACKS), 3, 3, 5, True, ("--victims", "reporting"))


def row(attack: str, share: float, units: int = 8, **facts: str) -> dict[str, Any]:
    """A measurement in which `share` of the units have their one image rebuilt; each has a PSNR of 30 or 10 dB."""
    rebuilt = [k < round(share * units) for k in range(units)]
    scores = {str(k): {"n": 1, "rebuilt": int(hit), "psnr": 30.0 if hit else 10.0} for k, hit in enumerate(rebuilt)}
    common = {"table": "grid", "network": "lenet", "dataset": "photos", "observation": "one gradient", "state": "new"}
    return {**common, "setting": "", "attack": attack, "units": scores, **facts}


CLAIM = {"name": "c", "rows": {"table": "grid"}, "score": "rebuilt", "comparison": ">=", "threshold": 0.5}
MOST = {**CLAIM, "each": "attack", "quorum": "most"}


@pytest.mark.parametrize(("share", "verdict"), [(1.0, "confirmed"), (0.0, "refuted"), (0.5, "not shown")])
def test_an_interval_decides_a_claim(share: float, verdict: str) -> None:
    assert claims.judge(CLAIM, [row("dlg", share)])["verdict"] == verdict
    flipped = {"confirmed": "refuted", "refuted": "confirmed"}.get(verdict, verdict)
    assert claims.judge({**CLAIM, "comparison": "<="}, [row("dlg", share)])["verdict"] == flipped


def test_few_units_show_nothing() -> None:
    assert claims.judge({**CLAIM, "threshold": 0.1}, [row("dlg", 1.0, units=2)])["verdict"] == "not shown"
    assert claims.judge(CLAIM, [])["verdict"] == "not shown"


def test_one_victim_through_two_networks_is_one_unit() -> None:
    both = [row("dlg", 1.0), row("dlg", 1.0, network="cnn")]
    assert claims.pooled(both, "rebuilt")["n"] == 8
    assert claims.pooled(both, "rebuilt")["low"] == claims.pooled(both[:1], "rebuilt")["low"]
    assert claims.pooled([*both, row("dlg", 1.0, dataset="leaves")], "rebuilt")["n"] == 16


def test_a_majority_of_attacks_decides() -> None:
    rows = [row("dlg", 1.0), row("idlg", 1.0), row("sme", 0.0), row("baseline", 0.0)]
    found = claims.judge(MOST, rows)
    assert found == {"verdict": "confirmed", "yes": ["dlg", "idlg"], "no": ["sme"], "open": []}
    assert claims.judge(MOST, [*rows, row("ggl", 0.5)])["verdict"] == "not shown"
    assert claims.judge(MOST, [*rows, row("ggl", 0.0)])["verdict"] == "refuted"
    assert claims.judge({**MOST, "quorum": "all"}, rows)["verdict"] == "refuted"
    assert claims.judge(MOST, rows[:2])["verdict"] == "not shown"  # two attacks are no majority


def test_attacks_that_failed_before_are_not_asked() -> None:
    given = {"rows": {"observation": "one gradient"}, "least": 0.5}
    claim = {**MOST, "rows": {"observation": "FedAvg"}, "given": given, "comparison": "<="}
    rows = [row(name, share) for name, share in (("dlg", 1.0), ("sme", 0.0))]
    rows += [row(name, 0.0, observation="FedAvg") for name in ("dlg", "sme")]
    assert claims.judge(claim, rows)["yes"] == ["dlg"]


def test_a_difference_is_taken_unit_by_unit() -> None:
    """Units differ by 100 dB, and their differences by nothing: the interval is a point."""
    low, high = row("dlg", 0.0, setting="a"), row("dlg", 0.0, setting="b")
    for k, (one, other) in enumerate(zip(low["units"].values(), high["units"].values(), strict=True)):
        one["psnr"], other["psnr"] = 100.0 * k, 100.0 * k + 7
    del high["units"]["0"]
    facts = {"rows": {"setting": "b"}, "against": {"setting": "a"}, "pairs": ["dataset"], "score": "psnr"}
    found = claims.judge({**CLAIM, **facts, "threshold": 5.0}, [low, high])
    assert found["verdict"] == "confirmed"
    assert (found["value"], found["n"]) == (pytest.approx(7.0), 7)
    assert found["low"] == pytest.approx(found["high"])


def test_units_add_up_the_rows_of_a_run() -> None:
    common = {"trial": 0, "match": 0, "null_psnr": 10.0}
    found = runs.units_of(
        [
            {**common, "psnr": 30.0, "identified": True},
            {**common, "psnr": 25.0, "identified": False},
            {**common, "psnr": 12.0, "identified": True, "trial": 1},
        ]
    )
    assert found["0"] == {"n": 2, "recovered": 2, "psnr": 55.0, "gain": 35.0, "identified": 1, "rebuilt": 1}
    assert found["1"]["rebuilt"] == 0


def test_every_claim_names_rows_that_the_study_has() -> None:
    facts = [cell.facts for cell in runs.cells(dataclasses.replace(PLAN, quick=False))]
    names = [claim["name"] for claim in claims.load()]
    assert len(set(names)) == len(names)
    for claim in claims.load():
        assert claim["claim"] and claim["source"]
        assert claim["comparison"] in (">=", "<=")
        given = [claim["given"]["rows"]] if "given" in claim else []
        for wanted in (claim["rows"], *([claim["against"]] if "against" in claim else []), *given):
            assert any(all(fact[name] == value for name, value in wanted.items()) for fact in facts), claim["name"]


@pytest.mark.parametrize("quick", [True, False])
def test_every_command_of_the_study_can_be_parsed(quick: bool) -> None:
    found = runs.cells(dataclasses.replace(PLAN, quick=quick, datasets=("leaves",)))
    for cell in found:
        (command,) = cli.parse(list(cell.words), runs.SOURCES[cell.mode][0], ATTACKS, "study")
        assert command.attack_name == cell.facts["attack"]
    assert {cell.facts["observation"] for cell in found if cell.facts["table"] == "grid"} == set(runs.OBSERVATIONS)
    assert {cell.facts["attack"] for cell in found} >= set(ATTACKS)


def test_an_unknown_attack_or_data_set_is_one_line() -> None:
    with pytest.raises(UsageError, match="`attacks`: nope is none of"):
        study.main(study.Flags(attacks=("nope",)))
    with pytest.raises(UsageError, match="unknown data set 'photo'"):
        study.main(study.Flags(datasets=("photo",)))


def test_a_cell_is_measured_once_and_a_refusal_is_a_row() -> None:
    cell = runs.Cell("grad", {"table": "grid", "attack": "analytic"}, ("analytic", "--model", "lenet"))
    assert "fully connected first layer" in runs.measure(cell)["refused"]


@pytest.mark.parametrize("part", study.PARTS)
def test_a_table_of_the_page_is_what_the_study_stored(part: str) -> None:
    text = study.PAGE.read_text()
    assert len(re.findall(results.marks(f"study {part}"), text, re.S)) == 1
    if STORED is not None:
        assert results.between_marks(f"study {part}", study.block(part, STORED)) in text


def test_the_readme_has_a_place_for_the_verdicts() -> None:
    assert len(re.findall(results.marks("study verdicts"), study.README.read_text(), re.S)) == 1
    assert all(set(names) <= set(runs.OBSERVATIONS) for names in runs.QUICK_SKIPS.values())


def test_refuted_claims_are_listed() -> None:
    stored = {"rows": [row(name, 0.0) for name in ("dlg", "idlg", "sme")], "commit": "c", "torch": "t", "cores": 2}
    first, _, *lines = study.verdict_block(stored | {"quick": True}).splitlines()
    assert first.endswith("Refuted:")
    assert lines[0].startswith("- Most attacks rebuild images from the gradient of one image")
    assert "3 against (dlg, idlg, sme)" in lines[0]


@pytest.mark.skipif(STORED is None, reason="the study has not been measured")
def test_the_verdicts_of_the_readme_are_those_of_the_study() -> None:
    assert STORED is not None
    assert results.between_marks("study verdicts", study.verdict_block(STORED)) in study.README.read_text()


@pytest.mark.skipif(STORED is None, reason="the study has not been measured")
def test_the_stored_study_was_measured_on_one_commit() -> None:
    assert STORED is not None
    assert STORED["commit"] and not STORED["commit"].endswith("+")
    assert (ROOT / "docs" / "study.json").stat().st_size < 1_000_000
