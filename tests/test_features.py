"""Layer inputs that a gradient determines, batch statistics that buffers reveal, and attacks that match them."""

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attacks import ATTACKS
from attacks.matching.layer_inputs import determined_inputs
from attacks.matching.matcher import GradientMatcher
from attacks.matching.statistics import batch_statistics, local_steps, matched_statistics, statistics_of
from core.protocol import Batch, Observation, Recipe, image_task
from evaluation.metrics import psnr
from federated.client import gradient, train
from models import external
from tests.test_attacks import smooth_pictures

TASK = image_task((3, 8, 8), 5)
STRANGERS = Path(__file__).with_name("strangers.py")


def network(norm: bool = False, stride: int = 1) -> nn.Sequential:
    """Two convolutions, the second with more channels than positions, and two fully connected layers."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 48, 3, padding=1),
        nn.BatchNorm2d(48) if norm else nn.Identity(),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Conv2d(48, 32, 3, stride, padding=1),
        nn.BatchNorm2d(32) if norm else nn.Identity(),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(512 // stride**2, 24),
        nn.ReLU(),
        nn.Linear(24, 5),
    )


def inputs_of(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """What each convolution and fully connected layer receives."""
    found: dict[str, Tensor] = {}
    model = copy.deepcopy(model)
    for name, layer in model.named_modules():
        layer.register_forward_pre_hook(lambda _, args, name=name: found.update({name: args[0].detach()}))
    model(x)
    return found


def observe(
    n: int = 1, defense: str = "none", mode: str = "eval", model: nn.Module | None = None
) -> tuple[Batch, Observation]:
    net = model or network(norm=mode == "train")
    truth = Batch(smooth_pictures(n, 8, seed=1), torch.arange(n) % 5)
    recipe = Recipe(n, defense=defense, model_mode=mode)  # type: ignore[arg-type]
    update = gradient(net, truth, TASK, recipe, torch.Generator().manual_seed(0))
    return truth, Observation(TASK, recipe, net, update)


@pytest.mark.parametrize("defense", ["none", "clip(bound=0.001)"])
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_determined_inputs_are_those_of_the_victim(defense: str, mode: str) -> None:
    truth, observation = observe(1, defense, mode)
    model = observation.model.train(mode == "train")
    found = determined_inputs(model, observation.update.ordered(model), torch.rand(4, 3, 8, 8), int(truth.labels[0]))
    assert [entry.layer for entry in found] == ["4", "8", "10"]
    received = inputs_of(model, truth.examples)
    for entry in found:
        assert entry.mask.min() >= 0
        x = received[entry.layer] * entry.mask
        assert torch.allclose(x / x.norm(), entry.direction, atol=1e-4)


def test_nothing_is_determined_where_the_rank_is_too_high() -> None:
    """By noise, and by two examples."""
    for n, defense in ((1, "gauss(sigma=0.01)"), (2, "none")):
        _, observation = observe(n, defense)
        gradients = observation.update.ordered(observation.model)
        assert determined_inputs(observation.model, gradients, torch.rand(4, 3, 8, 8), 0) == []


def test_an_input_that_is_not_unique_is_not_returned() -> None:
    """With stride 2 few patches overlap, and their subspace holds several inputs."""
    truth, observation = observe(1, model=network(stride=2))
    gradients = observation.update.ordered(observation.model)
    found = determined_inputs(observation.model, gradients, torch.rand(4, 3, 8, 8), int(truth.labels[0]))
    assert [entry.layer for entry in found] == ["8", "10"]


def test_inversion_of_layer_inputs_finds_what_gradient_matching_does_not() -> None:
    truth, observation = observe()
    scores = []
    for weight in (0.0, 1.0):
        attack = ATTACKS["ig_single"](iterations=20, feature_weight=weight, feature_iterations=150)
        found = attack.reconstruct(observation, torch.Generator().manual_seed(0))
        scores.append(psnr(truth.examples[0], found.examples[0]))
    without, with_inputs = scores
    assert with_inputs > 30
    assert with_inputs > without + 5


@pytest.mark.parametrize("momentum", [0.1, 0.5, None])
@pytest.mark.parametrize("steps", [1, 3])
def test_returned_buffers_reveal_the_weighted_mean_of_batch_statistics(momentum: float | None, steps: int) -> None:
    """Learning rate 0: all batches go through the same model."""
    net = network(norm=True)
    for layer in (net[1], net[5]):
        layer.momentum = momentum
        layer.running_mean.uniform_(-1, 1)
        layer.num_batches_tracked.fill_(7)
    truth = Batch(smooth_pictures(2 * steps, 8, seed=2), torch.arange(2 * steps) % 5)
    update, _ = train(net, truth, TASK, Recipe(2, lr=1e-12, model_mode="train"), torch.Generator().manual_seed(0))
    order = Recipe(2).batches(2 * steps, torch.Generator().manual_seed(0))
    assert local_steps(net, update.buffers) == steps
    weights = torch.tensor([(1 - (momentum or 0)) ** (steps - 1 - s) for s in range(steps)], dtype=torch.float32)
    weights /= weights.sum()
    expected = [inputs_of(copy.deepcopy(net).train(), truth.examples[chosen]) for chosen in order]
    for found in batch_statistics(net, update.buffers):
        pairs = [statistics_of(e[found.layer]) for e in expected]
        mean = sum(w * m for w, (m, _) in zip(weights, pairs, strict=True))
        variance = sum(w * v for w, (_, v) in zip(weights, pairs, strict=True))
        assert torch.allclose(found.mean, mean, atol=1e-5)
        assert torch.allclose(found.variance, variance, atol=1e-5)
    if steps == 1:
        received = expected[0]["1"]
        first, entries = batch_statistics(net, update.buffers)[0], received.numel() // 48
        biased = received.transpose(0, 1).flatten(1).var(1, unbiased=False)
        assert torch.allclose(first.variance * (entries - 1) / entries, biased, atol=1e-5)
        assert first.misfit(*first.over_steps([received])) < 1e-8


def test_a_client_in_eval_mode_reveals_no_statistics() -> None:
    net = network(norm=True)
    truth = Batch(smooth_pictures(2, 8, seed=2), torch.arange(2))
    update, _ = train(net, truth, TASK, Recipe(2, lr=0.1), torch.Generator())
    assert local_steps(net, update.buffers) == 0
    assert batch_statistics(net, update.buffers) == []
    assert batch_statistics(net, dataclasses.replace(update, buffers={}).buffers) == []


def after_five_steps(forgets: float | None = 0.1, **recipe: Any) -> tuple[Batch, Observation]:
    """Two images, and what a server sees after five local steps in train mode, with buffers that had moved before."""
    net = network(norm=True)
    for layer in (net[1], net[5]):
        layer.momentum = forgets
        layer.running_mean.uniform_(-1, 1)
        layer.num_batches_tracked.fill_(7)
    chosen = Recipe(2, local_epochs=5, model_mode="train", **{"lr": 0.05, **recipe})
    truth = Batch(smooth_pictures(2, 8, seed=2), torch.tensor([0, 3]))
    update, _ = train(net, truth, TASK, chosen, torch.Generator().manual_seed(0))
    return truth, Observation(TASK, chosen, net, update, granted={"labels": truth.labels})


def unrolled(observation: Observation) -> GradientMatcher:
    return GradientMatcher(observation, "unrolled")


@pytest.mark.parametrize("forgets", [0.1, None])
@pytest.mark.parametrize(
    "recipe", [{}, {"momentum": 0.9, "lr": 0.005}, {"optimizer": "adam", "lr": 0.0001}], ids=["sgd", "momentum", "adam"]
)
def test_only_the_true_images_explain_the_statistics_of_several_steps(
    forgets: float | None, recipe: dict[str, Any]
) -> None:
    truth, observation = after_five_steps(forgets, **recipe)
    statistics = matched_statistics(observation, unrolled(observation))
    assert statistics is not None
    matcher, misfits = statistics.matcher(unrolled), []
    for examples in (truth.examples, 1 - truth.examples):
        matcher.simulate(examples, truth.labels)
        misfits.append(statistics.misfit(statistics.moments(several_steps=True)).item())
    assert misfits[0] < 1e-7
    assert misfits[1] > 1e-3


@pytest.mark.parametrize(
    "belief", [{"model_mode": "eval"}, {"local_epochs": 4}, {"batch_size": 1, "local_epochs": 5}], ids=str
)
def test_statistics_of_other_steps_than_the_believed_ones_are_left_out(belief: dict[str, Any]) -> None:
    _, observation = after_five_steps()
    believed = dataclasses.replace(observation, recipe=dataclasses.replace(observation.recipe, **belief))
    assert matched_statistics(believed, unrolled(believed)) is None
    summed = dataclasses.replace(observation, aggregate=2)
    assert matched_statistics(summed, unrolled(summed)) is None


@pytest.mark.parametrize("attack", ["ig_multi", "sme", "dlg"])
def test_statistics_of_several_steps_bring_an_attack_nearer(attack: str) -> None:
    """To the statistics themselves: how much nearer to the images is measured in docs/results.md."""
    truth, observation = after_five_steps()
    statistics = matched_statistics(observation, unrolled(observation))
    assert statistics is not None
    matcher, misfits = statistics.matcher(unrolled), []
    for weight in (0.0, 1.0):
        chosen = ATTACKS[attack](iterations=40, statistics_weight=weight)
        found = chosen.reconstruct(observation, torch.Generator().manual_seed(0))
        matcher.simulate(found.examples, truth.labels)
        misfits.append(statistics.misfit(statistics.moments(several_steps=True)).item())
    assert misfits[1] < 0.7 * misfits[0]


@pytest.mark.parametrize("attack", ["ig_single", "ig_multi", "sme", "dlg"])
@pytest.mark.parametrize("steps", [1, 3])
def test_layers_that_users_write_do_not_stop_an_attack(attack: str, steps: int) -> None:
    """A BatchNorm layer that is shared, one that is called by keyword, and one that is never called."""
    net = external.load(f"{STRANGERS}:Norms", (3, 8, 8), 5)
    truth = Batch(smooth_pictures(2, 8, seed=2), torch.tensor([0, 3]))
    recipe = Recipe(2, local_epochs=steps, lr=0.05, model_mode="train")
    update, _ = train(net, truth, TASK, recipe, torch.Generator().manual_seed(0))
    assert [entry.layer for entry in batch_statistics(net, update.buffers) if entry.steps == steps] == ["by_name"]
    observation = Observation(TASK, recipe, net, update, granted={"labels": truth.labels})
    found = ATTACKS[attack](iterations=3).reconstruct(observation, torch.Generator().manual_seed(0))
    assert found.examples.isfinite().all()
