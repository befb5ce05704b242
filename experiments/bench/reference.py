"""The papers' own loops, written from their equations: what the benchmarks compare with.

Each is a generator that yields its current images (N, C, H, W), in the model's units, after every iteration.
"""

from collections.abc import Iterator, Sequence
from itertools import count

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attacks.base import Attack
from core.hyperparameters import paper_values

Weights = Sequence[Tensor]
ITERATIONS_PER_STEP = {"dlg": 20}  # of the paper, in one step of its loop


def budget(attack: type[Attack]) -> int:
    """The number of steps of the authors' loop; 1 for an attack without a loop."""
    return getattr(paper_values(attack), "iterations", 1) // ITERATIONS_PER_STEP.get(attack.name, 1)


def dlg(model: nn.Module, target: Weights, x: Tensor, classes: int) -> Iterator[Tensor]:
    """Zhu et al.: images and label logits by L-BFGS on the squared distance; an iteration is a step of 20."""
    x = x.clone().requires_grad_()
    y = torch.randn(len(x), classes, requires_grad=True)
    optimizer = torch.optim.LBFGS([x, y], max_iter=ITERATIONS_PER_STEP["dlg"])

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y.softmax(1))
        gradient = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
        distance = torch.stack([(a - b).square().sum() for a, b in zip(gradient, target, strict=True)]).sum()
        distance.backward()
        return distance

    while True:
        optimizer.step(closure)
        yield x.detach()


def ig_single(
    model: nn.Module, target: Weights, x: Tensor, labels: Tensor, iterations: int, tv: float = 1e-4
) -> Iterator[Tensor]:
    """Geiping et al.: signed Adam on cosine distance and total variation, clamped to [0, 1]; the rate falls thrice."""
    x = x.clone().requires_grad_()
    optimizer = torch.optim.Adam([x], lr=0.1)
    ends = [round(iterations * share) for share in (3 / 8, 5 / 8, 7 / 8)]
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, ends, gamma=0.1)
    while True:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), labels)
        gradient = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
        product = sum((a * b).sum() for a, b in zip(gradient, target, strict=True))
        squares = sum(a.square().sum() for a in gradient), sum(b.square().sum() for b in target)
        objective = 1 - product / (squares[0].sqrt() * squares[1].sqrt())
        tv_x = (x[..., 1:] - x[..., :-1]).abs().mean() + (x[..., 1:, :] - x[..., :-1, :]).abs().mean()
        (objective + tv * tv_x).backward()
        x.grad = x.grad.sign()
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            x.clamp_(0, 1)
        yield x.detach()


def cpa(gradient: Tensor, shape: Sequence[int], n: int) -> Iterator[Tensor]:
    """Kariyappa et al.: an unmixing V of the whitened rows, by Adam on negentropy, total variation and independence."""
    rows = gradient - gradient.mean(1, keepdim=True)
    _, _, vectors = torch.linalg.svd(rows, full_matrices=False)
    white = vectors[:n] * rows.shape[1] ** 0.5  # (n, d)
    v = torch.randn(n, n, requires_grad=True)
    optimizer = torch.optim.Adam([v], lr=1e-3)
    for _ in count():
        optimizer.zero_grad()
        unit = F.normalize(v, dim=1)
        sources = unit @ white
        negentropy = (sources.cosh().log().mean(1) - 0.3746).square().mean()  # of a Gaussian: E log cosh = 0.3746
        images = sources.view(n, *shape)
        tv = (images[..., 1:] - images[..., :-1]).abs().mean()
        tv = tv + (images[..., 1:, :] - images[..., :-1, :]).abs().mean()
        independence = (12.4 * (unit @ unit.T).abs()).exp().triu(1).sum() / (n * (n - 1) / 2)
        (-negentropy + 3.1 * tv + 1.47 * independence).backward()
        optimizer.step()
        low, high = images.detach().amin((1, 2, 3), keepdim=True), images.detach().amax((1, 2, 3), keepdim=True)
        yield (images.detach() - low) / (high - low)


def rtf(weight: Tensor, bias: Tensor, shape: Sequence[int]) -> Iterator[Tensor]:
    """Fowl et al.: differences of neighbouring rows, weight over bias."""
    weight, bias = weight.diff(dim=0), bias.diff()
    hit = bias != 0
    yield (weight[hit] / bias[hit, None]).view(-1, *shape).clamp(0, 1)
