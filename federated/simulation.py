"""Sources of trials: a gradient of one batch, or rounds of FedAvg with simulated clients.

A source yields what a server receives, as a `Trial`. A `Trial` also holds the truth, for scoring.
"""

import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

import data
from core.errors import UsageError
from core.protocol import Batch, Kind, Recipe, Task, Update
from core.rng import stream
from data import Dataset, Scheme, Split
from defenses.base import Memory, parse
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
    aggregate: int = 1  # number of clients whose weighted mean the update is


@dataclass(frozen=True)
class ClientJob:
    """A client's part of a round, to be computed here or in another process: the arguments of `client.train`."""

    model: nn.Module
    batch: Batch
    task: Task
    recipe: Recipe
    rng: torch.Generator
    memory: Memory = field(default_factory=Memory)

    def __call__(self) -> "TrainedClient":
        update, loss = train(self.model, self.batch, self.task, self.recipe, self.rng, self.memory)
        return TrainedClient(update, loss, self.memory)


class TrainedClient(NamedTuple):
    """What a client's training gives: the update, the mean training loss, and what the client remembers from now on."""

    update: Update
    loss: float
    memory: Memory


def train_one_by_one(jobs: Iterable[ClientJob]) -> Iterator[TrainedClient]:
    return (job() for job in jobs)


Ask = Callable[[nn.Module], Update]  # a model -> the update of the same clients from the same examples


def ask_once(model: nn.Module, ask: Ask, task: Task, recipe: Recipe) -> tuple[nn.Module, Update]:
    """`model` and its update: an honest server asks once."""
    return model, ask(model)


@dataclass
class Session:
    """What a source works on: the model, the place of its data, and the server's part of each broadcast."""

    model: nn.Module
    task: Task
    device: torch.device
    seed: int
    on_broadcast: Callable[[nn.Module, Recipe], nn.Module]  # the model that the server sends with a recipe
    personalize: Callable[[nn.Module, int], nn.Module] = lambda model, client: model  # what client k of a sum receives
    isolates: bool = False  # whether the first client of a sum is the only one whose examples are sought
    uses_final_model: bool = True  # False: the model after the last attacked round need not be computed
    train_clients: Callable[[Iterable[ClientJob]], Iterator[TrainedClient]] = train_one_by_one  # in order
    query: Callable[[nn.Module, Ask, Task, Recipe], tuple[nn.Module, Update]] = ask_once
    on_round: Callable[[dict[str, Any]], None] = lambda record: None  # loss and learning rate at the end of a round
    on_client: Callable[[int, int, int], None] = lambda number, trained, clients: (
        None
    )  # round, clients trained, of how many

    def broadcast(self, recipe: Recipe) -> None:
        self.model = self.on_broadcast(self.model, recipe)


def summed(updates: Sequence[Update]) -> Update:
    """What a server sees behind secure aggregation: the mean of updates, weighted by their numbers of examples.

    u = sum_k (n_k / n) u_k,      n = sum_k n_k
    """
    if len(updates) == 1:
        return updates[0]
    total = sum(u.num_examples for u in updates)
    shares = [u.num_examples / total for u in updates]

    def mean(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        stacked = {name: [part[name] for part in parts] for name in parts[0]}
        means = {
            name: sum((s * t.double() for s, t in zip(shares, tensors, strict=True)), torch.zeros(()).double())
            for name, tensors in stacked.items()
        }
        whole = {name: not parts[0][name].is_floating_point() for name in means}  # such as num_batches_tracked
        return {name: (t.round() if whole[name] else t).to(parts[0][name].dtype) for name, t in means.items()}

    return Update(updates[0].kind, mean([u.tensors for u in updates]), total, mean([u.buffers for u in updates]))


def _trial_of_sum(
    index: int, session: Session, recipe: Recipe, ask: Ask, batches: Sequence[Batch], **about: Any
) -> Trial:
    """The trial whose update is a sum, with the truth that the attack seeks: of all clients, or of the first alone."""
    clients = len(batches)
    if clients > 1:
        recipe = dataclasses.replace(recipe, batch_size=recipe.batch_size * clients)
    sought = batches[:1] if session.isolates else batches
    truth = Batch(torch.cat([b.examples for b in sought]), torch.cat([b.labels for b in sought]))
    model, update = session.query(session.model, ask, session.task, recipe)
    return Trial(index, model, recipe, update, truth, aggregate=clients, **about)


class Source(Protocol):
    """Where trials come from. `kind`, `recipe` and `num_examples` are of its largest update.

    smallest: number of examples of its smallest client.
    """

    kind: Kind
    recipe: Recipe
    num_examples: int
    smallest: int
    rounds: int  # of training that `Session.on_round` hears of

    def victims(self, seed: int) -> Tensor:
        """Indices of the private examples that some client may send: no candidates for identification."""

    def trials(self, session: Session) -> Iterator[Trial]:
        """The trials in order, the same for equal seeds."""


@dataclass(frozen=True)
class GradientSource:
    """Gradient mode: each trial is the gradient of one private batch; no two batches share an example.

    aggregate: number of clients, each with a batch of its own, whose mean gradient is all that the server sees.
    """

    private: Split
    recipe: Recipe
    count: int
    aggregate: int = 1

    kind: Kind = "gradient"
    rounds: int = 0

    @property
    def num_examples(self) -> int:
        return self.recipe.batch_size * self.aggregate

    @property
    def smallest(self) -> int:
        return self.recipe.batch_size

    def victims(self, seed: int) -> Tensor:
        """The private examples of all batches, in order."""
        order = torch.randperm(len(self.private), generator=stream(seed, "data"))
        return order[: self.num_examples * self.count]

    def trials(self, session: Session) -> Iterator[Trial]:
        session.broadcast(self.recipe)
        for index, together in enumerate(self.victims(session.seed).split(self.num_examples)):
            parts = together.split(self.recipe.batch_size)
            batches = [self.private.take(chosen).to(session.device) for chosen in parts]
            ask = partial(self._answer, session, batches, index, itertools.count())
            names = self.private.names_at(parts[0] if session.isolates else together)
            yield _trial_of_sum(index, session, self.recipe, ask, batches, names=names)

    def _answer(
        self, session: Session, batches: Sequence[Batch], index: int, queries: Iterator[int], model: nn.Module
    ) -> Update:
        """What the clients of a trial send for a model; each query has random numbers of its own."""
        updates, query = [], next(queries)
        for client, truth in enumerate(batches):
            rng = stream(session.seed, "client", index, *_place(client, query))
            received = session.personalize(model, client)
            updates.append(gradient(received, truth, session.task, self.recipe, rng))
        return summed(updates)


def _place(client: int, query: int) -> tuple[int, ...]:
    """A client's stream of random numbers; it does not depend on how many clients or queries there are."""
    return (client, query) if query else (client,) if client else ()


@dataclass(frozen=True)
class FedAvgSource:
    """Federated mode: rounds of FedAvg. In each round the server attacks those clients it has attacked least.

    parts: the private examples of each client, as positions in `private`. lr_decay: factor on the learning rate from
    one round to the next. aggregate: 1, or the number of clients in a round if the server sees only the weighted mean
    of their updates. attack_rounds: the rounds, from 1, in which the same clients are attacked; none for all rounds and
    changing clients.
    """

    private: Split
    parts: Sequence[Tensor]
    recipe: Recipe
    count: int
    rounds: int
    clients_per_round: int
    lr_decay: float = 1.0
    aggregate: int = 1
    attack_rounds: tuple[int, ...] = ()

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
        aggregate: int = 1,
        attack_rounds: tuple[int, ...] = (),
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
        if aggregate > 1 and clients_per_round not in (None, aggregate):
            raise UsageError(f"`aggregate={aggregate}` is that of a round: leave out `clients_per_round`")
        if attack_rounds and aggregate > 1:
            raise UsageError("`attack_rounds` follow single clients: leave out `aggregate`")
        if attack_rounds:
            _check_attack_rounds(attack_rounds, rounds, trials, clients, clients_per_round)
        rounds = rounds or max(attack_rounds, default=trials)
        per_round = clients_per_round or (aggregate if aggregate > 1 else clients)
        if per_round > clients:
            raise UsageError(f"`clients_per_round={per_round}` of `clients={clients}`: lower it")
        if aggregate > 1 and trials > rounds:
            raise UsageError(f"`trials={trials}`, but {rounds} round(s) have only one sum each: raise `rounds`")
        if trials > rounds * per_round:
            raise UsageError(
                f"`trials={trials}`, but {rounds} round(s) of {per_round} client(s) send only {rounds * per_round} "
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
        return cls(dataset.private, parts, recipe, trials, rounds, per_round, lr_decay, aggregate, attack_rounds)

    @property
    def num_examples(self) -> int:
        return sum(sorted(map(len, self.parts), reverse=True)[: self.aggregate])

    @property
    def smallest(self) -> int:
        return min(map(len, self.parts))

    def victims(self, seed: int) -> Tensor:
        """The private examples of all clients, attacked or not."""
        return torch.cat(list(self.parts))

    def targets(self, chosen: Sequence[int], number: int, attacked: Counter[int]) -> list[int]:
        """The clients of round `number` whose updates are attacked; `attacked` counts those of earlier rounds."""
        if self.attack_rounds:
            victims = self.count // len(self.attack_rounds)
            return list(chosen[:victims]) if number + 1 in self.attack_rounds else []
        most = min(-(-self.count // self.rounds), self.count - attacked.total())
        return sorted(chosen, key=lambda k: (attacked[k], k))[:most]

    def trials(self, session: Session) -> Iterator[Trial]:
        attacked, index = Counter[int](), 0
        memories = [Memory() for _ in self.parts]
        defense = parse(self.recipe.defense)
        for number in range(self.rounds):
            recipe = dataclasses.replace(self.recipe, lr=self.recipe.lr * self.lr_decay**number)
            session.broadcast(recipe)
            chosen = sample_clients(len(self.parts), self.clients_per_round, stream(session.seed, "clients", number))
            targets = self.targets(chosen, number, attacked)
            ends = index + len(targets) == self.count and not session.uses_final_model
            updates, losses = [], []
            if self.aggregate > 1:
                chosen = sorted(chosen, key=lambda k: k not in targets)  # the victim is client 0 of the sum
            elif ends:
                chosen = [k for k in chosen if k in targets]
            results = session.train_clients(self._jobs(session, recipe, number, chosen, memories))
            for trained, (client, (update, loss, memories[client])) in enumerate(zip(chosen, results, strict=True), 1):
                session.on_client(number, trained, len(chosen))
                updates.append(update)
                losses.append(loss)
                if client in targets and self.aggregate == 1:
                    attacked[client] += 1
                    origin = {"round": number, "client": client}
                    truth = self.private.take(self.parts[client]).to(session.device)
                    names = self.private.names_at(self.parts[client])
                    ask = self._ask(session, recipe, number, [client], update)
                    model, update = session.query(session.model, ask, session.task, recipe)
                    yield Trial(index, model, recipe, update, truth, origin, names)
                    index += 1
            if self.aggregate > 1 and targets:
                attacked[chosen[0]] += 1
                batches = [self.private.take(self.parts[k]).to(session.device) for k in chosen]
                sought = chosen[:1] if session.isolates else chosen
                names = self.private.names_at(torch.cat([self.parts[k] for k in sought]))
                origin = {"round": number, "client": chosen[0]} if session.isolates else {"round": number}
                ask = self._ask(session, recipe, number, chosen, summed(updates))
                yield _trial_of_sum(index, session, recipe, ask, batches, origin=origin, names=names)
                index += 1
            if not ends:
                aggregate(session.model, defense.on_aggregate(updates))
            mean_loss = sum(losses) / len(losses)
            finite = mean_loss if math.isfinite(mean_loss) else None  # None: local training diverged
            session.on_round({"round": number, "clients": len(losses), "loss": finite, "lr": recipe.lr})
            if ends:
                return

    def _jobs(
        self, session: Session, recipe: Recipe, number: int, chosen: Sequence[int], memories: Sequence[Memory]
    ) -> Iterator[ClientJob]:
        """The training of a round's clients."""
        for place, client in enumerate(chosen):
            batch = self.private.take(self.parts[client]).to(session.device)
            received = session.personalize(session.model, place)
            rng = stream(session.seed, "client", number, client)
            yield ClientJob(received, batch, session.task, recipe, rng, memories[client])

    def _ask(self, session: Session, recipe: Recipe, number: int, clients: Sequence[int], first: Update) -> Ask:
        """What these clients send for a model: `first` for the broadcast one, and other queries are trained anew."""
        queries = itertools.count(1)

        def ask(model: nn.Module) -> Update:
            if model is session.model:
                return first
            updates, query = [], next(queries)
            for trained, client in enumerate(clients):
                truth = self.private.take(self.parts[client]).to(session.device)
                rng = stream(session.seed, "client", number, client, query)
                received = session.personalize(model, trained)
                updates.append(train(received, truth, session.task, recipe, rng)[0])
            return summed(updates)

        return ask


def _check_attack_rounds(
    chosen: tuple[int, ...], rounds: int | None, trials: int, clients: int, per_round: int | None
) -> None:
    """Raise UsageError for rounds that do not exist, and for clients that would not take part in all of them."""
    if min(chosen) < 1 or len(set(chosen)) < len(chosen):
        raise UsageError("`attack_rounds` are different numbers from 1")
    if rounds is not None and max(chosen) > rounds:
        raise UsageError(f"`attack_rounds` names round {max(chosen)} of {rounds}: raise `rounds`")
    if trials % len(chosen):
        raise UsageError(
            f"`trials={trials}` must be a multiple of the {len(chosen)} `attack_rounds`: {len(chosen)} for one client, "
            f"{2 * len(chosen)} for two"
        )
    if trials // len(chosen) > clients:
        raise UsageError(f"`trials={trials}` in {len(chosen)} `attack_rounds` need more than {clients} `clients`")
    if per_round not in (None, clients):
        raise UsageError(
            "`attack_rounds` follow the same clients, which take part in every round: leave out `clients_per_round`"
        )


def _check_rates(lr: float, decay: float, rounds: int) -> None:
    """Raise UsageError if the rate of some round lies beyond what float32 can divide by, 1e-30 to 1e30."""
    last = math.log10(lr) + (rounds - 1) * math.log10(decay)
    for name, power in (("local_lr", math.log10(lr)), ("lr_decay", last)):
        if abs(power) > 30.001:  # rounding
            raise UsageError(f"`{name}`: a learning rate of 1e{power:+.0f} is outside 1e-30 to 1e+30")
