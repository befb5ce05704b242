"""How well each label rule reads an update: accuracy over classes, images, local epochs, learning rate, activation.

Accuracy is the multiset overlap sum_j min(n_j, n^_j) / n. Labels are drawn at random for images of the data set, so
that any number of classes can be asked for; counts rest on public images, disjoint from the private ones.
"""

import csv
import itertools
from pathlib import Path

import torch

import data
import models
from attacks.common import Matching
from attacks.labels import METHODS
from federated.client import train
from federated.wire import Batch, Observation, Recipe, Task
from utils.cli import ROOT, hp, settings
from utils.report import number, table
from utils.run import page, stream


@settings
class Flags:
    dataset: str = hp("photos", "whose images clients hold")
    base_datadir: Path = hp(ROOT / "datasets", "where data sets lie")
    model: str = hp("cnn", "the network")
    activation: tuple[str, ...] = hp(("relu", "sigmoid"), "activations")
    classes: tuple[int, ...] = hp((10, 100), "numbers of classes")
    client_images: tuple[int, ...] = hp((8, 50), "images a client holds")
    batch_size: int = hp(10, "a client's minibatch", least=1)
    local_epochs: tuple[int, ...] = hp((1, 10), "passes over the images")
    local_lr: tuple[float, ...] = hp((0.004, 0.05, 0.1), "learning rates")
    seeds: int = hp(3, "updates for each setting", least=1)
    out: Path = hp(ROOT / "results" / "fed" / "labels", "where table.md and table.csv go")


def accuracies(
    flags: Flags, source: data.Dataset, activation: str, classes: int, n: int, recipe: Recipe
) -> list[float]:
    """Mean accuracy of every rule over the seeds."""
    task = Task(source.task.image_shape, classes, source.task.mean, source.task.std)
    total = torch.zeros(len(METHODS))
    for seed in range(flags.seeds):
        rng = stream(seed, "labels", classes, n)
        net = models.build(flags.model, task.image_shape, classes, activation=activation, rng=rng)
        images = source.private.take(torch.randperm(len(source.private), generator=rng)[:n])[0]
        labels = torch.randint(classes, (n,), generator=rng)
        public = Batch(*source.public.take(torch.randperm(len(source.public), generator=rng)[:256]))
        update, _ = train(net, Batch(images, labels), task, recipe, rng)
        seen = Observation(task, recipe, net, update, public)
        mean_gradient = Matching(seen, "average").mean_gradient
        truth = torch.bincount(labels, minlength=classes)
        for i, rule in enumerate(METHODS.values()):
            found = torch.bincount(rule(mean_gradient, seen), minlength=classes)
            total[i] += torch.minimum(truth, found).sum() / n
    return (total / flags.seeds).tolist()


def main(flags: Flags) -> None:
    torch.set_num_threads(1)
    source = data.load(flags.dataset, base_datadir=flags.base_datadir, image_size=None, normalize="none")
    header = ["activation", "classes", "images", "steps", "lr", *METHODS]
    axes = (flags.activation, flags.classes, flags.client_images, flags.local_epochs, flags.local_lr)
    rows = []
    for activation, classes, n, epochs, lr in itertools.product(*axes):
        recipe = Recipe(min(flags.batch_size, n), epochs, lr=lr)
        found = accuracies(flags, source, activation, classes, n, recipe)
        setting = [activation, str(classes), str(n), str(recipe.steps(n)), f"{lr:g}"]
        rows.append([*setting, *(number(value, 3) for value in found)])
        print(" ".join(setting), *(f"{m} {v:.2f}" for m, v in zip(METHODS, found, strict=True)), sep="  ", flush=True)
    flags.out.mkdir(parents=True, exist_ok=True)
    text = table(header, rows)
    (flags.out / "table.md").write_text(text + "\n")
    with (flags.out / "table.csv").open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    print(f"\n{text}\n{flags.out / 'table.md'}, table.csv")


if __name__ == "__main__":
    page(Flags, main, __doc__)
