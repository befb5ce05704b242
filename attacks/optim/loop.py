"""The descent loop of every attack that optimises.

A descent has an objective, variables, an optimiser, phases (a budget, learning rates and a stopping rule each) and a
tracker. Everything that changes while it runs is in one `State`, which is saved and restored whole.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from attacks.optim.tracker import current_tracker

DECAY_AT = (3 / 8, 5 / 8, 7 / 8)  # shares of the budget at which Inverting Gradients' step falls to a tenth
MIN_IMPROVEMENT = 0.01  # relative; less than this counts as no improvement


@dataclass
class State:
    """All that a descent needs to continue."""

    variables: tuple[Tensor, ...]
    best_variables: tuple[Tensor, ...]  # at the lowest objective
    best: float = math.inf  # the lowest objective since the phase or the objective changed
    best_metric: float = math.inf  # what the objective reported there
    previous_best: float = math.inf  # `best` one step earlier
    loss: float = math.inf  # of the last step
    phase: int = 0
    iterations: int = 0
    phase_start: int = 0  # iterations at the start of the phase
    lowest: float = math.inf  # of the whole trace
    steps_without_improvement: int = 0
    trace: list[float] = field(default_factory=list)

    @classmethod
    def start(cls, variables: Sequence[Tensor]) -> "State":
        return cls(tuple(variables), tuple(v.detach().clone() for v in variables))

    def state_dict(self) -> dict[str, Any]:
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return fields | {"variables": tuple(v.detach() for v in self.variables)}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        copy_(self.variables, saved["variables"])
        for name, value in saved.items():
            if name != "variables":
                setattr(self, name, value)

    def start_phase(self, number: int) -> None:
        self.phase, self.phase_start, self.steps_without_improvement = number, self.iterations, 0

    def record(self, value: float) -> None:
        """Append a value of the objective to the trace."""
        self.trace.append(value)
        improved = value < (1 - MIN_IMPROVEMENT) * self.lowest
        self.steps_without_improvement = 0 if improved else self.steps_without_improvement + 1
        self.lowest = min(self.lowest, value)

    def consider(self, loss: float, metric: float) -> None:
        """Keep the variables if their objective is the lowest so far."""
        if loss < self.best:
            self.best, self.best_metric = loss, metric
            self.best_variables = tuple(v.detach().clone() for v in self.variables)


@dataclass(frozen=True)
class Evaluation:
    """The objective at the current variables: its value, its gradients, and the value to report."""

    loss: float
    grads: tuple[Tensor | None, ...]
    metric: float


class Objective:
    """What a descent minimises. `prepare` may change it before a step; its `state_dict` is saved with the descent."""

    def __call__(self, state: State) -> Evaluation:
        """The objective and its gradients at `state.variables`."""
        raise NotImplementedError

    def start(self) -> None:
        """Called once, before a descent that is not resumed."""

    def prepare(self, state: State) -> None:
        """Called before each step."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        del saved


class Function(Objective):
    """An objective from a function of the variables, differentiated by autograd."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self.function = function

    def __call__(self, state: State) -> Evaluation:
        loss = self.function(*state.variables)
        grads = torch.autograd.grad(loss, state.variables, allow_unused=True)
        return Evaluation(loss.item(), grads, loss.item())


Closure = Callable[[], tuple[float, Sequence[Tensor | None]]]  # the objective and its gradients


class Optimizer(Protocol):
    """Moves variables in place. `evaluate` computes the objective, `update` takes the step it leads to."""

    def evaluate(self, closure: Closure, at_most: int) -> tuple[float, int]:
        """The objective before this step, computed by `closure`, and the iterations taken: 1 to `at_most`."""

    def update(self, rates: Sequence[float]) -> None:
        """Move the variables, each by its learning rate."""

    def reset(self) -> None:
        """Clear the optimiser's history, because the objective has changed."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, saved: dict[str, Any]) -> None: ...


@dataclass(frozen=True)
class Phase:
    """A part of a descent.

    steps: its budget in iterations. until: alternative to `steps`, the total iteration count at which the phase ends;
    iterations that earlier phases did not use then belong to it. rates: iteration within the phase -> learning rate of
    each variable. should_stop: whether the phase ends early; called between `Optimizer.evaluate` and
    `Optimizer.update`. from_best: the phase starts at the best variables, with a reset optimiser and a new `best`.
    """

    rates: Callable[[int], Sequence[float]]
    steps: int = 0
    until: int | None = None
    should_stop: Callable[[State], bool] = lambda state: not math.isfinite(state.loss)
    from_best: bool = False

    def end(self, state: State) -> int:
        return state.phase_start + self.steps if self.until is None else self.until


def descend(
    variables: Sequence[Tensor],
    objective: Objective,
    optimizer: Optimizer,
    phases: Sequence[Phase],
    rng: torch.Generator,
    *,
    project: Callable[[], None] = lambda: None,
    should_abort: Callable[[State], bool] = lambda state: False,
    trace_best: bool = False,
    run: tuple[int, int] = (0, 1),
) -> State:
    """Minimise `objective` over `variables`, in place.

    project: moves the variables back to valid values after a step. should_abort: whether the descent ends after this
    phase; called after each phase. trace_best: the trace holds the metric at the best variables instead of the loss of
    each step. run: which of how many equal descents this is, for progress. A saved state of the current tracker is
    resumed.
    """
    tracker = current_tracker()
    state = State.start(variables)
    total = phases[-1].until or sum(phase.steps for phase in phases)
    saved = tracker.restore(rng)
    if saved is None:
        objective.start()
    else:
        state.load_state_dict(saved["state"])
        optimizer.load_state_dict(saved["optimizer"])
        objective.load_state_dict(saved["objective"])

    def closure() -> tuple[float, Sequence[Tensor | None]]:
        evaluation = objective(state)
        state.consider(evaluation.loss, evaluation.metric)
        return evaluation.loss, evaluation.grads

    for number in range(state.phase, len(phases)):
        phase = phases[number]
        if saved is None or number > state.phase:
            state.start_phase(number)
            if phase.from_best:
                copy_(state.variables, state.best_variables)
                state.best = state.previous_best = math.inf
                optimizer.reset()
        while state.iterations < phase.end(state):
            objective.prepare(state)
            state.loss, taken = optimizer.evaluate(closure, phase.end(state) - state.iterations)
            tracker.on_step(state.variables)
            state.iterations += taken
            state.record(state.best_metric if trace_best else state.loss)
            stop = phase.should_stop(state)
            state.previous_best = state.best
            if stop:
                break
            optimizer.update(phase.rates(state.iterations - taken - state.phase_start))
            project()
            tracker.progress(run[0] * total + state.iterations, run[1] * total, state.trace[-1])
            if tracker.should_save():
                parts = {"state": state, "optimizer": optimizer, "objective": objective}
                tracker.save(rng, {name: part.state_dict() for name, part in parts.items()})
        if should_abort(state):
            break
    return state


@torch.no_grad()
def copy_(variables: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Copy values into variables, in place."""
    for variable, value in zip(variables, values, strict=True):
        variable.copy_(value)
