"""Rounds on Flower's simulation are the rounds of our own loop: same clients, same updates, same global model."""

import dataclasses
import math
import random
import threading
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from core.errors import UsageError
from core.protocol import Recipe
from federated import flower_engine
from federated.flower_engine import Abandoned, FlowerSource, Handover
from federated.simulation import FedAvgSource, Session
from models import build
from runner.experiment import load_dataset
from runner.flags import Fed
from runner.sources import federated_source
from tests.commands import in_process, lines, only_run

DATASET = load_dataset(Fed(image_size=8))
RECIPE = Recipe(2, local_epochs=2, lr=0.1, momentum=0.5, model_mode="train")
FLAGS = ("--model", "fc2", "--image-size", "8", "--client-images", "2", "--clients", "3", "--trials", "2")

needs_flower = pytest.mark.skipif(
    find_spec("flwr") is None or find_spec("ray") is None, reason="pip install 'flwr>=1.41,<2' 'ray>=2.40,<3'"
)


def session() -> tuple[Session, list[dict[str, Any]]]:
    shape = (3, 8, 8)
    model = build("cnn", shape, DATASET.task.num_classes, norm="batch", rng=torch.Generator().manual_seed(0))
    records: list[dict[str, Any]] = []
    own = Session(model, DATASET.task, torch.device("cpu"), 0, lambda model, recipe: model)
    own.on_round = records.append
    return own, records


def in_this_process(server: Any, client: Any, clients: int) -> None:
    """A ServerApp and a ClientApp with Flower's own messages and without Ray; replies come in any order."""
    from flwr.app import Context, Message, RecordDict

    from tests.flower_grid import LocalGrid

    nodes = {2**63 - 10 * k: k for k in range(clients)}

    def answer(messages: Iterable[Message]) -> list[Message]:
        replies = [client(message, context(message.metadata.dst_node_id)) for message in messages]
        return random.sample(replies, len(replies))

    def context(node: int) -> Context:
        return Context(1, node, {"partition-id": nodes[node]}, RecordDict(), {})

    server(LocalGrid(nodes, answer), context(next(iter(nodes))))


@needs_flower
@pytest.mark.parametrize("real", [False, True], ids=["in-process", "simulation"])
def test_rounds_updates_and_global_model_are_ours(real: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not real:
        monkeypatch.setattr(flower_engine, "simulate", in_this_process)
    settings: dict[str, Any] = {"trials": 4, "seed": 0, "clients": 4, "client_images": 3, "rounds": 2, "lr_decay": 0.5}
    found = []
    for kind in (FedAvgSource, FlowerSource):
        own, records = session()
        source = kind.deal(DATASET, RECIPE, clients_per_round=3, **settings)
        trials = []
        for trial in source.trials(own):
            sent = {name: value.clone() for name, value in trial.model.state_dict().items()}
            trials.append((trial, sent))
        found.append((trials, records, own.model.state_dict()))
    (ours, rounds, model), (flowers, flower_rounds, flower_model) = found
    for (a, sent), (b, flower_sent) in zip(ours, flowers, strict=True):
        assert (a.index, a.origin, a.recipe, a.names) == (b.index, b.origin, b.recipe, b.names)
        assert a.truth is not None and b.truth is not None
        assert torch.equal(a.truth.examples, b.truth.examples)
        assert_close(sent, flower_sent)
        assert_close(a.update.tensors, b.update.tensors)
        assert_close(a.update.buffers, b.update.buffers)
        assert a.update.num_examples == b.update.num_examples
    assert_close(model, flower_model)
    for one, other in zip(rounds, flower_rounds, strict=True):
        assert (one["round"], one["lr"]) == (other["round"], other["lr"])
        assert math.isclose(one["loss"], other["loss"], rel_tol=1e-4)


def assert_close(ours: Any, theirs: Any) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert value.dtype == theirs[name].dtype
        assert torch.allclose(value.double(), theirs[name].double(), atol=1e-5), name


@needs_flower
def test_the_attacked_client_has_the_same_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flower_engine, "simulate", in_this_process)
    rows = []
    for engine in ("own", "flower"):
        command = ["analytic", *FLAGS, "--rounds", "1", "--engine", engine, "--out", str(tmp_path / engine)]
        assert in_process("main_fed.py", command, monkeypatch) == 0
        rows.append(lines(only_run(tmp_path / engine) / "rows.jsonl"))
    for one, other in zip(*rows, strict=True):
        assert {k: one[k] for k in ("trial", "image", "match", "label_true", "label_pred", "client", "identified")} == {
            k: other[k] for k in ("trial", "image", "match", "label_true", "label_pred", "client", "identified")
        }
        assert one["psnr"] == pytest.approx(other["psnr"], abs=0.01)


@needs_flower
def test_an_error_of_a_client_ends_the_run_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flower_engine, "simulate", in_this_process)

    def dies(*args: Any) -> Any:
        raise ArithmeticError("the client died")

    monkeypatch.setattr(flower_engine, "train", dies)
    own, _ = session()
    source = FlowerSource.deal(DATASET, RECIPE, trials=1, seed=0, clients=2, client_images=2)
    with pytest.raises(ArithmeticError, match="the client died"):
        list(source.trials(own))


def test_whoever_stops_early_ends_the_other_thread() -> None:
    events, ended = Handover(), []

    def work() -> None:
        try:
            for number in range(3):
                events.put({"round": number})
        except Abandoned:
            ended.append(True)
            raise

    thread = threading.Thread(target=events.run, args=(work,))
    thread.start()
    assert next(iter(events)) == {"round": 0}
    events.stop()
    thread.join(10)
    assert ended == [True]


def test_what_flower_does_not_simulate_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    flags = Fed(engine="flower", model="fc2", image_size=8)
    with monkeypatch.context() as patch:
        patch.setattr(flower_engine, "find_spec", lambda name: None)
        with pytest.raises(UsageError, match="pip install"):
            federated_source(flags, DATASET)
    monkeypatch.setattr(flower_engine, "find_spec", lambda name: True)
    with pytest.raises(UsageError, match="engine=own"):
        federated_source(dataclasses.replace(flags, aggregate=2), DATASET)
    with pytest.raises(UsageError, match="backend"):
        federated_source(dataclasses.replace(flags, backend="ray"), DATASET)
    assert isinstance(federated_source(flags, DATASET), FlowerSource)
