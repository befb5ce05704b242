"""Gradient Inversion with Generative Image Prior. Jeon, Kim, Lee, Oh, Ok, NeurIPS 2021. https://arxiv.org/abs/2110.14962

    z* = argmin_z D( g(G_w(z, y)), g* ) + r R(z),     w* = argmin_w D( g(G_w(z*, y)), g* ),     x* = G_w*(z*, y)

First the latent, then the generator's own weights, which leads to images that no latent has. What holds them is only
where they started and how they are made, so under noise they follow the noise.
"""

import copy
from typing import Literal

import torch

from attacks.base import checkpoint, register
from attacks.common import Matching, put
from attacks.labels import settle_labels
from attacks.latent import Found, LatentInversion, descend
from federated.wire import Observation, Reconstruction
from utils.cli import hp


@register("gias")
class GIAS(LatentInversion):
    """Gradient Inversion with Generative Image Prior: a latent of a trained generator, then its weights."""

    paper = "Jeon, Kim, Lee, Oh, Ok: Gradient Inversion with Generative Image Prior. NeurIPS 2021"

    generator: Literal["vae", "wgan"] = hp("vae", "G, trained on public images: in minutes (vae), or in hours (wgan)")
    weight_iterations: int = hp(200, "Adam steps on G's weights", least=1)
    weight_lr: float = hp(1e-3, "Adam's step on G's weights, falling linearly", above=0)

    def reconstruct(self, seen: Observation, rng: torch.Generator) -> Reconstruction:
        match = Matching(seen, self.reading)
        labels = settle_labels(match.mean_gradient, seen, rng)
        prior = copy.deepcopy(self.belief(seen.public, seen.task.num_classes))
        z, trace, evaluations = self.search(match, prior, labels, rng)
        score, weights = self.score(match, prior, labels), list(prior.requires_grad_().parameters())

        def move() -> Found:
            def lr(share: float) -> float:
                return self.weight_lr * (1 - share)

            return descend(weights, lambda: score(prior.decode(z, labels), z), self.weight_iterations, lr, rng)

        moved = checkpoint.stretch(Found, rng, move)
        put(weights, moved.values)
        with torch.no_grad():
            images = prior.decode(z, labels)
        return Reconstruction(
            images=images,
            labels=labels,
            trace=trace + moved.trace,
            iterations=evaluations + len(moved.trace),
            restarts=self.restarts - 1,
            status="ok" if min(trace) < trace[0] else "diverged",
        )
