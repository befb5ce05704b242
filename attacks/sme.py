"""Surrogate Model Extension. Zhu, Yao, Blaschko, ICML 2023. https://arxiv.org/abs/2306.00127

    x* = argmin_{x, a}  1 - cos( dL(F(x; w^), y)/dw^,  W_t - W_t+1 ) + b TV(x),      w^ = a W_t + (1 - a) W_t+1

The local steps run from W_t to W_t+1, and at some point between the two the gradient of all images points along the
whole way. Where that point lies is learned with the pixels: one gradient for each iteration, whatever T is. A
gradient on the wire leaves nothing to learn, and the attack is Inverting Gradients.

Clients bend off the straight line, and there no choice of points explains the update: at the true images the distance
stays at 0.03 to 0.05 after twenty steps of the cnn at a rate of 0.01. Our default follows the bend in a few strides

    W_k+1 = W_k - c_k g(W_k + (W_t+1 - W_k) / (2 (K - k))),      c_k such that each goes 1/K of the way to W_t+1

and matches their sum: K gradients for each iteration, whatever T is, and under 0.01 at the truth for K = 4.
"""

import torch
from torch import Tensor, nn

from attacks.base import register
from attacks.common import TINY, Matching, SignedInversion, cosine_distance, inner, inner_and_square, note_adam
from attacks.labels import settle_labels
from federated.wire import Observation, Recipe, Reconstruction, Task
from utils.cli import hp


@register("sme")
class SME(SignedInversion):
    """Surrogate Model Extension: cosine distance at models between the one broadcast and the one returned."""

    paper = "Zhu, Yao, Blaschko: Surrogate Model Extension. ICML 2023"

    iterations: int = hp(300, "steps at the most, of each run", least=1, paper=5000, source="run_experiment.py")
    lr: float = hp(0.1, "Adam's step in the model's units", above=0, paper=1e-3, source="run_experiment.py")
    tv: float = hp(0.6, "total-variation weight", least=0, paper=1e-4, source="run_experiment.py")
    strides: int = hp(
        4, "K, from W_t to W_t+1, T at the most; 1: one surrogate on the straight line, as published", least=1, paper=1
    )
    alpha: float = hp(0.5, "share of W_t in the one surrogate at the start", least=0, most=1)
    alpha_lr: float = hp(0.01, "Adam's step for that share", above=0, paper=1e-3, source="run_experiment.py")

    def check(self, model: nn.Module, task: Task, recipe: Recipe, kind: str, num_examples: int) -> None:
        super().check(model, task, recipe, kind, num_examples)
        note_adam(recipe, kind)

    def reconstruct(self, seen: Observation, rng: torch.Generator) -> Reconstruction:
        match = Matching(seen, "average")
        labels = settle_labels(match.mean_gradient, seen, rng)
        if seen.update.kind == "gradient" or seen.recipe.steps(match.count) == 1:
            return self.answer(*self.descend(match, labels, rng, match.cosine_distance))

        match.hasten(match.count)
        strides = min(self.strides, seen.recipe.steps(match.count))
        whole = match.meta.laid_out(seen.update.tensors)
        length = inner(whole, whole)
        # a stride that `left` remain of starts at W_k = W_t - way and looks from halfway(W_k) = ahead - (1 - s) way
        shares = [0.5 / left for left in range(strides, 0, -1)]
        ahead = [[w - s * d for w, d in zip(match.meta.weights, whole, strict=True)] for s in shares]

        def slope(pixels: Tensor, labels: Tensor, weights: list[Tensor]) -> tuple[Tensor, ...]:
            return match.as_delta(match.meta.gradient(seen.task.to_model(pixels), labels, weights))

        def surrogate(pixels: Tensor, labels: Tensor, alpha: Tensor) -> Tensor:
            between = [w - (1 - alpha) * d for w, d in zip(match.meta.weights, whole, strict=True)]
            return cosine_distance(slope(pixels, labels, between), match.target)

        def followed(pixels: Tensor, labels: Tensor) -> Tensor:
            way = [torch.zeros_like(d) for d in whole]
            for s, there in zip(shares, ahead, strict=True):
                halfway = [torch.sub(w, a, alpha=1 - s) for w, a in zip(there, way, strict=True)]
                g = slope(pixels, labels, halfway)
                along, square = inner_and_square(g, whole)
                # a guess that is far off may even step back: no stride is more than ten times its share
                along = torch.maximum(along, 0.1 * (square * length).clamp(min=TINY).sqrt())
                c = length / strides / along.clamp(min=TINY)
                way = [a + c * t for a, t in zip(way, g, strict=True)]
            return cosine_distance(way, match.target)

        if strides > 1:
            return self.answer(*self.descend(match, labels, rng, followed))
        return self.answer(*self.descend(match, labels, rng, surrogate, extra={self.alpha: self.alpha_lr}))
