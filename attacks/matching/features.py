"""Feature matching: examples whose layers receive what the update says they received. Ours.

    x_0 = argmin_{x valid}  R(x),                         R(x) = mean_l || f_l(x) / ||f_l(x)|| - f_l* ||^2 / 2
    x*  = argmin_{x valid}  1 - cos(g^, g*) + w R(x) + v S(x) + a TV(x),    started at x_0

with f_l* the inputs of those layers for which the gradient of one example determines them (layer_inputs.py), and S the
distance of BatchNorm's batch statistics, over all local steps, from those that the returned buffers reveal
(statistics.py). The first problem needs no second derivatives. It is also better conditioned: a layer's input depends
on the example through the layers before it, a gradient through all layers twice.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from attacks.matching.distances import add_balanced
from attacks.matching.joint import JointObjective
from attacks.matching.layer_inputs import InputSubspace, LayerInput, determined_inputs, input_subspaces
from attacks.matching.matcher import GradientMatcher
from attacks.matching.runs import Run
from attacks.matching.signed_inversion import MatchingObjective, SignedInversion
from attacks.matching.statistics import MOST_STEPS, MatchedStatistics, matched_statistics
from attacks.matching.watched import Watched
from attacks.optim.adam import Adam
from attacks.optim.loop import Evaluation, Objective, Phase, State, descend
from attacks.optim.tracker import current_tracker
from core.hyperparameters import hp, hyperparameters
from core.protocol import Observation

PROBES = 4  # smooth random examples that show which positions of a layer's output have a gradient
STEP = 0.1  # of Adam in the first problem, in the model's units, falling as half a cosine

MakeMatcher = Callable[[Observation], GradientMatcher]


@hyperparameters
class FeatureInversion(SignedInversion):
    """Signed descent on an update, and on what it tells exactly about the inputs of layers."""

    paper = {
        "feature_weight": (0.0, "as published"),
        "feature_iterations": (0, "as published"),
        "statistics_weight": (0.0, "as published"),
    }

    feature_weight: float = hp(
        1.0, "weight of the distance of layer inputs that the gradient of one example determines; 0: not used", ge=0
    )
    feature_iterations: int = hp(
        300, "steps that invert these layer inputs alone, for the start of the first run; 0: none", ge=0, smoke=3
    )
    statistics_weight: float = hp(
        0.1,
        "weight of the distance of batch statistics that returned BatchNorm buffers reveal, after at most "
        f"{MOST_STEPS} steps on full batches",
        ge=0,
    )

    def runs(self, observation: Observation, labels: Tensor, make: MakeMatcher, rng: torch.Generator) -> list[Run]:
        """All runs on the update that `make(observation)` matches.

        Where the known inputs have fewer entries than the example, their inversion may mislead: more runs then use the
        cosine distance alone, and the lowest objective decides.
        """
        objective = self.objective(observation, labels, make, rng)
        earlier = [make(other) for other in observation.earlier]
        runs = self.descend(_jointly(objective, earlier), labels, rng)
        if isinstance(objective, KnownInputs) and objective.first_guess is not None and not objective.overdetermined:
            runs += self.descend(_jointly(MatchingObjective(make(observation)), earlier), labels, rng)
        return runs

    def objective(
        self, observation: Observation, labels: Tensor, make: MakeMatcher, rng: torch.Generator
    ) -> MatchingObjective:
        """The cosine distance of `make(observation)`, with what the update determines beyond it, if anything."""
        matcher, model = make(observation), observation.model
        inputs: Sequence[LayerInput] | Sequence[InputSubspace] = []
        domain = observation.task.domain
        finite = all(t.isfinite().all() for t in matcher.mean_gradient)
        if self.feature_weight and not matcher.unrolled and domain.name == "image" and finite:
            probes = domain.to_model(_smooth_images(domain.shape).to(matcher.target[0]))
            known = model, matcher.mean_gradient, probes, int(labels[0])
            inputs = (determined_inputs(*known) if len(labels) == 1 else []) or input_subspaces(*known, len(labels))
        watched = Watched(observation, {entry.layer for entry in inputs})
        statistics = None
        if self.statistics_weight:
            statistics = matched_statistics(watched.observation, matcher)
        if not inputs and statistics is None:
            return MatchingObjective(matcher)
        matcher = make(watched.observation) if statistics is None else statistics.matcher(make)
        weights = self.feature_weight, self.statistics_weight
        objective = KnownInputs(matcher, watched, inputs, statistics, weights)
        if self.feature_iterations and any(isinstance(entry, LayerInput) for entry in inputs):
            invert = partial(objective.invert, labels, self.feature_iterations, self.tv, rng)
            objective.first_guess = current_tracker().run_segment(Run, rng, invert)
        return objective


def _jointly(objective: MatchingObjective, earlier: Sequence[GradientMatcher]) -> MatchingObjective:
    return JointObjective(objective, earlier) if earlier else objective


class KnownInputs(MatchingObjective):
    """The cosine distance of updates, plus at their weights the distances of layers' inputs and of their statistics.

    `watched` stores the inputs of the layers that `inputs` are about. `weights` are those of inputs and of statistics.
    """

    def __init__(
        self,
        matcher: GradientMatcher,
        watched: Watched,
        inputs: Sequence[LayerInput] | Sequence[InputSubspace],
        statistics: MatchedStatistics | None,
        weights: tuple[float, float],
    ) -> None:
        super().__init__(matcher)
        self.watched, self.inputs, self.statistics, self.weights = watched, inputs, statistics, weights
        watched.take()  # what the matcher has tried

    @property
    def overdetermined(self) -> bool:
        """Whether some layer's input has at least as many entries that are not zero as an example has."""
        size = math.prod(self.matcher.task.domain.shape)
        inputs = [entry for entry in self.inputs if isinstance(entry, LayerInput)]
        return any(int((x.direction > 1e-4 * x.direction.max()).sum()) >= size for x in inputs)

    def distance(self, examples: Tensor, labels: Tensor, *extra: Tensor) -> Tensor:
        of_updates = super().distance(examples, labels, *extra)
        return of_updates + self.distance_of_inputs()

    def distance_of_inputs(self) -> Tensor:
        """The weighted distances of the examples that went through the model last."""
        taken, found = self.watched.take(), []
        if self.inputs:
            own = [entry.distance(torch.cat(taken[entry.layer])) for entry in self.inputs]
            found.append(self.weights[0] * torch.stack(own).mean())
        if self.statistics is not None:
            moments = self.statistics.moments(self.matcher.unrolled)
            found.append(self.weights[1] * self.statistics.misfit(moments))
        return torch.stack(found).sum()

    def invert(self, labels: Tensor, iterations: int, tv: float, rng: torch.Generator) -> Run:
        """The examples at the lowest distance of inputs that a descent from the middle of the domain finds.

        The loss is the whole objective there, with labels (N,). `tv` is the share of the regulariser's gradient in
        the first step; it falls to zero.
        """
        exact = self.full_precision()
        domain, meta = self.matcher.task.domain, exact.matcher.meta
        x = domain.to_model(domain.init(len(labels), rng).to(self.matcher.target[0]))
        domain.project_(x)
        x.requires_grad_()

        def distance(x: Tensor) -> Tensor:
            meta(x)
            return self.distance_of_inputs()

        rates = [STEP * (1 + math.cos(math.pi * i / iterations)) / 2 for i in range(iterations)]
        phase = Phase(rates=lambda i: rates[i : i + 1], steps=iterations)
        prior = partial(add_prior, domain.regularizer, [tv * (1 - i / iterations) for i in range(iterations)])
        state = descend([x], Signed(distance, prior), Adam([x]), [phase], rng, project=lambda: domain.project_(x))
        examples = domain.decode(state.best_variables[0])
        unknowns = [v.init.to(x) for v in self.variables]
        with torch.no_grad():
            loss = exact.distance(examples, labels, *unknowns).item()
        return Run(examples, labels, loss, tuple(state.trace), state.iterations, failed=False)


class Signed(Objective):
    """A function of the examples alone, of whose gradient, with a regulariser's, the sign is used."""

    def __init__(self, function: Callable[[Tensor], Tensor], prior: Callable[[int, Tensor, Tensor], Tensor]) -> None:
        self.function, self.prior = function, prior

    def __call__(self, state: State) -> Evaluation:
        (x,) = state.variables
        loss = self.function(x)
        (grad,) = torch.autograd.grad(loss, x)
        return Evaluation(loss.item(), (self.prior(state.iterations, x, grad).sign(),), loss.item())


def add_prior(
    regularizer: Callable[[Tensor], Tensor], shares: Sequence[float], iteration: int, x: Tensor, grad: Tensor
) -> Tensor:
    """`grad` (N, *shape) plus the regulariser's gradient at its share of this iteration."""
    if not shares[iteration]:
        return grad
    (prior_grad,) = torch.autograd.grad(regularizer(x), x)
    return add_balanced(grad, prior_grad, shares[iteration])


def _smooth_images(shape: tuple[int, ...]) -> Tensor:
    """Smooth random images (PROBES, C, H, W)."""
    coarse = torch.rand(PROBES, shape[0], 4, 4, generator=torch.Generator().manual_seed(0))
    return F.interpolate(coarse, size=shape[1:], mode="bilinear")
