"""Inverting Gradients. Geiping, Bauermeister, Dröge, Moeller, NeurIPS 2020. https://arxiv.org/abs/2003.14053

    x* = argmin_{x in [0, 1]}  1 - <g^, g*> / (||g^|| ||g*||) + a TV(x)        (all layers as one vector)

by Adam on the sign of the slope, projected into the box after each step. Three readings of an update: g^ is one
gradient at x (ig_single), the change of the weights after T full-batch steps on x (ig_weight), or after E epochs of
minibatches in an order of the attacker's own (ig_multi). A gradient on the wire makes all three the first.
"""

from abc import abstractmethod

import torch
from torch import nn

from attacks.base import register
from attacks.common import Matching, SignedInversion, note_adam
from attacks.labels import settle_labels
from federated.wire import Observation, Recipe, Reconstruction, Task
from utils.cli import hp

PAPER = "Geiping, Bauermeister, Dröge, Moeller: Inverting Gradients. NeurIPS 2020"


class CosineInversion(SignedInversion):
    """What differs between the three is how an update is read."""

    @abstractmethod
    def read(self, seen: Observation) -> Matching:
        """The update, and how a client's images would have made it."""

    def reconstruct(self, seen: Observation, rng: torch.Generator) -> Reconstruction:
        match = self.read(seen)
        labels = settle_labels(match.mean_gradient, seen, rng)
        return self.answer(*self.descend(match, labels, rng, match.cosine_distance))


@register("ig_single")
class IGSingle(CosineInversion):
    """Inverting Gradients: cosine distance and total variation; a weight update is taken for one gradient."""

    paper = PAPER

    def check(self, model: nn.Module, task: Task, recipe: Recipe, kind: str, num_examples: int) -> None:
        super().check(model, task, recipe, kind, num_examples)
        note_adam(recipe, kind)

    def read(self, seen: Observation) -> Matching:
        return Matching(seen, "average")


@register("ig_weight")
class IGWeight(CosineInversion):
    """Inverting Gradients through T local steps, each on all images at once: made for one image."""

    paper = PAPER

    iterations: int = hp(300, "steps at the most, of each run", least=1, paper=8000, source="authors' notebook")
    tv: float = hp(0.6, "total-variation weight", least=0, paper=1e-6, source="authors' notebook")

    def read(self, seen: Observation) -> Matching:
        everyone = torch.arange(seen.update.num_examples)
        return Matching(seen, "unrolled", [everyone] * seen.recipe.steps(len(everyone)))


@register("ig_multi")
class IGMulti(CosineInversion):
    """Inverting Gradients through E epochs of minibatches, in a fixed order of the attacker's own."""

    paper = PAPER

    iterations: int = hp(300, "steps at the most, of each run", least=1, paper=24000, source="authors' notebook")
    restarts: int = hp(1, "runs; the lowest objective counts", least=1, paper=8, source="authors' notebook")
    lr: float = hp(
        0.1, "Adam's step in the model's units; x 0.1 at 3/8, 5/8, 7/8", above=0, paper=1.0, source="authors' notebook"
    )

    def read(self, seen: Observation) -> Matching:
        return Matching(seen, "unrolled")
