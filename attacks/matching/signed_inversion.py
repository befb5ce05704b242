"""Examples by Adam on the sign of their gradient, under a regulariser: what the attacks after DLG share."""

import copy
import dataclasses
import math
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from attacks.base import Attack
from attacks.matching.distances import add_balanced
from attacks.matching.matcher import GradientMatcher, Precision
from attacks.matching.runs import Run, run_restarts
from attacks.optim.adam import Adam
from attacks.optim.loop import DECAY_AT, Evaluation, Objective, Phase, State, descend
from core.hyperparameters import hp, hyperparameters
from defenses.base import Variable

SOLVED = 1e-4  # objective below which a first guess is the answer
NEAR = 1e-2  # objective below which a first guess needs no large steps

Own = TypeVar("Own", bound="MatchingObjective")


class MatchingObjective(Objective):
    """A function of guessed examples and labels to be minimised; by default the cosine distance of updates.

    `distance(examples, labels, *extra)` is the objective without the regulariser. A subclass may change it while the
    descent runs, by `prepare`; `finish` is called with the final variables before they are judged.
    """

    def __init__(self, matcher: GradientMatcher) -> None:
        self.matcher = matcher
        self.labels: Tensor | None = None  # of the examples; set by SignedInversion.descend
        self.gradients: Any = None  # likewise: how gradients of the examples become steps
        self.first_guess: Run | None = None  # where the first run starts

    @property
    def variables(self) -> tuple[Variable, ...]:
        """What is optimised besides the examples."""
        return self.matcher.counter.variables

    def distance(self, examples: Tensor, labels: Tensor, *extra: Tensor) -> Tensor:
        return self.matcher.cosine_distance(examples, labels, *extra)

    def at(self, x: Tensor, *extra: Tensor) -> Tensor:
        """The distance of the model's inputs `x` (N, *shape)."""
        assert self.labels is not None
        return self.distance(self.matcher.task.domain.from_model(x), self.labels, *extra)

    def __call__(self, state: State) -> Evaluation:
        loss = self.at(*state.variables)
        grads = torch.autograd.grad(loss, state.variables, allow_unused=True)
        return Evaluation(loss.item(), self.gradients(state.variables[0], grads), loss.item())

    @property
    def changes(self) -> bool:
        """Whether `prepare` changes the objective: losses of different steps are then not comparable."""
        return False

    def finish(self, x: Tensor, *extra: Tensor) -> None:
        """The descent has ended at these variables."""

    def full_precision(self: Own) -> Own:
        """The same objective with convolutions in float32; itself if they are."""
        matcher = self.matcher.full_precision()
        if matcher is self.matcher:
            return self
        other = copy.copy(self)
        other.matcher = matcher
        return other


@hyperparameters
class SignedInversion(Attack):
    """Adam on the sign of the gradient, under the domain's regulariser (for images total variation).

    Signed steps depend only on how the regulariser's gradient compares with the matching gradient, and the best
    absolute weight differs a hundredfold between networks. With tv_scale "share" the weight is relative: before they
    are added, the regulariser's gradient is scaled so that its mean size over an example is `tv` times the matching
    gradient's.
    """

    threat = "honest-but-curious"
    requires = frozenset({"double_backward"})
    infers_labels = True
    supports_adam = True
    paper = {
        "iterations": (4800, "Inverting Gradients' rec_mult.py"),
        "tv": (1e-4, "Inverting Gradients' options.py"),
        "tv_scale": ("absolute", "Inverting Gradients' rec_mult.py"),
        "init": ("normal", "Inverting Gradients' rec_mult.py"),
        "patience": (0, "Inverting Gradients' rec_mult.py"),
        "precision": ("float32", "Inverting Gradients' rec_mult.py"),
    }

    iterations: int = hp(300, "largest number of steps in a run", ge=1, smoke=3)
    restarts: int = hp(1, "number of runs; the one with the lowest objective is the answer", ge=1)
    lr: float = hp(
        0.1,
        "Adam step in the model's units, x 0.1 at 3/8, 5/8 and 7/8 of a run",
        gt=0,
        source="Inverting Gradients' rec_mult.py",
    )
    signed: bool = hp(True, "sign of the gradient instead of the gradient", source="Inverting Gradients' rec_mult.py")
    tv: float = hp(0.6, "weight of the regulariser (for images total variation)", ge=0)
    tv_scale: Literal["share", "absolute"] = hp(
        "share", "unit of that weight: share of the matching gradient, or absolute"
    )
    init: Literal["center", "normal"] = hp("center", "start: middle of the domain with a little noise, or N(0, 1)")
    patience: int = hp(100, "steps without a gain of 1% before the step falls early; 0: never", ge=0)
    precision: Precision = hp("auto", "dtype of 3x3 convolutions; auto: bfloat16 where the hardware supports it")

    def descend(self, objective: MatchingObjective, labels: Tensor, rng: torch.Generator, copies: int = 1) -> list[Run]:
        """All runs; their examples are (copies * N, *shape)."""
        objective.labels, objective.gradients = labels.repeat(copies), self._step_directions(objective)
        return run_restarts(self.restarts, rng, partial(self._run, objective, rng))

    def _run(self, objective: MatchingObjective, rng: torch.Generator, number: int) -> Run:
        matcher, labels = objective.matcher, objective.labels
        domain = matcher.task.domain
        assert labels is not None
        guess = objective.first_guess if number == 0 else None
        if guess is not None and guess.loss < SOLVED:
            return dataclasses.replace(guess, trace=(guess.loss,))
        if guess is not None:
            x = domain.to_model(guess.examples)
        elif self.init == "normal":
            x = torch.randn(len(labels), *domain.shape, generator=rng).to(matcher.target[0])
        else:
            x = domain.to_model(domain.init(len(labels), rng).to(matcher.target[0]))
        domain.project_(x)
        extra = [v.init.clone().to(x) for v in objective.variables]
        variables = [v.requires_grad_() for v in (x, *extra)]
        steps = [self.lr, *(v.step for v in objective.variables)]

        @torch.no_grad()
        def project() -> None:
            domain.project_(x)
            for value, variable in zip(extra, objective.variables, strict=True):
                value.copy_(variable.project(value))

        def should_stop(state: State) -> bool:
            return not math.isfinite(state.loss) or 0 < self.patience <= state.steps_without_improvement

        bounds = [0, *(round(self.iterations * share) for share in DECAY_AT), self.iterations]
        phases = [
            Phase(
                rates=lambda i, stage=stage: [step * 0.1**stage for step in steps],
                steps=end - begin,
                should_stop=should_stop,
            )
            for stage, (begin, end) in enumerate(pairwise(bounds))
        ][guess is not None and guess.loss < NEAR :]
        state = descend(
            variables, objective, Adam(variables), phases, rng, project=project, run=(number, self.restarts)
        )
        best, (best_x, *_) = state.best, state.best_variables
        extra = [v.detach() for v in extra]
        exact = objective.full_precision()
        exact.finish(best_x, *extra)
        ends = [best_x, x.detach(), *([] if guess is None else [domain.to_model(guess.examples)])]
        if exact is not objective or objective.changes or guess is not None:
            # with rounding, or an objective that has changed since, the lowest loss on the way proves little
            with torch.no_grad():
                candidates = [(exact.at(end, *extra).item(), end) for end in ends]
            best, best_x = min(candidates, key=lambda pair: pair[0] if math.isfinite(pair[0]) else math.inf)
        return Run(
            examples=domain.decode(best_x),
            labels=labels,
            loss=best,
            trace=tuple(state.trace),
            iterations=state.iterations + (guess.iterations if guess is not None else 0),
            failed=not best < (state.trace[0] if guess is None else 1),
        )

    def _step_directions(self, objective: MatchingObjective) -> Any:
        """What Adam is given: gradients with the regulariser's added, or only their signs."""
        regularizer = objective.matcher.task.domain.regularizer

        def directions(x: Tensor, grads: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
            of_examples, *others = grads
            assert of_examples is not None, "the objective does not depend on the examples"
            grads = (self.with_regularizer(x, of_examples, regularizer), *others)
            return tuple(g.sign() if self.signed and g is not None else g for g in grads)

        return directions

    def with_regularizer(self, x: Tensor, grad: Tensor, regularizer: Any) -> Tensor:
        """The matching gradient (N, *shape) plus, at its weight, the regulariser's."""
        if not self.tv:
            return grad
        (prior_grad,) = torch.autograd.grad(regularizer(x), x)
        if self.tv_scale == "absolute":
            return grad + self.tv * prior_grad
        return add_balanced(grad, prior_grad, self.tv)
