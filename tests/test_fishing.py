"""Fishing: which example's gradient is left, and that nothing of the others is."""

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import nn

from attacks import ATTACKS
from core.errors import UsageError
from core.protocol import Batch, Observation, Recipe, Update, image_task
from core.rng import stream
from defenses.detect import detect
from evaluation.bounds import recoverable_mask
from federated.client import gradient, train
from models import build
from models.implants.fishing import class_query, cutoff_query, isolated, projections

TASK = image_task((3, 8, 8), 5)
MODEL = build("lenet", (3, 8, 8), 5, rng=stream(0, "model"))


def batch(labels: Sequence[int]) -> Batch:
    rng = torch.Generator().manual_seed(3)
    return Batch(torch.rand(len(labels), 3, 8, 8, generator=rng), torch.tensor(labels))


def one_gradient(model: nn.Module, truth: Batch, n: int = 0) -> Update:
    return gradient(model, truth, TASK, Recipe(n or len(truth.labels)), torch.Generator())


def fished(truth: Batch, kind: str = "gradient", **settings: int) -> tuple[nn.Module, Update, list[nn.Module]]:
    """The model and the gradient that a fishing server ends with, and the models that it has sent."""
    sent: list[nn.Module] = []
    n = len(truth.labels)
    recipe = Recipe(n, lr=0.01)

    def ask(model: nn.Module) -> Update:
        sent.append(model)
        if kind == "gradient":
            return one_gradient(model, truth)
        return train(model, truth, TASK, recipe, torch.Generator().manual_seed(0))[0]

    attack = ATTACKS["fishing"](**settings)
    model, update = attack.query(attack.implant(MODEL, TASK, truth), ask, TASK, recipe)
    return model, update, sent


@pytest.mark.parametrize("labels", [[1, 2, 2, 3, 3, 0, 0, 0], [4] * 8, [0, 1] * 4, [0] * 32])
@pytest.mark.parametrize("kind", ["gradient", "delta"])
def test_what_is_left_is_the_gradient_of_one_example(labels: list[int], kind: str) -> None:
    truth = batch(labels)
    model, update, sent = fished(truth, kind)
    mask = recoverable_mask(ATTACKS["fishing"](), model, TASK, truth.examples)
    assert mask is not None
    assert mask.sum() == 1
    assert len(sent) <= 12
    chosen = int(model.head.weight.abs().sum(1).argmax())
    alone = one_gradient(model, Batch(truth.examples[mask], torch.tensor([chosen])))
    tolerance = 1e-4 if kind == "gradient" else 1e-2  # weights that move are rounded
    for name, tensor in alone.tensors.items():
        found = len(labels) * update.tensors[name]
        if name.startswith("head"):
            found, tensor = found[chosen], tensor[chosen]
        assert (found - tensor).norm() <= tolerance * tensor.norm(), name


def test_the_gradient_of_one_of_32_stands_out_among_the_others() -> None:
    """D-SNR: the largest gradient of an example over the sum of all others, of what the server computes."""
    labels = [i % 4 for i in range(32)]
    truth = batch(labels)
    model, update, sent = fished(truth)
    body = [name for name in update.tensors if not name.startswith("head")]
    single = [Batch(truth.examples[[i]], truth.labels[[i]]) for i in range(32)]

    def of(query: nn.Module, example: Batch) -> torch.Tensor:
        tensors = one_gradient(query, example).tensors
        sharpness = query.head.weight.abs().max() * query.head.in_features
        return torch.cat([tensors[name].flatten() / sharpness for name in body])

    parts = torch.stack([torch.stack([of(query, x) for x in single]) for query in sent])  # (queries, 32, P)
    result = torch.cat([update.tensors[name].flatten() for name in body])
    sums = parts.mean(1)
    pairs = [(a, b) for a in range(len(sent)) for b in range(len(sent)) if a != b]
    a, b = min(pairs, key=lambda p: (sums[p[0]] - sums[p[1]] - result).norm().item())
    sizes = (parts[a] - parts[b]).norm(dim=1)
    i = int(sizes.argmax())
    assert sizes[i] >= 10 * (sizes.sum() - sizes[i])
    assert torch.equal(recoverable_mask(ATTACKS["fishing"](), model, TASK, truth.examples), torch.arange(32) == i)


def test_a_class_query_silences_the_other_classes_and_a_cutoff_those_below_it() -> None:
    truth = batch([0, 1, 2, 1])
    body = list(dict(MODEL.named_parameters()))[:-2]
    for i in range(4):
        own = one_gradient(class_query(MODEL, 1), Batch(truth.examples[[i]], truth.labels[[i]]))
        assert any(own.tensors[name].any() for name in body) == (truth.labels[i] == 1)
    with torch.no_grad():
        s = projections(MODEL, truth.examples)
    query = cutoff_query(MODEL, 1, s.sort().values[1:3].mean().item(), 1e5)
    above = query(truth.examples).softmax(1)[:, 1]
    assert torch.equal(above.round(), (s > s.median()).float())


def test_examples_that_equal_one_another_are_not_called_isolated() -> None:
    truth = batch([1, 1])
    model, _, sent = fished(Batch(truth.examples[[0, 0]], truth.labels))
    assert isolated(model).isnan()
    assert len(sent) < 12
    assert not recoverable_mask(ATTACKS["fishing"](), model, TASK, truth.examples).any()


def test_few_queries_leave_a_class() -> None:
    truth = batch([0, 0, 0, 1, 1])
    model, update, sent = fished(truth, queries=2)
    assert len(sent) == 2
    assert round(-5 * update.tensors["head.bias"][1].item()) == 2
    assert isolated(model).isnan()


def test_an_update_that_is_not_finite_isolates_nothing() -> None:
    attack = ATTACKS["fishing"]()
    truth = batch([0, 1, 1, 2])
    recipe = Recipe(4, lr=0.01)

    def ask(model: nn.Module) -> Update:
        update = one_gradient(model, truth)
        return replace(update, tensors={name: t * math.nan for name, t in update.tensors.items()})

    model, update = attack.query(attack.implant(MODEL, TASK, truth), ask, TASK, recipe)
    assert isolated(model).isnan()
    assert attack.reconstruct(Observation(TASK, recipe, model, update), torch.Generator()).status == "diverged"


def test_a_client_finds_the_hook() -> None:
    for query in (class_query(MODEL, 2), cutoff_query(MODEL, 2, 3.0, 100.0)):
        assert "fishing head" in {sign.kind for sign in detect(query, TASK)}


def test_batch_norm_of_the_batch_is_refused() -> None:
    model = build("lenet", (3, 8, 8), 5, rng=stream(0, "model"), norm="batch")
    with pytest.raises(UsageError, match="`model_mode=eval`"):
        ATTACKS["fishing"]().check(model, TASK, Recipe(4, model_mode="train"), "gradient", 4)
    with pytest.raises(UsageError, match="honest-but-curious"):
        ATTACKS["fishing"](inner="rtf").check(model, TASK, Recipe(4), "gradient", 4)
