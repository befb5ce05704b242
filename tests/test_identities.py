"""Exact statements that follow from the mathematics: if one of these fails, no number in the README means anything."""

import copy

import pytest
import torch
from torch import Tensor, nn

from attacks.matching.matcher import GradientMatcher
from core.protocol import Batch, Observation, Recipe, Task, Update, image_task
from federated.client import gradient, train
from federated.server import aggregate
from models import MetaModel, build


def task_of(classes: int = 8, side: int = 16, normalised: bool = False) -> Task:
    half = (0.5,) * 3
    return image_task((3, side, side), classes, half if normalised else None, half if normalised else None)


def private_batch(task: Task, n: int, seed: int = 0) -> Batch:
    rng = torch.Generator().manual_seed(seed)
    examples = torch.rand(n, *task.domain.shape, generator=rng, dtype=torch.float64)
    return Batch(examples, torch.randint(task.num_classes, (n,), generator=rng))


def network(name: str, task: Task, **options: object) -> nn.Module:
    rng = torch.Generator().manual_seed(1)
    return build(name, task.domain.shape, task.num_classes, rng=rng, **options).double()


def observe(model: nn.Module, task: Task, recipe: Recipe, update: Update) -> Observation:
    return Observation(task, recipe, model, update, private_batch(task, 4, seed=99))


def largest_relative_error(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> float:
    largest = max(t.abs().max().item() for t in theirs)
    return max((a - b).abs().max().item() for a, b in zip(ours, theirs, strict=True)) / largest


@pytest.mark.parametrize(("momentum", "weight_decay"), [(0.0, 0.0), (0.9, 0.0), (0.0, 0.01), (0.9, 0.01)])
@pytest.mark.parametrize(("n", "batch", "epochs"), [(5, 5, 1), (5, 5, 5), (5, 2, 1), (7, 4, 10), (1, 1, 20)])
def test_unrolling_at_the_truth_gives_the_clients_delta(
    n: int, batch: int, epochs: int, momentum: float, weight_decay: float
) -> None:
    task = task_of(normalised=True)
    recipe = Recipe(batch, epochs, lr=0.05, momentum=momentum, weight_decay=weight_decay)
    model, truth = network("lenet", task), private_batch(task, n)
    update, _ = train(model, truth, task, recipe, torch.Generator().manual_seed(3))
    order = recipe.batches(n, torch.Generator().manual_seed(3))
    inputs = task.domain.to_model(truth.examples)
    unrolled = MetaModel(model).sgd(inputs, truth.labels, order, 0.05, momentum, weight_decay)
    assert largest_relative_error(unrolled, update.ordered(model)) < 1e-10


@pytest.mark.parametrize(("momentum", "weight_decay"), [(0.0, 0.0), (0.9, 0.0), (0.0, 0.01), (0.9, 0.01)])
def test_local_steps_are_those_of_torch_to_the_last_bit(momentum: float, weight_decay: float) -> None:
    task = task_of(side=8)
    recipe = Recipe(2, 3, 0.1, momentum, weight_decay, lr_schedule="cosine")
    model, truth = network("cnn", task).float(), private_batch(task, 4)
    truth = Batch(truth.examples.float(), truth.labels)
    update, _ = train(model, truth, task, recipe, torch.Generator().manual_seed(3))
    order = recipe.batches(4, torch.Generator().manual_seed(3))
    local = copy.deepcopy(model)
    optimizer = torch.optim.SGD(local.parameters(), 0.1, momentum, weight_decay=weight_decay)
    for indices, lr in zip(order, recipe.learning_rates(len(order)), strict=True):
        optimizer.param_groups[0]["lr"] = lr
        optimizer.zero_grad()
        nn.functional.cross_entropy(
            local(task.domain.to_model(truth.examples[indices])), truth.labels[indices]
        ).backward()
        optimizer.step()
    for before, after, sent in zip(model.parameters(), local.parameters(), update.ordered(model), strict=True):
        assert torch.equal(before - after, sent)


@pytest.mark.parametrize("schedule", ["constant", "cosine", "step"])
@pytest.mark.parametrize(("optimizer", "momentum"), [("sgd", 0.9), ("adam", 0.0)])
@pytest.mark.parametrize(("n", "batch", "epochs"), [(5, 5, 1), (5, 2, 2), (7, 4, 10)])
def test_unrolling_follows_optimizer_and_schedule(
    n: int, batch: int, epochs: int, optimizer: str, momentum: float, schedule: str
) -> None:
    task = task_of(normalised=True)
    recipe = Recipe(batch, epochs, 0.02, momentum, 0.01, optimizer, schedule)  # type: ignore[arg-type]
    model, truth = network("lenet", task, activation="relu"), private_batch(task, n)
    update, _ = train(model, truth, task, recipe, torch.Generator().manual_seed(3))
    order = recipe.batches(n, torch.Generator().manual_seed(3))
    unrolled = MetaModel(model).train(task.domain.to_model(truth.examples), truth.labels, order, recipe)
    assert largest_relative_error(unrolled, update.ordered(model)) < 1e-10


def test_gradients_through_adam_are_finite_where_relu_is_dead() -> None:
    """A weight that no example moves has v = 0, where the square root has no finite derivative."""
    task = task_of()
    recipe = Recipe(2, 3, lr=0.01, optimizer="adam")
    model, truth = network("lenet", task, activation="relu"), private_batch(task, 2)
    update, _ = train(model, truth, task, recipe, torch.Generator().manual_seed(0))
    examples = (1 - truth.examples).requires_grad_()
    loss = GradientMatcher(observe(model, task, recipe, update)).squared_distance(examples, truth.labels)
    (grad,) = torch.autograd.grad(loss, examples)
    assert any((t == 0).any() for t in update.tensors.values())
    assert grad.isfinite().all()
    assert grad.abs().sum() > 0


def test_one_adam_step_matched_as_a_gradient_has_the_right_signs() -> None:
    task = task_of()
    recipe = Recipe(2, lr=0.01, optimizer="adam")
    model, truth = network("lenet", task), private_batch(task, 2)
    update, _ = train(model, truth, task, recipe, torch.Generator().manual_seed(0))
    matcher = GradientMatcher(observe(model, task, recipe, update), "single_step")
    for ours, theirs in zip(matcher.simulate(truth.examples, truth.labels), matcher.target, strict=True):
        large = theirs.abs() > 0.5
        assert torch.equal(ours[large].sign(), theirs[large].sign())
    elsewhere = matcher.squared_distance(1 - truth.examples, truth.labels)
    assert matcher.squared_distance(truth.examples, truth.labels) < elsewhere / 2


@pytest.mark.parametrize(("name", "side", "n", "epochs"), [("resnet20", 16, 5, 3), ("resnet18", 9, 3, 1)])
def test_unrolling_holds_for_batchnorm_in_train_mode(name: str, side: int, n: int, epochs: int) -> None:
    task = task_of(side=side)
    recipe = Recipe(2, epochs, lr=0.05, momentum=0.5, model_mode="train")
    model, truth = network(name, task), private_batch(task, n)
    update, _ = train(model, truth, task, recipe, torch.Generator().manual_seed(3))
    order = recipe.batches(n, torch.Generator().manual_seed(3))
    unrolled = MetaModel(model, "train").sgd(task.domain.to_model(truth.examples), truth.labels, order, 0.05, 0.5)
    assert largest_relative_error(unrolled, update.ordered(model)) < 1e-10


@pytest.mark.parametrize("update_model", ["single_step", "unrolled"])
@pytest.mark.parametrize(("momentum", "weight_decay"), [(0.0, 0.0), (0.9, 0.01)])
def test_one_full_batch_step_is_the_gradient(update_model: str, momentum: float, weight_decay: float) -> None:
    task = task_of()
    model, truth = network("lenet", task), private_batch(task, 3)
    recipe = Recipe(3, lr=0.1, momentum=momentum, weight_decay=weight_decay)
    rng = torch.Generator().manual_seed(0)
    delta, _ = train(model, truth, task, recipe, rng)
    plain = gradient(model, truth, task, Recipe(3), rng)
    matcher = GradientMatcher(observe(model, task, recipe, delta), update_model)  # type: ignore[arg-type]
    assert largest_relative_error(matcher.mean_gradient, plain.ordered(model)) < 1e-10
    assert matcher.squared_distance(truth.examples, truth.labels) < 1e-20 * matcher.target_norm_sq


@pytest.mark.parametrize("epochs", [1, 5])
def test_objective_and_its_gradient_vanish_at_the_truth(epochs: int) -> None:
    task = task_of(normalised=True)
    model, truth = network("lenet", task), private_batch(task, 2)
    recipe = Recipe(2, epochs, lr=0.05, momentum=0.5, weight_decay=1e-3)
    update, _ = train(model, truth, task, recipe, torch.Generator().manual_seed(0))
    matcher = GradientMatcher(observe(model, task, recipe, update))
    examples = truth.examples.clone().requires_grad_()
    labels = torch.nn.functional.one_hot(truth.labels, task.num_classes).double()
    loss = matcher.squared_distance(examples, labels)
    (grad,) = torch.autograd.grad(loss, examples)
    assert loss < 1e-10
    assert grad.norm() < 1e-6
    elsewhere = matcher.squared_distance(1 - truth.examples, labels)
    assert elsewhere > 1e-3 * matcher.target_norm_sq


def test_the_order_of_minibatches_changes_the_delta() -> None:
    """A server that unrolls in an order of its own cannot reach objective zero; this gap is what is left."""
    task = task_of()
    model, truth = network("lenet", task), private_batch(task, 6)

    def gap(lr: float) -> float:
        recipe = Recipe(2, 2, lr=lr)
        one, other = (
            train(model, truth, task, recipe, torch.Generator().manual_seed(seed))[0].ordered(model) for seed in (0, 1)
        )
        return largest_relative_error(one, other)

    assert 1e-4 < gap(1e-4) < 0.1
    assert gap(1e-2) > 10 * gap(1e-4)


@pytest.mark.parametrize("name", ["mlp", "fc2"])
def test_weight_gradient_over_bias_gradient_is_the_example(name: str) -> None:
    """dL/dW1 = d x^T and dL/db1 = d: any row with d != 0 gives x (Phong et al. 2017)."""
    task = task_of()
    model, truth = network(name, task), private_batch(task, 1)
    weight, bias, *_ = gradient(model, truth, task, Recipe(1), torch.Generator()).ordered(model)
    row = bias.abs().argmax()
    assert torch.allclose((weight[row] / bias[row]).view_as(truth.examples[0]), truth.examples[0], atol=1e-10)


def test_fedavg_of_clients_with_one_full_batch_step_is_sgd_on_the_union() -> None:
    """McMahan et al.: with one local step on all examples FedAvg is FedSGD, whatever the clients' sizes."""
    task = task_of()
    model, truth = network("lenet", task), private_batch(task, 7)
    parts = [Batch(truth.examples[:2], truth.labels[:2]), Batch(truth.examples[2:], truth.labels[2:])]
    rng = torch.Generator().manual_seed(0)
    federated = copy.deepcopy(model)
    aggregate(federated, [train(model, part, task, Recipe(7, lr=0.1), rng)[0] for part in parts])
    together, _ = train(model, truth, task, Recipe(7, lr=0.1), rng)
    triples = zip(model.parameters(), together.ordered(model), federated.parameters(), strict=True)
    for before, delta, after in triples:
        assert torch.allclose(before - delta, after, atol=1e-12)


def test_a_client_changes_neither_the_broadcast_model_nor_the_global_random_state() -> None:
    task = task_of()
    model = network("resnet20", task)
    before = copy.deepcopy(model.state_dict())
    state = torch.random.get_rng_state()
    train(model, private_batch(task, 4), task, Recipe(2, 2, lr=0.1, model_mode="train"), torch.Generator())
    gradient(model, private_batch(task, 4), task, Recipe(4, model_mode="train"), torch.Generator())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.equal(state, torch.random.get_rng_state())
