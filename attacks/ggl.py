"""Generative Gradient Leakage. Li, Zhang, Liu, Liu, CVPR 2022. https://arxiv.org/abs/2203.15696

    z* = argmin_z  D( dL(F(G(z, y)), y)/dW, g* ) + r R(z),      x* = G(z*, y)

The label y is read off the update, and the image is sought among those a generator can make, which holds where noise
leaves pixels no say. What comes out looks like the class whatever the update said: a score means nothing beside
`class_baseline_psnr`, which is what the label alone was worth. The generator here is fitted to public images.
"""

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from attacks.base import Attack, progress, register
from attacks.common import Matching, Reading
from attacks.labels import settle_labels
from federated.wire import Observation, Reconstruction
from models.generators import ClassPCA
from utils.cli import hp


@register("ggl")
class GGL(Attack):
    """Generative Gradient Leakage: the latent of a class-conditional generator whose image explains the update."""

    paper = "Li, Zhang, Liu, Liu: Auditing Privacy Defenses via Generative Gradient Leakage. CVPR 2022"
    threat = "honest-but-curious"
    wants_model = "cnn"
    reads_adam = True

    iterations: int = hp(300, "Adam steps of each run", least=1, paper=2500, source="authors' adam.py")
    restarts: int = hp(1, "runs; the lowest objective counts", least=1)
    lr: float = hp(0.1, "Adam's step; up over the first 5%, down over the last 25%", above=0, source="authors' adam.py")
    latents: int = hp(32, "of an image: components of its class", least=1)
    matching: Literal["cosine", "l2"] = hp("cosine", "D: cosine distance, or squared distance over tensors", paper="l2")
    prior: float = hp(1e-4, "weight r of R, the divergence of z's entries from N(0, 1)", least=0, paper=0.1)
    noise: float = hp(
        0.0, "deviation of noise known to be on the gradient: then D is l2 and R the posterior's", least=0
    )
    reading: Reading = hp(
        "auto", "of a delta: average (as one gradient), unrolled (through the local steps), auto (unrolled if T > 1)"
    )

    def reconstruct(self, seen: Observation, rng: torch.Generator) -> Reconstruction:
        match = Matching(seen, self.reading)
        labels = settle_labels(match.mean_gradient, seen, rng)
        generator = ClassPCA(seen.public, self.latents)

        def objective(z: Tensor) -> Tensor:
            images, tensors = generator.decode(z, labels), len(match.target)
            if self.noise:
                return (match.squared_distance(images, labels) + self.noise**2 * z.square().sum()) / tensors
            if self.matching == "l2":
                return match.squared_distance(images, labels) / tensors + self.prior * divergence(z)
            return match.cosine_distance(images, labels) + self.prior * divergence(z)

        runs = []
        for run in range(self.restarts):
            start = 0.01 * torch.randn(len(labels), generator.dim, generator=rng)
            runs.append(self._search(objective, start.to(match.target[0]), run))
        z, trace = min(runs, key=lambda found: min(found[1]))
        failed = not min(trace) < trace[0]
        return Reconstruction(
            images=generator.decode(z, labels),
            labels=labels,
            trace=tuple(trace),
            iterations=sum(len(t) for _, t in runs),
            restarts=self.restarts - 1,
            status="diverged" if failed else "ok",
        )

    def _search(self, objective: Callable[[Tensor], Tensor], start: Tensor, run: int) -> tuple[Tensor, list[float]]:
        """One run of Adam from `start`: the latents with the lowest objective, and its course."""
        z = start.clone().requires_grad_()
        optimizer = torch.optim.Adam([z], lr=self.lr)
        best, kept, trace = math.inf, start, []
        for step in range(self.iterations):
            left = 1 - step / self.iterations
            down = 0.5 - 0.5 * math.cos(math.pi * min(1.0, left / 0.25))
            optimizer.param_groups[0]["lr"] = self.lr * down * min(1.0, (1 - left + 1 / self.iterations) / 0.05)
            loss = objective(z)
            trace.append(loss.item())
            if not math.isfinite(trace[-1]):
                break
            if trace[-1] < best:
                best, kept = trace[-1], z.detach().clone()
            (z.grad,) = torch.autograd.grad(loss, [z])
            optimizer.step()
            progress(run * self.iterations + step, self.restarts * self.iterations, trace[-1])
        return kept, trace


def divergence(z: Tensor) -> Tensor:
    """R: KL(N(m, s^2) || N(0, 1)), m, s mean and deviation of an image's latents (N, dim); mean over images."""
    if z.shape[1] < 2:
        return z.square().mean() / 2
    m, s2 = z.mean(1), z.var(1, correction=0) + 1e-12
    return (s2 + m.square() - 1 - s2.log()).mean() / 2
