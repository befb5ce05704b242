"""Exact statements the mathematics makes: if one of these fails, no number of ours means anything."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attacks.common import Matching
from federated.client import gradient, train
from federated.server import aggregate
from federated.wire import Batch, Observation, Recipe, Task, Update
from models import MetaModel, build


def task_of(classes: int = 8, side: int = 16, normalised: bool = False) -> Task:
    half = (0.5,) * 3 if normalised else (0.0,) * 3
    return Task((3, side, side), classes, half, (0.5,) * 3 if normalised else (1.0,) * 3)


def private_batch(task: Task, n: int, seed: int = 0) -> Batch:
    rng = torch.Generator().manual_seed(seed)
    images = torch.rand(n, *task.image_shape, generator=rng, dtype=torch.float64)
    return Batch(images, torch.randint(task.num_classes, (n,), generator=rng))


def network(name: str, task: Task, **options: object) -> torch.nn.Module:
    rng = torch.Generator().manual_seed(1)
    return build(name, task.image_shape, task.num_classes, rng=rng, **options).double()


def seen_by_server(model: torch.nn.Module, task: Task, recipe: Recipe, update: Update) -> Observation:
    return Observation(task, recipe, model, update, private_batch(task, 4, seed=99))


def largest_relative_error(ours: tuple[torch.Tensor, ...], theirs: tuple[torch.Tensor, ...]) -> float:
    size = max(t.abs().max().item() for t in theirs)
    return max((a - b).abs().max().item() for a, b in zip(ours, theirs, strict=True)) / size


@pytest.mark.parametrize(("momentum", "weight_decay"), [(0.0, 0.0), (0.9, 0.0), (0.0, 0.01), (0.9, 0.01)])
@pytest.mark.parametrize(("n", "batch", "epochs"), [(5, 5, 1), (5, 5, 5), (5, 2, 1), (7, 4, 10), (1, 1, 20)])
def test_unrolled_truth_is_the_clients_delta(
    n: int, batch: int, epochs: int, momentum: float, weight_decay: float
) -> None:
    task = task_of(normalised=True)
    recipe = Recipe(batch, epochs, lr=0.05, momentum=momentum, weight_decay=weight_decay)
    model, truth = network("lenet", task), private_batch(task, n)
    update, _ = train(model, truth, task, recipe, torch.Generator().manual_seed(3))
    order = recipe.batches(n, torch.Generator().manual_seed(3))
    unrolled = MetaModel(model).sgd(task.to_model(truth.images), truth.labels, order, 0.05, momentum, weight_decay)
    assert largest_relative_error(unrolled, update.tensors) < 1e-10


@pytest.mark.parametrize("schedule", ["constant", "cosine", "step"])
@pytest.mark.parametrize(("optimizer", "momentum"), [("sgd", 0.9), ("adam", 0.0)])
@pytest.mark.parametrize(("n", "batch", "epochs"), [(5, 5, 1), (5, 2, 2), (7, 4, 10)])
def test_unrolled_truth_follows_optimizer_and_schedule(
    n: int, batch: int, epochs: int, optimizer: str, momentum: float, schedule: str
) -> None:
    task = task_of(normalised=True)
    recipe = Recipe(batch, epochs, 0.02, momentum, 0.01, optimizer, schedule)  # type: ignore[arg-type]
    model, truth = network("lenet", task, activation="relu"), private_batch(task, n)
    update, _ = train(model, truth, task, recipe, torch.Generator().manual_seed(3))
    order = recipe.batches(n, torch.Generator().manual_seed(3))
    unrolled = MetaModel(model).train(task.to_model(truth.images), truth.labels, order, recipe)
    assert largest_relative_error(unrolled, update.tensors) < 1e-10


@pytest.mark.parametrize("schedule", ["constant", "cosine", "step"])
def test_rates_are_those_of_torchs_schedulers(schedule: str) -> None:
    for steps in (1, 4, 10):
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
        scheduler = {
            "constant": lambda o: torch.optim.lr_scheduler.ConstantLR(o, 1.0),
            "cosine": lambda o, t=steps: torch.optim.lr_scheduler.CosineAnnealingLR(o, t),
            "step": lambda o, t=steps: torch.optim.lr_scheduler.MultiStepLR(o, [-(-t // 2), -(-3 * t // 4)]),
        }[schedule](optimizer)
        theirs = []
        for _ in range(steps):
            theirs.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
        assert Recipe(1, lr=0.1, lr_schedule=schedule).rates(steps) == pytest.approx(theirs)  # type: ignore[arg-type]


def test_slopes_through_adam_are_finite_where_relu_is_dead() -> None:
    """A weight that no image moves has v = 0, whose root has no finite slope."""
    task = task_of()
    recipe = Recipe(2, 3, lr=0.01, optimizer="adam")
    model, truth = network("lenet", task, activation="relu"), private_batch(task, 2)
    update, _ = train(model, truth, task, recipe, torch.Generator().manual_seed(0))
    images = (1 - truth.images).requires_grad_()
    loss = Matching(seen_by_server(model, task, recipe, update)).squared_distance(images, truth.labels)
    (slope,) = torch.autograd.grad(loss, images)
    assert any((t == 0).any() for t in update.tensors)
    assert slope.isfinite().all()
    assert slope.abs().sum() > 0


def test_adams_one_step_read_as_a_gradient_keeps_its_signs() -> None:
    task = task_of()
    recipe = Recipe(2, lr=0.01, optimizer="adam")
    model, truth = network("lenet", task), private_batch(task, 2)
    update, _ = train(model, truth, task, recipe, torch.Generator().manual_seed(0))
    match = Matching(seen_by_server(model, task, recipe, update), "average")
    for ours, theirs in zip(match.simulate(truth.images, truth.labels), match.target, strict=True):
        sure = theirs.abs() > 0.5
        assert torch.equal(ours[sure].sign(), theirs[sure].sign())
    away = match.squared_distance(1 - truth.images, truth.labels)
    assert match.squared_distance(truth.images, truth.labels) < away / 2


@pytest.mark.parametrize(("name", "side", "n", "epochs"), [("resnet20", 16, 5, 3), ("resnet18", 9, 3, 1)])
def test_unrolled_truth_holds_for_batchnorm_in_train_mode(name: str, side: int, n: int, epochs: int) -> None:
    task = task_of(side=side)
    recipe = Recipe(2, epochs, lr=0.05, momentum=0.5, model_mode="train")
    model, truth = network(name, task), private_batch(task, n)
    update, _ = train(model, truth, task, recipe, torch.Generator().manual_seed(3))
    order = recipe.batches(n, torch.Generator().manual_seed(3))
    unrolled = MetaModel(model, "train").sgd(task.to_model(truth.images), truth.labels, order, 0.05, 0.5)
    assert largest_relative_error(unrolled, update.tensors) < 1e-10


@pytest.mark.parametrize("reading", ["average", "unrolled"])
@pytest.mark.parametrize(("momentum", "weight_decay"), [(0.0, 0.0), (0.9, 0.01)])
def test_one_full_step_is_the_gradient(reading: str, momentum: float, weight_decay: float) -> None:
    task = task_of()
    model, truth = network("lenet", task), private_batch(task, 3)
    recipe = Recipe(3, lr=0.1, momentum=momentum, weight_decay=weight_decay)
    rng = torch.Generator().manual_seed(0)
    delta, _ = train(model, truth, task, recipe, rng)
    plain = gradient(model, truth, task, Recipe(3), rng)
    match = Matching(seen_by_server(model, task, recipe, delta), reading)  # type: ignore[arg-type]
    assert largest_relative_error(match.mean_gradient, plain.tensors) < 1e-10
    assert match.squared_distance(truth.images, truth.labels) < 1e-20 * match.scale


@pytest.mark.parametrize("epochs", [1, 5])
def test_matching_loss_and_its_slope_vanish_at_the_truth(epochs: int) -> None:
    task = task_of(normalised=True)
    model, truth = network("lenet", task), private_batch(task, 2)
    recipe = Recipe(2, epochs, lr=0.05, momentum=0.5, weight_decay=1e-3)
    update, _ = train(model, truth, task, recipe, torch.Generator().manual_seed(0))
    match = Matching(seen_by_server(model, task, recipe, update))
    images = truth.images.clone().requires_grad_()
    labels = torch.nn.functional.one_hot(truth.labels, task.num_classes).double()
    loss = match.squared_distance(images, labels)
    (slope,) = torch.autograd.grad(loss, images)
    assert loss < 1e-10
    assert slope.norm() < 1e-6
    elsewhere = match.squared_distance(1 - truth.images, labels)
    assert elsewhere > 1e-3 * match.scale


def test_minibatch_order_is_visible_in_the_delta() -> None:
    """A server that unrolls with an order of its own cannot reach loss zero; the size of the gap is what it costs."""
    task = task_of()
    model, truth = network("lenet", task), private_batch(task, 6)

    def gap(lr: float) -> float:
        one, other = (
            train(model, truth, task, Recipe(2, 2, lr=lr), torch.Generator().manual_seed(s))[0].tensors for s in (0, 1)
        )
        return largest_relative_error(one, other)

    assert 1e-4 < gap(1e-4) < 0.1
    assert gap(1e-2) > 10 * gap(1e-4)


@pytest.mark.parametrize("name", ["mlp", "fc2"])
def test_weight_gradient_over_bias_gradient_is_the_image(name: str) -> None:
    """dL/dW1 = d x^T and dL/db1 = d: any row with d != 0 gives x (Phong et al. 2017)."""
    task = task_of()
    truth = private_batch(task, 1)
    update = gradient(network(name, task), truth, task, Recipe(1), torch.Generator())
    weight, bias = update.tensors[:2]
    row = bias.abs().argmax()
    assert torch.allclose((weight[row] / bias[row]).view_as(truth.images[0]), truth.images[0], atol=1e-10)


@given(st.integers(1, 40), st.integers(1, 12), st.integers(1, 4), st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_an_epoch_meets_every_image_once(n: int, batch: int, epochs: int, seed: int) -> None:
    recipe = Recipe(batch, epochs)
    for rng in (None, torch.Generator().manual_seed(seed)):
        schedule = recipe.batches(n, rng)
        assert len(schedule) == recipe.steps(n)
        met = torch.cat(schedule).view(epochs, n)
        assert all(sorted(epoch.tolist()) == list(range(n)) for epoch in met)


@given(st.integers(1, 12), st.floats(0, 0.95), st.sampled_from(["constant", "cosine", "step"]))
@settings(max_examples=30, deadline=None)
def test_gradient_mass_is_the_delta_of_a_constant_gradient(steps: int, momentum: float, schedule: str) -> None:
    recipe = Recipe(1, steps, lr=0.1, momentum=momentum, lr_schedule=schedule)  # type: ignore[arg-type]
    weight = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=0.1, momentum=momentum)
    for rate in recipe.rates(steps):
        optimizer.param_groups[0]["lr"] = rate
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    assert -weight.item() == pytest.approx(recipe.gradient_mass(1))


@given(st.integers(1, 8), st.floats(0, 0.95), st.sampled_from(["constant", "cosine", "step"]))
@settings(max_examples=30, deadline=None)
def test_gradient_weights_say_what_each_gradient_moved(steps: int, momentum: float, schedule: str) -> None:
    recipe = Recipe(1, steps, lr=0.1, momentum=momentum, lr_schedule=schedule)  # type: ignore[arg-type]
    weights = torch.zeros(steps, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([weights], lr=0.1, momentum=momentum)
    for step, rate in enumerate(recipe.rates(steps)):  # entry s has a gradient at step s alone
        optimizer.param_groups[0]["lr"] = rate
        weights.grad = torch.eye(steps, dtype=torch.float64)[step]
        optimizer.step()
    assert (-weights).tolist() == pytest.approx(recipe.gradient_weights(steps))


def test_fedavg_of_one_step_full_batch_clients_is_sgd_on_the_union() -> None:
    """McMahan et al.: with one local step over all images FedAvg is FedSGD, whatever the clients' sizes."""
    task = task_of()
    model, truth = network("lenet", task), private_batch(task, 7)
    parts = [Batch(truth.images[:2], truth.labels[:2]), Batch(truth.images[2:], truth.labels[2:])]
    rng = torch.Generator().manual_seed(0)
    federated = copy.deepcopy(model)
    aggregate(federated, [train(model, part, task, Recipe(7, lr=0.1), rng)[0] for part in parts])
    together, _ = train(model, truth, task, Recipe(7, lr=0.1), rng)
    for before, delta, after in zip(model.parameters(), together.tensors, federated.parameters(), strict=True):
        assert torch.allclose(before - delta, after, atol=1e-12)


def test_a_client_leaves_the_broadcast_model_and_the_global_stream_alone() -> None:
    task = task_of()
    model = network("resnet20", task)
    before = copy.deepcopy(model.state_dict())
    state = torch.random.get_rng_state()
    train(model, private_batch(task, 4), task, Recipe(2, 2, lr=0.1, model_mode="train"), torch.Generator())
    gradient(model, private_batch(task, 4), task, Recipe(4, model_mode="train"), torch.Generator())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.equal(state, torch.random.get_rng_state())
