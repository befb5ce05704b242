"""Metrics: how far a reconstruction is from one true example.

A metric is a function under `@metric(name, domain=...)`. Its name is the key of its column in rows.jsonl and
summary.json, so that a new metric needs no other place.
"""

import contextlib
import io
import math
import pickle
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from core.domain import Domain
from core.registry import Registry
from utils.network import is_reachable

PSNR_CAP = 100.0  # dB; an exact copy would be infinite

Network = Callable[[Tensor, Tensor], float | None]
F = TypeVar("F", bound=Callable[..., float | None])


@dataclass(frozen=True)
class Metric:
    """A number for one pair of examples (*shape), both valid in the domain.

    compute: called with the true example and its reconstruction; None where the metric is not defined. pretrained:
    whether it needs a network of its own name, which `compute` takes as a third argument.
    """

    name: str
    domain: str  # the name of the domain whose examples it compares
    compute: Callable[..., float | None]
    unit: str = ""
    digits: int = 3
    pretrained: bool = False
    position: int = 0  # of its column among the metrics of the domain


METRICS: Registry[Metric] = Registry("metric")  # by "domain.name": two domains may share a metric's name


def metric(name: str, *, domain: str, unit: str = "", digits: int = 3, pretrained: bool = False) -> Callable[[F], F]:
    """A decorator that enters a metric of the examples of `domain`."""

    def enter(compute: F) -> F:
        METRICS.add(f"{domain}.{name}", Metric(name, domain, compute, unit, digits, pretrained, len(METRICS)))
        return compute

    return enter


def metrics_of(domain: Domain) -> list[Metric]:
    """The metrics of a domain's examples, in the order in which they were registered."""
    return sorted((m for m in METRICS.values() if m.domain == domain.name), key=lambda m: m.position)


def compare(
    domain: Domain, truth: Tensor, guess: Tensor, networks: Mapping[str, Network] | None = None
) -> dict[str, float | None]:
    """Every metric of the domain by name, for one true example (*shape) and its reconstruction.

    networks: pretrained networks by the name of their metric; without one the metric is None.
    """
    scores: dict[str, float | None] = {}
    for entry in metrics_of(domain):
        if not entry.pretrained:
            scores[entry.name] = entry.compute(truth, guess)
        elif networks is not None and entry.name in networks:
            scores[entry.name] = entry.compute(truth, guess, networks[entry.name])
        else:
            scores[entry.name] = None
    return scores


@metric("psnr", domain="image", unit="dB", digits=2)
def psnr(truth: Tensor, guess: Tensor) -> float:
    """Peak signal-to-noise ratio in dB for values in [0, 1], capped at 100."""
    error = mse(truth, guess)
    return PSNR_CAP if error == 0 else min(PSNR_CAP, -10 * math.log10(error))


@metric("ssim", domain="image")
def ssim(truth: Tensor, guess: Tensor) -> float | None:
    """Structural similarity (Wang et al. 2004) of images (C, H, W): Gaussian window, sigma 1.5, 11 pixels wide.

    None for images smaller than the window.
    """
    from skimage.metrics import structural_similarity

    if min(truth.shape[1:]) < 11:
        return None
    a, b = (t.double().numpy() for t in (truth, guess))
    return float(
        structural_similarity(
            a, b, data_range=1.0, channel_axis=0, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
        )
    )


@metric("lpips", domain="image", pretrained=True)
def lpips(truth: Tensor, guess: Tensor, network: Network) -> float | None:
    """Learned perceptual distance (Zhang et al., CVPR 2018) of images (C, H, W)."""
    return network(truth, guess)


@metric("mse", domain="image", digits=4)
def mse(truth: Tensor, guess: Tensor) -> float:
    """Mean squared error over all entries."""
    return (truth.double() - guess.double()).square().mean().item()


class Lpips:
    """LPIPS with the AlexNet backbone. Calls return None without it, and the reason is reported once.

    The `lpips` package holds the linear heads only. The backbone is read from torch's hub cache, or downloaded there
    when there is a network; a random backbone never takes its place. Images of fewer than 31 pixels vanish in its
    poolings, and score None as well, as do images of other than 1 or 3 channels.
    """

    SMALLEST = 31
    BACKBONE = "alexnet-owt-7be5be79.pth"
    URL = f"https://download.pytorch.org/models/{BACKBONE}"
    PATIENCE = 5.0  # seconds to find out whether there is a network

    def __init__(self, notify: Callable[[str], None]) -> None:
        """`notify` prints a line for the user."""
        self.network: Any = None
        self.notify, self._reported = notify, False
        folder = Path(torch.hub.get_dir()) / "checkpoints"
        if not (folder / self.BACKBONE).exists() and not is_reachable(self.URL, self.PATIENCE):
            notify(f"LPIPS is left out: {self.URL} cannot be reached, and {folder} does not hold this file")
            return
        try:
            import lpips

            with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # lpips calls torchvision by an old name
                self.network = lpips.LPIPS(net="alex", verbose=False).eval()
        except (ImportError, OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
            notify(f"LPIPS is left out: {' '.join(str(error).split())[:160]}")

    @torch.no_grad()
    def __call__(self, truth: Tensor, guess: Tensor) -> float | None:
        if self.network is None:
            return None
        if min(truth.shape[1:]) < self.SMALLEST or len(truth) not in (1, 3):
            if not self._reported:
                size = f"{self.SMALLEST}x{self.SMALLEST}"
                self.notify(f"LPIPS is left out: it needs images of 1 or 3 channels and at least {size} pixels")
                self._reported = True
            return None
        pair = [t.float().expand(3, -1, -1)[None] for t in (truth, guess)]  # (1, 3, H, W)
        return self.network(*pair, normalize=True).item()
