"""Feature matching: examples whose layers receive what the update says they received. Ours.

    x_0 = argmin_{x valid}  R(x),                         R(x) = mean_l || f_l(x) / ||f_l(x)|| - f_l* ||^2 / 2
    x*  = argmin_{x valid}  1 - cos(g^, g*) + w R(x) + v S(x) + a TV(x),    started at x_0

with f_l* the inputs of those layers for which the gradient of one example determines them (layer_inputs.py), and S the
distance of BatchNorm's batch statistics from those that the returned buffers reveal (statistics.py). The first problem
needs no second derivatives. It is also better conditioned: a layer's input depends on the example through the layers
before it, a gradient through all layers twice.
"""

import copy
import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attacks.matching.distances import add_balanced
from attacks.matching.joint import JointObjective
from attacks.matching.layer_inputs import LayerInput, determined_inputs, input_subspaces
from attacks.matching.matcher import GradientMatcher
from attacks.matching.runs import Run
from attacks.matching.signed_inversion import MatchingObjective, SignedInversion
from attacks.matching.statistics import batch_statistics
from attacks.optim.adam import Adam
from attacks.optim.loop import Evaluation, Objective, Phase, State, descend
from attacks.optim.tracker import current_tracker
from core.hyperparameters import hp, hyperparameters
from core.protocol import Observation

PROBES = 4  # smooth random examples that show which positions of a layer's output have a gradient
STEP = 0.1  # of Adam in the first problem, in the model's units, falling as half a cosine

MakeMatcher = Callable[[Observation], GradientMatcher]


class Known(Protocol):
    """What is known of one layer's input."""

    layer: str

    def distance(self, features: Tensor) -> Tensor:
        """How far inputs (N, *shape) are from it: ()."""


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
        0.1, "weight of the distance of batch statistics that returned BatchNorm buffers reveal after one step", ge=0
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
        statistics = batch_statistics(model, observation.update.buffers) if not matcher.unrolled else []
        groups: list[tuple[float, Sequence[Known]]] = []
        if self.statistics_weight and statistics and statistics[0].steps == 1:
            groups.append((self.statistics_weight, statistics))
        inputs: Sequence[Known] = []
        domain = observation.task.domain
        finite = all(t.isfinite().all() for t in matcher.mean_gradient)
        if self.feature_weight and not matcher.unrolled and domain.name == "image" and finite:
            probes = domain.to_model(_smooth_images(domain.shape).to(matcher.target[0]))
            known = model, matcher.mean_gradient, probes, int(labels[0])
            inputs = determined_inputs(*known) if len(labels) == 1 else []
            groups.append((self.feature_weight, inputs or input_subspaces(*known, len(labels))))
        groups = [(weight, group) for weight, group in groups if group]
        if not groups:
            return MatchingObjective(matcher)
        objective = KnownInputs(observation, groups, make)
        if inputs and self.feature_iterations:
            invert = partial(objective.invert, labels, self.feature_iterations, self.tv, rng)
            objective.first_guess = current_tracker().run_segment(Run, rng, invert)
        return objective


def _jointly(objective: MatchingObjective, earlier: Sequence[GradientMatcher]) -> MatchingObjective:
    return JointObjective(objective, earlier) if earlier else objective


class KnownInputs(MatchingObjective):
    """The cosine distance of updates, plus for each group its weight times the mean distance of its layers' inputs."""

    def __init__(
        self, observation: Observation, groups: Sequence[tuple[float, Sequence[Known]]], make: MakeMatcher
    ) -> None:
        self.groups = groups
        self.captured: dict[str, Tensor] = {}
        model = copy.deepcopy(observation.model)
        for name in {entry.layer for _, group in groups for entry in group}:
            model.get_submodule(name).register_forward_pre_hook(_capture_in(self.captured, name))
        super().__init__(make(dataclasses.replace(observation, model=model)))

    @property
    def overdetermined(self) -> bool:
        """Whether some layer's input has at least as many entries that are not zero as an example has."""
        size = math.prod(self.matcher.task.domain.shape)
        inputs = [entry for _, group in self.groups for entry in group if isinstance(entry, LayerInput)]
        return any(int((x.direction > 1e-4 * x.direction.max()).sum()) >= size for x in inputs)

    def distance(self, examples: Tensor, labels: Tensor, *extra: Tensor) -> Tensor:
        of_updates = super().distance(examples, labels, *extra)
        return of_updates + self.distance_of_inputs()

    def distance_of_inputs(self) -> Tensor:
        """The weighted distances of the examples that went through the model last."""
        found = [
            weight * torch.stack([entry.distance(self.captured[entry.layer]) for entry in group]).mean()
            for weight, group in self.groups
        ]
        self.captured.clear()
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


def _capture_in(captured: dict[str, Tensor], name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    """A hook that stores a layer's input. A function, because copies of a model share the functions of its hooks."""

    def capture(_: nn.Module, args: tuple[Any, ...]) -> None:
        captured[name] = args[0]

    return capture


def _smooth_images(shape: tuple[int, ...]) -> Tensor:
    """Smooth random images (PROBES, C, H, W)."""
    coarse = torch.rand(PROBES, shape[0], 4, 4, generator=torch.Generator().manual_seed(0))
    return F.interpolate(coarse, size=shape[1:], mode="bilinear")
