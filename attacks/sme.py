"""Surrogate Model Extension. Zhu, Yao, Blaschko, ICML 2023. https://arxiv.org/abs/2306.00127

    x* = argmin_{x, a}  1 - cos( dL(F(x; w^), y)/dw^,  W_t - W_t+1 ) + b TV(x),      w^ = a W_t + (1 - a) W_t+1

The local steps run from W_t to W_t+1, and at some point between the two the gradient of all images points along the
whole way. Where that point lies is learned with the pixels: one gradient for each iteration, whatever T is. A
gradient on the wire leaves nothing to learn, and the attack is Inverting Gradients.
"""

import torch
from torch import Tensor, nn

from attacks.base import register
from attacks.common import Matching, SignedInversion, cosine_distance, note_adam
from attacks.labels import settle_labels
from federated.wire import Observation, Recipe, Reconstruction, Task
from utils.cli import hp


@register("sme")
class SME(SignedInversion):
    """Surrogate Model Extension: cosine distance at a model between the one broadcast and the one returned."""

    paper = "Zhu, Yao, Blaschko: Surrogate Model Extension. ICML 2023"

    iterations: int = hp(300, "steps at the most, of each run", least=1, paper=5000, source="run_experiment.py")
    lr: float = hp(0.1, "Adam's step in the model's units", above=0, paper=1e-3, source="run_experiment.py")
    tv: float = hp(0.6, "total-variation weight", least=0, paper=1e-4, source="run_experiment.py")
    alpha: float = hp(0.5, "share of W_t in the surrogate at the start", least=0)
    alpha_lr: float = hp(0.01, "Adam's step for that share", above=0, paper=1e-3, source="run_experiment.py")

    def check(self, model: nn.Module, task: Task, recipe: Recipe, kind: str, num_examples: int) -> None:
        super().check(model, task, recipe, kind, num_examples)
        note_adam(recipe, kind)

    def reconstruct(self, seen: Observation, rng: torch.Generator) -> Reconstruction:
        match = Matching(seen, "average")
        labels = settle_labels(match.mean_gradient, seen, rng)
        if seen.update.kind == "gradient":
            return self.answer(*self.descend(match, labels, rng, match.cosine_distance))

        def cost(pixels: Tensor, labels: Tensor, alpha: Tensor) -> Tensor:
            ways = zip(match.meta.weights, seen.update.tensors, strict=True)
            surrogate = [w - (1 - alpha) * d for w, d in ways]
            ours = match.meta.gradient(seen.task.to_model(pixels), labels, surrogate)
            return cosine_distance(match.as_delta(ours), match.target)

        return self.answer(*self.descend(match, labels, rng, cost, extra={self.alpha: self.alpha_lr}))
