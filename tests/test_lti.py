"""Learning to Invert learns from simulated clients with public data, once for each model and defence."""

from pathlib import Path

import pytest
import torch
from torch import nn

import attacks.lti as lti
from attacks import ATTACKS
from core.protocol import Batch, Observation, Recipe, image_task
from evaluation.metrics import psnr
from federated.client import gradient, train
from tests.test_attacks import smooth_pictures

TASK = image_task((3, 8, 8), 2, (0.5,) * 3, (0.5,) * 3)
SMALL = {"simulations": 400, "features": 800, "units": 128, "epochs": 30, "lr": 2e-3, "batch": 16}


def pictures(n: int, seed: int) -> Batch:
    return Batch(smooth_pictures(n, 8, seed), torch.zeros(n, dtype=torch.int64))


def observe(truth: Batch, defense: str, kind: str = "gradient") -> Observation:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(192, 2))
    count, rng = len(truth.labels), torch.Generator().manual_seed(5)
    recipe = Recipe(count, lr=0.1, defense=defense)
    if kind == "gradient":
        update = gradient(model, truth, TASK, recipe, rng)
    else:
        update, _ = train(model, truth, TASK, recipe, rng)
    return Observation(TASK, recipe, model, update, pictures(200, seed=1))


@pytest.fixture
def checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CHECKPOINTS", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(("defense", "kind"), [("sign()", "gradient"), ("topk(share=0.2)", "delta")])
def test_it_reads_examples_off_defended_updates(checkpoints: Path, defense: str, kind: str) -> None:
    """Better than the mean image by far, and no better on an update of somebody else's example."""
    attack, mean = ATTACKS["lti"](**SMALL), pictures(200, seed=1).examples.mean(0)
    gains, wrong = [], []
    for seed in range(6):
        truth, other = pictures(1, seed=50 + seed), pictures(1, seed=90 + seed)
        rec = attack.reconstruct(observe(truth, defense, kind), torch.Generator())
        gains.append(psnr(truth.examples[0], rec.examples[0]) - psnr(truth.examples[0], mean))
        wrong.append(psnr(other.examples[0], rec.examples[0]) - psnr(other.examples[0], mean))
    assert min(gains) > 0
    assert sum(gains) / 6 > 1.5
    assert sum(wrong) / 6 < 0
    assert len(list(checkpoints.glob("lti-*/network.safetensors"))) == 1


def test_a_network_is_trained_once_for_each_model_and_belief(
    checkpoints: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attack = ATTACKS["lti"](simulations=8, features=32, units=8, epochs=1)
    observation = observe(pictures(1, seed=7), "sign()")
    first = attack.reconstruct(observation, torch.Generator())
    monkeypatch.setattr(lti.LearningToInvert, "_train", None)  # what is trained already is loaded
    assert torch.equal(first.examples, attack.reconstruct(observation, torch.Generator()).examples)
    with pytest.raises(TypeError):
        attack.reconstruct(observe(pictures(1, seed=7), "none"), torch.Generator())


def test_the_error_of_a_group_is_that_of_its_best_order() -> None:
    rng = torch.Generator().manual_seed(0)
    targets = torch.rand(5, 3, 10, generator=rng)
    order = torch.randperm(3, generator=rng)
    assert lti.matched_error(targets[:, order], targets) == 0
    assert lti.matched_error(targets[:, order] + 0.1, targets).item() == pytest.approx(0.01, rel=1e-4)
