"""Rounds of FedAvg on Flower's simulation, in the place of this suite's own loop: main_fed.py ATTACK --engine flower.

Every client is a ClientApp on a node of its own, which trains as `federated.client.train` does and replies with its
weights. The ServerApp orders what our loop would order, in the same order of clients, and aggregates by Flower's FedAvg
(https://flower.ai). flwr and ray are optional, and imported when a run starts.
"""

import dataclasses
import functools
import logging
import math
import os
import pickle
import queue
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from core.errors import UsageError
from core.protocol import Batch, Recipe, Task, Update
from core.rng import stream
from data import Dataset
from federated.client import train
from federated.server import sample_clients
from federated.simulation import FedAvgSource, Session, Trial

DAY = 86400.0  # seconds that a round may take

Event = Trial | dict[str, Any]  # an update to attack, or the record of a round that has ended


@dataclass(frozen=True)
class Order:
    """What every client is given once: the network as broadcast, the training, and the seed of its own randomness."""

    model: nn.Module
    task: Task
    recipe: Recipe
    seed: int
    threads: int


class FlowerSource(FedAvgSource):
    """As `FedAvgSource`, with the same clients and the same randomness, on Flower's simulation."""

    @classmethod
    def deal(cls, dataset: Dataset, recipe: Recipe, *, aggregate: int = 1, **settings: Any) -> "FedAvgSource":
        """As for `FedAvgSource`. Raises UsageError if flwr or ray is missing, and for sums of updates."""
        missing = [name for name in ("flwr", "ray") if find_spec(name) is None]
        if missing:
            raise UsageError(
                f"`engine=flower` needs {' and '.join(missing)}, not installed: pip install 'flwr>=1.41,<2' "
                "'ray>=2.40,<3'"
            )
        if aggregate > 1:
            raise UsageError(f"`aggregate={aggregate}` is simulated by `engine=own` alone")
        return super().deal(dataset, recipe, aggregate=aggregate, **settings)

    def trials(self, session: Session) -> Iterator[Trial]:
        session.broadcast(self.recipe)  # layers that the server adds are part of the network that clients build
        events = Handover()
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            self._write_clients(folder, session)
            server = server_app(self, session, events.put)
            thread = threading.Thread(
                target=events.run, args=(simulate, server, client_app(folder), len(self.parts)), daemon=True
            )
            thread.start()
            try:
                for event in events:
                    if isinstance(event, Trial):
                        yield event
                    else:
                        session.on_round(event)
            finally:
                events.stop()
                thread.join()

    def _write_clients(self, folder: Path, session: Session) -> None:
        """The order, and of each client its examples."""
        order = Order(session.model, session.task, self.recipe, session.seed, torch.get_num_threads())
        (folder / "order").write_bytes(pickle.dumps(order))
        for client, part in enumerate(self.parts):
            (folder / str(client)).write_bytes(pickle.dumps(self.private.take(part)))


class Handover:
    """Events of one thread for a loop in another: the first waits until the loop asks for the next event."""

    def __init__(self) -> None:
        self.events: queue.Queue[Any] = queue.Queue()
        self.answers: queue.Queue[bool] = queue.Queue()

    def put(self, event: Event) -> None:
        """Hand over an event. Raises Abandoned if nobody listens any more."""
        self.events.put(event)
        if not self.answers.get():
            self.answers.put(False)
            raise Abandoned

    def run(self, work: Callable[..., None], *arguments: Any) -> None:
        """Do the work, whose end or error ends the loop."""
        try:
            work(*arguments)
            self.events.put(None)
        except Abandoned:
            self.events.put(None)
        except BaseException as error:  # raised again by the loop
            self.events.put(error)

    def __iter__(self) -> Iterator[Event]:
        while (event := self.events.get()) is not None:
            if isinstance(event, BaseException):
                raise event
            yield event
            self.answers.put(True)

    def stop(self) -> None:
        self.answers.put(False)


class Abandoned(Exception):
    """Nobody needs further rounds."""


def simulate(server: Any, client: Any, clients: int) -> None:
    """Run a ServerApp and a ClientApp on Flower's simulation, with a Ray of our own."""
    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import ray
    from flwr.simulation import run_simulation

    logging.getLogger("flwr").setLevel(logging.CRITICAL)
    # by itself, Flower waits for ever for a Ray that does not start
    environment = {"env_vars": {"PYTHONPATH": str(Path(__file__).parents[1])}}
    ray.init(
        address="local", include_dashboard=False, log_to_driver=False, logging_level="error", runtime_env=environment
    )
    try:
        resources: Any = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}}
        run_simulation(server, client, clients, backend_config=resources)
    finally:
        ray.shutdown()


def client_app(folder: Path) -> Any:
    """The ClientApp of every node: it tells which client it is, and trains on that client's examples."""
    from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp

    client = ClientApp()

    @client.query()
    def identify(message: Message, context: Context) -> Message:
        number = MetricRecord({"client": int(context.node_config["partition-id"])})
        return Message(RecordDict({"metrics": number}), reply_to=message)

    @client.train()
    def fit(message: Message, context: Context) -> Message:
        config, number = message.content["config"], int(context.node_config["partition-id"])
        order = _order(folder)
        torch.set_num_threads(order.threads)
        model = order.model
        model.load_state_dict(message.content["arrays"].to_torch_state_dict())
        examples: Batch = pickle.loads((folder / str(number)).read_bytes())
        recipe = dataclasses.replace(order.recipe, lr=float(config["lr"]))
        rng = stream(order.seed, "client", int(config["server-round"]) - 1, number)
        update, loss = train(model, examples, order.task, recipe, rng)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.sub_(update.tensors[name])
            for name, buffer in model.named_buffers():
                buffer.copy_(update.buffers[name])
        metrics = MetricRecord({"num-examples": update.num_examples, "loss": loss})
        return Message(RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics}), reply_to=message)

    return client


@functools.lru_cache(maxsize=1)
def _order(folder: Path) -> Order:
    """Read once in each process."""
    order: Order = pickle.loads((folder / "order").read_bytes())
    return dataclasses.replace(order, model=order.model.cpu())


def server_app(source: FlowerSource, session: Session, put: Callable[[Event], None]) -> Any:
    """The ServerApp of an experiment, which hands over each update to attack and each round's record."""
    from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
    from flwr.serverapp import Grid, ServerApp
    from flwr.serverapp.strategy import FedAvg

    attacked = Counter[int]()

    class Rounds(FedAvg):
        """FedAvg with the clients of our own loop, in their order."""

        nodes: dict[int, int]  # node by client

        def configure_train(self, server_round: int, arrays: Any, config: Any, grid: Any) -> Any:
            number = server_round - 1
            recipe = dataclasses.replace(source.recipe, lr=source.recipe.lr * source.lr_decay**number)
            load_arrays(session.model, arrays)
            if number:
                session.broadcast(recipe)
            self.recipe, self.sent = recipe, {k: v.clone() for k, v in session.model.state_dict().items()}
            rng = stream(session.seed, "clients", number)
            self.chosen = sample_clients(len(source.parts), source.clients_per_round, rng)
            own = ConfigRecord({"server-round": server_round, "lr": recipe.lr})
            content = RecordDict({"arrays": ArrayRecord(session.model.cpu().state_dict()), "config": own})
            session.model.to(session.device)
            return [Message(content, dst_node_id=self.nodes[k], message_type="train") for k in self.chosen]

        def aggregate_train(self, server_round: int, replies: Any) -> Any:
            number = server_round - 1
            client_of = {node: client for client, node in self.nodes.items()}
            ordered = sorted(answered(replies), key=lambda message: client_of[message.metadata.src_node_id])
            by_client = dict(zip(self.chosen, ordered, strict=True))
            targets = source.targets(self.chosen, number, attacked)
            for client in sorted(targets):
                message = by_client[client]
                update = _update(session, self.sent, message)
                truth = source.private.take(source.parts[client]).to(session.device)
                origin, names = {"round": number, "client": client}, source.private.names_at(source.parts[client])
                put(Trial(attacked.total(), session.model, self.recipe, update, truth, origin, names))
                attacked[client] += 1
            losses = [float(message.content["metrics"]["loss"]) for message in ordered]
            arrays, metrics = super().aggregate_train(server_round, ordered)
            load_arrays(session.model, arrays)
            mean = sum(losses) / len(losses)
            put({"round": number, "loss": mean if math.isfinite(mean) else None, "lr": self.recipe.lr})
            return arrays, metrics

    server = ServerApp()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        strategy = Rounds(fraction_evaluate=0.0, min_train_nodes=1, min_available_nodes=1)
        while len(nodes := list(grid.get_node_ids())) < len(source.parts):
            time.sleep(0.05)  # nodes are registered while the ServerApp starts
        asked = [Message(RecordDict(), dst_node_id=node, message_type="query") for node in nodes]
        strategy.nodes = {
            int(reply.content["metrics"]["client"]): reply.metadata.src_node_id
            for reply in answered(grid.send_and_receive(asked, timeout=DAY))
        }
        arrays = ArrayRecord(session.model.cpu().state_dict())
        session.model.to(session.device)
        strategy.start(grid=grid, initial_arrays=arrays, num_rounds=source.rounds, timeout=DAY)

    return server


def answered(replies: Iterable[Any]) -> list[Any]:
    """The replies. Raises RuntimeError if a client ended with an error."""
    found = list(replies)
    for message in found:
        if message.has_error():
            raise RuntimeError(f"a client ended with an error: {message.error.reason}")
    return found


def load_arrays(model: nn.Module, arrays: Any) -> None:
    """Weights and buffers of a Flower ArrayRecord, in place; means of counters are rounded."""
    state = model.state_dict()
    with torch.no_grad():
        for name, value in arrays.to_torch_state_dict().items():
            own = state[name]
            own.copy_(value if own.is_floating_point() else value.double().round())


def _update(session: Session, sent: dict[str, torch.Tensor], message: Any) -> Update:
    """What the server reads from a reply: the weights that it sent minus those that came back, and the buffers."""
    received = {k: v.to(session.device) for k, v in message.content["arrays"].to_torch_state_dict().items()}
    delta = {name: sent[name] - received[name] for name, _ in session.model.named_parameters()}
    buffers = {name: received.get(name, b.detach().clone()) for name, b in session.model.named_buffers()}
    return Update("delta", delta, int(message.content["metrics"]["num-examples"]), buffers)
