"""Data Leakage in Federated Averaging. Dimitrov, Balunović, Konstantinov, Vechev, TMLR 2022.
https://arxiv.org/abs/2206.12395

    X* = argmin_X  sum_l e^-l || Phi(X)_l - dW_l ||^2 + r / E^2 sum_{e,f} || g(X_e) - g(X_f) ||^2 + a TV(X)

A client shuffles in every epoch, in an order that the server does not know. So each epoch e of the simulated training
Phi has images X_e of its own, and a prior that does not depend on their order ties them: g is the largest response
among an epoch's images at every place and channel of a fixed random convolution. At the end the epochs' images are
matched one to one and averaged. Restarts are selected by the objective; the authors' code selects by PSNR.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from attacks.base import MatchingDistance, register
from attacks.labels.inference import infer_labels
from attacks.matching.matcher import GradientMatcher
from attacks.matching.runs import best_of, to_reconstruction
from attacks.matching.signed_inversion import MatchingObjective, SignedInversion
from core.hyperparameters import hp
from core.protocol import Observation, Reconstruction


@register("dlf")
class DLF(SignedInversion):
    """Data Leakage in Federated Averaging: images for every epoch, tied by a prior that ignores their order."""

    citation = "Dimitrov, Balunović, Konstantinov, Vechev: Data Leakage in Federated Averaging. TMLR 2022"
    link = "https://arxiv.org/abs/2206.12395"
    paper = {
        "iterations": (400, "authors' README"),
        "signed": (False, "flax_losses.py"),
        "tv": (2e-4, "authors' README"),
        "layer_decay": (1.0, "att_exp_layers"),
    }

    order_prior: float = hp(6.075, "weight r of the order-invariant prior", ge=0, source="authors' README")
    features: int = hp(96, "channels of the prior's random 3x3 convolution", ge=1, source="flax_losses.py")
    layer_decay: float = hp(0.0, "decay d of the distance's layer weights e^(-d l)", ge=0)

    def matching_objective(self, observation: Observation) -> MatchingDistance | None:
        """The weighted distance for the same images in every epoch, which the order prior leaves alone."""
        objective = self._objective(self._matcher(observation, fast_convs=False), torch.Generator())
        if objective.variables:
            return None
        epochs = objective.epochs
        return lambda examples, labels: objective.distance(
            examples.repeat(epochs, *[1] * (examples.ndim - 1)), labels.repeat(epochs)
        )

    def reconstruct(self, observation: Observation, rng: torch.Generator) -> Reconstruction:
        n, shape = observation.update.num_examples, observation.task.domain.shape
        matcher = self._matcher(observation)
        labels = infer_labels(matcher.mean_gradient, observation, rng)
        objective = self._objective(matcher, rng)
        runs = self.descend(objective, labels, rng, copies=objective.epochs)
        return to_reconstruction(runs, consensus(best_of(runs).examples.view(objective.epochs, n, *shape)))

    def _matcher(self, observation: Observation, fast_convs: bool = True) -> GradientMatcher:
        n, recipe = observation.update.num_examples, observation.recipe
        per_epoch = recipe.steps(n) // recipe.local_epochs
        batches = [batch + n * (step // per_epoch) for step, batch in enumerate(recipe.batches(n))]
        return GradientMatcher(observation, "unrolled", batches, fast_convs=fast_convs, precision=self.precision)

    def _objective(self, matcher: GradientMatcher, rng: torch.Generator) -> "EpochObjective":
        epochs = 1 if matcher.is_gradient else matcher.recipe.local_epochs
        channels = matcher.task.domain.shape[0]
        kernel = torch.randn(self.features, channels, 3, 3, generator=rng).to(matcher.target[0])
        kernel /= kernel[0].numel() ** 0.5
        return EpochObjective(matcher, kernel, epochs, self.order_prior, self.layer_decay)


class EpochObjective(MatchingObjective):
    """DLF's objective without total variation, on the images of all epochs (E * N, C, H, W)."""

    def __init__(
        self, matcher: GradientMatcher, kernel: Tensor, epochs: int, order_prior: float, layer_decay: float
    ) -> None:
        super().__init__(matcher)
        self.kernel, self.epochs, self.order_prior = kernel, epochs, order_prior
        self.weights = [math.exp(-layer_decay * (i // 2)) for i in range(len(matcher.target))]
        self.scale = sum(w * t.square().sum() for w, t in zip(self.weights, matcher.target, strict=True))

    def distance(self, examples: Tensor, labels: Tensor, *extra: Tensor) -> Tensor:
        ours = self.matcher.simulate(examples, labels, *extra)
        triples = zip(self.weights, ours, self.matcher.target, strict=True)
        distance = sum(w * (a - b).square().sum() for w, a, b in triples) / self.scale
        if self.epochs == 1 or not self.order_prior:
            return distance
        responses = F.conv2d(examples, self.kernel, padding=1)
        largest = responses.view(self.epochs, len(examples) // self.epochs, -1).amax(1)  # (E, features * H * W)
        # the mean over all pairs of epochs of |a - b|^2 is twice the variance
        return distance + self.order_prior * 2 * largest.var(0, correction=0).mean()


def consensus(epochs: Tensor) -> Tensor:
    """(E, N, C, H, W) -> (N, C, H, W): each epoch's images assigned one to one to the first's, then the mean."""
    from scipy.optimize import linear_sum_assignment

    first = epochs[0].flatten(1)
    aligned = []
    for images in epochs:
        cost = torch.stack([(row - images.flatten(1)).square().mean(1) for row in first])  # (N, N)
        _, columns = linear_sum_assignment(cost.cpu().numpy())
        aligned.append(images[torch.as_tensor(columns, device=images.device)])
    return torch.stack(aligned).mean(0)
