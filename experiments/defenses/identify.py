"""The share of updates whose victim is identified among N candidates, beside what differential privacy allows.

Each trial draws one of the candidates as the victim, and the client computes its gradient under dpsgd. Candidates are
private examples of the data set, whose gradients resemble one another, or canaries: one image, N classes, and a linear
model, for which gradients are as different as they can be. Canaries test the noise and its accounting. A share above
its bound by more than three standard deviations ends the command with an error.
"""

import json
import math
from pathlib import Path
from typing import Literal

import torch
from torch import nn

import data
import models
from core.errors import UsageError
from core.hyperparameters import hp, hyperparameters
from core.paths import ROOT
from core.protocol import Batch, Observation, Recipe, Task, image_task
from core.rng import stream
from evaluation.guarantees import gaussian_epsilon, identification_rate, success_bound
from evaluation.intervals import share_interval
from evaluation.likelihood import Identification
from federated.client import gradient
from report.tables import number, table
from runner.cli import run_script
from utils.files import write_json


@hyperparameters
class Flags:
    dataset: str = hp("photos", "data set")
    base_datadir: Path = hp(ROOT / "datasets", "folder of the data sets")
    images: Literal["canaries", "private"] = hp("canaries", "candidates: canaries, or private images of the data set")
    image_size: int = hp(16, "side of the images in pixels", ge=4)
    victims: Literal["tuning", "reporting", "all"] = hp("reporting", "private images that may be candidates")
    model: str = hp("cnn", "network for private images")
    candidates: tuple[int, ...] = hp((10, 100, 1000), "numbers N of candidates")
    sigmas: tuple[float, ...] = hp((0.3, 0.5, 1.0, 2.0), "noise multipliers")
    bound: float = hp(0.1, "clipping bound of dpsgd", gt=0)
    trials: int = hp(2000, "number of updates for each N and noise multiplier", ge=1)
    seed: int = hp(0, "random seed", ge=0)
    out: Path = hp(ROOT / "results" / "identify", "folder of identify.json and table.md")


def main(flags: Flags) -> None:
    torch.set_num_threads(1)
    rows, above = [], []
    for count in flags.candidates:
        model, task, pool = (canaries if flags.images == "canaries" else private_images)(count, flags)
        for sigma in flags.sigmas:
            row = measure(model, task, pool, sigma, flags)
            rows.append(row)
            if row["share"] > row["bound"] + 3 * row["deviation"]:
                above.append(f"N = {count}, sigma = {sigma:g}: {row['share']:.3f} > {row['bound']:.3f}")
    header = ["N", "sigma", "epsilon", "identified", "95% interval", "orthogonal gradients", "bound", "chance"]
    cells = [
        [
            *(str(r["candidates"]), f"{r['sigma']:g}", number(r["epsilon"]), number(r["share"], 3)),
            f"{r['low']:.3f} to {r['high']:.3f}",
            *(number(r[key], 3) for key in ("orthogonal", "bound")),
            number(1 / r["candidates"], 4),
        ]
        for r in rows
    ]
    flags.out.mkdir(parents=True, exist_ok=True)
    write_json(flags.out / "identify.json", json.loads(json.dumps(rows)))
    text = table(header, cells)
    (flags.out / "table.md").write_text(text + "\n")
    print(text)
    if above:
        raise SystemExit("identified more often than the guarantee allows: " + "; ".join(above))


def canaries(count: int, flags: Flags) -> tuple[nn.Module, Task, Batch]:
    """One image under N labels, and a linear model that knows nothing: its gradients form a simplex."""
    task = image_task((3, 2, 2), count)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, count))
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    image = torch.rand(1, 3, 2, 2, generator=stream(flags.seed, "canary"))
    return model, task, Batch(image.repeat(count, 1, 1, 1), torch.arange(count))


def private_images(count: int, flags: Flags) -> tuple[nn.Module, Task, Batch]:
    dataset = data.load(
        flags.dataset, base_datadir=flags.base_datadir, image_size=flags.image_size, victims=flags.victims
    )
    task, private = dataset.task, dataset.private
    if count > len(private):
        raise UsageError(f"`candidates={count}`, but {flags.dataset} has {len(private)} such images")
    model = models.build(flags.model, task.domain.shape, task.num_classes, rng=stream(flags.seed, "model"))
    chosen = torch.randperm(len(private), generator=stream(flags.seed, "candidates", count))[:count]
    return model, task, private.take(chosen)


def measure(model: nn.Module, task: Task, pool: Batch, sigma: float, flags: Flags) -> dict[str, float]:
    recipe = Recipe(1, defense=f"dpsgd(bound={flags.bound!r}, sigma={sigma!r})")
    count = len(pool.labels)
    identification, ranks = None, []
    for trial in range(flags.trials):
        rng = stream(flags.seed, "identify", count, repr(sigma), trial)
        victim = int(torch.randint(count, (), generator=rng))
        truth = Batch(pool.examples[victim : victim + 1], pool.labels[victim : victim + 1])
        update = gradient(model, truth, task, recipe, rng)
        if identification is None:
            identification = Identification(Observation(task, recipe, model, update), pool)
        ranks.append(identification.rank(update, victim))
    bound = success_bound(1 / count, 1 / sigma)
    shares = share_interval([rank == 1 for rank in ranks], list(range(len(ranks))))
    return {
        "candidates": count,
        "sigma": sigma,
        "epsilon": gaussian_epsilon(1 / sigma),
        "trials": len(ranks),
        "share": shares["share"],
        "low": shares["low"],
        "high": shares["high"],
        "top5": sum(rank <= 5 for rank in ranks) / len(ranks),
        "mean_reciprocal_rank": sum(1 / rank for rank in ranks) / len(ranks),
        "orthogonal": identification_rate(count, 1 / sigma),
        "bound": bound,
        "deviation": math.sqrt(bound * (1 - bound) / len(ranks)),
    }


if __name__ == "__main__":
    run_script(Flags, main, __doc__)
