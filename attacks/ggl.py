"""Generative Gradient Leakage. Li, Zhang, Liu, Liu, CVPR 2022. https://arxiv.org/abs/2203.15696

    z* = argmin_z  D( T(dL(F(G(z, y)), y)/dW), g* ) + r R(z),      x* = G(z*, y)

The label y is read off the update, and the image is sought among those a generator can make, which holds where noise
leaves pixels no say. T is what a defence does to an update without drawing, and known: clients' guesses undergo it too.
"""

import torch

from attacks.base import register
from attacks.common import Matching
from attacks.labels import settle_labels
from attacks.latent import LatentInversion
from federated.wire import Observation, Reconstruction


@register("ggl")
class GGL(LatentInversion):
    """Generative Gradient Leakage: the latent of a class-conditional generator whose image explains the update."""

    paper = "Li, Zhang, Liu, Liu: Auditing Privacy Defenses via Generative Gradient Leakage. CVPR 2022"

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
