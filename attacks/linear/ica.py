"""Independent component analysis: rows (h, d) that are mixtures of n sources -> the sources, up to sign and scale.

Symmetric FastICA with tanh, Hyvarinen, IEEE Transactions on Neural Networks 1999. First used on gradients by the
Cocktail Party Attack, Kariyappa et al., ICML 2023.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from attacks.optim.tracker import current_tracker
from core.protocol import Task

GAUSSIAN_LOG_COSH = 0.3746  # E log cosh of a standard normal variable
RANK_TOLERANCE = 1e-11  # eigenvalues below this share of the largest hold no source

View = Callable[[Tensor], Tensor]  # rows (h, d) -> a linear function of them (h, m), the data that ICA is run on


@dataclass(frozen=True)
class Unmixing:
    """V (r, r), whose product with whitened rows are independent sources, and the trace of what it minimises."""

    matrix: Tensor
    trace: tuple[float, ...]


def log_cosh(s: Tensor) -> Tensor:
    """log cosh s, without overflow for large |s|."""
    return s.abs() + F.softplus(-2 * s.abs()) - math.log(2)


def rotation(size: int, rng: torch.Generator, like: Tensor) -> Tensor:
    """A random orthogonal matrix (size, size) of the dtype and device of `like`."""
    return torch.linalg.qr(torch.randn(size, size, generator=rng, dtype=torch.float64))[0].to(like)


def differences(rows: Tensor, task: Task) -> Tensor:
    """Horizontal and vertical pixel differences of every row (h, d), side by side: a `View`.

    Differences mix as the images do. Unlike pixels they are sparse and nearly uncorrelated, as ICA needs its sources.
    Examples other than images have no neighbours: their rows are centred instead.
    """
    if len(task.domain.shape) != 3:
        return centred(rows)
    images = rows.view(-1, *task.domain.shape)
    return torch.cat([images.diff(dim=3).flatten(1), images.diff(dim=2).flatten(1)], 1)


def centred(rows: Tensor) -> Tensor:
    """Rows (h, d) minus their means: a `View`."""
    return rows - rows.mean(1, keepdim=True)


def whitening(view: Tensor, n: int, rank_tolerance: float) -> Tensor:
    """W_w (r, h) such that W_w view has unit covariance; r <= n, without eigenvalues below `rank_tolerance`."""
    values, vectors = torch.linalg.eigh(view @ view.T / (view.shape[1] - 1))
    used = [i for i in range(len(values) - 1, -1, -1)[:n] if values[i] > rank_tolerance * values[-1]]
    return vectors[:, used].T / values[used, None].sqrt()


def fast_ica(white: Tensor, rng: torch.Generator, iterations: int = 400) -> Unmixing:
    """An orthogonal unmixing of `white` (r, m), of unit covariance; the trace is minus the sum of negentropies.

    Iterations run in float32, which is precise enough for whitened rows.
    """
    like, white = white, white.float()
    unmixing = rotation(len(white), rng, white)
    trace = []
    for iteration in range(iterations):
        sources = unmixing @ white
        trace.append(-(log_cosh(sources[:, ::8]).mean(1) - GAUSSIAN_LOG_COSH).square().sum().item())
        g = sources.tanh()
        step = g @ white.T / white.shape[1] - (1 - g.square()).mean(1, keepdim=True) * unmixing
        u, _, v = torch.linalg.svd(step)
        previous, unmixing = unmixing, u @ v
        converged = (1 - (unmixing * previous).sum(1).abs()).max() < 1e-6
        # two similar sources rotate about each other for ever
        if converged or (iteration >= 40 and trace[-1] > 0.9999 * trace[-21]):
            break
        current_tracker().progress(iteration + 1, iterations, trace[-1])
    u, _, v = torch.linalg.svd(unmixing.to(like))
    return Unmixing(u @ v, tuple(trace))


def unmix(rows: Tensor, n: int, view: View, rng: torch.Generator, rank_tolerance: float = RANK_TOLERANCE) -> Tensor:
    """Sources (r, d) of rows (h, d) that mix n of them, by FastICA on `view(rows)`."""
    data = view(rows)
    whiten = whitening(data, n, rank_tolerance)
    return fast_ica(whiten @ data, rng).matrix @ whiten @ rows
