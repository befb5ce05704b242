"""Truth is no part of an observation: what an attack is given is searched, byte by byte, for what it must not hold."""

import pickle
from typing import Any

import pytest
import torch

from attacks import ATTACKS
from core.protocol import Batch, Observation
from runner import cli
from runner.executors import Job, pack
from runner.experiment import Experiment
from runner.flags import Fed, Grad
from runner.sources import federated_source, gradient_source

BATCH = 6  # six labels in a row are unlikely to turn up by chance
DOORS: dict[str, Any] = {"grad": (Grad, gradient_source), "fed": (Fed, federated_source)}
MODES = sorted(DOORS)


def experiment(mode: str, *flags: str, grant: str = "none") -> Experiment:
    words = ["baseline", "--trials", "3", "--grant", grant]
    words += ["--batch-size", str(BATCH)] if mode == "grad" else ["--client-images", str(BATCH), "--batch-size", "4"]
    flags_cls, source = DOORS[mode]
    (command,) = cli.parse([*words, *flags], flags_cls, ATTACKS, mode)
    return Experiment(mode, command, source)


def jobs(made: Experiment) -> list[Job]:
    """Every trial as it is handed to an attack; its truth rides in the payload."""
    return list(made.jobs_of(made.session(), finished=set()))


def truths(mode: str, *flags: str) -> list[Batch]:
    return [job.payload.truth for job in jobs(experiment(mode, *flags))]


def contents(observation: Observation) -> list[bytes]:
    """An observation as bytes: whole, and as it is sent to a worker."""
    return [pickle.dumps(observation), pack(observation)]


@pytest.mark.parametrize("mode", MODES)
def test_no_private_example_and_no_label_is_in_an_observation(mode: str) -> None:
    made = experiment(mode)
    trials = jobs(made)
    assert len(trials) == 3
    for job in trials:
        examples, labels = job.payload.truth
        for data in contents(job.observation):
            assert labels.numpy().tobytes() not in data
            for example in examples:
                inputs = made.task.domain.to_model(example[None])[0]
                for form in (example, inputs, (example * 255).round().to(torch.uint8)):
                    assert form.contiguous().numpy().tobytes() not in data


@pytest.mark.parametrize("mode", MODES)
def test_the_search_finds_what_is_there(mode: str) -> None:
    """Granted labels, and an example that was put in on purpose, are both found."""
    job = jobs(experiment(mode, grant="labels"))[0]
    examples, labels = job.payload.truth
    for data in contents(job.observation):
        assert labels.numpy().tobytes() in data
    leaked = pickle.dumps((job.observation, examples[0].clone()))
    assert examples[0].numpy().tobytes() in leaked


@pytest.mark.parametrize("mode", MODES)
def test_no_private_example_is_public_or_a_negative_control(mode: str) -> None:
    made = experiment(mode)
    for job in jobs(made):
        assert job.observation.public is not None
        public = {example.numpy().tobytes() for example in job.observation.public.examples}
        assert len(public) > 100
        controls = {example.numpy().tobytes() for example in made.negative_controls(BATCH, job.index)}
        private = {example.numpy().tobytes() for example in job.payload.truth.examples}
        assert not private & (public | controls)


def test_every_attack_gets_the_same_victims_in_both_modes() -> None:
    """The stream of private examples depends on the seed alone."""
    in_grad, in_fed = truths("grad"), truths("fed", "--rounds", "1")
    again, other = truths("grad", "--model", "cnn", "--trials", "2"), truths("grad", "--seed", "1")
    for a, b in zip(in_grad, in_fed, strict=True):
        assert torch.equal(a.examples, b.examples)
        assert torch.equal(a.labels, b.labels)
    assert torch.equal(in_grad[1].examples, again[1].examples)
    assert not torch.equal(in_grad[0].examples, other[0].examples)


@pytest.mark.parametrize("mode", MODES)
def test_granted_facts_are_named(mode: str) -> None:
    granted, plain = experiment(mode, grant="labels"), experiment(mode)
    assert granted.config()["oracle"] == ["labels"]
    assert plain.config()["oracle"] == []
    assert list(jobs(granted)[0].observation.granted) == ["labels"]
    assert jobs(plain)[0].observation.granted == {}
