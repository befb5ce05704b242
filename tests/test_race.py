"""The race between engines: stored runs are not repeated, and the table follows from them."""

import csv
import json
import sys
from pathlib import Path

import pytest

from attacks.base import ATTACKS
from experiments.bench import engines, race
from runner import cli
from runner.experiment import Experiment
from runner.flags import Grad
from runner.sources import gradient_source


def fake(engine: str, iterations: int, flags: list[str]) -> race.Run:
    """Ours gains 1 dB a second up to 30 dB, the peer half of it up to 20; a TV of 0.5 costs the peer 5 dB."""
    speed, cap = (1.0, 30) if engine == "ours" else (0.5, 20)
    cap -= 5 if "0.5" in flags else 0
    seconds = [1.0 + k for k in range(60)]
    scores = [(t, min(cap, speed * t), float(speed * t > 10)) for t in seconds]
    return {"seconds": seconds[-1], "iterations": 60, "scores": scores}


def test_a_race_is_stored_resumed_and_tabulated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[list[str]] = []

    def counted(engine: str, iterations: int, flags: list[str]) -> race.Run:
        calls.append(flags)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return fake(engine, iterations, flags)

    monkeypatch.setattr(race, "run_engine", counted)
    flags = race.Flags(models=("lenet",), victims=2, tvs=(0.5, 0.01), peer_iterations=(40,), out=tmp_path)
    with pytest.raises(KeyboardInterrupt):
        race.main(flags)
    race.main(flags)
    assert len(calls) == 2 * 2 + 3 * 2 + 1, "tuning, three racers on two victims, and the one that was interrupted"
    assert {"tuning", "reporting"} == {words[words.index("--victims") + 1] for words in calls}
    with (tmp_path / "race.csv").open() as file:
        ours, _, peer = csv.DictReader(file)
    assert peer["TV"] == "0.01", "the better one on tuning victims"
    assert (float(ours["final PSNR dB"]), float(peer["final PSNR dB"])) == (30, 20)
    assert float(peer["x ours"]) == pytest.approx(2, rel=0.05)
    assert (tmp_path / "race_lenet.png").exists()
    race.main(flags)
    assert len(calls) == 11, "a finished race computes nothing"


@pytest.mark.parametrize("normalize", ["none", "half"])
def test_an_annealed_loop_ends_with_its_budget_and_is_scored(normalize: str) -> None:
    words = ["ig_single", "--image-size", "8", "--trials", "1", "--paper", "--tv", "1e-3", "--normalize", normalize]
    (command,) = cli.parse(words, Grad, ATTACKS, "bench")
    experiment = Experiment("grad", command, gradient_source)
    job = next(experiment.jobs_of(experiment.session(), set()))
    found = engines.attack_one("reference_annealed", experiment, job, engines.Watch(3), 3)
    assert found["iterations"] == 3
    assert len(found["scores"]) == 4
    assert all(0 < psnr < 30 and 0 <= identified <= 1 for _, psnr, identified in found["scores"])
    assert json.dumps(found["scores"])
    assert "breaching" not in sys.modules
