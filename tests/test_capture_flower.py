"""A Flower strategy that captures: the federation is Flower's own, and the update is what the client really sent."""

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("flwr", reason="flwr is not installed: pip install 'flwr>=1.41,<2'")

from flwr.app import ArrayRecord, Error, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg

from core.errors import UsageError
from core.protocol import Batch, Recipe, image_task
from federated.capture import load_capture, read_update
from federated.client import train
from federated.flower import capturing
from federated.server import aggregate
from models import build
from tests.flower_grid import LocalGrid

TASK = image_task((1, 4, 4), 3)
RECIPE = Recipe(2, local_epochs=2, lr=0.1)
NODES = (2**63 - 5, 7, 1234)  # as large as Flower's
FACTS = {"input_shape": (1, 4, 4), "recipe": RECIPE}


def network() -> torch.nn.Module:
    return build("mlp", (1, 4, 4), 3, rng=torch.Generator().manual_seed(0))


def data_of(node: int) -> Batch:
    rng = torch.Generator().manual_seed(node)
    return Batch(torch.rand(node % 3 + 2, 1, 4, 4, generator=rng), torch.randint(3, (node % 3 + 2,), generator=rng))


def update_of(model: torch.nn.Module, node: int) -> Any:
    return train(model, data_of(node), TASK, RECIPE, torch.Generator().manual_seed(node))[0]


def reply(message: Message, failing: frozenset[int]) -> Message:
    """What a node that trains in this process sends; an error if it is one of `failing`."""
    node = message.metadata.dst_node_id
    if node in failing:
        return Message(Error(code=1, reason="the node died"), reply_to=message)
    model = network()
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    update = update_of(model, node)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.sub_(update.tensors[name])
    metrics = MetricRecord({"num-examples": update.num_examples})
    content = RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics})
    return Message(content, reply_to=message)


def federated(folder: Path, rounds: int, failing: frozenset[int] = frozenset()) -> torch.nn.Module:
    """The global model after some rounds of a capturing strategy."""
    grid = LocalGrid(NODES, lambda messages: [reply(message, failing) for message in messages])
    strategy = capturing(FedAvg(fraction_evaluate=0.0), folder, network(), **FACTS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = strategy.start(grid, ArrayRecord(network().state_dict()), num_rounds=rounds)
    model = network()
    model.load_state_dict(result.arrays.to_torch_state_dict())
    return model


def test_rounds_of_flower_are_ours_and_every_update_is_captured(tmp_path: Path) -> None:
    found, model = federated(tmp_path, rounds=2), network()
    for number in (1, 2):
        updates = [update_of(model, node) for node in NODES]
        for node, sent in zip(NODES, updates, strict=True):
            capture = load_capture(tmp_path / f"round{number:04d}" / f"node{node}")
            blank = network()
            update = read_update(capture, blank)
            assert capture.recipe == RECIPE
            assert capture.origin == {"round": number, "client": node}
            assert update.num_examples == len(data_of(node).labels)
            for name, p in model.named_parameters():
                assert torch.allclose(blank.get_parameter(name), p, atol=1e-6)
                assert torch.allclose(update.tensors[name], sent.tensors[name], atol=1e-6)
        aggregate(model, updates)
    for a, b in zip(found.parameters(), model.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_a_node_that_dies_costs_its_update_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    federated(tmp_path, rounds=1, failing=frozenset({7}))
    names = {path.name for path in (tmp_path / "round0001").iterdir()}
    assert names == {f"node{node}" for node in NODES if node != 7}
    assert "node 7 was not captured: it ended with an error: the node died" in capsys.readouterr().err


def test_settings_are_kept_and_other_objects_refused() -> None:
    strategy = FedAvg(fraction_train=0.5)
    own = capturing(strategy, "nowhere", network(), **FACTS)
    assert isinstance(own, FedAvg)
    assert own.fraction_train == 0.5
    assert type(strategy) is FedAvg
    with pytest.raises(UsageError, match="configure_train"):
        capturing(copy.copy(TASK), "nowhere", network())
