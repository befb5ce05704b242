"""Data Leakage in Federated Averaging. Dimitrov, Balunović, Konstantinov, Vechev, TMLR 2022.
https://arxiv.org/abs/2206.12395

    X* = argmin_X  sum_l e^-l || Phi(X)_l - dW_l ||^2 + r / E^2 sum_{e,f} || g(X_e) - g(X_f) ||^2 + a TV(X)

A client shuffles anew in every epoch, and the server does not know how: so each epoch e has images X_e of its own
where Phi trains, and a prior that no order changes holds them together, g = the largest response among an epoch's
images at every place and channel of a fixed random convolution. At the end the epochs' images are matched one to one
and averaged. Restarts are chosen by the objective, where the authors' code takes the best PSNR.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from attacks.base import register
from attacks.common import Matching, SignedInversion
from attacks.labels import settle_labels
from federated.wire import Observation, Reconstruction
from utils.cli import hp


@register("dlf")
class DLF(SignedInversion):
    """Data Leakage in Federated Averaging: images for every epoch, tied by a prior that no order changes."""

    paper = "Dimitrov, Balunović, Konstantinov, Vechev: Data Leakage in Federated Averaging. TMLR 2022"

    iterations: int = hp(300, "steps at the most, of each run", least=1, paper=400, source="authors' README")
    signed: bool = hp(True, "only the sign of the slope", paper=False, source="flax_losses.py")
    tv: float = hp(0.6, "total-variation weight", least=0, paper=2e-4, source="authors' README")
    order: float = hp(6.075, "weight r of the order-invariant prior", least=0, source="authors' README")
    features: int = hp(96, "channels of its random 3x3 convolution", least=1, source="flax_losses.py")
    layer_decay: float = hp(
        0.0, "layer l of the distance weighs e^(-decay l)", least=0, paper=1.0, source="att_exp_layers"
    )

    def reconstruct(self, seen: Observation, rng: torch.Generator) -> Reconstruction:
        n, recipe = seen.update.num_examples, seen.recipe
        epochs = 1 if seen.update.kind == "gradient" else recipe.local_epochs
        per_epoch = recipe.steps(n) // recipe.local_epochs
        batches = [batch + n * (step // per_epoch) for step, batch in enumerate(recipe.batches(n))]
        match = Matching(seen, "unrolled", batches)
        labels = settle_labels(match.mean_gradient, seen, rng)
        kernel = torch.randn(self.features, seen.task.image_shape[0], 3, 3, generator=rng).to(match.target[0])
        kernel /= kernel[0].numel() ** 0.5
        weights = [math.exp(-self.layer_decay * (i // 2)) for i in range(len(match.target))]
        scale = sum(w * t.square().sum() for w, t in zip(weights, match.target, strict=True))

        def cost(pixels: Tensor, labels: Tensor) -> Tensor:
            triples = zip(weights, match.simulate(pixels, labels), match.target, strict=True)
            distance = sum(w * (ours - its).square().sum() for w, ours, its in triples) / scale
            if epochs == 1 or not self.order:
                return distance
            responses = F.conv2d(pixels, kernel, padding=1).view(epochs, n, -1).amax(1)  # (E, features * H * W)
            # mean over all pairs of epochs of |a - b|^2 is twice the variance
            return distance + self.order * 2 * responses.var(0, correction=0).mean()

        best, iterations = self.descend(match, labels, rng, cost, copies=epochs)
        return self.answer(best, iterations, consensus(best.pixels.view(epochs, n, *seen.task.image_shape)))


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
