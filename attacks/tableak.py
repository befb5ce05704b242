"""TabLeak. Vero, Balunović, Dimitrov, Vechev, ICML 2023. https://arxiv.org/abs/2210.01785

    u* = argmin_u  1 - cos( g(x(u)), g* ),      x(u): numbers as they are, the block of a category is softmax(u / tau)

The softmax turns the search for one of K categories into a continuous one whose guesses are valid throughout. R runs
from different starts find rows that differ where the update says little: their rows are paired with those of the best
run, and pooled by the median of each entry. How far the runs agree tells the attacker, who has no truth, which cells
are right: p of the answer for a category, and P(|e| < t) for a number whose runs have standard deviation s,

    P(|e| < t) = erf( t / (s sqrt 2) ),      t = 0.319 standard deviations of the column

which falls as the Gaussian's entropy log s + const rises, the authors' certificate, and compares with categories.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from attacks.base import MatchingDistance, register
from attacks.labels.inference import infer_labels
from attacks.matching.matcher import GradientMatcher
from attacks.matching.runs import Run, best_of, to_reconstruction
from attacks.matching.signed_inversion import MatchingObjective, SignedInversion
from core.domain import TabularDomain
from core.hyperparameters import hp
from core.protocol import Observation, Reconstruction, Task

OURS = "ours, tuning victims"
TOLERANCE = 0.319  # of a number, in standard deviations
NEVER = 1e6  # cost of pairing rows of different labels


@dataclass(frozen=True)
class SoftmaxRows(TabularDomain):
    """Rows whose blocks of categories are logits: the model sees their softmax."""

    temperature: float = 1.0

    def init(self, n: int, rng: torch.Generator) -> Tensor:
        return 0.01 * torch.randn(n, *self.shape, generator=rng)

    def to_model(self, examples: Tensor) -> Tensor:
        parts = [
            (examples[:, place] / self.temperature).softmax(1) if column.categories else examples[:, place]
            for column, place in self.places()
        ]
        return torch.cat(parts, 1)

    def project(self, examples: Tensor) -> Tensor:
        """Numbers within their public range; logits are free."""
        is_number = torch.tensor([not c.categories for c in self.columns for _ in range(c.width)])
        return torch.where(is_number.to(examples.device), super().project(examples), examples)

    def decode(self, inputs: Tensor) -> Tensor:
        return super().project(self.to_model(inputs.detach()))


@register("tableak")
class TabLeak(SignedInversion):
    """TabLeak: gradient matching for tables, with softmax categories and pooled runs."""

    citation = "Vero, Balunović, Dimitrov, Vechev: TabLeak, Tabular Data Leakage in Federated Learning. ICML 2023"
    link = "https://arxiv.org/abs/2210.01785"
    kinds = frozenset({"tabular"})
    example_model = "mlp"
    paper = {
        "iterations": (1500, "authors' code"),
        "restarts": (30, "authors' code"),
        "lr": (0.06, "authors' code"),
        "tv": (0.0, "authors' code"),
        "init": ("normal", "authors' code, uniform in [-1, 1]"),
    }

    iterations: int = hp(500, "largest number of steps in a run", source=OURS, ge=1, smoke=3)
    restarts: int = hp(8, "number of runs that are pooled", source=OURS, ge=1, smoke=2)
    tv: float = hp(0.0, "weight of the regulariser (squares of standardised numbers)", ge=0)
    init: Literal["center", "normal"] = hp(
        "normal", "start: middle of the domain with a little noise (center), or N(0, 1) (normal)"
    )
    temperature: float = hp(1.0, "divisor tau of the logits of a category", source="authors' code", gt=0)

    def matching_objective(self, observation: Observation) -> MatchingDistance | None:
        matcher = GradientMatcher(observation)
        return None if matcher.counter.variables else matcher.cosine_distance

    def reconstruct(self, observation: Observation, rng: torch.Generator) -> Reconstruction:
        domain = observation.task.domain
        assert isinstance(domain, TabularDomain), domain
        labels = infer_labels(GradientMatcher(observation).mean_gradient, observation, rng)
        rows = SoftmaxRows(domain.shape, domain.columns, self.temperature)
        softened = dataclasses.replace(observation, task=Task(rows, observation.task.num_classes))
        runs = self.descend(MatchingObjective(GradientMatcher(softened)), labels, rng)
        good = [run for run in runs if run.examples.isfinite().all()] or runs
        examples, certainty = pool(domain, good)
        return dataclasses.replace(to_reconstruction(runs, examples.float()), certainty=certainty)


def pool(domain: TabularDomain, runs: list[Run]) -> tuple[Tensor, Tensor]:
    """Rows (N, d) with one category in each block, and the probability that each cell is right (N, columns)."""
    best = best_of(runs)
    aligned = torch.stack([run.examples[order_like(best, run)] for run in runs]).double()  # (R, N, d)
    median, certainty = aligned.quantile(0.5, dim=0), []
    for column, place in domain.places():
        if column.categories:
            share = aligned[:, :, place].mean(0)
            answer = median[:, place].argmax(1)
            certainty.append(share.gather(1, answer[:, None])[:, 0])
            median[:, place] = torch.eye(column.width).to(median)[answer]
        else:
            spread = aligned[:, :, place.start].std(0, correction=0).clamp(min=1e-12)
            certainty.append(torch.special.erf(TOLERANCE / (math.sqrt(2) * spread)))
    return median, torch.stack(certainty, 1)


def order_like(best: Run, run: Run) -> Tensor:
    """The order of a run's rows in which they are nearest to those of the best run, label by label."""
    from scipy.optimize import linear_sum_assignment

    cost = (best.examples[:, None] - run.examples[None]).abs().sum(2)
    cost = cost + NEVER * (best.labels[:, None] != run.labels[None])
    _, columns = linear_sum_assignment(cost.cpu().numpy())
    return torch.as_tensor(columns, device=run.examples.device)
