"""Federated mode: rounds of FedAvg with weight deltas on the wire, and the server attacks what it receives."""

from utils.workers import start_ahead

if __name__ == "__main__":
    start_ahead()  # before torch is imported here

import dataclasses
import math
from collections import Counter
from collections.abc import Iterator

from data.partition import partition
from defenses.base import parse
from federated.client import train
from federated.server import aggregate, sample_clients
from federated.wire import Batch, Recipe, UsageError
from utils.cli import Command, Fed
from utils.run import Scene, Victim, main, stream


class FedScene(Scene):
    """Clients with their private images, and the recipe of their local training."""

    def __init__(self, mode: str, command: Command) -> None:
        run = command.run
        self._refuse_idle_flags(run)
        run = dataclasses.replace(
            run,
            rounds=run.rounds or run.trials,
            clients_per_round=run.clients_per_round or run.clients,
            beta=run.beta or 0.5,
            classes_per_client=run.classes_per_client or 2,
        )
        super().__init__(mode, dataclasses.replace(command, run=run))
        self.rounds = run.rounds
        if run.clients_per_round > run.clients:
            raise UsageError(f"--clients-per-round {run.clients_per_round} of --clients {run.clients}: lower it")
        if run.trials > run.rounds * run.clients_per_round:
            raise UsageError(
                f"--trials {run.trials}, but {run.rounds} round(s) of {run.clients_per_round} client(s) send only "
                f"{run.rounds * run.clients_per_round} updates: raise --rounds"
            )
        if not len(self.dataset.test):
            raise UsageError(f"{run.dataset} holds out no image to measure accuracy on: a class needs three or more")
        self.parts = partition(
            self.dataset.private.labels,
            run.clients,
            run.client_images or None,
            run.partition,
            run.beta,
            run.classes_per_client,
            stream(self.seed, "data"),
        )
        largest = max(map(len, self.parts))
        if (run.batch_size or 1) > largest:
            raise UsageError(f"--batch-size {run.batch_size} is more than a client's {largest} image(s): lower it")
        self.recipe = Recipe(
            batch_size=run.batch_size or largest,
            local_epochs=run.local_epochs,
            lr=run.local_lr,
            momentum=run.momentum,
            weight_decay=run.weight_decay,
            optimizer=run.client_optimizer,
            lr_schedule=run.lr_schedule,
            model_mode=run.model_mode,
            defense=parse(run.defense),
        )
        if run.lr_schedule != "constant" and self.recipe.steps(largest) == 1:
            raise UsageError(f"--lr-schedule {run.lr_schedule} wants more than one local step: raise --local-epochs")
        self.attack.check(self.model, self.task, self.recipe, "delta", largest)

    @staticmethod
    def _refuse_idle_flags(run: Fed) -> None:
        if run.beta is not None and run.partition != "dirichlet":
            raise UsageError("--beta belongs to --partition dirichlet")
        if run.classes_per_client is not None and run.partition != "classes":
            raise UsageError("--classes-per-client belongs to --partition classes")
        if run.momentum and run.client_optimizer != "sgd":
            raise UsageError("--momentum belongs to --client-optimizer sgd")

    def data_of(self, client: int) -> Batch:
        return self.take(self.parts[client])


def observations(scene: FedScene) -> Iterator[Victim]:
    """In each round the server attacks those of its clients it has attacked least, until the trials are used up."""
    run, attacked, trial = scene.run, Counter[int](), 0
    per_round = -(-run.trials // run.rounds)
    for number in range(run.rounds):
        recipe = dataclasses.replace(scene.recipe, lr=run.local_lr * run.lr_decay**number)
        scene.broadcast(recipe)
        chosen = sample_clients(run.clients, run.clients_per_round, stream(scene.seed, "clients", number))
        targets = sorted(chosen, key=lambda k: (attacked[k], k))[: min(per_round, run.trials - trial)]
        updates, losses = [], []
        for client in chosen:
            truth = scene.data_of(client)
            update, loss = train(scene.model, truth, scene.task, recipe, stream(scene.seed, "client", number, client))
            updates.append(update)
            losses.append(loss)
            if client in targets:
                attacked[client] += 1
                origin = {"round": number, "client": client}
                yield Victim(trial, truth, scene.observe(update, recipe, truth), origin)
                trial += 1
        aggregate(scene.model, updates)
        mean_loss = sum(losses) / len(losses)
        mean_loss = mean_loss if math.isfinite(mean_loss) else None  # training has blown up
        scene.on_round({"round": number, "loss": mean_loss, "accuracy": scene.accuracy(), "lr": recipe.lr})


if __name__ == "__main__":
    main("fed", Fed, FedScene, observations)
