"""Surrogate Model Extension. Zhu, Yao, Blaschko, ICML 2023. https://arxiv.org/abs/2306.00127

    x* = argmin_{x, a}  1 - cos( dL(F(x; w^), y)/dw^,  W_t - W_t+1 ) + b TV(x),      w^ = a W_t + (1 - a) W_t+1

The local steps run from W_t to W_t+1, and at some point between the two the gradient of all images points along the
whole way. Where that point lies is learned with the pixels: one gradient for each iteration, whatever T is. A
gradient on the wire leaves nothing to learn, and the attack is Inverting Gradients.

Clients bend off the straight line, and there no choice of points explains the update: at the true images the distance
stays at 0.03 to 0.05 after twenty steps of the cnn at a rate of 0.01. Our default corrects the surrogate (defect
correction, Stetter 1978). Every few iterations the guess x' goes through the client's own local steps, without a way
back; what the surrogate says otherwise is taken off what it says until the next time:

    x* = argmin_{x, a}  1 - cos( s(x, a) - e, W_t - W_t+1 ),      e = s(x', a') - u(x')

with s the surrogate's gradient and u the client's update, both scaled to go all the way. Where guesses come to rest
s - e is u: the objective is that of the unrolled attack, for one gradient with a slope in each iteration.
"""

from collections.abc import Sequence

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
    correct: int = hp(5, "iterations from one correction to the next; 0: none, as published", least=0, paper=0)
    alpha: float = hp(0.5, "share of W_t in the surrogate at the start", least=0, most=1)
    alpha_lr: float = hp(0.0, "Adam's step for it; 0: it stays", least=0, paper=1e-3, source="run_experiment.py")

    def check(self, model: nn.Module, task: Task, recipe: Recipe, kind: str, num_examples: int) -> None:
        super().check(model, task, recipe, kind, num_examples)
        note_adam(recipe, kind)

    def reconstruct(self, seen: Observation, rng: torch.Generator) -> Reconstruction:
        several = seen.update.kind == "delta" and seen.recipe.steps(seen.update.num_examples) > 1
        match = Matching(seen, "unrolled" if several and self.correct else "average")
        labels = settle_labels(match.mean_gradient, seen, rng)
        if not several:
            return self.answer(*self.descend(match, labels, rng, match.cosine_distance))
        match.hasten(match.count)
        surrogate = Surrogate(match, seen.update.tensors)
        extra, correct = {self.alpha: self.alpha_lr}, surrogate.correct if self.correct else None
        found = self.descend(match, labels, rng, surrogate.distance, extra=extra, correct=correct, every=self.correct)
        return self.answer(*found)


class Surrogate:
    """One model between the one broadcast and the one returned, in whose place clients are taken to have trained."""

    def __init__(self, match: Matching, delta: Sequence[Tensor]) -> None:
        self.match, self.delta = match, match.meta.laid_out(delta)
        self.length = inner(match.target, match.target)
        self.error: list[Tensor] | None = None

    def distance(self, pixels: Tensor, labels: Tensor, alpha: Tensor) -> Tensor:
        """1 - cos to what was sent, of the gradient at `alpha` W_t + (1 - `alpha`) W_t+1 as it was last corrected."""
        said = self._says(pixels, labels, alpha)
        if self.error is not None:
            said = [s - e for s, e in zip(self._whole(said), self.error, strict=True)]
        return cosine_distance(said, self.match.target)

    @torch.no_grad()
    def correct(self, pixels: Tensor | None, labels: Tensor, *alpha: Tensor) -> None:
        """From here on nothing is wrong at these pixels; None: forget what was."""
        self.error = None
        if pixels is not None:
            pairs = zip(
                self._whole(self._says(pixels, labels, *alpha)),
                self._whole(self.match.simulate(pixels, labels)),
                strict=True,
            )
            self.error = [said - sent for said, sent in pairs]

    def _says(self, pixels: Tensor, labels: Tensor, alpha: Tensor) -> tuple[Tensor, ...]:
        match = self.match
        between = [w - (1 - alpha) * d for w, d in zip(match.meta.weights, self.delta, strict=True)]
        inputs = match.task.to_model(pixels)
        return match.as_delta(match.meta.gradient(inputs, labels, between, create_graph=torch.is_grad_enabled()))

    def _whole(self, sent: Sequence[Tensor]) -> list[Tensor]:
        """Scaled to go as far along the client's way as the client; what hardly does, to ten times its length."""
        along, square = inner_and_square(sent, self.match.target)
        along = torch.maximum(along, 0.1 * (square * self.length).clamp(min=TINY).sqrt())
        return [self.length / along.clamp(min=TINY) * t for t in sent]
