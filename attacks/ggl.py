"""Generative Gradient Leakage. Li, Zhang, Liu, Liu, CVPR 2022. https://arxiv.org/abs/2203.15696

    z* = argmin_z  D( T(dL(F(G(z, y)), y)/dW), g* ) + r R(z),      x* = G(z*, y)

The label y is read off the update, and the image is sought among those a generator can make, which holds where noise
leaves pixels no say. T is what a defence does to an update without drawing, and known: clients' guesses undergo it too.
"""

from typing import Literal

import torch

from attacks.base import register
from attacks.common import Matching
from attacks.labels import settle_labels
from attacks.latent import LatentInversion
from federated.wire import Observation, Reconstruction
from utils.cli import hp


@register("ggl")
class GGL(LatentInversion):
    """Generative Gradient Leakage: the latent of a class-conditional generator whose image explains the update.

    --paper sets the authors' search. Their generators, GANs trained on faces and on ImageNet, are not here: --generator
    wgan is of their kind.
    """

    paper = "Li, Zhang, Liu, Liu: Auditing Privacy Defenses via Generative Gradient Leakage. CVPR 2022"

    iterations: int = hp(300, "Adam steps of each run", least=1, paper=2500, source="authors' adam.py")
    evaluations: int = hp(3000, "CMA-ES: of the objective, in each run", least=1, paper=25000, source="500 x 50")
    lr: float = hp(0.1, "Adam's step; up over the first 5%, down over the last 25%", above=0, source="authors' adam.py")
    matching: Literal["cosine", "l2"] = hp("cosine", "D: cosine distance, or squared distance over tensors", paper="l2")
    prior: float = hp(1e-5, "weight r of R, the divergence of z's entries from N(0, 1)", least=0, paper=0.1)
    noise: float | None = hp(
        None,
        "deviation of noise on the update, then D is l2 and R the posterior's; default: what the recipe's defence adds",
        least=0,
        paper=0.0,
    )

    def reconstruct(self, seen: Observation, rng: torch.Generator) -> Reconstruction:
        match = Matching(seen, self.reading)
        labels = settle_labels(match.mean_gradient, seen, rng)
        prior = self.belief(seen.public, seen.task.num_classes)
        z, trace, evaluations = self.search(match, prior, labels, rng)
        return Reconstruction(
            images=prior.decode(z, labels),
            labels=labels,
            trace=trace,
            iterations=evaluations,
            restarts=self.restarts - 1,
            status="ok" if min(trace) < trace[0] else "diverged",
        )
