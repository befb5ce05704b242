"""An honest client: it computes on its own images and lets only an `Update` out."""

import copy

import torch
import torch.nn.functional as F
from torch import nn

from federated.wire import Batch, Recipe, Task, Update


def gradient(model: nn.Module, batch: Batch, task: Task, recipe: Recipe, rng: torch.Generator) -> Update:
    """One gradient of the mean cross-entropy over `batch`, as in FedSGD.

    `rng` draws the dropout masks when the recipe orders train mode, and a defence's noise. `model` is left as it was.
    """
    model = _private_copy(model, recipe)
    with torch.random.fork_rng():
        torch.manual_seed(_dropout_seed(rng))
        loss = F.cross_entropy(model(task.to_model(batch.images)), batch.labels)
    tensors = torch.autograd.grad(loss, list(model.parameters()))
    return Update("gradient", _defended(tensors, recipe, rng), len(batch.labels), _buffers(model))


def train(model: nn.Module, batch: Batch, task: Task, recipe: Recipe, rng: torch.Generator) -> tuple[Update, float]:
    """A client's part of a FedAvg round: `recipe.steps` of SGD or Adam, then W_before - W_after.

    `rng` shuffles the minibatches and draws the dropout masks and a defence's noise. Returns the update and the mean
    training loss, which stays with the experimenter and does not ride on the wire. `model` is left as it was.
    """
    local = _private_copy(model, recipe)
    optimizer = _optimizer(local, recipe)
    inputs = task.to_model(batch.images)
    losses = []
    schedule = recipe.batches(len(batch.labels), rng)
    with torch.random.fork_rng():
        torch.manual_seed(_dropout_seed(rng))
        for indices, rate in zip(schedule, recipe.rates(len(schedule)), strict=True):
            optimizer.param_groups[0]["lr"] = rate
            loss = F.cross_entropy(local(inputs[indices]), batch.labels[indices])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    pairs = zip(model.parameters(), local.parameters(), strict=True)
    delta = tuple((before - after).detach() for before, after in pairs)
    return Update("delta", _defended(delta, recipe, rng), len(batch.labels), _buffers(local)), sum(losses) / len(losses)


def _optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    if recipe.optimizer == "adam":
        return torch.optim.Adam(model.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay)
    return torch.optim.SGD(model.parameters(), lr=recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay)


def _defended(tensors: tuple[torch.Tensor, ...], recipe: Recipe, rng: torch.Generator) -> tuple[torch.Tensor, ...]:
    sent = tensors if recipe.defense is None else recipe.defense(tensors, rng)
    return tuple(t.detach() for t in sent)


def _private_copy(model: nn.Module, recipe: Recipe) -> nn.Module:
    return copy.deepcopy(model).train(recipe.model_mode == "train")


def _buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: b.detach().clone() for name, b in model.named_buffers()}


def _dropout_seed(rng: torch.Generator) -> int:
    """Dropout draws from torch's global stream, which is seeded from the client's own for the while."""
    return int(torch.randint(2**62, (), generator=rng))
