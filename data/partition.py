"""Which client of a federation holds which examples of a split."""

from collections.abc import Callable
from functools import partial
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from core.errors import UsageError
from data.splits import frozen_rng

Scheme = Literal["iid", "dirichlet", "classes"]
# remaining examples of each class (K,), examples of a client, rng -> the client's examples of each class (K,)
Quota = Callable[[np.ndarray, int, np.random.RandomState], np.ndarray]


def partition(
    labels: Tensor,
    clients: int,
    client_images: int | None,
    scheme: Scheme,
    beta: float,
    classes_per_client: int,
    rng: torch.Generator,
) -> list[Tensor]:
    """The examples of each client, as disjoint, non-empty int64 tensors of indices into `labels` (N,).

    Each client holds `client_images` examples; None distributes the whole split, so that clients differ by at most one
    example. `scheme` is the value of the argument `partition`:

    "iid": with n examples each, client k holds `torch.randperm(N, generator=rng)[k * n : (k + 1) * n]`.
    "dirichlet": the class proportions of each client are drawn from a symmetric Dir(`beta`); Hsu, Qi, Brown 2019,
        https://arxiv.org/abs/1909.06335.
    "classes": each client holds equally many examples of `classes_per_client` classes; all classes are held equally
        often.

    When a class is used up, other classes take its place. Raises UsageError for arguments that cannot be satisfied.
    """
    sizes = _sizes(len(labels), clients, client_images)
    order = torch.randperm(len(labels), generator=rng)
    match scheme:
        case "iid":
            return list(order[: sum(sizes)].split(sizes))
        case "dirichlet":
            if not 0 < beta < float("inf"):
                raise UsageError(f"`beta={beta}`: Dir(beta) needs a positive number")
            return _by_class(labels, order, sizes, partial(_dirichlet, beta), rng)
        case "classes":
            most = min(len(labels.unique()), min(sizes))
            if not 1 <= classes_per_client <= most:
                raise UsageError(
                    f"`classes_per_client={classes_per_client}`: choose 1 to {most}, which is as many as the split's"
                    " classes and the images of a client allow"
                )
            return _by_class(labels, order, sizes, _Classes(classes_per_client), rng)
        case _:
            raise UsageError(f"`partition={scheme}`: choose one of iid, dirichlet, classes")


def _sizes(total: int, clients: int, client_images: int | None) -> list[int]:
    """The number of examples of each client, out of a split of `total`."""
    if clients < 1:
        raise UsageError(f"`clients={clients}`: at least one is needed")
    if client_images is None:
        if clients > total:
            raise UsageError(f"`clients={clients}`: the split has only {total} images")
        return [total // clients + (k < total % clients) for k in range(clients)]
    if client_images < 1:
        raise UsageError(f"`client_images={client_images}`: at least one is needed")
    if clients * client_images > total:
        raise UsageError(
            f"{clients} clients with {client_images} images each need {clients * client_images} images, but the split"
            f" has {total}: lower `clients` or `client_images`"
        )
    return [client_images] * clients


def _by_class(labels: Tensor, order: Tensor, sizes: list[int], quota: Quota, rng: torch.Generator) -> list[Tensor]:
    """The examples of each client: `quota` says how many of each class, and they are taken from the end of `order`."""
    indices = [order[labels[order] == c] for c in labels.unique()]  # K tensors
    remaining = np.array([len(own) for own in indices])  # (K,)
    # torch has no public Dirichlet sampler that takes a generator
    numpy_rng = frozen_rng(int(torch.randint(2**32, (), generator=rng)))
    clients = []
    for size in sizes:
        counts = quota(remaining, size, numpy_rng)
        taken = torch.cat([own[n - k : n] for own, n, k in zip(indices, remaining, counts, strict=True)])
        clients.append(taken[torch.randperm(size, generator=rng)])
        remaining = remaining - counts
    return clients


def _dirichlet(beta: float, remaining: np.ndarray, size: int, rng: np.random.RandomState) -> np.ndarray:
    """A `Quota`, with class proportions from Dir(beta)."""
    proportions = rng.dirichlet(np.full(len(remaining), beta))
    if not np.isfinite(proportions).all():
        # every gamma variate underflowed: in the limit beta -> 0 a client has one class only
        proportions = np.eye(len(remaining))[rng.randint(len(remaining))]
    return _fill(proportions, size, remaining, rng.multinomial)


class _Classes:
    """A `Quota` of `per_client` classes: of those with enough examples left, the ones that the fewest clients hold.

    Ties are broken at random.
    """

    def __init__(self, per_client: int) -> None:
        self.per_client = per_client
        self.holders: np.ndarray | int = 0  # (K,), the number of clients that hold each class

    def __call__(self, remaining: np.ndarray, size: int, rng: np.random.RandomState) -> np.ndarray:
        share = size // self.per_client
        holders = self.holders + np.zeros_like(remaining)
        preference = np.lexsort((rng.rand(len(remaining)), holders, -np.minimum(remaining, share)))
        chosen = np.isin(np.arange(len(remaining)), preference[: self.per_client])  # (K,)
        counts = _fill(chosen.astype(float), size, remaining, _evenly)
        self.holders = holders + (counts > 0)
        return counts


def _fill(
    weights: np.ndarray, size: int, remaining: np.ndarray, draw: Callable[[int, np.ndarray], np.ndarray]
) -> np.ndarray:
    """`size` examples distributed over classes by `weights` (K,), at most `remaining` (K,) of each: counts (K,).

    `draw(n, shares)` distributes n examples by shares that sum to 1. Needs remaining.sum() >= size.
    """
    counts = np.zeros_like(remaining)
    while missing := size - counts.sum():
        free = remaining - counts
        shares = weights * (free > 0)
        if not shares.any():
            shares = free.astype(float)
        counts += np.minimum(draw(missing, shares / shares.sum()), free)
    return counts


def _evenly(n: int, shares: np.ndarray) -> np.ndarray:
    """`n` distributed in proportion to `shares` (K,) as integers, the largest remainders rounded up: counts (K,)."""
    counts = np.floor(n * shares).astype(int)
    up = np.argsort(counts - n * shares, kind="stable")[: n - counts.sum()]
    counts[up] += 1
    return counts
