"""Sources of trials: a gradient of one batch, or rounds of FedAvg with simulated clients.

A source yields what a server receives, as a `Trial`. A `Trial` also holds the truth, for scoring.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

import data
from core.errors import UsageError
from core.protocol import Batch, Kind, Recipe, Task, Update
from core.rng import stream
from data import Dataset, Scheme, Split
from defenses.base import parse
from federated.client import gradient, train
from federated.server import aggregate, sample_clients


@dataclass(frozen=True)
class Trial:
    """One update to attack: what the server knows of it and, for scoring alone, the private batch."""

    index: int
    model: nn.Module  # as broadcast; the source changes it in place later, so whoever keeps it copies it
    recipe: Recipe
    update: Update
    truth: Batch | None = None
    origin: dict[str, int] = dataclasses.field(default_factory=dict)  # round and client, in federated mode
    names: tuple[str, ...] | None = None  # file names of the private examples, if they have any


@dataclass
class Session:
    """What a source works on: the model, the place of its data, and the server's part of each broadcast."""

    model: nn.Module
    task: Task
    device: torch.device
    seed: int
    on_broadcast: Callable[[nn.Module, Recipe], nn.Module]  # the model that the server sends with a recipe
    on_round: Callable[[dict[str, Any]], None] = lambda record: None  # loss and learning rate at the end of a round
    on_client: Callable[[int, int, int], None] = lambda number, trained, clients: None  # round, clients trained, of all

    def broadcast(self, recipe: Recipe) -> None:
        self.model = self.on_broadcast(self.model, recipe)


class Source(Protocol):
    """Where trials come from. `kind`, `recipe` and `num_examples` are of its largest update."""

    kind: Kind
    recipe: Recipe
    num_examples: int
    rounds: int  # of training that `Session.on_round` hears of

    def victims(self, seed: int) -> Tensor:
        """Indices of the private examples that some client may send: no candidates for identification."""

    def trials(self, session: Session) -> Iterator[Trial]:
        """The trials in order, the same for equal seeds."""


@dataclass(frozen=True)
class GradientSource:
    """Gradient mode: each trial is the gradient of one private batch; no two batches share an example."""

    private: Split
    recipe: Recipe
    count: int

    kind: Kind = "gradient"
    rounds: int = 0

    @property
    def num_examples(self) -> int:
        return self.recipe.batch_size

    def victims(self, seed: int) -> Tensor:
        """The private examples of all batches, in order."""
        order = torch.randperm(len(self.private), generator=stream(seed, "data"))
        return order[: self.recipe.batch_size * self.count]

    def trials(self, session: Session) -> Iterator[Trial]:
        session.broadcast(self.recipe)
        for index, chosen in enumerate(self.victims(session.seed).split(self.recipe.batch_size)):
            truth = self.private.take(chosen).to(session.device)
            rng = stream(session.seed, "client", index)
            update = gradient(session.model, truth, session.task, self.recipe, rng)
            yield Trial(index, session.model, self.recipe, update, truth, names=self.private.names_at(chosen))


@dataclass(frozen=True)
class FedAvgSource:
    """Federated mode: rounds of FedAvg. In each round the server attacks those clients it has attacked least.

    parts: the private examples of each client, as positions in `private`. lr_decay: factor on the learning rate from
    one round to the next.
    """

    private: Split
    parts: Sequence[Tensor]
    recipe: Recipe
    count: int
    rounds: int
    clients_per_round: int
    lr_decay: float = 1.0

    kind: Kind = "delta"

    @classmethod
    def deal(
        cls,
        dataset: Dataset,
        recipe: Recipe,
        *,
        trials: int,
        seed: int,
        clients: int,
        client_images: int | None = 1,
        clients_per_round: int | None = None,
        rounds: int | None = None,
        lr_decay: float = 1.0,
        partition: Scheme = "iid",
        beta: float | None = None,
        classes_per_client: int | None = None,
    ) -> "FedAvgSource":
        """A federation whose clients hold the private split as `partition` deals it.

        None stands for all clients in a round, one round per trial, and the partition's own parameters; a batch size
        of 0 in the recipe for all images of a client, 0 `client_images` for the whole split. Raises UsageError for
        settings that contradict each other or that the data set does not allow.
        """
        if beta is not None and partition != "dirichlet":
            raise UsageError("`beta` belongs to `partition=dirichlet`")
        if classes_per_client is not None and partition != "classes":
            raise UsageError("`classes_per_client` belongs to `partition=classes`")
        if recipe.momentum and recipe.optimizer != "sgd":
            raise UsageError("`momentum` belongs to `client_optimizer=sgd`")
        rounds, per_round = rounds or trials, clients_per_round or clients
        if per_round > clients:
            raise UsageError(f"`clients_per_round={per_round}` of `clients={clients}`: lower it")
        visible = parse(recipe.defense).visible_updates(per_round)
        if -(-trials // rounds) > visible:
            raise UsageError(
                f"`trials={trials}`, but {rounds} round(s) of {per_round} client(s) send only {rounds * visible} "
                "updates: raise `rounds`"
            )
        if not len(dataset.test):
            raise UsageError(f"{dataset.name} holds out no image to measure accuracy on: a class needs three or more")
        rng = stream(seed, "data")
        labels = dataset.private.labels
        parts = data.partition(
            labels, clients, client_images or None, partition, beta or 0.5, classes_per_client or 2, rng
        )
        largest = max(map(len, parts))
        if recipe.batch_size > largest:
            raise UsageError(f"`batch_size={recipe.batch_size}` is more than a client's {largest} image(s): lower it")
        recipe = dataclasses.replace(recipe, batch_size=recipe.batch_size or largest)
        steps = recipe.steps(largest)
        _check_rates(recipe.lr, lr_decay, rounds)
        if recipe.lr_schedule != "constant" and steps == 1:
            raise UsageError(f"`lr_schedule={recipe.lr_schedule}` needs more than one local step: raise `local_epochs`")
        return cls(dataset.private, parts, recipe, trials, rounds, per_round, lr_decay)

    @property
    def num_examples(self) -> int:
        visible = parse(self.recipe.defense).visible_updates(self.clients_per_round)
        return max(map(len, self.parts)) * -(-self.clients_per_round // visible)

    def victims(self, seed: int) -> Tensor:
        """The private examples of all clients, attacked or not."""
        return torch.cat(list(self.parts))

    def trials(self, session: Session) -> Iterator[Trial]:
        attacked, index = Counter[int](), 0
        per_round = -(-self.count // self.rounds)
        defense = parse(self.recipe.defense)
        for number in range(self.rounds):
            recipe = dataclasses.replace(self.recipe, lr=self.recipe.lr * self.lr_decay**number)
            session.broadcast(recipe)
            chosen = sample_clients(len(self.parts), self.clients_per_round, stream(session.seed, "clients", number))
            targets = sorted(chosen, key=lambda k: (attacked[k], k))[: min(per_round, self.count - index)]
            updates, losses, truths = [], [], []
            for trained, client in enumerate(chosen):
                session.on_client(number, trained, len(chosen))
                truth = self.private.take(self.parts[client]).to(session.device)
                rng = stream(session.seed, "client", number, client)
                update, loss = train(session.model, truth, session.task, recipe, rng)
                updates.append(update)
                losses.append(loss)
                truths.append(truth)
                if client in targets and not defense.aggregates:
                    attacked[client] += 1
                    origin = {"round": number, "client": client}
                    names = self.private.names_at(self.parts[client])
                    yield Trial(index, session.model, recipe, update, truth, origin, names)
                    index += 1
            visible = defense.on_aggregate(updates)
            size = -(-len(updates) // len(visible))  # clients in an aggregate
            for first, update in zip(range(0, len(chosen), size), visible, strict=True):
                if defense.aggregates and index < self.count and first < size * per_round:
                    members = chosen[first : first + size]
                    union = Batch(*map(torch.cat, zip(*truths[first : first + size], strict=True)))
                    names = self.private.names_at(torch.cat([self.parts[k] for k in members]))
                    together = dataclasses.replace(recipe, batch_size=recipe.batch_size * len(members))
                    origin = {"round": number, "client": members[0]}
                    yield Trial(index, session.model, together, update, union, origin, names)
                    index += 1
            aggregate(session.model, visible)
            mean_loss = sum(losses) / len(losses)
            finite = mean_loss if math.isfinite(mean_loss) else None  # None: local training diverged
            session.on_round({"round": number, "loss": finite, "lr": recipe.lr})


def _check_rates(lr: float, decay: float, rounds: int) -> None:
    """Raise UsageError if the rate of some round lies beyond what float32 can divide by, 1e-30 to 1e30."""
    last = math.log10(lr) + (rounds - 1) * math.log10(decay)
    for name, power in (("local_lr", math.log10(lr)), ("lr_decay", last)):
        if abs(power) > 30.001:  # rounding
            raise UsageError(f"`{name}`: a learning rate of 1e{power:+.0f} is outside 1e-30 to 1e+30")
