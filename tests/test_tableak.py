"""TabLeak: softmax categories, pooled runs, and the attacker's own certainty."""

import torch

from attacks import ATTACKS
from attacks.matching.runs import Run
from attacks.tableak import TOLERANCE, SoftmaxRows, order_like, pool
from core.domain import Column, TabularDomain
from core.protocol import Batch, Observation, Recipe, Reconstruction, Task
from core.rng import stream
from evaluation.baselines import Baselines
from evaluation.evaluator import ScoringContext
from evaluation.scoring import scoring_of
from federated.client import gradient
from models import build

COLUMNS = (*(Column(f"n{i}", (), 0.0, 1.0, -3.0, 3.0) for i in range(6)), Column("work", ("a", "b", "c")))
DOMAIN = TabularDomain((9,), COLUMNS)


def run(numbers: list[float], kinds: list[int], labels: list[int], loss: float = 0.0) -> Run:
    rows = torch.zeros(len(numbers), 9)
    rows[:, 0], rows[:, 6:] = torch.tensor(numbers), torch.eye(3)[kinds]
    return Run(rows, torch.tensor(labels), loss, (loss,), 1, False)


def test_categories_are_distributions_for_the_model_and_logits_for_the_optimiser() -> None:
    rows = SoftmaxRows(DOMAIN.shape, DOMAIN.columns)
    u = 10 * torch.randn(4, 9, generator=torch.Generator().manual_seed(0))
    x = rows.to_model(u)
    torch.testing.assert_close(x[:, 6:].sum(1), torch.ones(4))
    assert torch.equal(x[:, :6], u[:, :6])
    rows.project_(u)
    assert u[:, :6].abs().max() <= 3
    assert u[:, 6:].abs().max() > 3
    assert torch.equal(DOMAIN.project(rows.decode(u)), rows.decode(u))


def test_runs_are_pooled_in_the_order_of_the_best_one() -> None:
    best = run([1.0, -1.0, 0.5], [0, 1, 2], [0, 1, 1], 0.1)
    other = run([0.55, 1.1, -1.2], [2, 0, 1], [1, 0, 1], 0.2)
    third = run([1.0, 0.45, -3.0], [0, 2, 2], [0, 1, 1], 0.3)
    assert order_like(best, other).tolist() == [1, 2, 0]
    median, certainty = pool(DOMAIN, [best, other, third])
    torch.testing.assert_close(median[:, 0], torch.tensor([1.0, -1.2, 0.5]).double())
    assert median[:, 6:].argmax(1).tolist() == [0, 1, 2]
    torch.testing.assert_close(certainty[:, -1], torch.tensor([1.0, 2 / 3, 1.0]).double())
    assert certainty[0, 0] > 0.99 > 0.9 > certainty[1, 0]
    assert certainty[:, 1:6].min() == 1  # all runs agree


def test_the_certainty_of_a_number_is_the_share_of_right_cells_of_a_gaussian() -> None:
    rng = torch.Generator().manual_seed(0)
    spread = 0.5
    runs = [run((spread * torch.randn(4, generator=rng)).tolist(), [0] * 4, [0, 1, 2, 3]) for _ in range(400)]
    _, certainty = pool(DOMAIN, runs)
    right = (spread * torch.randn(100_000, generator=rng)).abs() <= TOLERANCE
    assert (certainty[:, 0] - right.double().mean()).abs().max() < 0.05


def test_records_of_a_batch_are_found_with_their_categories() -> None:
    task = Task(DOMAIN, 4)
    rng = torch.Generator().manual_seed(1)
    numbers, kinds = torch.randn(3, 6, generator=rng), torch.tensor([0, 2, 1])
    truth = Batch(torch.cat([numbers, torch.eye(3)[kinds]], 1), torch.tensor([0, 1, 2]))
    model = build("mlp", (9,), 4, rng=stream(0, "model"), width=64)
    update = gradient(model, truth, task, Recipe(3), torch.Generator())
    observation = Observation(task, Recipe(3), model, update, granted={"labels": truth.labels})
    rec = ATTACKS["tableak"](iterations=200, restarts=2).reconstruct(observation, torch.Generator().manual_seed(0))
    assert torch.equal(DOMAIN.cells(rec.examples)[:, -1], kinds.float())
    assert (rec.examples[:, :6] - numbers).abs().max() < TOLERANCE
    assert rec.certainty is not None
    assert rec.certainty.min() > 0.5


def test_the_surest_quarter_is_scored() -> None:
    rng = torch.Generator().manual_seed(0)
    domain = TabularDomain((60,), tuple(Column(f"n{i}", (), 0.0, 1.0, -3.0, 3.0) for i in range(60)))
    truth = Batch(torch.randn(8, 60, generator=rng).clamp(-1.5, 1.5), torch.zeros(8).long())
    certainty = torch.rand(8, 60, generator=rng)
    wrong = torch.rand(8, 60, generator=rng) > certainty  # a cell is right with the probability that is claimed
    context = ScoringContext(Task(domain, 2), Baselines(truth))
    scoring = scoring_of(domain)
    score = scoring.score(truth, Reconstruction(truth.examples + wrong, certainty=certainty), context)
    record = {**score.record, "seconds": 0.0}
    surest = scoring.summarize([{"trial": 0, **row} for row in score.rows], [record])["surest"]
    assert surest["right"] > 0.8 > 0.2 > surest["least"]
    assert abs(surest["right"] - surest["claimed"]) < 0.1
    assert surest["error"] < 0.1
    over = scoring.score(truth, Reconstruction(truth.examples + wrong, certainty=certainty**0.1), context)
    worse = scoring.summarize([{"trial": 0, **row} for row in over.rows], [record])["surest"]
    assert worse["right"] == surest["right"]
    assert worse["error"] > 0.2
