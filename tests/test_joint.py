"""Several updates of one client, matched by one guess."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from attacks import ATTACKS
from attacks.matching.joint import JointObjective
from attacks.matching.matcher import GradientMatcher
from attacks.matching.signed_inversion import MatchingObjective
from core.errors import UsageError
from core.protocol import Batch, Observation, Recipe, image_task
from federated.client import gradient
from models import build
from runner import cli
from runner.experiment import Experiment
from runner.flags import Fed
from runner.sources import federated_source

TASK, RECIPE = image_task((1, 8, 8), 3), Recipe(2)
FLAGS = ("--model", "lenet", "--image-size", "16", "--clients", "2", "--trials", "4", "--attack-rounds", "1", "2")


def observation(seed: int) -> Observation:
    """What the server sees of the same two images with another network."""
    model = build("mlp", (1, 8, 8), 3, rng=torch.Generator().manual_seed(seed))
    return Observation(TASK, RECIPE, model, gradient(model, truth(), TASK, RECIPE, torch.Generator()))


def truth() -> Batch:
    return Batch(torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(9)), torch.tensor([0, 2]))


def test_the_joint_objective_is_the_mean_over_updates_and_zero_at_the_truth() -> None:
    matchers = [GradientMatcher(observation(seed)) for seed in range(3)]
    joint = JointObjective(MatchingObjective(matchers[0]), matchers[1:])
    guess = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    own = [m.cosine_distance(guess, truth().labels) for m in matchers]
    assert torch.allclose(joint.distance(guess, truth().labels), torch.stack(own).mean())
    assert joint.distance(*truth()).item() == pytest.approx(0, abs=1e-5)
    assert joint.full_precision() is joint


def test_equal_updates_give_what_one_update_gives() -> None:
    attack = ATTACKS["ig_single"](iterations=5, feature_weight=0, precision="float32")
    alone = observation(0)
    labels = {"labels": truth().labels}
    alone = dataclasses.replace(alone, granted=labels)
    twice = dataclasses.replace(alone, earlier=(alone,))
    one, other = (attack.reconstruct(o, torch.Generator().manual_seed(0)) for o in (alone, twice))
    assert torch.allclose(one.examples, other.examples, atol=1e-4)


def experiment(*words: str) -> Experiment:
    (command,) = cli.parse([*words], Fed, ATTACKS, "main_fed.py")
    return Experiment("fed", command, federated_source)


@pytest.mark.parametrize("finished", [set(), {0, 1}])
def test_an_attack_sees_the_earlier_updates_of_its_client_alone(finished: set[int]) -> None:
    found = experiment("ig_single", *FLAGS, "--accumulate")
    jobs = {job.index: job for job in found.jobs_of(found.session(), finished)}
    assert set(jobs) == {0, 1, 2, 3} - finished
    for index in (2, 3):
        (earlier,) = jobs[index].observation.earlier
        assert earlier.public is None and earlier.earlier == ()
        own = jobs[index].observation
        assert not torch.equal(earlier.update.tensors["head.weight"], own.update.tensors["head.weight"])
        if not finished:
            first = jobs[index - 2].observation
            assert first.earlier == ()
            assert torch.equal(earlier.update.tensors["head.weight"], first.update.tensors["head.weight"])
    assert "the client's earlier updates" in found.knowledge
    plain = experiment("ig_single", *FLAGS)
    assert [job.observation.earlier for job in plain.jobs_of(plain.session(), set())] == [()] * 4


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("analytic", "--model", "fc2", "--accumulate"), "applies to ig_multi"),
        (("ig_single", "--accumulate"), "attack_rounds"),
        (("ig_single", *FLAGS, "--accumulate", "--defense", "precode()"), "secrets"),
    ],
)
def test_accumulation_is_refused_where_it_means_nothing(words: Any, reason: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=reason):
        experiment(*words)
