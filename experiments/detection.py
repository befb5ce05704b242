"""False alarms and detections of defenses.detect: honest networks, new and trained, and what malicious servers send.

sh experiments/detection.sh [--torchvision]
"""

import copy
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

import data
import models
from attacks.base import ATTACKS
from core.errors import UsageError
from core.hyperparameters import hp, hyperparameters
from core.paths import ROOT
from core.protocol import Batch, Recipe, Task
from core.rng import stream
from defenses.detect import detect
from federated.server import pretrain
from models import external
from runner.cli import run_script

MALICIOUS: dict[str, list[dict[str, object]]] = {
    "rtf": [
        *({"connection": c, "sparse": s} for c in ("addition", "split", "cat", "linear") for s in (False, True)),
        {"one_shot": True},
        {"position": "features"},
        {"threshold_drift": 0.0, "connection": "linear", "quantiles": "official"},
    ],
    "trap": [
        {"weight_init": "trap", "bias": "zero"},
        {"weight_init": "trap", "bias": "quantile"},
        {"weight_init": "white", "bias": "quantile"},
    ],
    "fishing": [{}],
    "loki": [{"slots": 4}],
}


@hyperparameters
class Flags:
    """Flags of this script."""

    epochs: int = hp(4, "epochs of training on public images before a network counts as trained", ge=0)
    images: int = hp(256, "number of public images for this training", ge=1)
    largest: int = hp(100, "most parameters of torchvision's classifiers, in millions", ge=1)
    torchvision: bool = hp(False, "torchvision's classifiers as well, new ones, at 64x64")
    dataset: str = hp("photos", "data set: {datasets}")
    base_datadir: Path = hp(ROOT / "datasets", "folder of the data sets")


def honest(flags: Flags, task: Task, public: Batch) -> Iterator[tuple[str, nn.Module, Task]]:
    """Every network of the zoo, new and trained; torchvision's if the flags ask for them."""
    for name in models.MODELS:
        model = models.build(name, task.domain.shape, task.num_classes, rng=stream(0, "model"))  # type: ignore[arg-type]
        yield f"{name}, new", model, task
        trained = copy.deepcopy(model)
        pretrain(trained, public, task, flags.epochs, stream(0, "pre"))
        yield f"{name}, trained", trained, task
    if flags.torchvision:
        import torchvision

        large = data.load(flags.dataset, base_datadir=flags.base_datadir, image_size=64).task
        for name in torchvision.models.list_models(module=torchvision.models):
            try:
                net = external.load(f"torchvision:{name}", (3, 64, 64), 8)
                if sum(p.numel() for p in net.parameters()) > flags.largest * 1e6:
                    print(f"left out: {name} has more than {flags.largest} million parameters")
                    continue
                yield f"torchvision:{name}", net, large
            except UsageError as error:
                print(f"left out: {error}")


def malicious(task: Task, public: Batch) -> Iterator[tuple[str, nn.Module, Task]]:
    """What the attacks with malicious servers of this suite broadcast."""
    for name, variants in MALICIOUS.items():
        for settings in variants:
            attack = ATTACKS[name](**settings)  # type: ignore[arg-type]
            for network in (
                ("fc2",) if name == "trap" else ("cnn", "resnet18") if "position" not in settings else ("cnn",)
            ):
                model = models.build(network, task.domain.shape, task.num_classes, rng=stream(0, "model"))  # type: ignore[arg-type]
                broadcast = attack.implant(model, task, public, Recipe(8))
                yield f"{name} {' '.join(f'{k}={v}' for k, v in settings.items())} on {network}", broadcast, task


def run(flags: Flags) -> None:
    dataset = data.load(flags.dataset, base_datadir=flags.base_datadir)
    public = dataset.public.take(torch.arange(min(flags.images, len(dataset.public))))
    for title, nets in (
        ("detections", malicious(dataset.task, public)),
        ("false alarms", honest(flags, dataset.task, public)),
    ):
        count = flagged = 0
        for name, model, task in nets:
            try:
                signs = detect(model, task)
            except (RuntimeError, ValueError) as error:
                print(f"left out: {name}: {' '.join(str(error).split())[:100]}")
                continue
            count += 1
            flagged += bool(signs)
            kinds = ", ".join(sorted({sign.kind for sign in signs}))
            print(f"{title}, {name}: {kinds or 'no sign'}", flush=True)
        print(f"{title}: {flagged} of {count}", flush=True)


if __name__ == "__main__":
    run_script(Flags, run, __doc__)
