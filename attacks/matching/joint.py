"""Several updates of the same examples: one guess must explain them all.

x* = argmin_{x valid}  mean_r d(x, y; W_r, u_r)                (d of one update, W_r and u_r of round r)
"""

import copy
import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from attacks.matching.matcher import GradientMatcher
from attacks.matching.signed_inversion import MatchingObjective
from attacks.optim.loop import State


class JointObjective(MatchingObjective):
    """The mean of an objective of the last update and of the cosine distances of earlier ones.

    Whatever is optimised besides the examples belongs to the last update.
    """

    def __init__(self, last: MatchingObjective, earlier: Sequence[GradientMatcher]) -> None:
        super().__init__(last.matcher)
        self.last, self.earlier = last, list(earlier)
        guess = last.first_guess
        if guess is not None:  # of the last update alone: how good it is, all of them say
            unknowns = [v.init.to(guess.examples) for v in self.variables]
            with torch.no_grad():
                loss = self.full_precision().distance(guess.examples, guess.labels, *unknowns).item()
            self.first_guess = dataclasses.replace(guess, loss=loss)

    @property
    def changes(self) -> bool:
        return self.last.changes

    def prepare(self, state: State) -> None:
        self.last.prepare(state)

    def finish(self, x: Tensor, *extra: Tensor) -> None:
        self.last.finish(x, *extra)

    def distance(self, examples: Tensor, labels: Tensor, *extra: Tensor) -> Tensor:
        own = self.last.distance(examples, labels, *extra)
        return torch.stack([own, *(m.cosine_distance(examples, labels) for m in self.earlier)]).mean()

    def full_precision(self) -> "JointObjective":
        last, earlier = self.last.full_precision(), [m.full_precision() for m in self.earlier]
        if last is self.last and all(a is b for a, b in zip(earlier, self.earlier, strict=True)):
            return self
        other = copy.copy(self)
        other.last, other.earlier, other.matcher = last, earlier, last.matcher
        return other
