"""Searching a generator's latents for the image that explains an update: what attacks with a generative prior share.

What comes out looks like the class whatever the update said. So beside each score stand the class's mean image (what
the label alone is worth), the best this generator could do for somebody who sees the victim (its floor, an oracle), and
Inverting Gradients on the same update, which believes nothing of images but that they are smooth.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from attacks.adam import Adam
from attacks.base import Attack, checkpoint, discover, progress
from attacks.common import Matching, Reading, check_reading, put
from federated.wire import Batch, Recipe, Task, UsageError
from models import priors
from models.generators import ClassPCA, Prior
from utils.cli import hp, settings

Score = Callable[[Tensor, Tensor], Tensor]  # images (N, C, H, W), latents (N, dim) -> objective ()
Objective = Callable[[Tensor], Tensor]  # latents (N, dim) -> objective ()


@dataclass(frozen=True)
class Found:
    """One search, at the lowest objective it saw."""

    values: tuple[Tensor, ...]  # of what was searched
    loss: float
    trace: tuple[float, ...]


@settings
class LatentInversion(Attack):
    """z* = argmin_z D(g(G(z, y)), g*) + r R(z), by Adam or without slopes by CMA-ES."""

    threat = "honest-but-curious"
    wants_model = "cnn"
    reads_adam = True

    generator: Literal["class_pca", "vae", "wgan"] = hp(
        "class_pca", "G, of public images: fitted in a second, trained in minutes (vae), or in hours (wgan)"
    )
    generator_file: Path | None = hp(None, "G from this folder of experiments/prior.sh instead")
    generator_steps: int = hp(0, "of a G that is trained; 0: its own default", least=0)
    generator_units: Literal["half", "dataset"] = hp(
        "half", "what a trained G's last layer makes: tanh about mid-grey, or public mean and std"
    )
    latents: int = hp(32, "of an image", least=1)
    optimizer: Literal["adam", "cma"] = hp("adam", "of the latents: Adam, or CMA-ES, which needs no slope")
    iterations: int = hp(300, "Adam steps of each run", least=1)
    evaluations: int = hp(3000, "CMA-ES: of the objective, in each run", least=1)
    restarts: int = hp(1, "runs; the lowest objective counts", least=1)
    lr: float = hp(0.1, "Adam's step; up over the first 5%, down over the last 25%", above=0)
    spread: float = hp(0.5, "CMA-ES: deviation of the first draws about z = 0", above=0)
    matching: Literal["cosine", "l2"] = hp("cosine", "D: cosine distance, or squared distance over tensors")
    prior: float = hp(1e-5, "weight r of R, the divergence of z's entries from N(0, 1)", least=0)
    noise: float | None = hp(
        None,
        "deviation of noise on the update, then D is l2 and R the posterior's; default: what the recipe's defence adds",
        least=0,
    )
    reading: Reading = hp(
        "auto", "of a delta: average (as one gradient), unrolled (through the local steps), auto (unrolled if T > 1)"
    )
    pixels: int = hp(1000, "iterations of the Inverting Gradients that stands beside; 0: none", least=0)

    def check(self, model: nn.Module, task: Task, recipe: Recipe, kind: str, num_examples: int) -> None:
        super().check(model, task, recipe, kind, num_examples)
        trained = self.generator != "class_pca" and self.generator_file is None
        if self.generator_file is not None:
            dim = priors.require(self.generator_file, task)["order"].dim
            if self.latents != dim:
                raise UsageError(
                    f"the generator in {self.generator_file} has {dim} latents of an image: --latents {dim}"
                )
        if not trained and (self.generator_steps or self.generator_units != "half"):
            raise UsageError("--generator-steps and --generator-units are for training: they belong to --generator vae")
        check_reading(self.reading, recipe, kind, num_examples)

    def prepare(self, task: Task, public: Batch, about: Mapping[str, Any]) -> None:
        if self.generator_file is not None:
            priors.require(self.generator_file, task, public)
        elif self.generator != "class_pca":
            self.belief(public, task.num_classes, about)

    def belief(self, public: Batch, classes: int, about: Mapping[str, Any] | None = None) -> Prior:
        """G, fitted to or trained on these public images."""
        if self.generator_file is not None:
            return priors.load(self.generator_file, public.images.device)
        if self.generator == "class_pca":
            return ClassPCA(public, self.latents)
        order = priors.order(
            self.generator, dim=self.latents, steps=self.generator_steps, normalize=self.generator_units
        )
        return priors.obtain(order, public, classes, about)[0]

    def floor(self, task: Task, public: Batch, truth: Batch) -> Tensor:
        return priors.nearest(self.belief(public, task.num_classes), *truth)

    def companion(self, kind: str) -> Attack | None:
        name = "ig_single" if kind == "gradient" or self.reading == "average" else "ig_multi"  # as this one reads it
        return discover()[name](iterations=self.pixels) if self.pixels else None

    def score(self, match: Matching, prior: Prior, labels: Tensor) -> Score:
        """The objective; where the noise's deviation s is known, -log p(z | g*) = D / (2 s^2) - log p(z), scaled."""
        tensors = len(match.target)
        noise = match.noise if self.noise is None else self.noise

        def objective(images: Tensor, z: Tensor) -> Tensor:
            if noise:
                return (match.squared_distance(images, labels) + 2 * noise**2 * prior.prior(z).sum()) / tensors
            if self.matching == "l2":
                return match.squared_distance(images, labels) / tensors + self.prior * divergence(z)
            return match.cosine_distance(images, labels) + self.prior * divergence(z)

        return objective

    def search(
        self, match: Matching, prior: Prior, labels: Tensor, rng: torch.Generator
    ) -> tuple[Tensor, tuple[float, ...], int]:
        """Latents (N, dim) of the best of all runs, its objective's course, and the evaluations of all together."""
        score = self.score(match, prior, labels)

        def objective(z: Tensor) -> Tensor:
            return score(prior.decode(z, labels), z)

        one = self._adam if self.optimizer == "adam" else self._cma
        centre = torch.zeros(len(labels), prior.dim, device=labels.device)
        runs = [
            checkpoint.stretch(Found, rng, partial(one, objective, centre, rng, run)) for run in range(self.restarts)
        ]
        best = min(runs, key=lambda run: run.loss)
        return best.values[0], best.trace, sum(len(run.trace) for run in runs)

    def _adam(self, objective: Objective, centre: Tensor, rng: torch.Generator, run: int) -> Found:
        z = (0.01 * torch.randn(centre.shape, generator=rng)).to(centre).requires_grad_()

        def lr(share: float) -> float:
            down = 0.5 - 0.5 * math.cos(math.pi * min(1.0, (1 - share) / 0.25))
            return self.lr * down * min(1.0, (share + 1 / self.iterations) / 0.05)

        return descend([z], lambda: objective(z), self.iterations, lr, rng, (run, self.restarts))

    def _cma(self, objective: Objective, centre: Tensor, rng: torch.Generator, run: int) -> Found:
        """Covariance matrix adaptation. Hansen, Ostermeier, Evolutionary Computation 9, 2001."""
        import cma

        draws = np.random.default_rng(int(torch.randint(2**31, (), generator=rng)))
        # never more than asked for, though a generation of fewer than four teaches nothing
        own = 4 + int(3 * math.log(centre.numel()))
        options = {"popsize": max(2, min(own, self.evaluations)), "seed": math.nan, "verbose": -9}
        options |= {"randn": lambda *size: draws.standard_normal(size)}
        strategy = cma.CMAEvolutionStrategy(np.zeros(centre.numel()), self.spread, options)
        trace: list[float] = []

        def latents(flat: np.ndarray) -> Tensor:
            return torch.from_numpy(flat).to(centre).view_as(centre)

        while not trace or (len(trace) + strategy.popsize <= self.evaluations and not strategy.stop()):
            asked = strategy.ask()
            with torch.no_grad():
                values = [objective(latents(flat)).item() for flat in asked]
            strategy.tell(asked, [v if math.isfinite(v) else 1e30 for v in values])
            trace += values
            progress(run * self.evaluations + len(trace), self.restarts * self.evaluations, min(trace))
        return Found((latents(strategy.best.x),), float(strategy.best.f), tuple(trace))


def descend(
    variables: Sequence[Tensor],
    objective: Callable[[], Tensor],
    steps: int,
    lr: Callable[[float], float],
    rng: torch.Generator,
    run: tuple[int, int] = (0, 1),
) -> Found:
    """Adam on `variables`, its step lr(share of the way); `run` is (which, of how many), for those who watch."""
    optimizer = Adam(variables)
    best, kept, trace, first = math.inf, tuple(v.detach().clone() for v in variables), [], 0
    if saved := checkpoint.resume(rng):
        put(variables, saved["variables"])
        optimizer.load(saved["optimizer"])
        best, kept, trace, first = (saved[k] for k in ("best", "kept", "trace", "step"))
    for step in range(first, steps):
        loss = objective()
        trace.append(loss.item())
        if not math.isfinite(trace[-1]):
            break
        if trace[-1] < best:
            best, kept = trace[-1], tuple(v.detach().clone() for v in variables)
        slopes = torch.autograd.grad(loss, variables, allow_unused=True)
        optimizer.step(slopes, [lr(step / steps)] * len(slopes))
        progress(run[0] * steps + step, run[1] * steps, trace[-1])
        if checkpoint.due():
            state = {"variables": [v.detach() for v in variables], "optimizer": optimizer.state()}
            checkpoint.save(rng, state | {"best": best, "kept": kept, "trace": trace, "step": step + 1})
    return Found(kept, best, tuple(trace))


def divergence(z: Tensor) -> Tensor:
    """R: KL(N(m, s^2) || N(0, 1)), m, s mean and deviation of an image's latents (N, dim); mean over images."""
    if z.shape[1] < 2:
        return z.square().mean() / 2
    m, s2 = z.mean(1), z.var(1, correction=0) + 1e-12
    return (s2 + m.square() - 1 - s2.log()).mean() / 2
