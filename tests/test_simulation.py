"""Simulated clients: which of them train, where, and with which convolutions, changes no update."""

import copy
import dataclasses
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
import torch

import data
import federated.client
from attacks import ATTACKS
from core.protocol import Batch, Observation, Recipe, Update
from core.rng import stream
from federated.client import train
from federated.simulation import ClientJob, FedAvgSource, Session, TrainedClient, Trial, train_one_by_one
from models import build
from models.winograd import WinogradConv
from runner import training
from runner.training import ClientTrainer

PHOTOS = data.load("photos", base_datadir=Path("unused"), image_size=8, victims="tuning")
SHAPE, CLASSES = PHOTOS.task.domain.shape, PHOTOS.task.num_classes


def session() -> Session:
    model = build("lenet", SHAPE, CLASSES, rng=stream(0, "model"))
    return Session(model, PHOTOS.task, torch.device("cpu"), 0, lambda model, recipe: model)


def source(trials: int, rounds: int, **changes: int) -> FedAvgSource:
    settings = {"trials": trials, "seed": 0, "clients": 4, "client_images": 2, "rounds": rounds} | changes
    return FedAvgSource.deal(PHOTOS, Recipe(1, 1, lr=0.1), **settings)  # type: ignore[arg-type]


def assert_equal(ours: Update, expected: Update) -> None:
    assert all(torch.equal(ours.tensors[name], expected.tensors[name]) for name in expected.tensors)


@pytest.mark.parametrize(("trials", "rounds", "trained"), [(3, 3, 9), (2, 1, 2), (3, 2, 5), (1, 5, 1)])
def test_only_clients_whose_updates_are_used_train(trials: int, rounds: int, trained: int) -> None:
    """Without a final model nobody else's update is needed in the last attacked round."""
    found: list[list[Trial]] = []
    counts: list[int] = []
    for uses_final_model in (True, False):
        jobs: list[ClientJob] = []

        def counted(given: Iterable[ClientJob], jobs: list[ClientJob] = jobs) -> Iterator[TrainedClient]:
            for job in given:
                jobs.append(job)
                yield job()

        now = dataclasses.replace(session(), uses_final_model=uses_final_model, train_clients=counted)
        found.append(list(source(trials, rounds).trials(now)))
        counts.append(len(jobs))
    assert counts == [4 * rounds, trained]
    for all_train, few_train in zip(*found, strict=True):
        assert all_train.origin == few_train.origin
        assert_equal(few_train.update, all_train.update)


def test_every_client_of_a_sum_trains() -> None:
    now = dataclasses.replace(session(), uses_final_model=False)
    (trial,) = source(1, 1, aggregate=4).trials(now)
    assert trial.update.num_examples == 8


def test_worker_processes_send_the_same_updates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "WORTHWHILE", 0.0)
    model = session().model

    def jobs() -> list[ClientJob]:
        batch = PHOTOS.private.take(torch.arange(3))
        return [ClientJob(model, batch, PHOTOS.task, Recipe(1, 1, lr=0.1), stream(k)) for k in range(4)]

    with ClientTrainer(2, torch.get_num_threads()) as trainer:
        pairs = list(zip(trainer(jobs()), train_one_by_one(jobs()), strict=True))
        assert trainer.pool is not None
    assert len(pairs) == 4
    for (ours, loss, _), (expected, expected_loss, _) in pairs:
        assert loss == expected_loss
        assert_equal(ours, expected)


def test_fast_convolutions_change_updates_by_rounding_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("models.winograd.FEWEST_CHANNELS_FIRST_ORDER", 4)
    monkeypatch.setattr("models.winograd.FEWEST_TILES_FIRST_ORDER", 4)
    model, task = build("resnet20", SHAPE, CLASSES, rng=stream(0, "model")), PHOTOS.task
    truth = PHOTOS.private.take(torch.arange(2))
    recipe = Recipe(2, 4, lr=0.05)

    def update(dtype: torch.dtype = torch.float32) -> Update:
        batch = Batch(truth.examples.to(dtype), truth.labels)
        return train(copy.deepcopy(model).to(dtype), batch, task, recipe, stream(0))[0]

    with monkeypatch.context() as patch:
        patch.setattr(federated.client, "use_fast_convs_", lambda *args, **flags: None)
        plain, exact = update(), update(torch.float64)
    calls: list[int] = []
    forward = WinogradConv.forward
    monkeypatch.setattr(WinogradConv, "forward", lambda self, x: (calls.append(1), forward(self, x))[1])
    fast = update()
    assert calls and len(calls) % 4 == 0  # steps
    for name, truly in exact.tensors.items():
        ours, theirs = (float((u.tensors[name] - truly).norm()) for u in (fast, plain))
        assert ours <= 3 * theirs + 1e-6 * float(truly.norm()), name
        assert fast.tensors[name].is_contiguous()
    objective = ATTACKS["ig_weight"]().matching_objective(Observation(task, recipe, model, fast))
    assert objective is not None
    with torch.no_grad():
        assert abs(float(objective(*truth))) < 1e-6
