"""The papers' own loops, written from their equations: what the benchmarks compare with.

Each is a generator that yields its current images (N, C, H, W), in the model's units, after every iteration.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import count

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attacks.base import Attack
from core.hyperparameters import paper_values

Weights = Sequence[Tensor]
GAUSSIAN_LOG_COSH = 0.3746  # E log cosh z, z ~ N(0, 1)
ITERATIONS_PER_STEP = {"dlg": 20}  # of the paper, in one step of its loop


def budget(attack: type[Attack]) -> int:
    """The number of steps of the authors' loop; 1 for an attack without a loop."""
    return getattr(paper_values(attack), "iterations", 1) // ITERATIONS_PER_STEP.get(attack.name, 1)


def dlg(model: nn.Module, target: Weights, x: Tensor, y: Tensor) -> Iterator[Tensor]:
    """Zhu et al.: images and label logits y (N, K) by L-BFGS on the squared distance; an iteration is a step of 20.

    With labels y (N,), which stay fixed, it is iDLG's loop (Zhao et al.).
    """
    soft = y.is_floating_point()
    x, y = x.clone().requires_grad_(), y.clone().requires_grad_(soft)
    optimizer = torch.optim.LBFGS([x, y] if soft else [x], max_iter=ITERATIONS_PER_STEP["dlg"])

    def closure() -> Tensor:
        optimizer.zero_grad()
        ours = gradient(model, x, y.softmax(1) if soft else y)
        distance = torch.stack([(a - b).square().sum() for a, b in zip(ours, target, strict=True)]).sum()
        distance.backward()
        return distance

    while True:
        optimizer.step(closure)
        yield x.detach()


def gradient(model: nn.Module, x: Tensor, y: Tensor, weights: Weights | None = None) -> Weights:
    """dL/dW of a batch, at the model's own weights or at others, with its graph."""
    named = dict(model.named_parameters())
    weights = list(named.values()) if weights is None else weights
    logits = torch.func.functional_call(model, dict(zip(named, weights, strict=True)), (x,))
    return torch.autograd.grad(F.cross_entropy(logits, y), weights, create_graph=True)


def fedavg(model: nn.Module, x: Tensor, y: Tensor, batches: Sequence[Tensor], lr: float) -> Weights:
    """W_0 - W_T after SGD on these batches of indices, with its graph."""
    first = list(model.parameters())
    weights: Weights = first
    for batch in batches:
        grads = gradient(model, x[batch], y[batch], weights)
        weights = [w - lr * g for w, g in zip(weights, grads, strict=True)]
    return [a - b for a, b in zip(first, weights, strict=True)]


def cosine_distance(ours: Weights, target: Weights) -> Tensor:
    """1 - cos, all layers as one vector."""
    product = sum((a * b).sum() for a, b in zip(ours, target, strict=True))
    squares = sum(a.square().sum() for a in ours), sum(b.square().sum() for b in target)
    return 1 - product / (squares[0].sqrt() * squares[1].sqrt())


def total_variation(x: Tensor) -> Tensor:
    return (x[..., 1:] - x[..., :-1]).abs().mean() + (x[..., 1:, :] - x[..., :-1, :]).abs().mean()


def step_schedule(optimizer: torch.optim.Optimizer, iterations: int) -> torch.optim.lr_scheduler.MultiStepLR:
    ends = [round(iterations * share) for share in (3 / 8, 5 / 8, 7 / 8)]
    return torch.optim.lr_scheduler.MultiStepLR(optimizer, ends, gamma=0.1)


def ig(
    simulate: Callable[[Tensor], Weights],
    target: Weights,
    x: Tensor,
    iterations: int,
    lr: float = 0.1,
    tv: float = 1e-4,
    bounds: tuple[Tensor | float, Tensor | float] = (0.0, 1.0),
) -> Iterator[Tensor]:
    """Geiping et al.: signed Adam on cosine distance and total variation, clamped to bounds; the rate falls thrice.

    simulate: images -> the update that they cause: `gradient` for one step, `fedavg` for several.
    """
    x = x.clone().requires_grad_()
    optimizer = torch.optim.Adam([x], lr=lr)
    schedule = step_schedule(optimizer, iterations)
    while True:
        optimizer.zero_grad()
        (cosine_distance(simulate(x), target) + tv * total_variation(x)).backward()
        x.grad = x.grad.sign()
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            x.copy_(x.clamp(*bounds))  # type: ignore[arg-type]
        yield x.detach()


def sme(
    model: nn.Module, delta: Weights, x: Tensor, y: Tensor, iterations: int, *, lr: float, alpha_lr: float, tv: float
) -> Iterator[Tensor]:
    """Zhu et al.: Adam on images and on the place alpha of the surrogate between the weights before and after."""
    x, alpha = x.clone().requires_grad_(), torch.tensor(0.5, dtype=x.dtype, requires_grad=True)
    optimizer = torch.optim.Adam([{"params": [x], "lr": lr}, {"params": [alpha], "lr": alpha_lr}])
    schedule = step_schedule(optimizer, iterations)
    while True:
        optimizer.zero_grad()
        between = [w.detach() - (1 - alpha) * d for w, d in zip(model.parameters(), delta, strict=True)]
        (cosine_distance(gradient(model, x, y, between), delta) + tv * total_variation(x)).backward()
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            x.clamp_(0, 1)
            alpha.clamp_(0, 1)
        yield x.detach()


def ggl(
    model: nn.Module, target: Weights, decode: Callable[[Tensor], Tensor], z: Tensor, y: Tensor, iterations: int
) -> Iterator[Tensor]:
    """Li et al.: Adam on latents z (1, d); squared distance over tensors and 0.1 of the divergence from N(0, 1)."""
    z = z.clone().requires_grad_()
    optimizer = torch.optim.Adam([z], lr=0.1)
    for step in range(iterations):
        t = step / iterations
        down = 0.5 - 0.5 * math.cos(math.pi * min(1.0, (1 - t) / 0.25))
        optimizer.param_groups[0]["lr"] = 0.1 * down * min(1.0, t / 0.05)
        optimizer.zero_grad()
        ours = gradient(model, decode(z), y)
        distance = sum((a - b).square().sum() for a, b in zip(ours, target, strict=True)) / len(target)
        mean, deviation = z.mean(), z.std(unbiased=False)
        (distance - 0.05 * (1 + deviation.square().log() - mean.square() - deviation.square())).backward()
        optimizer.step()
        yield z.detach()


def gias(
    model: nn.Module, target: Weights, generator: nn.Module, z: Tensor, y: Tensor, steps: int, weight_steps: int
) -> Iterator[Tensor]:
    """Jeon et al.: Adam on latents z (1, d), then on the generator's weights at the best latents; cosine distance."""
    z = z.clone().requires_grad_()
    best, least = z.detach().clone(), math.inf
    weights = list(generator.parameters())
    for variables, lr, total in (([z], 0.03, steps), (weights, 1e-3, weight_steps)):
        if variables is weights:
            z = best
        optimizer = torch.optim.Adam(variables, lr=lr)
        schedule = step_schedule(optimizer, total)
        for _ in range(total):
            optimizer.zero_grad()
            distance = cosine_distance(gradient(model, generator.decode(z, y), y), target)
            if variables is not weights and distance.item() < least:
                best, least = z.detach().clone(), distance.item()
            distance.backward()
            optimizer.step()
            schedule.step()
            yield variables[0].detach()


def cpa(gradient: Tensor, shape: Sequence[int], n: int) -> Iterator[tuple[Tensor, float]]:
    """Kariyappa et al.: an unmixing V of the whitened rows, by Adam on negentropy, total variation and independence.

    Yields images, each scaled to [0, 1], and the objective.
    """
    rows = gradient - gradient.mean(1, keepdim=True)
    *_, vectors = torch.linalg.svd(rows, full_matrices=False)
    white = vectors[:n] * (rows.shape[1] - 1) ** 0.5  # (n, d)
    sources_of_rows = torch.linalg.lstsq(rows.T, white.T).solution.T  # (n, h): white = sources_of_rows @ rows
    v = torch.eye(n, dtype=rows.dtype, requires_grad=True)
    optimizer = torch.optim.Adam([v], lr=1e-3)
    for _ in count():
        optimizer.zero_grad()
        unit = F.normalize(v, dim=1)
        negentropy = ((unit @ white).cosh().log().mean(1) - GAUSSIAN_LOG_COSH).square().mean()
        images = (unit @ (sources_of_rows @ gradient)).view(n, *shape)
        cosines = (unit @ unit.T - torch.eye(n)).abs()
        independence = (12.4 * cosines).exp().mean() - 1
        objective = -negentropy + 3.1 * total_variation(images) + 1.47 * independence
        objective.backward()
        optimizer.step()
        low, high = images.detach().amin((1, 2, 3), keepdim=True), images.detach().amax((1, 2, 3), keepdim=True)
        yield (images.detach() - low) / (high - low), objective.item()


def rtf(weight: Tensor, bias: Tensor, shape: Sequence[int]) -> Iterator[Tensor]:
    """Fowl et al.: differences of neighbouring rows, weight over bias."""
    weight, bias = weight.diff(dim=0), bias.diff()
    hit = bias != 0
    yield (weight[hit] / bias[hit, None]).view(-1, *shape).clamp(0, 1)
