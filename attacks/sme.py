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

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from attacks.base import MatchingDistance, register
from attacks.labels.inference import infer_labels
from attacks.matching.distances import TINY, cosine_distance, inner, inner_and_square
from attacks.matching.features import FeatureInversion
from attacks.matching.matcher import GradientMatcher, note_adam
from attacks.matching.runs import to_reconstruction
from attacks.matching.signed_inversion import MatchingObjective
from attacks.matching.statistics import MatchedStatistics, matched_statistics
from attacks.optim.loop import State
from core.hyperparameters import hp
from core.protocol import Observation, Recipe, Reconstruction, Task
from defenses.base import Variable


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


class Surrogate(MatchingObjective):
    """The cosine distance at one model between the one broadcast and the one returned, corrected every few iterations.

    `corrections` are the iterations at which the surrogate is corrected at the current guess. `statistics`, at their
    weight, are those of all local steps; the surrogate's are of one batch with all examples.
    """

    def __init__(
        self,
        matcher: GradientMatcher,
        delta: Sequence[Tensor],
        alpha: float,
        alpha_lr: float,
        corrections: range,
        statistics: MatchedStatistics | None = None,
        statistics_weight: float = 0.0,
    ) -> None:
        super().__init__(matcher)
        self.statistics, self.statistics_weight = statistics, statistics_weight
        self.delta = matcher.meta.to_memory_format(delta)
        self.alpha = Variable(torch.tensor(alpha), alpha_lr, lambda value: value.clamp(0, 1))
        self.corrections = corrections
        self.target_norm_sq = inner(matcher.target, matcher.target)
        self.start()

    @property
    def variables(self) -> tuple[Variable, ...]:
        return (self.alpha, *self.matcher.counter.variables)

    @property
    def changes(self) -> bool:
        return len(self.corrections) > 0

    def distance(self, examples: Tensor, labels: Tensor, *extra: Tensor) -> Tensor:
        """1 - cos between the update and the gradient at alpha W_t + (1 - alpha) W_t+1, as it was last corrected."""
        gradient = self._gradient(examples, labels, *extra)
        if self.error is not None:
            gradient = tuple(s - e for s, e in zip(self._rescaled(gradient), self.error, strict=True))
        distance = cosine_distance(gradient, self.matcher.target)
        if self.statistics is None:
            return distance
        found = self.statistics.moments(several_steps=False)
        if not self.moved:  # the surrogate's statistics are not those of the local steps
            return distance
        found = [(m - dm, v - dv) for (m, v), (dm, dv) in zip(found, self.moved, strict=True)]
        return distance + self.statistics_weight * self.statistics.misfit(found)

    def start(self) -> None:
        self.error: list[Tensor] | None = None
        self.moved: list[tuple[Tensor, Tensor]] = []  # statistics: the surrogate's minus those of the local steps
        self.corrected_at: tuple[Tensor, ...] | None = None  # the variables at the last correction

    def prepare(self, state: State) -> None:
        if len(state.trace) in self.corrections:
            state.best = float("inf")
            self.correct(*(v.detach().clone() for v in state.variables))

    def finish(self, x: Tensor, *extra: Tensor) -> None:
        if self.corrections:
            self.correct(x, *extra)

    @torch.no_grad()
    def correct(self, x: Tensor, *extra: Tensor) -> None:
        """Make the surrogate exact at the model's inputs `x`."""
        assert self.labels is not None
        self.corrected_at = (x, *extra)
        examples = self.matcher.task.domain.from_model(x)
        self.error = None
        surrogate = self._rescaled(self._gradient(examples, self.labels, *extra))
        ours = self.statistics.moments(several_steps=False) if self.statistics is not None else []
        client = self._rescaled(self.matcher.simulate(examples, self.labels, *extra[1:]))
        theirs = self.statistics.moments(several_steps=True) if self.statistics is not None else []
        self.error = [s - u for s, u in zip(surrogate, client, strict=True)]
        self.moved = [(m - n, v - w) for (m, v), (n, w) in zip(ours, theirs, strict=True)]

    def state_dict(self) -> dict[str, Any]:
        return {"corrected_at": self.corrected_at}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        self.start()
        if saved["corrected_at"] is not None:
            self.correct(*saved["corrected_at"])

    def _gradient(self, examples: Tensor, labels: Tensor, alpha: Tensor, *unknowns: Tensor) -> tuple[Tensor, ...]:
        """The gradient at the surrogate model, after Adam (for its clients) and the defence."""
        meta = self.matcher.meta
        between = [w - (1 - alpha) * d for w, d in zip(meta.weights, self.delta, strict=True)]
        if self.matcher.counter.batch is not None:
            examples, labels = self.matcher.counter.batch(examples, labels, self.matcher.task, *unknowns)
        inputs = self.matcher.task.domain.to_model(examples)
        gradient = meta.gradient(inputs, labels, between, create_graph=torch.is_grad_enabled())
        return self.matcher.defended(self.matcher.adam_direction(gradient), *unknowns)

    def _rescaled(self, update: Sequence[Tensor]) -> list[Tensor]:
        """`update` scaled so that its component along the observed update has that update's length.

        The scale is at most that of an update at a cosine of 0.1.
        """
        product, square = inner_and_square(update, self.matcher.target)
        product = torch.maximum(product, 0.1 * (square * self.target_norm_sq).clamp(min=TINY).sqrt())
        return [self.target_norm_sq / product.clamp(min=TINY) * t for t in update]
