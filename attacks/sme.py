"""Surrogate Model Extension. Zhu, Yao, Blaschko, ICML 2023. https://arxiv.org/abs/2306.00127

    x* = argmin_{x, a}  1 - cos( dL(F(x; w^), y)/dw^,  W_t - W_t+1 ) + b TV(x),      w^ = a W_t + (1 - a) W_t+1

The local steps lead from W_t to W_t+1. The gradient of all examples at some model between the two is assumed to be
parallel to W_t - W_t+1, and the position a of this model is optimised together with the examples: one gradient per
iteration, whatever T is. For a gradient update there is no such position, and the attack is Inverting Gradients.

The clients' path is curved, and then no model on the straight line explains the update: at the true examples the
distance stays at 0.03 to 0.05 after twenty steps of the cnn at a rate of 0.01. By default, and unlike the paper, we
correct the surrogate (defect correction, Stetter 1978): every few iterations the guess x' goes through the client's
own local steps, without derivatives, and the difference is subtracted until the next correction:

    x* = argmin_{x, a}  1 - cos( s(x, a) - e, W_t - W_t+1 ),      e = s(x', a') - u(x')

with s the surrogate's gradient and u the client's update, both rescaled to the length of the observed update. At a
fixed point s - e = u, so the objective equals the unrolled attack's, while each iteration differentiates through one
gradient only. Where returned BatchNorm buffers reveal the mean statistics of the local steps (matching/statistics.py),
those of the surrogate are matched as well, with the same correction.
"""

import torch
from torch import nn

from attacks.base import MatchingDistance, register
from attacks.labels.inference import infer_labels
from attacks.matching.features import FeatureInversion
from attacks.matching.matcher import GradientMatcher, note_adam
from attacks.matching.runs import to_reconstruction
from attacks.matching.statistics import matched_statistics
from attacks.matching.surrogate import Surrogate
from core.hyperparameters import hp
from core.protocol import Observation, Recipe, Reconstruction, Task


@register("sme")
class SME(FeatureInversion):
    """Surrogate Model Extension: cosine distance at a model between the one broadcast and the one returned."""

    citation = "Zhu, Yao, Blaschko: Surrogate Model Extension. ICML 2023"
    link = "https://arxiv.org/abs/2306.00127"
    paper = {
        "iterations": (1000, "authors' cifar_sme.json"),
        "lr": (1.0, "authors' cifar_sme.json"),
        "signed": (False, "authors' adversary.py"),
        "tv": (5e-3, "authors' cifar_sme.json, 0.01 on half of this total variation"),
        "correction_interval": (0, "as published"),
        "alpha_lr": (1e-3, "authors' cifar_sme.json"),
    }

    correction_interval: int = hp(
        5,
        "iterations between two corrections of the surrogate gradient by a simulation of the client's local steps; "
        "0: no correction",
        ge=0,
    )
    alpha: float = hp(
        0.5,
        "initial weight alpha of the broadcast model W_t in the surrogate model alpha W_t + (1 - alpha) W_t+1",
        ge=0,
        le=1,
    )
    alpha_lr: float = hp(0.0, "Adam step of alpha; 0: alpha fixed", ge=0)

    def check(self, model: nn.Module, task: Task, recipe: Recipe, kind: str, num_examples: int) -> None:
        super().check(model, task, recipe, kind, num_examples)
        note_adam(recipe, kind)

    def matching_objective(self, observation: Observation) -> MatchingDistance | None:
        """The cosine distance of the client's own local steps: the surrogate's, where it is exact."""
        matcher = GradientMatcher(observation)
        return None if matcher.counter.variables else matcher.cosine_distance

    def reconstruct(self, observation: Observation, rng: torch.Generator) -> Reconstruction:
        update = observation.update
        several = update.kind == "delta" and observation.recipe.steps(update.num_examples) > 1
        update_model = "unrolled" if several and self.correction_interval else "single_step"

        def make(observed: Observation) -> GradientMatcher:
            return GradientMatcher(observed, update_model, fast_convs=True, precision=self.precision)

        matcher = make(observation)
        labels = infer_labels(matcher.mean_gradient, observation, rng)
        if not several:
            return to_reconstruction(self.runs(observation, labels, make, rng))
        statistics = None
        if self.statistics_weight:
            statistics = matched_statistics(observation, matcher)
        if statistics is not None:
            matcher = statistics.matcher(make)
        corrections = range(self.iterations // 10, self.iterations, self.correction_interval or self.iterations)
        delta = update.ordered(observation.model)
        objective = Surrogate(
            matcher,
            delta,
            self.alpha,
            self.alpha_lr,
            corrections if self.correction_interval else range(0),
            statistics,
            self.statistics_weight,
        )
        return to_reconstruction(self.descend(objective, labels, rng))
