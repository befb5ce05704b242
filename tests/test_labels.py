"""Label rules: each where its paper says it is exact, and the recommended one from real local training."""

import pytest
import torch

from attacks.common import Matching
from attacks.labels import METHODS, RECAST, round_counts, settle_labels
from defenses.base import parse
from federated.client import gradient, train
from federated.wire import Batch, Observation, Recipe, Task
from models import build
from tests.test_attacks import smooth_pictures


def observed(classes: int, labels: torch.Tensor, recipe: Recipe | None, activation: str, seed: int) -> Observation:
    """The update of a client with these labels; a gradient unless there is a recipe."""
    task = Task((3, 12, 12), classes, (0.0,) * 3, (1.0,) * 3)
    rng = torch.Generator().manual_seed(seed)
    net = build("cnn", task.image_shape, classes, activation=activation, rng=rng)
    truth = Batch(smooth_pictures(len(labels), 12, seed), labels)
    public = Batch(smooth_pictures(64, 12, seed + 1000), torch.zeros(64, dtype=torch.int64))
    if recipe is None:
        recipe = Recipe(len(labels))
        update = gradient(net, truth, task, recipe, rng)
    else:
        update, _ = train(net, truth, task, recipe, rng)
    return Observation(task, recipe, net, update, public)


def accuracy(name: str, seen: Observation, labels: torch.Tensor) -> float:
    found = METHODS[name](Matching(seen, "average").mean_gradient, seen)
    counts = (torch.bincount(y, minlength=seen.task.num_classes) for y in (found, labels))
    return torch.minimum(*counts).sum().item() / len(labels)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_rule_names_the_label_of_one_image(name: str) -> None:
    for y in range(5):
        labels = torch.tensor([y])
        assert accuracy(name, observed(5, labels, None, "relu", seed=y), labels) == 1


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_rule_but_the_two_by_weight_sums_knows_labels_that_do_not_repeat(name: str) -> None:
    labels = torch.arange(0, 40, 5)
    least = 0.5 if name in ("GDL", "DLF") else 1.0  # noise inputs give them another feature sum than pictures do
    assert accuracy(name, observed(40, labels, None, "relu", seed=1), labels) >= least


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
        hits.append(
            accuracy("bias counts", observed(classes, labels, Recipe(batch, epochs, lr), activation, seed), labels)
        )
    assert sum(hits) / len(hits) >= 0.98


@pytest.mark.parametrize(("optimizer", "lr", "activation"), [("adam", 0.001, "relu"), ("sgd", 0.1, "sigmoid")])
def test_rehearsals_bring_counts_nearer(
    optimizer: str, lr: float, activation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where local steps leave the straight line, or Adam hides sizes."""
    found = []
    for rehearsals in ((), RECAST):
        monkeypatch.setattr("attacks.labels.RECAST", rehearsals)
        hits = 0.0
        for seed in range(4):
            labels = torch.randint(10, (20,), generator=torch.Generator().manual_seed(seed))
            seen = observed(10, labels, Recipe(5, 3, lr, optimizer=optimizer), activation, seed)
            hits += accuracy("bias counts", seen, labels) / 4
        found.append(hits)
    assert found[1] > 0.8
    assert found[1] > found[0] + 0.1


def test_a_rehearsal_undergoes_what_the_client_did() -> None:
    labels = torch.randint(10, (20,), generator=torch.Generator().manual_seed(1))
    seen = observed(10, labels, Recipe(5, 3, 0.05, defense=parse("clip=0.01")), "relu", seed=1)
    assert accuracy("bias counts", seen, labels) >= 0.9


def test_counts_beyond_all_bounds_are_answered() -> None:
    assert round_counts(torch.tensor([1e20, 0.0, 2.0]), 4).tolist() == [0, 0, 0, 2]


def test_an_update_that_is_not_finite_has_labels_all_the_same() -> None:
    labels = torch.tensor([3, 3, 0, 1])
    seen = observed(6, labels, Recipe(2, 2, 1e9), "relu", seed=0)
    assert not all(t.isfinite().all() for t in seen.update.tensors)
    assert len(settle_labels(Matching(seen, "average").mean_gradient, seen, torch.Generator())) == 4


def test_settled_labels_are_the_granted_ones_or_the_counted_ones() -> None:
    labels = torch.tensor([3, 3, 0, 1])
    seen = observed(6, labels, None, "relu", seed=0)
    mean_gradient = Matching(seen).mean_gradient
    found = settle_labels(mean_gradient, seen, torch.Generator().manual_seed(0))
    assert sorted(found.tolist()) == sorted(labels.tolist())
    granted = Observation(seen.task, seen.recipe, seen.model, seen.update, seen.public, {"labels": labels})
    assert torch.equal(settle_labels(mean_gradient, granted, torch.Generator()), labels)
