"""Which of N candidates caused an update? The attack that bounds of differential privacy are about.

answer = argmax_i log p(g~ | z_i);   for Gaussian noise:   argmin_i ||g~ - Q(g(z_i))||^2,   Q: clipping, for example

Balle, Cherubin, Hayes, S&P 2022, https://arxiv.org/abs/2201.04845; Hayes, Mahloujifar, Balle, NeurIPS 2023,
https://arxiv.org/abs/2302.07225. The attacker knows the candidates, one of which is the victim, and all other examples
of the update. So this is no reconstruction by an honest-but-curious server: it is what the guarantee allows at most.
"""

import dataclasses
from functools import cached_property

import torch
from torch import Tensor

from attacks.matching.matcher import GradientMatcher
from core.protocol import Batch, Observation, Update


@dataclasses.dataclass(frozen=True)
class Identification:
    """Candidates for the one unknown example of updates of the same model and recipe.

    observation: of any such update. candidates: N examples with their labels. rest: the other examples of the update.
    """

    observation: Observation
    candidates: Batch
    rest: Batch | None = None

    @cached_property
    def simulated(self) -> Tensor:  # (N, P)
        """The update that each candidate would have caused, without noise."""
        matcher = GradientMatcher(self.observation)
        updates = []
        with torch.no_grad():
            for x, y in zip(self.candidates.examples.split(1), self.candidates.labels.split(1), strict=True):
                if self.rest is not None:
                    x, y = torch.cat([x, self.rest.examples]), torch.cat([y, self.rest.labels])
                updates.append(torch.cat([t.flatten() for t in matcher.simulate(x, y)]))
        return torch.stack(updates)

    def log_likelihood(self, update: Update) -> Tensor:
        """(N,): how likely the update is for each candidate, up to scale and a constant."""
        matcher = GradientMatcher(dataclasses.replace(self.observation, update=update))
        target, misfit = matcher.target, matcher.counter.misfit
        if misfit is None:
            flat = torch.cat([t.flatten() for t in target])
            # -||t - g||^2 / 2 without ||t||^2 / 2
            return self.simulated @ flat - self._half_norms
        sizes = [t.numel() for t in target]
        scores = []
        for row in self.simulated:
            parts = tuple(p.view_as(t) for p, t in zip(row.split(sizes), target, strict=True))
            scores.append(-misfit(parts, target))
        return torch.stack(scores)

    @cached_property
    def _half_norms(self) -> Tensor:
        return self.simulated.square().sum(1) / 2

    def rank(self, update: Update, victim: int) -> int:
        """The rank of candidate `victim`, 1 if it is the likeliest."""
        scores = self.log_likelihood(update)
        return int((scores > scores[victim]).sum()) + 1
