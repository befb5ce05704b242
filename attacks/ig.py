"""Inverting Gradients. Geiping, Bauermeister, Dröge, Moeller, NeurIPS 2020. https://arxiv.org/abs/2003.14053

    x* = argmin_{x valid}  1 - <g^, g*> / (||g^|| ||g*||) + a TV(x)        (all layers as one vector)

by Adam on the sign of the gradient, projected after each step. Three models of an update: g^ is one gradient at x
(ig_single), the change of the weights after T full-batch steps on x (ig_weight), or after E epochs of minibatches in
an order of the attacker's own (ig_multi). For a gradient update all three are the first.
"""

from abc import abstractmethod

import torch
from torch import nn

from attacks.base import MatchingDistance, register
from attacks.labels.inference import infer_labels
from attacks.matching.features import FeatureInversion
from attacks.matching.matcher import GradientMatcher, note_adam
from attacks.matching.runs import to_reconstruction
from core.protocol import Observation, Recipe, Reconstruction, Task


class CosineInversion(FeatureInversion):
    """What the three attacks share: they differ only in how they model an update."""

    citation = "Geiping, Bauermeister, Dröge, Moeller: Inverting Gradients. NeurIPS 2020"
    link = "https://arxiv.org/abs/2003.14053"
    accumulates = True

    @abstractmethod
    def matcher(self, observation: Observation, fast_convs: bool = True) -> GradientMatcher:
        """The observed update, and how a client's examples would have caused it."""

    def matching_objective(self, observation: Observation) -> MatchingDistance | None:
        matcher = self.matcher(observation, fast_convs=False)
        return None if matcher.counter.variables else matcher.cosine_distance

    def reconstruct(self, observation: Observation, rng: torch.Generator) -> Reconstruction:
        labels = infer_labels(self.matcher(observation).mean_gradient, observation, rng)
        return to_reconstruction(self.runs(observation, labels, self.matcher, rng))


@register("ig_single")
class IGSingle(CosineInversion):
    """Inverting Gradients: cosine distance and total variation; a weight update counts as one gradient."""

    def check(self, model: nn.Module, task: Task, recipe: Recipe, kind: str, num_examples: int) -> None:
        super().check(model, task, recipe, kind, num_examples)
        note_adam(recipe, kind)

    def matcher(self, observation: Observation, fast_convs: bool = True) -> GradientMatcher:
        return GradientMatcher(observation, "single_step", fast_convs=fast_convs, precision=self.precision)


@register("ig_weight")
class IGWeight(CosineInversion):
    """Inverting Gradients through T local steps, each on all examples at once: made for one example."""

    paper = {"iterations": (8000, "authors' notebook"), "tv": (1e-6, "authors' notebook")}

    def matcher(self, observation: Observation, fast_convs: bool = True) -> GradientMatcher:
        everyone = torch.arange(observation.update.num_examples)
        batches = [everyone] * observation.recipe.steps(len(everyone))
        return GradientMatcher(observation, "unrolled", batches, fast_convs=fast_convs, precision=self.precision)


@register("ig_multi")
class IGMulti(CosineInversion):
    """Inverting Gradients through E epochs of minibatches, in a fixed order of the attacker's own."""

    paper = {
        "iterations": (24000, "authors' notebook"),
        "restarts": (8, "authors' notebook"),
        "lr": (1.0, "authors' notebook"),
        "tv": (1e-6, "authors' notebook"),
    }

    def matcher(self, observation: Observation, fast_convs: bool = True) -> GradientMatcher:
        return GradientMatcher(observation, "unrolled", fast_convs=fast_convs, precision=self.precision)
