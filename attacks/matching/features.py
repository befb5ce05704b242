"""Feature matching: examples whose layers receive what the update says they received. Ours.

    x_0 = argmin_{x valid}  R(x),    R(x) = mean_l || f_l(x) / ||f_l(x)|| - f_l ||^2 / 2
    x*  = argmin_{x valid}  1 - cos(g^, g*) + w R(x),    started at x_0

with f_l the inputs of those layers for which the gradient of one example determines them (layer_inputs.py). The first
problem needs no second derivatives, so its steps are several times faster. And it is better conditioned: a layer's
input depends on the example through the layers before it, a gradient through all layers twice.
"""

import copy
import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attacks.matching.layer_inputs import LayerInput, determined_inputs
from attacks.matching.matcher import GradientMatcher
from attacks.matching.runs import Run
from attacks.matching.signed_inversion import MatchingObjective
from attacks.optim.adam import Adam
from attacks.optim.loop import Evaluation, Objective, Phase, State, descend
from attacks.optim.tracker import current_tracker
from core.protocol import Observation

PROBES = 4  # smooth random examples that show which positions of a layer's output have a gradient
STEP = 0.1  # of Adam in the first problem, in the model's units, falling as half a cosine

MakeMatcher = Callable[[Observation], GradientMatcher]


def matching_objective(
    observation: Observation, labels: Tensor, make: MakeMatcher, weight: float, iterations: int, rng: torch.Generator
) -> MatchingObjective:
    """The objective of an attack that matches the update by `make(observation)`.

    Where the update determines inputs of layers, these are matched as well, with `weight` times their distance, and
    the first run starts at examples that `iterations` steps have inverted them to. Otherwise, and with a weight of 0,
    it is the cosine distance of updates.
    """
    matcher = make(observation)
    if not weight or matcher.unrolled or matcher.num_examples > 1:
        return MatchingObjective(matcher)
    domain = observation.task.domain
    probes = domain.to_model(_smooth_examples(domain.shape).to(matcher.target[0]))
    inputs = determined_inputs(observation.model, matcher.mean_gradient, probes, int(labels[0]))
    if not inputs:
        return MatchingObjective(matcher)
    objective = FeatureMatching(observation, inputs, make, weight)
    if iterations:
        invert = partial(objective.invert, labels, iterations, rng)
        objective.first_guess = current_tracker().run_segment(Run, rng, invert)
    return objective


class FeatureMatching(MatchingObjective):
    """The cosine distance of updates plus `weight` times the mean distance of the layers' inputs."""

    def __init__(self, observation: Observation, inputs: list[LayerInput], make: MakeMatcher, weight: float) -> None:
        self.inputs, self.weight = inputs, weight
        self.captured: dict[str, Tensor] = {}
        model = copy.deepcopy(observation.model)
        for entry in inputs:
            model.get_submodule(entry.layer).register_forward_pre_hook(_capture_in(self.captured, entry.layer))
        super().__init__(make(dataclasses.replace(observation, model=model)))

    def distance(self, examples: Tensor, labels: Tensor, *extra: Tensor) -> Tensor:
        of_updates = super().distance(examples, labels, *extra)
        return of_updates + self.weight * self.captured_distance()

    def captured_distance(self) -> Tensor:
        """R of the examples that went through the model last."""
        found = []
        for entry in self.inputs:
            features = self.captured.pop(entry.layer) * entry.mask
            unit = features / features.norm().clamp(min=1e-12)
            found.append((unit - entry.direction).square().sum() / 2)
        return torch.stack(found).mean()

    def invert(self, labels: Tensor, iterations: int, rng: torch.Generator) -> Run:
        """The examples at the lowest R that a descent from the middle of the domain finds."""
        domain, meta = self.matcher.task.domain, self.matcher.full_precision().meta
        x = domain.to_model(domain.init(len(labels), rng).to(self.matcher.target[0]))
        domain.project_(x)
        x.requires_grad_()
        phase = Phase(
            rates=lambda i: (STEP * (1 + math.cos(math.pi * i / iterations)) / 2,),
            steps=iterations,
        )
        objective = _InputDistance(lambda x: (meta(x), self.captured_distance())[1])
        state = descend([x], objective, Adam([x]), [phase], rng, project=lambda: domain.project_(x))
        return Run(
            examples=domain.decode(state.best_variables[0]),
            labels=labels,
            loss=state.best,
            trace=tuple(state.trace),
            iterations=state.iterations,
            failed=not state.best < state.trace[0],
        )


class _InputDistance(Objective):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        self.function = function

    def __call__(self, state: State) -> Evaluation:
        (x,) = state.variables
        loss = self.function(x)
        (grad,) = torch.autograd.grad(loss, x)
        return Evaluation(loss.item(), (grad.sign(),), loss.item())


def _capture_in(captured: dict[str, Tensor], name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    """A hook that stores a layer's input. A function, because copies of a model share the functions of its hooks."""

    def capture(_: nn.Module, args: tuple[Any, ...]) -> None:
        captured[name] = args[0]

    return capture


def _smooth_examples(shape: tuple[int, ...]) -> Tensor:
    """Random examples (PROBES, *shape); images are smooth."""
    rng = torch.Generator().manual_seed(0)
    if len(shape) != 3:
        return torch.rand(PROBES, *shape, generator=rng)
    coarse = torch.rand(PROBES, shape[0], 4, 4, generator=rng)
    return F.interpolate(coarse, size=shape[1:], mode="bilinear")
