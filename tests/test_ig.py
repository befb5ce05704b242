"""Inverting Gradients and its successors: the objective at the truth, schedule, memory, pictures that come back."""

import gc
import math
from collections.abc import Sequence

import pytest
import torch

from attacks import common
from attacks.base import REGISTRY, discover
from attacks.common import Matching, cosine_distance
from attacks.dlf import consensus
from federated.client import gradient, train
from federated.wire import Batch, Observation, Recipe, Task
from models import MetaModel, build
from tests.test_attacks import smooth_pictures
from utils.evaluator import match, psnr

discover()
TASK = Task((3, 16, 16), 6, (0.0,) * 3, (1.0,) * 3)


def scene(n: int, recipe: Recipe | None = None, double: bool = False, seed: int = 0) -> tuple[Batch, Observation]:
    """A small ReLU net's update on pictures with labels of their own; a gradient unless there is a recipe."""
    rng = torch.Generator().manual_seed(seed)
    net = build("cnn", TASK.image_shape, TASK.num_classes, rng=rng)
    pictures = smooth_pictures(n + 32, 16, seed=seed + 3)
    if double:
        net, pictures = net.double(), pictures.double()
    truth = Batch(pictures[:n], torch.arange(n) % TASK.num_classes)
    public = Batch(pictures[n:], torch.arange(32) % TASK.num_classes)
    if recipe is None:
        recipe = Recipe(n)
        update = gradient(net, truth, TASK, recipe, rng)
    else:
        update, _ = train(net, truth, TASK, recipe, rng)
    return truth, Observation(TASK, recipe, net, update, public)


def score(truth: Batch, images: torch.Tensor) -> float:
    pairs = match(truth.images, images)
    return sum(psnr(x, images[j]) for x, j in zip(truth.images, pairs, strict=True)) / len(pairs)


def baseline(truth: Batch, seen: Observation) -> float:
    return sum(psnr(x, seen.public.images.mean(0)) for x in truth.images) / len(truth.images)


@pytest.mark.parametrize("steps", [0, 1, 5])
def test_cosine_distance_and_its_slope_vanish_at_the_truth(steps: int) -> None:
    truth, seen = scene(2, Recipe(2, steps, lr=0.05) if steps else None, double=True)
    images = truth.images.clone().requires_grad_()
    loss = Matching(seen).cosine_distance(images, truth.labels)
    (slope,) = torch.autograd.grad(loss, images)
    assert abs(loss) < 1e-12
    assert slope.abs().max() < 1e-8
    assert Matching(seen).cosine_distance(1 - truth.images, truth.labels) > 1e-3


def test_cosine_distance_is_of_all_layers_as_one_vector() -> None:
    a, b = [torch.tensor([3.0]), torch.tensor([[0.0, 4.0]])], [torch.tensor([1.0]), torch.tensor([[0.0, 0.0]])]
    assert cosine_distance(a, b).item() == pytest.approx(1 - 3 / 5)
    assert cosine_distance([5 * t for t in a], b).item() == pytest.approx(1 - 3 / 5)


def test_step_size_falls_at_three_five_and_seven_eighths(monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[float] = []

    class Spy(common.Adam):
        def step(self, slopes: Sequence[torch.Tensor], lr: Sequence[float]) -> None:
            rates.append(lr[0])
            super().step(slopes, lr)

    monkeypatch.setattr(common, "Adam", Spy)
    _, seen = scene(1)
    REGISTRY["ig_single"](iterations=16, patience=0).reconstruct(seen, torch.Generator().manual_seed(0))
    assert rates == pytest.approx([0.1] * 6 + [0.01] * 4 + [0.001] * 4 + [0.0001] * 2)


def test_a_plateau_ends_the_run_early() -> None:
    """Steps too small to gain anything: each of the four stages waits, and the budget is not spent."""
    _, seen = scene(1)
    rec = REGISTRY["ig_single"](iterations=100_000, patience=3, lr=1e-12).reconstruct(seen, torch.Generator())
    assert rec.iterations <= 4 * 5


def test_prior_weighs_the_same_whatever_the_matching_slope() -> None:
    attack = REGISTRY["ig_single"](tv=0.5)
    x = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    slope = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    blend = attack._with_prior(x, slope)
    assert torch.allclose(attack._with_prior(x, 1e-6 * slope), 1e-6 * blend, rtol=1e-4)
    prior = (blend - slope).abs().flatten(1).mean(1)
    assert torch.allclose(prior, 0.5 * slope.abs().flatten(1).mean(1), rtol=1e-4)


@pytest.mark.parametrize("name", ["ig_single", "dlf"])
def test_one_picture_comes_back_and_beats_the_mean_image(name: str) -> None:
    truth, seen = scene(1)
    rec = REGISTRY[name](iterations=100).reconstruct(seen, torch.Generator().manual_seed(0))
    assert rec.labels is not None
    assert rec.labels.tolist() == truth.labels.tolist()
    assert score(truth, rec.images) > max(20, baseline(truth, seen) + 5)


def test_in_gradient_mode_all_forms_are_the_same_attack() -> None:
    _, seen = scene(2)
    first, *others = (
        REGISTRY[name](iterations=5).reconstruct(seen, torch.Generator().manual_seed(0)).images
        for name in ("ig_single", "ig_weight", "ig_multi", "sme")
    )
    assert all(torch.equal(first, other) for other in others)


def test_one_local_step_is_the_gradient_to_every_form() -> None:
    truth, seen = scene(2, Recipe(2, 1, lr=0.1), double=True)
    for name in ("ig_single", "ig_weight", "ig_multi"):
        loss = REGISTRY[name]().read(seen).cosine_distance(truth.images, truth.labels)
        assert abs(loss) < 1e-12


@pytest.mark.parametrize("name", ["ig_multi", "sme"])
def test_many_local_steps_are_inverted(name: str) -> None:
    """Four steps on one picture: through all of them, or from one surrogate between the two models."""
    truth, seen = scene(1, Recipe(1, 4, lr=0.005))
    rec = REGISTRY[name](iterations=80).reconstruct(seen, torch.Generator().manual_seed(0))
    assert score(truth, rec.images) > max(18, baseline(truth, seen) + 5)


def test_a_corrected_surrogate_says_at_the_truth_what_the_client_sent() -> None:
    """After twelve steps no point on the straight line explains the update; corrected at the truth, any does."""
    truth, seen = scene(2, Recipe(2, 12, lr=0.01), double=True)
    before, after = [], []

    class Look(REGISTRY["sme"]):  # type: ignore[misc]
        def descend(self, match, labels, rng, cost, **more):  # type: ignore[no-untyped-def]
            for alpha in torch.linspace(0, 1, 11).double():
                more["correct"](None, truth.labels)
                before.append(cost(truth.images, truth.labels, alpha).item())
                more["correct"](truth.images, truth.labels, alpha)
                after.append(cost(truth.images, truth.labels, alpha).item())
            return super().descend(match, labels, rng, cost, **more)

    Look(iterations=1).reconstruct(seen, torch.Generator().manual_seed(0))
    assert min(before) > 0.01
    assert max(after) < 1e-12


def test_corrections_bring_the_surrogate_nearer() -> None:
    truth, seen = scene(1, Recipe(1, 12, lr=0.02))
    corrected, published = (
        REGISTRY["sme"](iterations=80, correct=every).reconstruct(seen, torch.Generator().manual_seed(0))
        for every in (5, 0)
    )
    assert score(truth, corrected.images) > score(truth, published.images) + 3


def test_epochs_of_dlf_are_put_in_one_order_before_they_are_averaged() -> None:
    images = smooth_pictures(4, 8, seed=1)
    epochs = torch.stack([images, images[[2, 0, 3, 1]], images[[1, 0, 2, 3]]])
    assert torch.allclose(consensus(epochs), images)


def test_order_prior_of_dlf_is_blind_to_order_and_not_to_content() -> None:
    """At the truth, in any order for each epoch, the objective of full-batch epochs is zero; elsewhere it is not."""
    truth, seen = scene(3, Recipe(3, 2, lr=0.05), double=True)
    costs: list[torch.Tensor] = []

    class Look(REGISTRY["dlf"]):  # type: ignore[misc]
        def descend(self, match, labels, rng, cost, copies):  # type: ignore[no-untyped-def]
            order = torch.tensor([int((truth.labels == y).nonzero()) for y in labels])
            x = truth.images[order]
            y = labels.repeat(2)
            costs.extend([cost(torch.cat([x, x]), y), cost(torch.cat([x, 1 - x]), y)])
            return super().descend(match, labels, rng, cost, copies)

    Look(iterations=1).reconstruct(seen, torch.Generator().manual_seed(0))
    assert costs[0] < 1e-12
    assert costs[1] > 0.1


@pytest.mark.parametrize(("momentum", "weight_decay"), [(0.0, 0.0), (0.9, 0.01)])
def test_a_checkpointed_unroll_has_the_same_values_and_slopes(momentum: float, weight_decay: float) -> None:
    truth, seen = scene(3, double=True)
    meta, batches = MetaModel(seen.model), Recipe(2, 3).batches(3)
    x, soft = truth.images.clone().requires_grad_(), torch.eye(6).double()[truth.labels].requires_grad_()
    found = []
    for checkpoint in (False, True):
        delta = meta.sgd(x, soft, batches, 0.1, momentum, weight_decay, checkpoint=checkpoint)
        found.append([*delta, *torch.autograd.grad(sum(d.pow(3).sum() for d in delta), [x, soft])])
    for plain, kept in zip(*found, strict=True):
        assert torch.allclose(plain, kept, atol=1e-12)


def test_small_learning_rates_keep_their_digits() -> None:
    """What the client subtracts is lost on the wire; what the attacker simulates need not be."""
    truth, seen = scene(2)
    exact = MetaModel(seen.model.double())
    batches = Recipe(2, 5).batches(2)
    wanted = exact.sgd(truth.images.double(), truth.labels, batches, 1e-4)
    found = MetaModel(seen.model.float()).sgd(truth.images, truth.labels, batches, 1e-4)
    error = math.sqrt(sum((a - b).square().sum().item() for a, b in zip(found, wanted, strict=True)))
    size = math.sqrt(sum(b.square().sum().item() for b in wanted))
    assert error < 1e-5 * size


def test_memory_of_an_unroll_does_not_grow_with_iterations() -> None:
    """Tensors alive after three iterations are alive after ten, and no more."""
    truth, seen = scene(2, Recipe(1, 4, lr=0.05))
    reading = Matching(seen, "unrolled")
    x = truth.images.clone().requires_grad_()
    counts = []
    gc.disable()  # a cycle would hide behind the collector
    try:
        for iteration in range(10):
            torch.autograd.grad(reading.cosine_distance(x, truth.labels), [x])
            if iteration in (2, 9):
                counts.append(sum(1 for o in gc.get_objects() if type(o) is torch.Tensor))
    finally:
        gc.enable()
    assert counts[1] <= counts[0]
