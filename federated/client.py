"""An honest client: it computes on its own examples and sends only an `Update`."""

import copy
from dataclasses import replace

import torch
from torch import nn

from core.protocol import Batch, Kind, Recipe, Task, Update, by_name
from core.rng import seeded_global_rng
from defenses.base import Gradient, Memory, Pipeline, PlainStep, Tensors, parse
from models.winograd import use_fast_convs_


def gradient(model: nn.Module, batch: Batch, task: Task, recipe: Recipe, rng: torch.Generator) -> Update:
    """One gradient of the mean loss over `batch`, as in FedSGD.

    `rng` draws dropout masks when the recipe orders train mode, and a defence's noise. `model` is not changed.
    """
    defense = parse(recipe.defense).for_client(Memory())
    local = _private_copy(model, recipe, defense)
    with seeded_global_rng(rng):
        grads = _step(local, batch, task, recipe, defense, rng)
    tensors = tuple(torch.zeros_like(p) if g is None else g for p, g in zip(local.parameters(), grads, strict=True))
    return _update("gradient", local, tensors, len(batch.labels), defense, rng)


def train(
    model: nn.Module,
    batch: Batch,
    task: Task,
    recipe: Recipe,
    rng: torch.Generator,
    memory: Memory | None = None,
) -> tuple[Update, float]:
    """A client's part of a FedAvg round: `recipe.steps` of SGD or Adam, then W_before - W_after.

    `rng` shuffles the minibatches and draws dropout masks and a defence's noise. `memory` is what the client remembers
    of earlier rounds (None: this is its first one) and is changed. Returns the update and the mean training loss, which
    stays with the experimenter and is not sent. `model` is not changed.

    On a CPU and in eval mode, large convolutions are computed by Winograd's algorithm. It rounds about as torch's does
    (tests/test_simulation.py). In train mode BatchNorm over few entries multiplies rounding errors, up to a hundredfold
    in a few steps, and torch's convolutions are used.
    """
    memory = memory or Memory()
    defense = parse(recipe.defense).for_client(memory)
    local = _private_copy(model, recipe, defense)
    if batch.labels.device.type == "cpu" and recipe.model_mode == "eval":
        use_fast_convs_(local, task.domain.to_model(batch.examples[: recipe.batch_size]), second_order=False)
    before = [p.detach().clone() for p in local.parameters()]
    optimizer = (_Adam if recipe.optimizer == "adam" else _SGD)(local, recipe)
    losses: list[float] = []
    recipe = replace(recipe, batch_size=min(recipe.batch_size, len(batch.labels)))
    schedule = defense.on_schedule(recipe.batches(len(batch.labels), rng), len(batch.labels), rng)
    with seeded_global_rng(rng):
        for indices, lr in zip(schedule, recipe.learning_rates(len(schedule)), strict=True):
            minibatch = Batch(batch.examples[indices], batch.labels[indices])
            grads = _step(local, minibatch, task, recipe, defense, rng, losses)
            optimizer.step(grads, lr)
            memory.steps += 1
    delta = tuple((w - p.detach()) for w, p in zip(before, local.parameters(), strict=True))
    memory.rounds += 1
    return _update("delta", local, delta, len(batch.labels), defense, rng), sum(losses) / max(len(losses), 1)


def _step(
    model: nn.Module,
    batch: Batch,
    task: Task,
    recipe: Recipe,
    defense: Pipeline,
    rng: torch.Generator,
    losses: list[float] | None = None,
) -> Gradient:
    """The defended gradient of one minibatch; losses are appended to `losses`."""
    examples, labels = defense.on_batch(batch, task, rng) if len(batch.labels) else batch
    inputs = task.domain.to_model(examples)
    return defense.on_gradient(PlainStep(model, inputs, recipe.targets(inputs, labels), recipe, losses), rng)


def _update(
    kind: Kind, model: nn.Module, tensors: Tensors, num_examples: int, defense: Pipeline, rng: torch.Generator
) -> Update:
    sent = tuple(t.detach().contiguous() for t in defense.on_update(tensors, rng))
    buffers = {name: b.detach().clone() for name, b in model.named_buffers()}
    return Update(kind, by_name(model, sent), num_examples, buffers)


class _Adam:
    """`torch.optim.Adam` as a client uses it."""

    def __init__(self, model: nn.Module, recipe: Recipe) -> None:
        self.optimizer = torch.optim.Adam(model.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay)

    def step(self, grads: Gradient, lr: float) -> None:
        group = self.optimizer.param_groups[0]
        group["lr"] = lr
        for parameter, grad in zip(group["params"], grads, strict=True):
            parameter.grad = grad
        self.optimizer.step()


class _SGD:
    """`torch.optim.SGD` to the last bit, without the 150 MB and the second that it takes to import torch._dynamo."""

    def __init__(self, model: nn.Module, recipe: Recipe) -> None:
        self.parameters, self.recipe = list(model.parameters()), recipe
        self.buffers: dict[int, torch.Tensor] = {}  # of momentum, by position

    @torch.no_grad()
    def step(self, grads: Gradient, lr: float) -> None:
        momentum, weight_decay = self.recipe.momentum, self.recipe.weight_decay
        for i, (parameter, grad) in enumerate(zip(self.parameters, grads, strict=True)):
            if grad is None:
                continue
            if weight_decay:
                grad = grad.add(parameter, alpha=weight_decay)
            if momentum:
                grad = self.buffers[i] = (
                    self.buffers[i].mul_(momentum).add_(grad) if i in self.buffers else grad.clone()
                )
            parameter.add_(grad, alpha=-lr)


def _private_copy(model: nn.Module, recipe: Recipe, defense: Pipeline) -> nn.Module:
    return defense.on_model(copy.deepcopy(model)).train(recipe.model_mode == "train")
