"""Squared gradient distance by L-BFGS: what DLG and iDLG share, with restarts and a stopping rule of ours."""

import math
from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from attacks.base import Attack, MatchingDistance
from attacks.matching.matcher import UPDATE_MODEL_HELP, GradientMatcher, UpdateModel, check_update_model
from attacks.matching.runs import Run, run_restarts, to_reconstruction
from attacks.matching.statistics import MOST_STEPS, MatchedStatistics, matched_statistics
from attacks.optim.lbfgs import Lbfgs
from attacks.optim.loop import Evaluation, Objective, Phase, State, descend
from core.errors import UsageError
from core.hyperparameters import hp, hyperparameters
from core.protocol import Observation, Recipe, Reconstruction, Task

REGULARIZER_FADE = (1.0, 0.1, 0.01)  # of its weight in the three phases of a batch


class SquaredDistance(Objective):
    """||g^ - g*||^2, plus a regulariser whose weight changes with the phase; variables are examples and label logits.

    The distance of BatchNorm's statistics is added at its weight. Reports ||g^ - g*||^2 alone, relative to ||g*||^2.
    """

    def __init__(
        self,
        matcher: GradientMatcher,
        decode: Callable[[Tensor], Tensor],
        labels: Tensor | None,
        weights: list[float],
        statistics: MatchedStatistics | None = None,
        statistics_weight: float = 0.0,
    ) -> None:
        self.matcher, self.decode, self.labels = matcher, decode, labels
        self.weights = weights  # of the regulariser in each phase, relative to ||g*||^2
        self.statistics, self.statistics_weight = statistics, statistics_weight

    def __call__(self, state: State) -> Evaluation:
        examples = self.decode(state.variables[0])
        unknowns = state.variables[1 if self.labels is not None else 2 :]
        labels = state.variables[1].softmax(1) if self.labels is None else self.labels
        distance = self.matcher.squared_distance(examples, labels, *unknowns)
        weight = self.weights[state.phase] * self.matcher.target_norm_sq
        loss = distance + weight * self.matcher.task.domain.smooth_regularizer(examples) if weight else distance
        if self.statistics is not None:
            misfit = self.statistics.misfit(self.statistics.moments(self.matcher.unrolled))
            loss = loss + self.statistics_weight * self.matcher.target_norm_sq * misfit
        found = torch.autograd.grad(loss, state.variables, allow_unused=True)
        grads = tuple(torch.zeros_like(v) if g is None else g for v, g in zip(state.variables, found, strict=True))
        return Evaluation(loss.item(), grads, distance.item() / self.matcher.target_norm_sq)


@hyperparameters
class LbfgsInversion(Attack):
    """Squared gradient distance by L-BFGS.

    With our defaults a single example follows from the equations alone. A batch has too few of them, and a
    regulariser, fading in three phases, selects among the batches that fit.
    """

    threat = "honest-but-curious"
    requires = frozenset({"double_backward"})
    infers_labels = True
    supports_adam = True
    paper = {
        "iterations": (6000, "300 steps of 20, authors' main.py"),
        "restarts": (1, "authors' main.py"),
        "line_search": ("none", "authors' main.py"),
        "history": (100, "torch's default, authors' main.py"),
        "init": ("normal", "authors' main.py"),
        "bounded": (False, "authors' main.py"),
        "tv": (0.0, "authors' main.py"),
        "patience": (0, "authors' main.py"),
        "tolerance": (0.0, "authors' main.py"),
        "statistics_weight": (0.0, "as published"),
    }

    iterations: int = hp(800, "largest number of L-BFGS iterations in a run", ge=1, smoke=3)
    restarts: int = hp(3, "largest number of runs; another one starts only if one fails", ge=1, smoke=1)
    lr: float = hp(
        1.0,
        "step length that each line search tries first; without a line search, the step length itself",
        gt=0,
        source="authors' main.py",
    )
    line_search: Literal["strong_wolfe", "none"] = hp(
        "strong_wolfe", "line search of L-BFGS; without one it diverges on some images"
    )
    history: int = hp(200, "number of curvature pairs that L-BFGS stores", ge=1)
    init: Literal["center", "normal"] = hp("center", "start: middle of the domain with a little noise, or N(0, 1)")
    bounded: bool = hp(True, "examples confined to their domain by a smooth map; for images a sine")
    tv: float = hp(
        1e-2,
        "weight of the regulariser (for images total variation) relative to ||g*||^2, for batches only; x 0.1 in each "
        "of two further phases",
        ge=0,
    )
    failure_threshold: float = hp(1e-2, "squared distance, relative to ||g*||^2, above which a run has failed", gt=0)
    patience: int = hp(160, "iterations after which a run above the failure threshold ends; 0: never", ge=0)
    tolerance: float = hp(
        1e-9,
        "squared distance, relative to ||g*||^2, below which a run has converged; without effect with a regulariser",
        ge=0,
    )
    statistics_weight: float = hp(
        0.1,
        "weight, relative to ||g*||^2, of the distance of batch statistics that returned BatchNorm buffers reveal, "
        f"after at most {MOST_STEPS} steps on full batches",
        ge=0,
    )
    update_model: UpdateModel = hp("auto", UPDATE_MODEL_HELP)

    def check(self, model: nn.Module, task: Task, recipe: Recipe, kind: str, num_examples: int) -> None:
        super().check(model, task, recipe, kind, num_examples)
        if (reason := task.domain.fits(num_examples)) is not None:
            raise UsageError(reason)
        check_update_model(self.update_model, recipe, kind, num_examples)

    def matching_objective(self, observation: Observation) -> MatchingDistance | None:
        matcher = GradientMatcher(observation, self.update_model)
        return None if matcher.counter.variables else matcher.relative_squared_distance

    def invert(
        self,
        observation: Observation,
        rng: torch.Generator,
        labels: Tensor | None = None,
        logits: Callable[[int], Tensor] | None = None,
    ) -> Reconstruction:
        """Runs from new starts until one does not fail; the run with the lowest objective is the answer.

        Either `labels` (N,) are fixed, or `logits(run)` is where those of each run start (N, num_classes).
        """
        assert (labels is None) != (logits is None), "labels are fixed or optimised"
        make = partial(GradientMatcher, update_model=self.update_model)
        matcher, statistics = make(observation), None
        if self.statistics_weight:
            statistics = matched_statistics(observation, matcher)
        if statistics is not None:
            matcher = statistics.matcher(make)
        if not 0 < matcher.target_norm_sq < math.inf:  # an empty update, or local training that diverged
            examples = matcher.task.domain.project(matcher.task.domain.init(matcher.num_examples, rng))
            return Reconstruction(examples, labels, status="diverged")
        run = partial(self._run, matcher, statistics, rng, labels, logits)
        return to_reconstruction(run_restarts(self.restarts, rng, run, until_success=True))

    def _run(
        self,
        matcher: GradientMatcher,
        statistics: MatchedStatistics | None,
        rng: torch.Generator,
        labels: Tensor | None,
        logits: Callable[[int], Tensor] | None,
        number: int,
    ) -> Run:
        """One descent; ends when it has converged or failed."""
        first_logits = logits(number) if logits is not None else None
        domain = matcher.task.domain
        if self.init == "normal":
            start = torch.randn(matcher.num_examples, *domain.shape, generator=rng)
        else:
            start = domain.init(matcher.num_examples, rng)
        start = start.to(matcher.device)
        decode = domain.from_unbounded if self.bounded else (lambda u: u)
        variables = [domain.to_unbounded(start) if self.bounded else start]
        if first_logits is not None:
            variables.append(first_logits.detach().clone().to(matcher.device))
        variables += [v.init.clone().to(matcher.device) for v in matcher.counter.variables]
        for variable in variables:
            variable.requires_grad_()

        weights = [0.0] if matcher.num_examples == 1 or not self.tv else [self.tv * fade for fade in REGULARIZER_FADE]

        def failed(state: State) -> bool:
            return 0 < self.patience <= state.iterations and not state.best_metric <= self.failure_threshold

        def should_stop(state: State) -> bool:
            if weights[state.phase]:
                # the distance does not approach zero: it has converged when the objective stays the same
                converged = state.previous_best - state.best < 1e-4 * state.best
            else:
                converged = state.best_metric < self.tolerance
            return not math.isfinite(state.loss) or failed(state) or converged

        ends = [self.iterations * (i + 1) // len(weights) for i in range(len(weights))]
        state = descend(
            variables,
            SquaredDistance(matcher, decode, labels, weights, statistics, self.statistics_weight),
            Lbfgs(variables, self.lr, self.history, self.line_search == "strong_wolfe"),
            [Phase(rates=lambda i: (), until=end, should_stop=should_stop, from_best=True) for end in ends],
            rng,
            should_abort=failed,
            trace_best=True,
            run=(number, self.restarts),
        )
        best = state.best_variables
        return Run(
            examples=domain.project(decode(best[0])),
            labels=best[1].argmax(1) if labels is None else labels,
            loss=state.best_metric,
            trace=tuple(state.trace),
            iterations=state.iterations,
            failed=not state.best_metric <= self.failure_threshold,
        )
