"""Gradient Inversion with Generative Image Prior. Jeon, Kim, Lee, Oh, Ok, NeurIPS 2021. https://arxiv.org/abs/2110.14962

    z* = argmin_z D( g(G_w(z, y)), g* ) + r R(z),     w* = argmin_w D( g(G_w(z*, y)), g* ),     x* = G_w*(z*, y)

First the latent, then the generator's own weights. Moved weights make images outside the generator's range. Only the
initial weights and the architecture restrict them, so noise on the update appears in the images.
"""

import copy
from typing import Literal

import torch

from attacks.base import register
from attacks.matching.latent import LatentInversion, Search, steps
from attacks.optim.adam import Adam
from attacks.optim.loop import Function, Phase, copy_, descend
from attacks.optim.tracker import current_tracker
from core.hyperparameters import hp
from core.protocol import Observation, Reconstruction


@register("gias")
class GIAS(LatentInversion):
    """Gradient Inversion with Generative Image Prior: a latent of a trained generator, then its weights."""

    citation = "Jeon, Kim, Lee, Oh, Ok: Gradient Inversion with Generative Image Prior. NeurIPS 2021"
    link = "https://arxiv.org/abs/2110.14962"
    kinds = frozenset({"continuous"})

    paper = {
        "iterations": (500, "authors' ours_v2_bs4.sh, 32x32"),
        "restarts": (3, "authors' ours_v2_bs4.sh"),
        "lr": (0.03, "authors' ours_v2_bs4.sh"),
        "schedule": ("step", "authors' reconstruction_algorithms.py"),
        "init_std": (1.0, "authors' reconstruction_algorithms.py"),
        "latent_weight": (0.0, "z_norm of authors' reconstruction_algorithms.py"),
        "noise": (0.0, "not in the paper"),
        "weight_iterations": (5000, "authors' ours_v2_bs4.sh, 32x32"),
        "weight_schedule": ("step", "authors' reconstruction_algorithms.py"),
    }

    generator: Literal["vae", "wgan"] = hp(
        "vae", "generator G, trained on public images: in minutes (vae) or in hours (wgan)"
    )
    weight_iterations: int = hp(200, "Adam steps on G's weights", ge=1, smoke=3)
    weight_lr: float = hp(1e-3, "Adam step on G's weights", gt=0, source="authors' ours_v2_bs4.sh")
    weight_schedule: Literal["linear", "step"] = hp(
        "linear", "schedule of the step on G's weights: linear to zero, or x 0.1 at 3/8, 5/8 and 7/8"
    )

    def reconstruct(self, observation: Observation, rng: torch.Generator) -> Reconstruction:
        matcher, labels, generator = self.start(observation, rng)
        generator = copy.deepcopy(generator)
        (z, *unknowns), trace, evaluations = self.search(matcher, generator, labels, rng)
        objective = self.objective(matcher, generator, labels)
        weights = list(generator.requires_grad_().parameters())

        def move_weights() -> Search:
            factor = steps if self.weight_schedule == "step" else lambda i, total: 1 - i / total
            total = self.weight_iterations
            phase = Phase(lambda i: [self.weight_lr * factor(i, total)] * len(weights), total)
            function = Function(lambda *_: objective(generator.decode(z, labels), z, *unknowns))
            return Search.of(descend(weights, function, Adam(weights), [phase], rng))

        moved = current_tracker().run_segment(Search, rng, move_weights)
        copy_(weights, moved.values)
        with torch.no_grad():
            images = generator.decode(z, labels)
        return Reconstruction(
            examples=images,
            labels=labels,
            trace=trace + moved.trace,
            iterations=evaluations + len(moved.trace),
            restarts=self.restarts - 1,
            status="ok" if min(trace) < trace[0] else "diverged",
        )
