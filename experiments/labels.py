"""Accuracy of each label rule over classes, images, local epochs, learning rate and activation.

Accuracy is the multiset overlap sum_j min(n_j, n^_j) / n, with its 95% interval over updates. Labels are drawn at
random for images of the reporting victims, so that any number of classes can be chosen. Rules use public images that
are disjoint from the private ones.
"""

import csv
import itertools
from pathlib import Path

import torch

import data
import models
from attacks.labels.registry import RULES
from attacks.matching.matcher import GradientMatcher
from core.hyperparameters import hp, hyperparameters
from core.paths import ROOT
from core.protocol import Batch, Observation, Recipe, image_task
from core.rng import stream
from evaluation.intervals import mean_interval
from federated.client import train
from report.tables import table
from runner.cli import run_script


@hyperparameters
class Flags:
    dataset: str = hp("photos", "data set: {datasets}")
    base_datadir: Path = hp(ROOT / "datasets", "folder of the data sets")
    model: str = hp("cnn", "network: {models}")
    activation: tuple[str, ...] = hp(("relu", "sigmoid"), "activations")
    classes: tuple[int, ...] = hp((10, 100), "numbers of classes")
    client_images: tuple[int, ...] = hp((50,), "numbers of images of a client")
    batch_size: int = hp(10, "size of a client's minibatch", ge=1)
    local_epochs: tuple[int, ...] = hp((10,), "passes of a client over its images")
    local_lr: tuple[float, ...] = hp((0.05, 0.1), "learning rates")
    seeds: int = hp(8, "number of updates for each setting", ge=3)
    out: Path = hp(ROOT / "results" / "fed" / "labels", "folder of table.md and table.csv")


def accuracies(
    flags: Flags, dataset: data.Dataset, activation: str, classes: int, n: int, recipe: Recipe
) -> list[list[float]]:
    """Accuracy of every rule on every update."""
    domain = dataset.task.domain
    task = image_task(domain.shape, classes, domain.mean, domain.std)
    found: list[list[float]] = [[] for _ in RULES]
    for seed in range(flags.seeds):
        rng = stream(seed, "labels", classes, n)
        net = models.build(flags.model, domain.shape, classes, activation=activation, rng=rng)
        examples = dataset.private.take(torch.randperm(len(dataset.private), generator=rng)[:n]).examples
        labels = torch.randint(classes, (n,), generator=rng)
        public = dataset.public.take(torch.randperm(len(dataset.public), generator=rng)[:256])
        update, _ = train(net, Batch(examples, labels), task, recipe, rng)
        observation = Observation(task, recipe, net, update, public)
        mean_gradient = GradientMatcher(observation, "single_step").mean_gradient
        truth = torch.bincount(labels, minlength=classes)
        for values, rule in zip(found, RULES.values(), strict=True):
            inferred = torch.bincount(rule(mean_gradient, observation), minlength=classes)
            values.append((torch.minimum(truth, inferred).sum() / n).item())
    return found


def _cell(values: list[float]) -> str:
    found = mean_interval(values, range(len(values)))
    return f"{found['mean']:.2f} [{max(found['low'], 0.0):.2f}, {min(found['high'], 1.0):.2f}]"


def main(flags: Flags) -> None:
    torch.set_num_threads(1)
    dataset = data.load(
        flags.dataset, base_datadir=flags.base_datadir, image_size=None, normalize="none", victims="reporting"
    )
    header = ["activation", "classes", "images", "steps", "lr", *RULES]
    axes = (flags.activation, flags.classes, flags.client_images, flags.local_epochs, flags.local_lr)
    rows = []
    for activation, classes, n, epochs, lr in itertools.product(*axes):
        recipe = Recipe(min(flags.batch_size, n), epochs, lr=lr)
        cells = [_cell(values) for values in accuracies(flags, dataset, activation, classes, n, recipe)]
        setting = [activation, str(classes), str(n), str(recipe.steps(n)), f"{lr:g}"]
        rows.append([*setting, *cells])
        print(" ".join(setting), *(f"{m} {c}" for m, c in zip(RULES, cells, strict=True)), sep="  ", flush=True)
    flags.out.mkdir(parents=True, exist_ok=True)
    text = table(header, rows)
    (flags.out / "table.md").write_text(text + "\n")
    with (flags.out / "table.csv").open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    print(f"\n{text}\n{flags.out / 'table.md'}, table.csv")


if __name__ == "__main__":
    run_script(Flags, main, __doc__)
