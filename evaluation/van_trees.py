"""The least mean squared error of any attacker behind Gaussian noise, if examples were Gaussian.

    E ||x^ - x||^2  >=  tr (E[J^T J] / s^2 + S^-1)^-1,       J = dg / dx

g(x) is the update without noise, s the standard deviation of the noise on its entries, S the covariance of public
examples (van Trees' inequality; Gill and Levit, Applications of the van Trees Inequality, Bernoulli 1995). Without S^-1
it is the bound of Cramer and Rao, which holds for unbiased attackers alone. For a linear g it is the error of the
posterior mean.

It is no guarantee. An attacker whose prior knows more of images than a mean and a covariance may do better, the
expectation is a mean over few public examples, and labels count as known.
"""

import math
from typing import Any

import torch
from torch import Tensor

from attacks.matching.matcher import GradientMatcher
from core.protocol import Batch, Observation
from core.rng import stream
from defenses.base import parse
from defenses.clip import Clip
from defenses.dpfedavg import DPFedAvg
from defenses.dpsgd import DPSGD
from defenses.gauss import Gauss

DIRECTIONS = 128  # principal directions of the prior in which the Jacobian is taken, for each example
LEAST_DIRECTIONS = 16
DRAWS = 6  # public examples, or batches of them, over which J^T J is averaged
LARGEST = 20_000_000  # entries of the Jacobian in these directions


def van_trees(observation: Observation) -> dict[str, Any] | None:
    """The bound for one update: mse, psnr (dB, of the mean squared error), directions and draws; None without one.

    The observation's update is not read, only its kind and its number of examples. There is no bound without public
    examples, without Gaussian noise of known size at the end of a deterministic computation, through several local
    steps, and where the Jacobian is too large.
    """
    public, count = observation.public, observation.update.num_examples
    single = observation.update.kind == "gradient" or observation.recipe.steps(count) == 1
    if public is None or not single or observation.task.domain.name != "image" or observation.aggregate > 1:
        return None
    matcher = GradientMatcher(observation)
    std, parameters = noise_std(matcher, count), sum(t.numel() for t in matcher.target)
    rank = min(DIRECTIONS, LARGEST // (parameters * count), len(public.labels) - 1, public.examples[0].numel())
    if not std or rank < min(LEAST_DIRECTIONS, public.examples[0].numel()):
        return None
    factor = principal_factor(public.examples.flatten(1), rank)
    rng, information = stream("van trees"), factor.new_zeros(rank * count, rank * count)
    for _ in range(DRAWS):
        chosen = torch.randint(len(public.labels), (count,), generator=rng).to(public.labels.device)
        columns = jacobian(matcher, Batch(public.examples[chosen], public.labels[chosen]), factor)
        information += columns.T.double() @ columns.double() / DRAWS
    mse = posterior_error(information / std**2, factor)
    return {"mse": mse, "psnr": -10 * math.log10(max(mse, 1e-30)), "directions": rank, "draws": DRAWS}


def noise_std(matcher: GradientMatcher, count: int) -> float | None:
    """The standard deviation of the noise on an entry of `matcher.target`; None if the bound does not apply."""
    steps = parse(matcher.recipe.defense).steps
    if len(steps) == 1 and isinstance(steps[0], DPSGD):
        return steps[0].sigma * steps[0].bound / count
    return matcher.noise if all(isinstance(step, Clip | Gauss | DPFedAvg) for step in steps) else None


def principal_factor(rows: Tensor, rank: int) -> Tensor:
    """A (d, rank) with A A^T the covariance of rows (M, d) in its largest directions: less than S, so a safe prior."""
    centred = (rows - rows.mean(0)).double()
    _, sizes, directions = torch.linalg.svd(centred / math.sqrt(len(rows)), full_matrices=False)
    return directions[:rank].T * sizes[:rank]


def jacobian(matcher: GradientMatcher, batch: Batch, factor: Tensor) -> Tensor:
    """J A (P, N rank) at a batch of N examples, whose unknowns are moved along the columns of A (d, rank) each.

    A product J a is the derivative of J^T v, which is linear in v, with respect to v in the direction a.
    """
    x = batch.examples.to(matcher.target[0]).requires_grad_()
    update = torch.cat([t.flatten() for t in matcher.simulate(x, batch.labels)])
    v = torch.zeros_like(update, requires_grad=True)
    (product,) = torch.autograd.grad(update, x, v, create_graph=True)
    columns = []
    for own in range(len(x)):
        for direction in factor.T.to(x):
            moved = torch.zeros_like(x)
            moved[own] = direction.view_as(x[own])
            columns.append(torch.autograd.grad(product, v, moved, retain_graph=True)[0])
    return torch.stack(columns, 1)


def posterior_error(information: Tensor, factor: Tensor) -> float:
    """tr(A (I + A^T F A)^-1 A^T) / N d, for A^T F A (N rank, N rank) and the factor A (d, rank) of every example."""
    count = len(information) // factor.shape[1]
    inverse = torch.linalg.inv(torch.eye(len(information)).to(information) + information)
    blocks = inverse.diagonal().view(count, -1)  # A^T A is diagonal: the columns are principal directions
    return float((blocks * factor.square().sum(0)).sum() / (count * len(factor)))
