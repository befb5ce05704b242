"""Captured updates from a Flower federation: three lines in any ServerApp.

    from federated.flower import capturing

    strategy = capturing(FedAvg(), "captured", Net(), input_shape=(3, 32, 32), recipe={"lr": 0.01, "local_epochs": 1})
    strategy.start(grid=grid, initial_arrays=arrays, num_rounds=3)

Every reply of a client becomes a folder captured/round0001/node<id>, which main_audit.py attacks. Training is not
changed. Written for the message API of flwr 1.41 and later (https://flower.ai); nothing of Flower is imported here.
"""

import copy
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from core.errors import UsageError
from federated.capture import from_flower, save_update

S = TypeVar("S")


def capturing(strategy: S, folder: str | Path, model: nn.Module, **facts: Any) -> S:
    """The strategy with the same settings, which also writes every client's update of every round to `folder`.

    model: a network with the names and shapes of what is trained; its own weights do not matter. facts: further
    arguments of `save_update`, such as `input_shape`, `recipe`, `mean` and `std`. A reply that is an error or does not
    fit the model costs one line on standard error, and training goes on.
    """
    for method in ("configure_train", "aggregate_train"):
        if not hasattr(strategy, method):
            raise UsageError(
                f"{type(strategy).__name__} has no {method}: capturing needs a strategy of flwr 1.41 or later"
            )
    base: Any = type(strategy)
    private, root = copy.deepcopy(model), Path(folder)

    class Capturing(base):  # type: ignore[misc]
        def configure_train(self, server_round: int, arrays: Any, config: Any, grid: Any) -> Any:
            self.broadcast = arrays.to_torch_state_dict()
            return super().configure_train(server_round, arrays, config, grid)

        def aggregate_train(self, server_round: int, replies: Iterable[Any]) -> Any:
            # replies come in the order in which clients end: by node, sums are the same in every run
            replies = sorted(replies, key=lambda message: message.metadata.src_node_id)
            for message in replies:
                write_reply(root, private, self.broadcast, message, server_round, facts)
            return super().aggregate_train(server_round, replies)

    Capturing.__name__ = Capturing.__qualname__ = f"Capturing{base.__name__}"
    other = copy.copy(strategy)
    other.__class__ = Capturing
    return other


def write_reply(
    folder: Path,
    model: nn.Module,
    broadcast: Mapping[str, Any],
    message: Any,
    server_round: int,
    facts: Mapping[str, Any],
) -> Path | None:
    """Write one reply; None, and one line on standard error, for a reply that cannot be written."""
    node = int(message.metadata.src_node_id)
    try:
        if message.has_error():
            raise UsageError(f"it ended with an error: {message.error.reason}")
        model.load_state_dict(dict(broadcast))
        own = {"origin": {"round": server_round, "client": node}, **from_flower(message.content), **facts}
        return save_update(folder / f"round{server_round:04d}" / f"node{node}", model, **own)
    except (UsageError, RuntimeError, KeyError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        print(f"round {server_round}: the update of node {node} was not captured: {reason}", file=sys.stderr)
        return None
