"""Label rules: each where its paper claims exactness, and the recommended one after real local training."""

import dataclasses
import statistics

import pytest
import torch

from attacks.labels import counts
from attacks.labels.head import proven_labels
from attacks.labels.inference import infer_labels
from attacks.labels.registry import RULES
from attacks.labels.rules import round_counts
from attacks.matching.matcher import GradientMatcher
from core.protocol import Batch, Observation, Recipe, image_task
from federated.client import gradient, train
from models import build
from tests.test_attacks import smooth_pictures


def observe(
    classes: int,
    labels: torch.Tensor,
    recipe: Recipe | None,
    activation: str,
    seed: int,
    as_gradient: bool = False,
    head_scale: float = 1,
) -> Observation:
    """The update of a client with these labels; a gradient if there is no recipe, or if asked for."""
    task = image_task((3, 12, 12), classes)
    rng = torch.Generator().manual_seed(seed)
    net = build("cnn", task.domain.shape, classes, activation=activation, rng=rng)
    with torch.no_grad():
        net.head.weight.mul_(head_scale)
    truth = Batch(smooth_pictures(len(labels), 12, seed), labels)
    public = Batch(smooth_pictures(64, 12, seed + 1000), torch.zeros(64, dtype=torch.int64))
    if recipe is None or as_gradient:
        recipe = recipe or Recipe(len(labels))
        update = gradient(net, truth, task, recipe, rng)
    else:
        update, _ = train(net, truth, task, recipe, rng)
    return Observation(task, recipe, net, update, public)


def accuracy(name: str, observation: Observation, labels: torch.Tensor) -> float:
    """The share of the labels that a rule infers, as multisets."""
    inferred = RULES[name](GradientMatcher(observation, "single_step").mean_gradient, observation)
    present = (torch.bincount(y, minlength=observation.task.num_classes) for y in (inferred, labels))
    return torch.minimum(*present).sum().item() / len(labels)


@pytest.mark.parametrize("name", sorted(RULES))
def test_every_rule_infers_the_label_of_one_image(name: str) -> None:
    for y in range(5):
        labels = torch.tensor([y])
        assert accuracy(name, observe(5, labels, None, "relu", seed=y), labels) == 1


@pytest.mark.parametrize("name", sorted(RULES))
def test_every_rule_but_two_infers_labels_that_do_not_repeat(name: str) -> None:
    labels = torch.arange(0, 40, 5)
    least = 0.5 if name in ("GDL", "DLF") else 1.0  # noise inputs have another sum of features than pictures
    assert accuracy(name, observe(40, labels, None, "relu", seed=1), labels) >= least


@pytest.mark.parametrize(
    ("activation", "classes", "n", "batch", "epochs", "lr"),
    [
        ("relu", 10, 30, 10, 5, 0.1),
        ("relu", 100, 30, 30, 1, 0.1),
        ("relu", 10, 8, 2, 3, 0.05),
        ("sigmoid", 10, 8, 2, 3, 0.001),
        ("sigmoid", 100, 30, 30, 1, 0.1),
    ],
)
def test_bias_counts_survive_local_training(
    activation: str, classes: int, n: int, batch: int, epochs: int, lr: float
) -> None:
    hits = []
    for seed in range(2):
        labels = torch.randint(classes, (n,), generator=torch.Generator().manual_seed(seed))
        observation = observe(classes, labels, Recipe(batch, epochs, lr), activation, seed)
        hits.append(accuracy("bias counts", observation, labels))
    assert statistics.fmean(hits) >= 0.98


@pytest.mark.parametrize(("optimizer", "lr", "activation"), [("adam", 0.001, "relu"), ("sgd", 0.1, "sigmoid")])
def test_simulated_clients_improve_counts(
    optimizer: str, lr: float, activation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where local steps leave the straight line, or Adam hides sizes."""
    means = []
    for shares in ((), counts.RESAMPLE_SHARES):
        monkeypatch.setattr(counts, "RESAMPLE_SHARES", shares)
        hits = []
        for seed in range(3):
            labels = torch.randint(10, (20,), generator=torch.Generator().manual_seed(seed))
            observation = observe(10, labels, Recipe(5, 3, lr, optimizer=optimizer), activation, seed)  # type: ignore[arg-type]
            hits.append(accuracy("bias counts", observation, labels))
        means.append(statistics.fmean(hits))
    without, with_simulation = means
    assert with_simulation > 0.8
    assert with_simulation > without + 0.1


def test_simulated_clients_apply_the_defense() -> None:
    """An attacker who does not know that the client clips misses labels; one who does infers them all."""
    hits, without = [], []
    for seed in range(1, 4):
        labels = torch.randint(10, (20,), generator=torch.Generator().manual_seed(seed))
        observation = observe(10, labels, Recipe(5, 3, 0.05, defense="clip(bound=0.01)"), "relu", seed)
        hits.append(accuracy("bias counts", observation, labels))
        undefended = dataclasses.replace(observation, recipe=Recipe(5, 3, 0.05))
        without.append(accuracy("bias counts", undefended, labels))
    assert statistics.median(hits) >= 0.9
    assert statistics.median(hits) > statistics.median(without)


@pytest.mark.parametrize("recipe", [None, Recipe(32, lr=0.05)])
def test_counts_do_not_depend_on_the_scale_of_a_clipped_gradient(recipe: Recipe | None) -> None:
    """All classes occur, so no class tells the scale by its absence. Without knowledge of the clip counts are wrong."""
    hits, without = [], []
    for seed in range(3):
        labels = torch.randint(6, (32,), generator=torch.Generator().manual_seed(seed))
        clipped = dataclasses.replace(recipe or Recipe(32), defense="clip(bound=0.01)")
        observation = observe(6, labels, clipped, "relu", seed, as_gradient=recipe is None)
        hits.append(accuracy("bias counts", observation, labels))
        undefended = dataclasses.replace(observation, recipe=recipe or Recipe(32))
        without.append(accuracy("bias counts", undefended, labels))
    assert statistics.fmean(hits) >= 0.95
    assert statistics.fmean(hits) > statistics.fmean(without)


@pytest.mark.parametrize("head_scale", [1.0, 40.0])
def test_labels_that_the_heads_gradient_proves_are_right(head_scale: float) -> None:
    """From labels of which one is wrong; large weights of the head stand for a trained network."""
    proven = []
    for seed in range(3):
        labels = torch.randint(8, (3,), generator=torch.Generator().manual_seed(seed)).sort().values
        observation = observe(8, labels, None, "relu", seed, head_scale=head_scale)
        gradients, head = observation.update.ordered(observation.model), observation.model.head
        own = head.weight.detach(), head.bias.detach()
        wrong = torch.cat([(labels[:1] + 1) % 8, labels[1:]])
        found = proven_labels(*gradients[-2:], *own, counts.public_head_inputs(observation), wrong)
        proven += [] if found is None else [found]
        assert found is None or found.equal(labels)
    assert len(proven) >= 2


def test_counts_beyond_all_bounds_are_rounded() -> None:
    assert round_counts(torch.tensor([1e20, 0.0, 2.0]), 4).tolist() == [0, 0, 0, 2]


def test_an_update_that_is_not_finite_still_gets_labels() -> None:
    labels = torch.tensor([3, 3, 0, 1])
    observation = observe(6, labels, Recipe(2, 2, 1e9), "relu", seed=0)
    assert not all(t.isfinite().all() for t in observation.update.tensors.values())
    mean_gradient = GradientMatcher(observation, "single_step").mean_gradient
    assert len(infer_labels(mean_gradient, observation, torch.Generator())) == 4


def test_labels_are_the_granted_ones_or_inferred() -> None:
    labels = torch.tensor([3, 3, 0, 1])
    observation = observe(6, labels, None, "relu", seed=0)
    mean_gradient = GradientMatcher(observation).mean_gradient
    inferred = infer_labels(mean_gradient, observation, torch.Generator().manual_seed(0))
    assert sorted(inferred.tolist()) == sorted(labels.tolist())
    granted = dataclasses.replace(observation, granted={"labels": labels})
    assert torch.equal(infer_labels(mean_gradient, granted, torch.Generator()), labels)
