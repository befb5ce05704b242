"""The descent loop and the tracker: a descent that was interrupted anywhere ends bit for bit where it would have."""

import dataclasses
import io
import math
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from attacks import ATTACKS
from attacks.optim.adam import Adam
from attacks.optim.cma import minimize_cma
from attacks.optim.lbfgs import Lbfgs
from attacks.optim.loop import Evaluation, Function, Objective, Phase, State, descend
from attacks.optim.tracker import Tracker, current_tracker, tracking
from core.protocol import Batch, Observation, Recipe, image_task
from federated.client import gradient, train
from models import build


class Interruption(Exception):
    """The process ends here."""


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    """A state as it is read back from a checkpoint: only tensors, numbers, strings and containers survive."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def interrupted(work: Callable[[], Any], at_save: int) -> dict[str, Any]:
    """The state saved when `work` is interrupted at its save number `at_save`."""
    saves: list[dict[str, Any]] = []

    def save(state: dict[str, Any]) -> None:
        saves.append(through_a_file(state))
        if len(saves) > at_save:
            raise Interruption

    with tracking(Tracker(should_save=lambda: True, save=save)), pytest.raises(Interruption):
        work()
    return saves[-1]


def assert_resumes(work: Callable[[], Any], least_saves: int, at_most: int = 1000) -> None:
    """`work()` gives equal results without saving and when it is resumed from each of its saves.

    at_most: the largest number of saves that are tried, the first and the last among them.
    """
    expected = work()
    saves: list[dict[str, Any]] = []
    with tracking(Tracker(should_save=lambda: True, save=lambda state: saves.append(through_a_file(state)))):
        assert_equal(work(), expected, "while saving")
    assert len(saves) >= least_saves, f"only {len(saves)} saves"
    chosen = torch.linspace(0, len(saves) - 1, min(len(saves), at_most)).round().long().tolist()
    assert_equal(interrupted(work, chosen[-2]), saves[chosen[-2]], "a save before an interruption")
    for number in chosen:
        with tracking(Tracker(saved=saves[number])):
            assert_equal(work(), expected, f"resumed from save {number}")


def assert_equal(a: Any, b: Any, where: str) -> None:
    """Bit for bit, through dataclasses and containers."""
    assert type(a) is type(b), f"{where}: {type(a)} and {type(b)}"
    if isinstance(a, Tensor):
        assert torch.equal(a, b), where
    elif dataclasses.is_dataclass(a):
        assert_equal(vars(a), vars(b), where)
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_equal(a[key], b[key], f"{where}, {key}")
    elif isinstance(a, tuple | list):
        assert len(a) == len(b), f"{where}: {len(a)} and {len(b)} entries"
        for i, (one, other) in enumerate(zip(a, b, strict=True)):
            assert_equal(one, other, f"{where}, entry {i}")
    else:
        assert a == b, f"{where}: {a} and {b}"


def bent_valley(x: Tensor) -> Tensor:
    """A chained Rosenbrock function: a few hundred L-BFGS iterations do not exhaust it."""
    return (10 * (x[1:] - x[:-1].square()).square() + (1 - x[:-1]).square()).sum()


class Drifting(Objective):
    """A quadratic whose centre moves every fourth step, by a draw: its centre is state that has to be saved."""

    def __init__(self, rng: torch.Generator) -> None:
        self.rng, self.center, self.starts = rng, torch.zeros(6), 0

    def start(self) -> None:
        self.starts += 1

    def prepare(self, state: State) -> None:
        if state.iterations % 4 == 3:
            self.center = torch.randn(6, generator=self.rng)
            state.best = math.inf

    def __call__(self, state: State) -> Evaluation:
        x, _ = state.variables
        loss = (x - self.center).square().sum() + x.sum().cos()
        (grad,) = torch.autograd.grad(loss, x)
        return Evaluation(loss.item(), (grad, None), loss.item() + 1)

    def state_dict(self) -> dict[str, Any]:
        return {"center": self.center, "starts": self.starts}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        self.center, self.starts = saved["center"], saved["starts"]


def test_adam_with_phases_and_patience_resumes() -> None:
    def should_stop(state: State) -> bool:
        return state.steps_without_improvement >= 3

    def work() -> tuple[State, Tensor]:
        rng = torch.Generator().manual_seed(0)
        x, scale = torch.randn(5, generator=rng).requires_grad_(), torch.tensor(1.0, requires_grad=True)
        function = Function(lambda x, scale: bent_valley(x) + (scale * x.sum() - 3).square())
        phases = [
            Phase(lambda i: [0.3, 0.01], steps=9, should_stop=should_stop),
            Phase(lambda i: [0.1 / (i + 1), 0.02], steps=8, from_best=True),
            Phase(lambda i: [0.01, 0.001], until=25, should_stop=should_stop),
        ]
        state = descend([x, scale], function, Adam([x, scale]), phases, rng, project=lambda: x.data.clamp_(-1.5, 1.5))
        return state, rng.get_state()

    assert 2 < len(work()[0].trace) <= 25
    assert_resumes(work, least_saves=12)


@pytest.mark.parametrize("line_search", [True, False])
@pytest.mark.parametrize("history", [5, 100])
def test_lbfgs_with_phases_from_the_best_resumes(history: int, line_search: bool) -> None:
    def work() -> tuple[State, Tensor]:
        rng = torch.Generator().manual_seed(1)
        x = torch.randn(40, generator=rng, dtype=torch.float64).requires_grad_()

        def objective(x: Tensor) -> Tensor:
            return bent_valley(x).log1p()

        phases = [Phase(rates=lambda i: (), until=end, from_best=True) for end in (50, 100, 130)]
        optimizer = Lbfgs([x], 1.0 if line_search else 0.01, history, line_search)
        state = descend([x], Function(objective), optimizer, phases, rng, trace_best=True)
        return state, rng.get_state()

    state = work()[0]
    assert state.iterations == 130  # three phases: 20 20 10, 20 20 10, 20 10
    assert state.best < state.trace[0]
    assert_resumes(work, least_saves=8)


def test_an_objective_with_state_resumes() -> None:
    def work() -> tuple[State, Tensor, int, Tensor]:
        rng = torch.Generator().manual_seed(2)
        variables = [torch.zeros(6, requires_grad=True), torch.ones(2, requires_grad=True)]
        objective = Drifting(rng)
        phases = [Phase(lambda i: [0.2, 0.2], steps=6), Phase(lambda i: [0.05, 0.05], steps=7)]
        state = descend(variables, objective, Adam(variables), phases, rng)
        return state, objective.center, objective.starts, rng.get_state()

    state, center, starts, _ = work()
    assert starts == 1
    assert center.abs().sum() > 0
    assert torch.equal(state.variables[1], torch.ones(2))
    assert_resumes(work, least_saves=13)


def test_cma_resumes_without_evaluating_again() -> None:
    evaluated: list[Tensor] = []

    def objective(x: Tensor) -> Tensor:
        evaluated.append(x)
        return bent_valley(x.flatten().double())

    def work() -> tuple[State, Tensor]:
        rng = torch.Generator().manual_seed(3)
        return minimize_cma(objective, torch.zeros(2, 3), 0.5, 60, rng), rng.get_state()

    state = work()[0]
    assert len(evaluated) == len(state.trace) == state.iterations
    assert state.best == pytest.approx(min(state.trace))
    assert_resumes(work, least_saves=5)
    saved = interrupted(work, at_save=2)
    evaluated.clear()
    with tracking(Tracker(saved=saved)):
        work()
    assert len(evaluated) == len(state.trace) - len(saved["open"][0]["trace"])


@pytest.mark.parametrize(
    ("name", "hyperparameters", "n", "recipe"),
    [
        ("dlg", {"iterations": 60, "restarts": 2, "failure_threshold": 1e-9}, 2, None),  # three phases, two runs
        ("dlg", {"iterations": 40, "restarts": 1}, 1, Recipe(1, 2, lr=0.01)),
        ("ig_single", {"iterations": 8, "restarts": 2}, 2, None),
        ("ig_multi", {"iterations": 5, "init": "normal"}, 2, Recipe(1, 2, lr=0.01)),
        ("sme", {"iterations": 12, "correction_interval": 3, "alpha_lr": 0.1}, 2, Recipe(1, 2, lr=0.01)),
        ("dlf", {"iterations": 6, "restarts": 2}, 2, Recipe(1, 2, lr=0.01)),
    ],
)
def test_a_whole_reconstruction_resumes(
    name: str, hyperparameters: dict[str, Any], n: int, recipe: Recipe | None
) -> None:
    task = image_task((3, 16, 16), 4)
    net = build("lenet", task.domain.shape, 4, rng=torch.Generator().manual_seed(0))
    rng = torch.Generator().manual_seed(1)
    truth = Batch(torch.rand(n, 3, 16, 16, generator=rng), torch.arange(n))
    public = Batch(torch.rand(20, 3, 16, 16, generator=rng), torch.arange(20) % 4)
    update = train(net, truth, task, recipe, rng)[0] if recipe else gradient(net, truth, task, Recipe(n), rng)
    observation = Observation(task, recipe or Recipe(n), net, update, public)
    attack = ATTACKS[name](**hyperparameters)
    assert_resumes(
        lambda: attack.reconstruct(observation, torch.Generator().manual_seed(5)),
        least_saves=hyperparameters["iterations"] // 20 if name == "dlg" else hyperparameters["iterations"] // 2,
        at_most=5,
    )


def test_progress_counts_up_to_the_total() -> None:
    reports: list[tuple[int, int, float]] = []
    x = torch.ones(3, requires_grad=True)
    phases = [Phase(lambda i: [0.1], steps=4), Phase(lambda i: [0.01], steps=3)]
    with tracking(Tracker(on_progress=lambda *report: reports.append(report))):
        state = descend([x], Function(bent_valley), Adam([x]), phases, torch.Generator(), run=(1, 3))
    assert [iteration for iteration, _, _ in reports] == list(range(8, 15))
    assert {total for _, total, _ in reports} == {21}
    assert [value for _, _, value in reports] == state.trace


def test_the_best_variables_have_the_lowest_objective() -> None:
    """A step much too large: the end is worse than what was found on the way."""
    x = torch.full((4,), 0.9, requires_grad=True)
    phases = [Phase(lambda i: [0.001 if i < 5 else 0.5], steps=9)]
    state = descend([x], Function(bent_valley), Adam([x]), phases, torch.Generator())
    assert state.best == min(state.trace) < state.trace[-1]
    assert bent_valley(state.best_variables[0]).item() == pytest.approx(state.best)


def test_two_threads_do_not_share_progress() -> None:
    together = threading.Barrier(2, timeout=30)
    reports: dict[int, list[int]] = {2: [], 3: []}

    def descend_with(steps: int) -> None:
        x = torch.ones(3, requires_grad=True)
        with tracking(Tracker(on_progress=lambda iteration, total, objective: reports[steps].append(total))):
            together.wait()
            descend([x], Function(bent_valley), Adam([x]), [Phase(lambda i: [0.1], steps=steps)], torch.Generator())
            together.wait()

    threads = [threading.Thread(target=descend_with, args=(steps,)) for steps in reports]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert reports == {2: [2, 2], 3: [3, 3, 3]}


def test_an_exception_leaves_the_current_tracker_as_it_was() -> None:
    outer, inner = Tracker(), Tracker()
    with tracking(outer):
        with tracking(inner):
            assert current_tracker() is inner
        assert current_tracker() is outer
        with pytest.raises(ZeroDivisionError), tracking(Tracker()):
            raise ZeroDivisionError
        assert current_tracker() is outer
    assert current_tracker() is not outer


def test_without_a_tracker_nothing_is_saved_or_restored() -> None:
    rng = torch.Generator()
    tracker = current_tracker()
    assert tracker.restore(rng) is None
    assert not tracker.should_save()
    tracker.progress(1, 2, 3.0)
