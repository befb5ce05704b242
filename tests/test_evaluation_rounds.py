"""Leakage over rounds: each round's own scores, and the update that the attacker would choose without the truth."""

from pathlib import Path
from typing import Any

import pytest

from core.errors import UsageError
from evaluation.rounds import over_rounds
from runner.experiment import load_dataset
from runner.flags import Fed
from runner.sources import federated_source
from tests.commands import in_process, lines, only_run


def row(trial: int, psnr: float) -> dict[str, Any]:
    return {"trial": trial, "image": 0, "match": 0, "psnr": psnr, "null_psnr": 10.0}


def trial(number: int, round_: int, client: int, answer: float | None) -> dict[str, Any]:
    found = None if answer is None else {"answer": answer, "truth": 0.0, "baseline": 1.0}
    return {"trial": number, "round": round_, "client": client, "objective": found}


def test_the_lowest_objective_so_far_is_taken_and_not_the_best_score() -> None:
    trials = [trial(0, 0, 3, 0.2), trial(1, 4, 3, 0.1), trial(2, 9, 3, 0.3)]
    found = over_rounds([row(0, 25.0), row(1, 15.0), row(2, 30.0)], trials)
    assert found is not None
    assert [entry["round"] for entry in found] == [1, 5, 10]
    assert [entry["psnr"] for entry in found] == [25.0, 15.0, 30.0]
    assert [entry["accumulated"] for entry in found] == [
        {"psnr": 25.0, "recovered": 1.0},
        {"psnr": 15.0, "recovered": 0.0},
        {"psnr": 15.0, "recovered": 0.0},
    ]
    assert {entry["null_psnr"] for entry in found} == {10.0}


def test_clients_are_kept_apart_and_attacks_without_an_objective_accumulate_nothing() -> None:
    trials = [trial(0, 0, 0, 0.2), trial(1, 0, 1, 0.5), trial(2, 1, 0, 0.1), trial(3, 1, 1, 0.6)]
    found = over_rounds([row(0, 10.0), row(1, 20.0), row(2, 30.0), row(3, 40.0)], trials)
    assert found is not None
    assert [entry["accumulated"]["psnr"] for entry in found] == [15.0, 25.0]
    silent = over_rounds([row(0, 10.0), row(1, 20.0)], [trial(0, 0, 0, None), trial(1, 1, 0, None)])
    assert silent is not None
    assert [entry["accumulated"] for entry in silent] == [None, None]
    assert over_rounds([row(0, 10.0), row(1, 20.0)], [trial(0, 0, 0, 0.1), trial(1, 1, 1, 0.1)]) is None
    assert over_rounds([row(0, 10.0)], [{"trial": 0, "objective": None}]) is None


def test_the_same_client_is_attacked_in_the_rounds_that_the_user_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ["analytic", "--model", "fc2", "--image-size", "8", "--clients", "3", "--trials", "4"]
    flags += ["--attack-rounds", "1", "3", "--out", str(tmp_path)]
    assert in_process("main_fed.py", flags, monkeypatch) == 0
    run = only_run(tmp_path)
    found = [(r["round"], r["client"]) for r in lines(run / "rows.jsonl")]
    assert found == [(0, 0), (0, 1), (2, 0), (2, 1)]
    assert (run / "rounds.png").read_bytes().startswith(b"\x89PNG")
    assert len(lines(run / "rounds.jsonl")) == 3


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        ({"attack_rounds": (1, 1)}, "different numbers"),
        ({"attack_rounds": (0,)}, "from 1"),
        ({"attack_rounds": (1, 4), "rounds": 3}, "rounds"),
        ({"attack_rounds": (1, 4, 7)}, "multiple"),
        ({"attack_rounds": (1, 2), "clients": 4}, "clients"),
        ({"attack_rounds": (1, 2), "clients_per_round": 5}, "leave out"),
        ({"attack_rounds": (1, 2), "aggregate": 2}, "leave out"),
    ],
)
def test_rounds_that_do_not_exist_are_refused(flags: dict[str, Any], word: str) -> None:
    with pytest.raises(UsageError, match=word):
        federated_source(Fed(image_size=8, **flags), load_dataset(Fed(image_size=8)))
