"""Independent component analysis of mixed images: rows (h, d) that mix n of them -> the images, up to sign and scale.

Symmetric FastICA with tanh, Hyvarinen, 1999, as used on gradients since Kariyappa et al., ICML 2023.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from attacks.base import progress
from federated.wire import Task

GAUSS = 0.3746  # E log cosh of a standard normal variable


def log_cosh(s: Tensor) -> Tensor:
    """log cosh s, which overflows as written for |s| > 88."""
    return s.abs() + F.softplus(-2 * s.abs()) - math.log(2)


def rotation(size: int, rng: torch.Generator, like: Tensor) -> Tensor:
    """A random orthogonal matrix (size, size)."""
    return torch.linalg.qr(torch.randn(size, size, generator=rng, dtype=torch.float64))[0].to(like)


def differences(rows: Tensor, task: Task) -> Tensor:
    """Horizontal and vertical pixel differences of every row (h, d), side by side.

    They mix as the images do and are sparse and nearly uncorrelated, as ICA wants its sources.
    """
    pictures = rows.view(-1, *task.image_shape)
    return torch.cat([pictures.diff(dim=3).flatten(1), pictures.diff(dim=2).flatten(1)], 1)


def whitening(view: Tensor, n: int, cut: float) -> Tensor:
    """W_w (r, h) with W_w view of unit covariance, r <= n: eigenvalues below `cut` of the largest carry no image."""
    values, vectors = torch.linalg.eigh(view @ view.T / view.shape[1])
    kept = [i for i in range(len(values) - 1, -1, -1)[:n] if values[i] > cut * values[-1]]
    return vectors[:, kept].T / values[kept, None].sqrt()


def fast_ica(white: Tensor, rng: torch.Generator, iterations: int = 400) -> tuple[Tensor, tuple[float, ...]]:
    """V (r, r) that makes white rows (r, m) independent, and the course of the negative sum of negentropies.

    In float32, which whitened rows can afford.
    """
    like, white = white, white.float()
    unmixing = rotation(len(white), rng, white)
    trace = []
    for iteration in range(iterations):
        sources = unmixing @ white
        trace.append(-(log_cosh(sources[:, ::8]).mean(1) - GAUSS).square().sum().item())
        g = sources.tanh()
        step = g @ white.T / white.shape[1] - (1 - g.square()).mean(1, keepdim=True) * unmixing
        u, _, v = torch.linalg.svd(step)
        previous, unmixing = unmixing, u @ v
        still = (1 - (unmixing * previous).sum(1).abs()).max() < 1e-6
        # two sources that look alike turn about each other for ever
        if still or (iteration >= 40 and trace[-1] > 0.9999 * trace[-21]):
            break
        progress(iteration, iterations, trace[-1])
    u, _, v = torch.linalg.svd(unmixing.to(like))
    return u @ v, tuple(trace)


def unmix(rows: Tensor, n: int, see: Callable[[Tensor], Tensor], rng: torch.Generator, cut: float = 1e-11) -> Tensor:
    """Sources (r, d) of rows (h, d) that mix n images; ICA looks at `see(rows)`, such as differences."""
    view = see(rows)
    whiten = whitening(view, n, cut)
    return fast_ica(whiten @ view, rng)[0] @ whiten @ rows
