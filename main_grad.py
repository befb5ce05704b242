"""Pure-gradient mode: each trial puts the gradient of one private batch on the wire, and the server attacks it."""

from utils.workers import start_ahead

if __name__ == "__main__":
    start_ahead()  # before torch is imported here

from collections.abc import Iterator

import torch

from defenses.base import parse
from federated.client import gradient
from federated.wire import Recipe, UsageError
from utils.cli import Command, Grad
from utils.run import Scene, Victim, main, stream


class GradScene(Scene):
    """One batch for each trial, all of them different images."""

    def __init__(self, mode: str, command: Command) -> None:
        super().__init__(mode, command)
        n, there = self.run.batch_size, len(self.dataset.private)
        if n * self.run.trials > there:
            raise UsageError(
                f"{self.run.trials} trials with --batch-size {n} need {n * self.run.trials} private images, "
                f"{self.run.dataset} has {there}: lower --batch-size or --trials"
            )
        self.recipe = Recipe(batch_size=n, model_mode=self.run.model_mode, defense=parse(self.run.defense))
        self.attack.check(self.model, self.task, self.recipe, "gradient", n)
        order = torch.randperm(there, generator=stream(self.seed, "data"))
        self.batches = order[: n * self.run.trials].split(n)


def observations(scene: GradScene) -> Iterator[Victim]:
    scene.broadcast(scene.recipe)
    for trial, indices in enumerate(scene.batches):
        truth = scene.take(indices)
        update = gradient(scene.model, truth, scene.task, scene.recipe, stream(scene.seed, "client", trial))
        yield Victim(trial, truth, scene.observe(update, scene.recipe, truth))


if __name__ == "__main__":
    main("grad", Grad, GradScene, observations)
