"""The surrogate of a client's local steps: one gradient between the broadcast and the returned model, corrected.

attacks/sme.py has the equations.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from attacks.matching.distances import TINY, cosine_distance, inner, inner_and_square
from attacks.matching.matcher import GradientMatcher
from attacks.matching.signed_inversion import MatchingObjective
from attacks.matching.statistics import MatchedStatistics
from attacks.optim.loop import State
from defenses.base import Variable


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
