"""Generative Gradient Leakage. Li, Zhang, Liu, Liu, CVPR 2022. https://arxiv.org/abs/2203.15696

    z* = argmin_z  D( T(dL(F(G(z, y)), y)/dW), g* ) + r R(z),      x* = G(z*, y)

The label y is inferred from the update. The image is searched among those that a generator can make, which works where
noise hides the pixels. T is the deterministic part of a known defence, applied to the simulated gradient as well.
"""

import torch

from attacks.base import register
from attacks.matching.latent import LatentInversion
from core.protocol import Observation, Reconstruction


@register("ggl")
class GGL(LatentInversion):
    """Generative Gradient Leakage: the latent of a class-conditional generator whose image explains the update.

    --paper selects the authors' search. Their generators, GANs trained on faces and on ImageNet, are not included;
    --generator wgan is a GAN trained on the public images.
    """

    citation = "Li, Zhang, Liu, Liu: Auditing Privacy Defenses via Generative Gradient Leakage. CVPR 2022"
    link = "https://arxiv.org/abs/2203.15696"
    kinds = frozenset({"continuous"})
    paper = {
        "iterations": (2500, "authors' adam.py"),
        "evaluations": (25000, "500 generations of 50"),
        "distance": ("l2", "authors' code"),
        "latent_weight": (0.1, "authors' code"),
        "noise": (0.0, "authors' code"),
        "init_std": (1.0, "authors' reconstructor.py"),
    }

    def reconstruct(self, observation: Observation, rng: torch.Generator) -> Reconstruction:
        matcher, labels, generator = self.start(observation, rng)
        (z, *_), trace, evaluations = self.search(matcher, generator, labels, rng)
        return Reconstruction(
            examples=generator.decode(z, labels),
            labels=labels,
            trace=trace,
            iterations=evaluations,
            restarts=self.restarts - 1,
            status="ok" if min(trace) < trace[0] else "diverged",
        )
