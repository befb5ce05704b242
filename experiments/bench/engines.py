"""One engine in a process of its own: python engines.py ENGINE ITERATIONS alone|turns grad|fed ATTACK flags.

ENGINE is ours, reference or breaching, ITERATIONS its budget for each victim (0: its own). All get the same model,
gradient and inferred labels. `alone` attacks every victim, one after the other; pictures are kept while the clock runs,
and scored after. In `turns`, of the first victim, it prints a dot after each iteration and waits for a line on standard
input, so that engines can take single iterations in turn. The last line is JSON: what it took and how near it came.
"""

import contextlib
import dataclasses
import importlib
import itertools
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import main_fed
import main_grad
from attacks.base import discover
from attacks.common import Matching
from attacks.labels import settle_labels
from attacks.linear import pixel_layer
from experiments.bench import reference
from federated.wire import Batch, Observation
from utils import cli
from utils.evaluator import correlations, match, psnr
from utils.memory import keep_pages
from utils.run import Scene, Victim, stream

MODES = {"grad": (main_grad, cli.Grad, main_grad.GradScene), "fed": (main_fed, cli.Fed, main_fed.FedScene)}
KEPT = 400  # pictures of a run that are scored, at the most


class Stop(KeyboardInterrupt):
    """The budget is used up; as Ctrl-C, which the peer answers with what it has."""


class Watch:
    """A clock that is shown every iteration's images, and keeps some, evenly spaced."""

    def __init__(self, budget: int) -> None:
        self.budget = budget or 10**9
        self.times: list[float] = []
        self.pictures: list[tuple[float, Tensor]] = []
        self.every = 1
        self.start = time.perf_counter()

    def __call__(self, images: Tensor) -> None:
        self.times.append(time.perf_counter() - self.start)
        if len(self.times) % self.every == 0:
            self.pictures.append((self.times[-1], images.detach().clone()))
        if len(self.pictures) > KEPT:
            self.pictures, self.every = self.pictures[1::2], 2 * self.every
        if len(self.times) >= self.budget:
            raise Stop


class Baton(Watch):
    """A clock that stands still while other engines have their turn; `times` are of single iterations."""

    def __call__(self, images: Tensor) -> None:
        super().__call__(images)
        print(".", file=sys.__stdout__, flush=True)
        if not sys.stdin.readline():
            raise Stop
        self.start = time.perf_counter()


def ours(scene: Scene, seen: Observation, trial: int, watch: Watch, iterations: int) -> Tensor:
    """The attack of the command line; its objective is watched from outside."""
    attack = scene.attack
    if iterations and hasattr(attack, "iterations") and not isinstance(watch, Baton):
        attack = dataclasses.replace(attack, iterations=iterations)
        watch.budget = 10**9  # it knows its budget

    def watched(cost: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def shown(pixels: Tensor, *rest: Tensor) -> Tensor:
            watch(pixels)
            return cost(pixels, *rest)

        return shown

    class Watched(type(attack)):
        def descend(self, match: Matching, labels: Tensor, rng: Any, cost: Any, **more: Any) -> Any:
            return super().descend(match, labels, rng, watched(cost), **more)

        def invert(self, match: Matching, *more: Any, **named: Any) -> Any:
            match.squared_distance = watched(match.squared_distance)
            return super().invert(match, *more, **named)

    torch.set_num_threads(scene.threads)
    keep_pages()
    attack = Watched(**{f.name: getattr(attack, f.name) for f in dataclasses.fields(attack)})
    return attack.reconstruct(seen, stream(scene.seed, "attack", trial)).images


def plain(scene: Scene, seen: Observation, trial: int, watch: Watch, iterations: int) -> Tensor:
    """The paper's loop."""
    name, (model, target) = scene.command.attack_name, (seen.model, seen.update.tensors)
    first = torch.randn(seen.update.num_examples, *seen.task.image_shape, generator=stream(scene.seed, "attack", trial))
    if name == "dlg":
        loop = reference.dlg(model, target, first, seen.task.num_classes)
    elif name == "ig_single":
        budget = reference.budget(type(scene.attack))
        loop = reference.ig_single(model, target, first, seen.granted["labels"], budget)
    elif name == "cpa":
        layer = pixel_layer(model, seen.task)
        (rows,) = (g for p, g in zip(model.parameters(), target, strict=True) if p is layer.weight)
        loop = reference.cpa(rows, seen.task.image_shape, seen.update.num_examples)
    else:
        loop = reference.rtf(*target[:2], seen.task.image_shape)
    for images in loop:
        watch(images)
    return images


def breaching(scene: Scene, seen: Observation, trial: int, watch: Watch, iterations: int) -> Tensor:
    """breaching 0.1.2, its configuration `invertinggradients` as it is."""
    import breaching as peer

    class Watched(peer.attacks.OptimizationBasedAttacker):
        def _compute_objective(self, candidate: Tensor, *more: Any) -> Any:
            watch(candidate)
            return super()._compute_objective(candidate, *more)

    class Facts(dict):
        __getattr__ = dict.__getitem__

    task, count = seen.task, seen.update.num_examples
    facts = Facts(shape=task.image_shape, modality="vision", mean=task.mean, std=task.std, classes=task.num_classes)
    buffers = list(seen.model.buffers())
    payload = [{"parameters": list(seen.model.parameters()), "buffers": buffers, "metadata": facts}]
    told = {"num_data_points": count, "labels": seen.granted["labels"], "local_hyperparams": None}
    shared = [{"gradients": list(seen.update.tensors), "buffers": None, "metadata": told}]
    config = peer.get_attack_config("invertinggradients")
    attacker = Watched(seen.model, torch.nn.CrossEntropyLoss(), config)
    first = torch.randn(count, *task.image_shape, generator=stream(scene.seed, "attack", trial))
    return attacker.reconstruct(payload, shared, {}, initial_data=first)[0]["data"]


ENGINES = {"ours": ours, "reference": plain, "breaching": breaching}


def with_labels(scene: Scene, seen: Observation, trial: int) -> Observation:
    """The labels an attack infers, handed to all before the clock starts: its cost is no part of what is compared."""
    labels = settle_labels(Matching(seen, "average").mean_gradient, seen, stream(scene.seed, "attack", trial))
    return dataclasses.replace(seen, granted={"labels": labels})


def memory() -> float:
    """The most this process has held since `forget_memory`, in MB."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def forget_memory() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def score(truth: Batch, images: Tensor) -> float:
    """Mean PSNR over the true images, each with its partner."""
    pairs = match(truth.images, images)
    return sum(psnr(t, images[j]) if j is not None else 0.0 for t, j in zip(truth.images, pairs, strict=True)) / len(
        pairs
    )


def attacked(engine: str, scene: Scene, victim: Victim, watch: Watch, iterations: int) -> dict[str, Any]:
    """One victim by one engine: seconds, iterations, (seconds, PSNR) on the way and at the end."""
    infers = scene.command.attack_name == "ig_single"
    seen = with_labels(scene, victim.seen, victim.trial) if infers else victim.seen
    forget_memory()
    answer, watch.start = None, time.perf_counter()
    with contextlib.suppress(Stop):
        answer = ENGINES[engine](scene, seen, victim.trial, watch, iterations).detach()
    total, peak = time.perf_counter() - watch.start, memory()
    pictures = watch.pictures if answer is None else [*watch.pictures, (total, answer)]
    scores = [(t, score(victim.truth, p.cpu().float().clamp(0, 1))) for t, p in pictures]
    found = {"seconds": total, "iterations": len(watch.times), "scores": scores, "peak": peak}
    if scene.command.attack_name == "cpa":
        found["corr"] = min(correlations(victim.truth.images, pictures[-1][1].float())[0])
    return found


def main() -> None:
    engine, iterations, how, mode, *flags = sys.argv[1:]
    page, run_cls, scene_cls = MODES[mode]
    (command,) = cli.parse(flags, run_cls, discover(), "engines.py")
    scene = scene_cls(mode, command)
    if engine == "breaching":
        importlib.import_module("breaching")  # before the clock starts
    victims = page.observations(scene)
    first = next(victims)
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115  the peer prints
    watch_cls = Baton if how == "turns" else Watch
    chosen = [first] if how == "turns" else itertools.chain([first], victims)
    found = []
    for victim in chosen:
        watch = watch_cls(int(iterations))
        found.append(attacked(engine, scene, victim, watch, int(iterations)) | {"times": watch.times})
    print(json.dumps({"victims": found, "threads": torch.get_num_threads()}), file=sys.__stdout__)


if __name__ == "__main__":
    main()
