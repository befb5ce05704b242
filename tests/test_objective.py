"""The objective at the truth: zero wherever the attacker's belief is right; and the status that follows from it."""

import pytest
import torch

from attacks import ATTACKS
from core.protocol import Recipe, Reconstruction, Task
from defenses.base import DEFENSES
from evaluation.objective import Objectives, objectives, status_of
from tests.test_contract import IMAGES, NAMES, batch, observe, small, task_of

MATCHING = [name for name in NAMES if small(name).matching_objective(observe(small(name), "gradient", n=1)) is not None]
UNROLLED = sorted(set(MATCHING) - {"ig_single"})  # which models an update otherwise than the client
ROUNDING = 1e-6  # of float32, relative

DETERMINISTIC = ["none", "clip(bound=0.01)"]


def mean_of(task: Task) -> torch.Tensor:
    return task.domain.project(torch.full((1, *task.domain.shape), 0.5))[0]


def found(name: str, kind: str, recipe: Recipe | None = None, n: int = 2) -> Objectives:
    """The objectives of an attack that answers with noise."""
    attack = small(name)
    task = task_of(attack)
    answer = batch(n, 9, task)
    observation = observe(attack, kind, n, local=recipe)
    values = objectives(attack, observation, batch(n, 1, task), Reconstruction(*answer), mean_of(task))
    assert values is not None
    return values


def test_every_attack_by_gradient_matching_has_an_objective() -> None:
    published = {"dlf", "dlg", "ggl", "gias", "idlg", "ig_multi", "ig_single", "ig_weight", "sme"}
    assert published <= set(MATCHING)


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("name", MATCHING)
def test_the_truth_explains_its_gradient(name: str, n: int) -> None:
    values = found(name, "gradient", n=n)
    assert values.truth is not None and values.answer is not None and values.baseline is not None
    assert abs(values.truth) < ROUNDING < 100 * ROUNDING < values.answer


@pytest.mark.parametrize("defense", DETERMINISTIC)
@pytest.mark.parametrize("name", MATCHING)
def test_the_truth_explains_one_full_batch_step(name: str, defense: str) -> None:
    values = found(name, "delta", Recipe(2, 1, lr=0.05, defense=defense))
    assert values.truth is not None and values.answer is not None
    assert abs(values.truth) < ROUNDING < values.answer


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(2, 4, lr=0.05),
        Recipe(2, 3, lr=0.05, defense="clip(bound=0.01)"),
        Recipe(2, 3, lr=0.05, momentum=0.9, weight_decay=0.01, lr_schedule="cosine"),
        Recipe(2, 3, lr=0.05, model_mode="train"),
    ],
    ids=["sgd", "clip", "momentum", "train"],
)
@pytest.mark.parametrize("name", UNROLLED)
def test_the_truth_explains_many_full_batch_steps(name: str, recipe: Recipe) -> None:
    values = found(name, "delta", recipe)
    assert values.truth is not None and values.answer is not None
    assert abs(values.truth) < ROUNDING < values.answer


def test_a_wrong_belief_shows_at_the_truth() -> None:
    attack = small("dlg")
    observation = observe(attack, "delta", local=Recipe(2, 4, lr=0.05))
    object.__setattr__(observation, "recipe", Recipe(2, 4, lr=0.5))
    values = objectives(attack, observation, batch(2, seed=1), Reconstruction(*batch(2, seed=1)), mean_of(IMAGES))
    assert values is not None and values.truth is not None
    assert values.truth > 1e-3
    assert values.truth == values.answer


def test_objectives_of_another_number_of_examples_do_not_exist() -> None:
    attack = small("dlg")
    observation = observe(attack, "gradient", n=2)
    values = objectives(
        attack, observation, batch(3, seed=1), Reconstruction(batch(1, seed=0).examples), mean_of(IMAGES)
    )
    assert values == Objectives(None, None, None)


def test_every_deterministic_defence_is_among_those_tested() -> None:
    """A new defence whose counter knows everything belongs into DETERMINISTIC."""
    assert {d.split("(")[0] for d in DETERMINISTIC} <= {"none", *DEFENSES}


@pytest.mark.parametrize(
    ("answer", "truth", "baseline", "recovered", "status"),
    [
        (1e-8, 1e-13, 0.5, True, "solved"),
        (1e-3, 1e-13, 0.5, False, "stuck"),
        (0.2, 0.2, 0.5, False, "ambiguous"),
        (0.1, 0.2, 0.5, False, "ambiguous"),
        (0.6, 0.2, 0.5, False, "diverged"),
        (float("nan"), 0.2, 0.5, False, "diverged"),
        (0.3, None, 0.5, False, "stuck"),
    ],
)
def test_the_four_words(answer: float, truth: float | None, baseline: float, recovered: bool, status: str) -> None:
    assert status_of(Reconstruction(torch.zeros(1)), Objectives(answer, truth, baseline), recovered) == status


def test_attacks_without_an_objective_have_the_same_words() -> None:
    assert ATTACKS["rtf"]().matching_objective(observe(small("rtf"), "gradient")) is None
    rec = Reconstruction(torch.zeros(1))
    assert [status_of(rec, None, recovered) for recovered in (True, False)] == ["solved", "stuck"]
    assert status_of(Reconstruction(torch.zeros(0), status="diverged"), None, False) == "diverged"
