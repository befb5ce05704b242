"""`--paper` is the paper: the attack with the authors' values equals the plain loop of its equations, step by step.

All in float64, so that two orders of the same sums agree to many digits over the steps compared.
"""

import copy
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attacks import ATTACKS, Attack
from attacks.optim.tracker import Tracker, tracking
from core.hyperparameters import paper_values
from core.protocol import Batch, Observation, Recipe, Update, by_name, image_task
from experiments.bench import reference
from models import build

TASK = image_task((3, 12, 12), 4)
STEPS = 12
SEED = 7
BATCHES = [torch.tensor([0, 1]), torch.tensor([2]), torch.tensor([0, 1]), torch.tensor([2])]


@pytest.fixture(autouse=True)
def _float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def batch(n: int, seed: int = 1) -> Batch:
    rng = torch.Generator().manual_seed(seed)
    return Batch(torch.rand(n, *TASK.domain.shape, generator=rng), torch.arange(n) % TASK.num_classes)


def network(name: str) -> nn.Module:
    return build(name, TASK.domain.shape, TASK.num_classes, rng=torch.Generator().manual_seed(3)).double()


def paper(name: str, **changes: Any) -> Attack:
    """The attack with the authors' values, but for budgets."""
    return dataclasses.replace(paper_values(ATTACKS[name]), **changes)  # type: ignore[type-var]


def iterates(attack: Attack, model: nn.Module, tensors: Sequence[Tensor], truth: Batch, **more: Any) -> list[Tensor]:
    """The first variable before each step of the attack, with granted labels."""
    steps: list[Tensor] = []
    update = Update(more.pop("kind", "gradient"), by_name(model, [t.detach() for t in tensors]), len(truth.labels))
    recipe = more.pop("recipe", Recipe(len(truth.labels)))
    observation = Observation(TASK, recipe, model, update, granted={"labels": truth.labels}, **more)
    with tracking(Tracker(on_step=lambda variables: steps.append(variables[0].detach().clone()))):
        attack.reconstruct(observation, torch.Generator().manual_seed(SEED))
    return steps


def start(n: int) -> Tensor:
    return torch.randn(n, *TASK.domain.shape, generator=torch.Generator().manual_seed(SEED))


def after(loop: Iterator[Tensor], steps: int) -> list[Tensor]:
    """What a plain loop yields, which it changes in place."""
    return [value.clone() for value in islice(loop, steps)]


def assert_equal(ours: Sequence[Tensor], theirs: Sequence[Tensor], tolerance: float = 1e-9) -> None:
    """`ours` are variables before each step, `theirs` after each step."""
    for step, (a, b) in enumerate(zip(ours[1:], theirs, strict=False)):
        assert (a - b).abs().max() < tolerance * b.abs().max(), f"step {step}"
    assert len(ours) > 3
    assert not ours[-1].equal(ours[0])


@pytest.mark.parametrize("name", ["dlg", "idlg"])
def test_dlg_and_idlg(name: str) -> None:
    """A step is 20 iterations of L-BFGS."""
    model, truth = network("lenet"), batch(1)
    target = [g.detach() for g in reference.gradient(model, *truth)]
    attack = paper(name, iterations=60)
    steps: list[Tensor] = []
    granted = {"labels": truth.labels} if name == "idlg" else {}
    observation = Observation(TASK, Recipe(1), model, Update("gradient", by_name(model, target), 1), granted=granted)
    with tracking(Tracker(on_step=lambda variables: steps.append(variables[0].detach().clone()))):
        attack.reconstruct(observation, torch.Generator().manual_seed(SEED))
    rng = torch.Generator().manual_seed(SEED)
    if name == "dlg":  # logits are drawn first
        logits = torch.randn(1, TASK.num_classes, generator=rng)
        loop = reference.dlg(model, target, torch.randn(1, *TASK.domain.shape, generator=rng), logits)
    else:
        loop = reference.dlg(model, target, torch.randn(1, *TASK.domain.shape, generator=rng), truth.labels)
    theirs = after(loop, 3)
    assert len(steps) == 3
    for a, b in zip(steps, theirs, strict=True):  # after the step: L-BFGS moves while it evaluates
        assert (a - b).abs().max() < 1e-8 * b.abs().max()


def ig_case(name: str) -> tuple[nn.Module, Batch, Callable[[Tensor], Sequence[Tensor]], dict[str, Any]]:
    """A model, its client's batch, the update of given images, and the rest of the observation."""
    model, truth = network("cnn"), batch(1 if name != "ig_multi" else 3)
    if name == "ig_single":
        return model, truth, lambda x: reference.gradient(model, x, truth.labels), {}
    batches = [torch.tensor([0])] * 3 if name == "ig_weight" else BATCHES
    recipe = Recipe(1 if name == "ig_weight" else 2, 3 if name == "ig_weight" else 2, lr=0.01)
    return (
        model,
        truth,
        lambda x: reference.fedavg(model, x, truth.labels, batches, 0.01),
        {"kind": "delta", "recipe": recipe},
    )


@pytest.mark.parametrize("name", ["ig_single", "ig_weight", "ig_multi"])
def test_inverting_gradients(name: str) -> None:
    model, truth, simulate, more = ig_case(name)
    target = [t.detach() for t in simulate(truth.examples)]
    attack = paper(name, iterations=STEPS, restarts=1)
    published = paper_values(ATTACKS[name])
    ours = iterates(attack, model, target, truth, **more)
    first = start(len(truth.labels)).clamp(0, 1)
    loop = reference.ig(simulate, target, first, STEPS, published.lr, published.tv)
    assert len(ours) == STEPS
    assert_equal(ours, after(loop, STEPS))


def test_surrogate_model_extension() -> None:
    model, truth = network("cnn"), batch(3)
    delta = [t.detach() for t in reference.fedavg(model, *truth, BATCHES, 0.01)]
    published = paper_values(ATTACKS["sme"])
    ours = iterates(paper("sme", iterations=STEPS), model, delta, truth, kind="delta", recipe=Recipe(2, 2, lr=0.01))
    rates = {"lr": published.lr, "alpha_lr": published.alpha_lr, "tv": published.tv}
    loop = reference.sme(model, delta, start(3).clamp(0, 1), truth.labels, STEPS, **rates)
    assert_equal(ours, after(loop, STEPS))


def test_generative_gradient_leakage() -> None:
    model, truth, public = network("cnn"), batch(1), batch(40, seed=5)
    target = [g.detach() for g in reference.gradient(model, *truth)]
    attack = paper("ggl", iterations=STEPS, latent_dim=6)
    generator = attack.build_generator(public, TASK.num_classes)
    ours = iterates(attack, model, target, truth, public=public)
    z = torch.randn(1, 6, generator=torch.Generator().manual_seed(SEED))
    loop = reference.ggl(model, target, lambda z: generator.decode(z, truth.labels), z, truth.labels, STEPS)
    assert_equal(ours, after(loop, STEPS))


def test_generative_image_prior(monkeypatch: pytest.MonkeyPatch) -> None:
    """The attack's own generator, small and untrained."""
    model, truth, public = network("cnn"), batch(1), batch(40, seed=5)
    target = [g.detach() for g in reference.gradient(model, *truth)]
    generator = Decoder()
    attack = paper("gias", iterations=STEPS, weight_iterations=STEPS, restarts=1, latent_dim=6)
    monkeypatch.setattr(type(attack), "build_generator", lambda *_: generator)
    ours = iterates(attack, model, target, truth, public=public)
    z = torch.randn(1, 6, generator=torch.Generator().manual_seed(SEED))
    loop = after(reference.gias(model, target, copy.deepcopy(generator), z, truth.labels, STEPS, STEPS), 2 * STEPS)
    assert_equal(ours[:STEPS], loop[:STEPS])
    assert_equal(ours[STEPS:], loop[STEPS:])


class Decoder(nn.Module):
    """A generator of one layer."""

    latent_dim = 6

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(432, 6, generator=torch.Generator().manual_seed(0)))

    def decode(self, z: Tensor, labels: Tensor) -> Tensor:
        return (z @ self.weight.T).sigmoid().view(-1, *TASK.domain.shape)


def test_cocktail_party() -> None:
    model, truth, public = network("fc2"), batch(4), batch(64, seed=5)
    target = [g.detach() for g in reference.gradient(model, *truth)]
    attack = paper("cpa", iterations=STEPS)
    update = Update("gradient", by_name(model, target), 4)
    observation = Observation(TASK, Recipe(4), model, update, public, {"labels": truth.labels})
    trace = attack.reconstruct(observation, torch.Generator().manual_seed(SEED)).trace
    loop = reference.cpa(target[0], TASK.domain.shape, 4)
    assert len(trace) == STEPS
    assert list(trace) == pytest.approx([value for _, value in islice(loop, STEPS)], rel=1e-6)


def test_robbing_the_fed() -> None:
    """The published decoder loses the images above the last threshold; ours returns the others and those."""
    public, truth = batch(200, seed=5), batch(4)
    truth = Batch(truth.examples * torch.tensor([0.2, 0.5, 0.9, 1.4]).view(-1, 1, 1, 1), truth.labels)
    attack = paper("rtf")
    model = attack.implant(network("cnn"), TASK, public, Recipe(4)).double()
    target = [g.detach() for g in reference.gradient(model, *truth)]
    observation = Observation(TASK, Recipe(4), model, Update("gradient", by_name(model, target), 4), public)
    ours = attack.reconstruct(observation, torch.Generator().manual_seed(SEED)).examples
    (theirs,) = reference.rtf(target[0], target[1], TASK.domain.shape)
    found = torch.cdist(theirs.flatten(1), ours.double().flatten(1)).min(1).values
    exact = torch.cdist(theirs.flatten(1), truth.examples.flatten(1)).min(1).values < 1e-6
    assert exact.any()
    assert (found[exact] < 1e-4).all()
