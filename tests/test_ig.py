"""Inverting Gradients, SME and DLF: objectives at the truth, schedule, memory, and images that are recovered."""

import gc
import math
import statistics
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from attacks import ATTACKS
from attacks.dlf import EpochObjective, consensus
from attacks.matching.distances import cosine_distance
from attacks.matching.matcher import GradientMatcher
from attacks.matching.runs import Run
from attacks.matching.signed_inversion import MatchingObjective
from attacks.matching.surrogate import Surrogate
from attacks.optim.adam import Adam
from core.protocol import Batch, Observation, Recipe, Reconstruction, image_task
from evaluation.metrics import psnr
from evaluation.pairing import pair
from federated.client import gradient, train
from models import MetaModel, build
from tests.test_attacks import smooth_pictures

TASK = image_task((3, 16, 16), 6)
SEEDS = range(3)  # scores are medians over networks and pictures, so that one bad descent does not decide


def observe(n: int, recipe: Recipe | None = None, double: bool = False, seed: int = 0) -> tuple[Batch, Observation]:
    """Pictures with labels 0, 1, ... and their update by a small ReLU network; a gradient unless there is a recipe."""
    rng = torch.Generator().manual_seed(seed)
    net = build("cnn", TASK.domain.shape, TASK.num_classes, rng=rng)
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


def score(truth: Batch, images: Tensor) -> float:
    """Mean PSNR after pairing."""
    indices = pair(truth.examples, images)
    return statistics.fmean(psnr(x, images[j]) for x, j in zip(truth.examples, indices, strict=True))


def gain_and_score(truth: Batch, observation: Observation, rec: Reconstruction) -> tuple[float, float]:
    """PSNR above that of the mean public image, and PSNR."""
    assert observation.public is not None
    mean = observation.public.examples.mean(0)
    found = score(truth, rec.examples)
    return found - statistics.fmean(psnr(x, mean) for x in truth.examples), found


def objective_of(name: str, observation: Observation) -> tuple[MatchingObjective, Tensor, int]:
    """The objective, labels and copies of the batch that an attack's `reconstruct` starts its descent with."""
    captured: list[tuple[MatchingObjective, Tensor, int]] = []

    class Capture(ATTACKS[name]):  # type: ignore[misc]
        def descend(
            self, objective: MatchingObjective, labels: Tensor, rng: torch.Generator, copies: int = 1
        ) -> list[Run]:
            captured.append((objective, labels, copies))
            return super().descend(objective, labels, rng, copies)

    Capture(iterations=1).reconstruct(observation, torch.Generator().manual_seed(0))
    return captured[0]


@pytest.mark.parametrize("steps", [0, 1, 5])
def test_cosine_distance_and_its_gradient_vanish_at_the_truth(steps: int) -> None:
    truth, observation = observe(2, Recipe(2, steps, lr=0.05) if steps else None, double=True)
    matcher, examples = GradientMatcher(observation), truth.examples.clone().requires_grad_()
    loss = matcher.cosine_distance(examples, truth.labels)
    (grad,) = torch.autograd.grad(loss, examples)
    assert abs(loss) < 1e-12
    assert grad.abs().max() < 1e-8
    assert matcher.cosine_distance(1 - truth.examples, truth.labels) > 1e-3


def test_cosine_distance_is_of_all_layers_as_one_vector() -> None:
    a, b = [torch.tensor([3.0]), torch.tensor([[0.0, 4.0]])], [torch.tensor([1.0]), torch.tensor([[0.0, 0.0]])]
    assert cosine_distance(a, b).item() == pytest.approx(1 - 3 / 5)
    assert cosine_distance([5 * t for t in a], b).item() == pytest.approx(1 - 3 / 5)


def test_step_size_falls_at_three_five_and_seven_eighths(monkeypatch: pytest.MonkeyPatch) -> None:
    observed: list[float] = []

    class Spy(Adam):
        def step(self, grads: Sequence[Tensor | None], rates: Sequence[float]) -> None:
            observed.append(rates[0])
            super().step(grads, rates)

    monkeypatch.setattr("attacks.matching.signed_inversion.Adam", Spy)
    _, observation = observe(1)
    ATTACKS["ig_single"](iterations=16, patience=0, feature_weight=0).reconstruct(
        observation, torch.Generator().manual_seed(0)
    )
    assert observed == pytest.approx([0.1] * 6 + [0.01] * 4 + [0.001] * 4 + [0.0001] * 2)


def test_a_plateau_ends_the_run_early() -> None:
    """Steps too small for any improvement: each of the four phases waits, and the budget is not spent."""
    _, observation = observe(1)
    attack = ATTACKS["ig_single"](iterations=100_000, patience=3, lr=1e-12, feature_weight=0)
    assert attack.reconstruct(observation, torch.Generator()).iterations <= 4 * 5


def test_the_regularizers_share_does_not_depend_on_the_size_of_the_matching_gradient() -> None:
    attack, regularizer = ATTACKS["ig_single"](tv=0.5), TASK.domain.regularizer
    x = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    total = attack.with_regularizer(x, grad, regularizer)
    assert torch.allclose(attack.with_regularizer(x, 1e-6 * grad, regularizer), 1e-6 * total, rtol=1e-4)
    of_regularizer = (total - grad).abs().flatten(1).mean(1)
    assert torch.allclose(of_regularizer, 0.5 * grad.abs().flatten(1).mean(1), rtol=1e-4)


@pytest.mark.parametrize("name", ["ig_single", "dlf"])
def test_one_image_is_recovered_far_better_than_by_the_mean_image(name: str) -> None:
    gains, scores = [], []
    for seed in SEEDS:
        truth, observation = observe(1, seed=seed)
        rec = ATTACKS[name](iterations=100).reconstruct(observation, torch.Generator().manual_seed(0))
        assert rec.labels is not None
        assert rec.labels.tolist() == truth.labels.tolist()
        gain, found = gain_and_score(truth, observation, rec)
        gains.append(gain)
        scores.append(found)
    assert statistics.median(scores) > 20
    assert statistics.median(gains) > 5


def test_for_a_gradient_all_forms_are_the_same_attack() -> None:
    _, observation = observe(2)
    first, *others = (
        ATTACKS[name](iterations=5).reconstruct(observation, torch.Generator().manual_seed(0)).examples
        for name in ("ig_single", "ig_weight", "ig_multi", "sme")
    )
    assert all(torch.equal(first, other) for other in others)


def test_for_one_local_step_every_form_has_its_minimum_at_the_truth() -> None:
    truth, observation = observe(2, Recipe(2, 1, lr=0.1), double=True)
    for name in ("ig_single", "ig_weight", "ig_multi"):
        loss = ATTACKS[name]().matcher(observation).cosine_distance(truth.examples, truth.labels)
        assert abs(loss) < 1e-12


@pytest.mark.parametrize("name", ["ig_multi", "sme"])
def test_many_local_steps_are_inverted(name: str) -> None:
    """Four steps on one picture: through all of them, or by one surrogate between the two models."""
    gains, scores = [], []
    for seed in SEEDS:
        truth, observation = observe(1, Recipe(1, 4, lr=0.005), seed=seed)
        rec = ATTACKS[name](iterations=80).reconstruct(observation, torch.Generator().manual_seed(0))
        gain, found = gain_and_score(truth, observation, rec)
        gains.append(gain)
        scores.append(found)
    assert statistics.median(scores) > 18
    assert statistics.median(gains) > 5


def test_a_surrogate_corrected_at_the_truth_gives_the_observed_update_there() -> None:
    """No point on the straight line explains twelve steps; corrected at the truth, every point does."""
    truth, observation = observe(2, Recipe(2, 12, lr=0.01), double=True)
    surrogate, _, _ = objective_of("sme", observation)
    assert isinstance(surrogate, Surrogate)
    surrogate.labels = truth.labels
    inputs = TASK.domain.to_model(truth.examples)
    before, after = [], []
    for alpha in torch.linspace(0, 1, 11).double():
        surrogate.start()
        before.append(surrogate.distance(truth.examples, truth.labels, alpha).item())
        surrogate.correct(inputs, alpha)
        after.append(surrogate.distance(truth.examples, truth.labels, alpha).item())
    assert min(before) > 0.01
    assert max(after) < 1e-12


def test_corrections_improve_the_surrogate() -> None:
    scores: dict[int, list[float]] = {5: [], 0: []}
    for seed in SEEDS:
        truth, observation = observe(1, Recipe(1, 12, lr=0.02), seed=seed)
        for interval, found in scores.items():
            attack = ATTACKS["sme"](iterations=80, correction_interval=interval)
            rec = attack.reconstruct(observation, torch.Generator().manual_seed(0))
            found.append(score(truth, rec.examples))
    assert statistics.median(a - b for a, b in zip(scores[5], scores[0], strict=True)) > 3


def test_dlf_puts_epochs_in_one_order_before_it_averages_them() -> None:
    images = smooth_pictures(4, 8, seed=1)
    epochs = torch.stack([images, images[[2, 0, 3, 1]], images[[1, 0, 2, 3]]])
    assert torch.allclose(consensus(epochs), images)


def test_dlfs_order_prior_ignores_the_order_and_not_the_content() -> None:
    """At the truth, in any order for each epoch, the objective of full-batch epochs is zero; elsewhere it is not."""
    truth, observation = observe(3, Recipe(3, 2, lr=0.05), double=True)
    objective, _, copies = objective_of("dlf", observation)
    assert isinstance(objective, EpochObjective)
    assert copies == 2
    x, y, order = *truth, [2, 0, 1]
    labels = torch.cat([y, y[order]])
    assert objective.distance(torch.cat([x, x[order]]), labels) < 1e-12
    assert objective.distance(torch.cat([x, 1 - x[order]]), labels) > 0.1


@pytest.mark.parametrize(("momentum", "weight_decay"), [(0.0, 0.0), (0.9, 0.01)])
def test_unrolling_with_checkpoints_has_the_same_values_and_gradients(momentum: float, weight_decay: float) -> None:
    truth, observation = observe(3, double=True)
    meta, batches = MetaModel(observation.model), Recipe(2, 3).batches(3)
    x, soft = truth.examples.clone().requires_grad_(), torch.eye(6).double()[truth.labels].requires_grad_()
    results = []
    for checkpoint in (False, True):
        delta = meta.sgd(x, soft, batches, 0.1, momentum, weight_decay, checkpoint=checkpoint)
        results.append([*delta, *torch.autograd.grad(sum(d.pow(3).sum() for d in delta), [x, soft])])
    for plain, recomputed in zip(*results, strict=True):
        assert torch.allclose(plain, recomputed, atol=1e-12)


def test_small_learning_rates_lose_no_digits_in_simulation() -> None:
    """A client's subtraction of weights loses digits; the attacker's simulation sums the steps and does not."""
    truth, observation = observe(2)
    batches = Recipe(2, 5).batches(2)
    expected = MetaModel(observation.model.double()).sgd(truth.examples.double(), truth.labels, batches, 1e-4)
    simulated = MetaModel(observation.model.float()).sgd(truth.examples, truth.labels, batches, 1e-4)
    error = math.sqrt(sum((a - b).square().sum().item() for a, b in zip(simulated, expected, strict=True)))
    size = math.sqrt(sum(b.square().sum().item() for b in expected))
    assert error < 1e-5 * size


def test_memory_of_unrolling_does_not_grow_with_iterations() -> None:
    """As many tensors are alive after ten iterations as after three."""
    truth, observation = observe(2, Recipe(1, 4, lr=0.05))
    matcher = GradientMatcher(observation, "unrolled")
    x = truth.examples.clone().requires_grad_()
    counts = []
    gc.disable()  # the collector would hide a reference cycle
    try:
        for iteration in range(10):
            torch.autograd.grad(matcher.cosine_distance(x, truth.labels), [x])
            if iteration in (2, 9):
                counts.append(sum(1 for o in gc.get_objects() if type(o) is torch.Tensor))
    finally:
        gc.enable()
    assert counts[1] <= counts[0]
