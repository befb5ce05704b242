"""One engine in a process of its own: python engines.py ENGINE ITERATIONS alone|turns grad|fed ATTACK flags.

ENGINE is a name in ENGINES, ITERATIONS its budget for each victim (0: its own). The learning rate of an engine whose
name ends in _annealed falls within this budget. All get the same model, gradient and inferred labels. With `alone` the
engine attacks every victim, one after the other; images are stored while the clock runs and scored afterwards. With
`turns` it attacks the first victim only, prints a dot after each iteration and waits for a line on standard input, so
that engines can take single iterations in turn. The last line is JSON: times and scores.
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
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attacks.base import ATTACKS
from attacks.labels.inference import infer_labels
from attacks.matching.matcher import GradientMatcher
from attacks.optim.tracker import Tracker, tracking
from core.domain import ImageDomain
from core.protocol import Batch, Observation
from core.rng import stream
from evaluation.candidates import Candidates
from evaluation.identification import ranks
from evaluation.metrics import psnr
from evaluation.pairing import correlations, pair
from experiments.bench import reference
from models.inspection import pixel_layer
from runner import cli
from runner.executors import Job
from runner.experiment import Experiment
from runner.flags import Fed, Grad
from runner.run import candidates_of
from runner.sources import federated_source, gradient_source
from utils.memory import disable_malloc_trim

MODES = {"grad": (Grad, gradient_source), "fed": (Fed, federated_source)}
MAX_STORED = 400  # images of a run that are scored, at the most


class BudgetSpent(KeyboardInterrupt):
    """The budget is spent; breaching answers Ctrl-C with its current estimate."""


class Watch:
    """A clock that is called with every iteration's images, and stores some of them, evenly spaced."""

    def __init__(self, budget: int) -> None:
        self.budget = budget or 10**9
        self.times: list[float] = []
        self.stored: list[tuple[float, Tensor]] = []
        self.interval = 1
        self.start = time.perf_counter()

    def __call__(self, images: Tensor) -> None:
        self.times.append(time.perf_counter() - self.start)
        if len(self.times) % self.interval == 0:
            self.stored.append((self.times[-1], images.detach().clone()))
        if len(self.stored) > MAX_STORED:
            self.stored, self.interval = self.stored[1::2], 2 * self.interval
        if len(self.times) >= self.budget:
            raise BudgetSpent


class TurnWatch(Watch):
    """A clock that stops while other engines take their turn; `times` are of single iterations."""

    def __call__(self, images: Tensor) -> None:
        super().__call__(images)
        print(".", file=sys.__stdout__, flush=True)
        if not sys.stdin.readline():
            raise BudgetSpent
        self.start = time.perf_counter()


def ours(experiment: Experiment, observation: Observation, trial: int, watch: Watch, iterations: int) -> Tensor:
    """The attack of the command line, watched through its tracker."""
    attack, domain = experiment.attack, observation.task.domain
    if iterations and hasattr(attack, "iterations") and not isinstance(watch, TurnWatch):
        attack = dataclasses.replace(attack, iterations=iterations)
        watch.budget = 10**9  # the attack knows its budget
    decode = domain.from_unbounded if getattr(attack, "bounded", False) else domain.from_model

    def on_step(variables: Sequence[Tensor]) -> None:
        watch(decode(variables[0].detach()) if variables[0].shape[1:] == domain.shape else variables[0])

    torch.set_num_threads(experiment.threads)
    disable_malloc_trim()
    with tracking(Tracker(on_step=on_step)):
        return attack.reconstruct(observation, stream(experiment.seed, "attack", trial)).examples


def plain(experiment: Experiment, observation: Observation, trial: int, watch: Watch, iterations: int) -> Tensor:
    """The paper's loop."""
    name, model, task = experiment.command.attack_name, observation.model, observation.task
    target, n, shape = observation.update.ordered(model), observation.update.num_examples, task.domain.shape
    first = torch.randn(n, *shape, generator=stream(experiment.seed, "attack", trial))
    if name == "dlg":
        loop = reference.dlg(model, target, first, torch.randn(n, task.num_classes))
    elif name == "ig_single":
        loop = inverting_gradients(observation, first, reference.budget(type(experiment.attack)))
    elif name == "cpa":
        layer = pixel_layer(model, task)
        (rows,) = (g for p, g in zip(model.parameters(), target, strict=True) if p is layer.weight)
        loop = (images for images, _ in reference.cpa(rows, shape, n))
    else:
        loop = reference.rtf(*target[:2], shape)
    for images in loop:
        watch(images)
    return images


def inverting_gradients(observation: Observation, first: Tensor, iterations: int, tv: float = 1e-4) -> Iterator[Tensor]:
    """Images in [0, 1] after each step of the paper's loop, whose schedule ends with `iterations`."""
    model, domain, labels = observation.model, observation.task.domain, observation.granted["labels"]
    assert isinstance(domain, ImageDomain)
    mean, std = (torch.tensor(t).view(-1, 1, 1) for t in (domain.mean, domain.std))
    loop = reference.ig(
        lambda x: reference.gradient(model, x, labels),
        observation.update.ordered(model),
        first,
        iterations,
        tv=tv,
        bounds=((0 - mean) / std, (1 - mean) / std),
    )
    return (x * std + mean for x in loop)


def plain_annealed(
    experiment: Experiment, observation: Observation, trial: int, watch: Watch, iterations: int
) -> Tensor:
    """Inverting Gradients' loop with the attack's weight of total variation, annealed within `iterations`."""
    shape = (observation.update.num_examples, *observation.task.domain.shape)
    first = torch.randn(shape, generator=stream(experiment.seed, "attack", trial))
    watch.budget = 10**9  # the loop knows its budget
    for images in itertools.islice(
        inverting_gradients(observation, first, iterations, experiment.attack.tv), iterations
    ):
        watch(images)
    return images


def breaching_annealed(
    experiment: Experiment, observation: Observation, trial: int, watch: Watch, iterations: int
) -> Tensor:
    """As `breaching`, with its number of iterations and the attack's weight of total variation."""
    changes = {"max_iterations": iterations, "tv": experiment.attack.tv}
    watch.budget = 10**9  # it knows its budget
    return breaching(experiment, observation, trial, watch, iterations, changes)


def breaching(
    experiment: Experiment,
    observation: Observation,
    trial: int,
    watch: Watch,
    iterations: int,
    changes: Mapping[str, Any] | None = None,
) -> Tensor:
    """breaching 0.1.2 with its configuration `invertinggradients`; changes: its budget and total variation."""
    import breaching as peer

    task, count, model = observation.task, observation.update.num_examples, observation.model
    domain = task.domain

    class Watched(peer.attacks.OptimizationBasedAttacker):
        def _compute_objective(self, candidate: Tensor, *more: Any) -> Any:
            watch(domain.from_model(candidate))
            return super()._compute_objective(candidate, *more)

    class Metadata(dict):
        __getattr__ = dict.__getitem__

    metadata = Metadata(
        shape=domain.shape, modality="vision", mean=domain.mean, std=domain.std, classes=task.num_classes
    )
    buffers = list(model.buffers())
    payload = [{"parameters": list(model.parameters()), "buffers": buffers, "metadata": metadata}]
    known = {"num_data_points": count, "labels": observation.granted["labels"], "local_hyperparams": None}
    shared = [{"gradients": list(observation.update.ordered(model)), "buffers": None, "metadata": known}]
    config = peer.get_attack_config("invertinggradients")
    if changes:
        config.optim.max_iterations = changes["max_iterations"]
        config.regularization.total_variation.scale = changes["tv"]
    attacker = Watched(model, torch.nn.CrossEntropyLoss(), config)
    first = torch.randn(count, *domain.shape, generator=stream(experiment.seed, "attack", trial))
    return domain.from_model(attacker.reconstruct(payload, shared, {}, initial_data=first)[0]["data"])


ENGINES: dict[str, Callable[..., Tensor]] = {
    "ours": ours,
    "reference": plain,
    "reference_annealed": plain_annealed,
    "breaching": breaching,
    "breaching_annealed": breaching_annealed,
}


def with_labels(experiment: Experiment, observation: Observation, trial: int) -> Observation:
    """The observation with the labels that an attack infers: all engines get them before the clock starts."""
    gradient = GradientMatcher(observation, "single_step").mean_gradient
    labels = infer_labels(gradient, observation, stream(experiment.seed, "attack", trial))
    return dataclasses.replace(observation, granted={"labels": labels})


def peak_memory() -> float:
    """The largest memory of this process since `reset_peak_memory`, in MB."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def reset_peak_memory() -> None:
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def scored(truth: Batch, images: Tensor, candidates: Candidates) -> tuple[float, float]:
    """Mean PSNR over the true images, each with its partner, 0 without one; and the share that is identified."""
    pairs = pair(truth.examples, images)
    scores = [0.0 if j is None else psnr(t, images[j]) for t, j in zip(truth.examples, pairs, strict=True)]
    places = ranks(truth.examples, truth.labels, images, pairs, candidates)
    return sum(scores) / len(scores), sum(bool(place["identified"]) for place in places) / len(places)


def attack_one(engine: str, experiment: Experiment, job: Job, watch: Watch, iterations: int) -> dict[str, Any]:
    """One victim by one engine: seconds, iterations, and (seconds, PSNR, share identified) at several times."""
    observation, truth = job.observation, job.payload.truth
    if experiment.command.attack_name == "ig_single":
        observation = with_labels(experiment, observation, job.index)
    reset_peak_memory()
    answer, watch.start = None, time.perf_counter()
    with contextlib.suppress(BudgetSpent):
        answer = ENGINES[engine](experiment, observation, job.index, watch, iterations).detach()
    total, peak = time.perf_counter() - watch.start, peak_memory()
    stored = watch.stored if answer is None else [*watch.stored, (total, answer)]
    is_image = [(t, p) for t, p in stored if p.shape[1:] == truth.examples.shape[1:]]
    candidates = candidates_of(experiment)
    scores = [(t, *scored(truth, p.cpu().float().clamp(0, 1), candidates)) for t, p in is_image]
    found = {"seconds": total, "iterations": len(watch.times), "scores": scores, "peak": peak}
    if experiment.command.attack_name == "cpa":
        found["corr"] = min(correlations(truth.examples, is_image[-1][1].float())[0])
    return found


def main() -> None:
    engine, iterations, how, mode, *flags = sys.argv[1:]
    flags_cls, source = MODES[mode]
    (command,) = cli.parse(flags, flags_cls, ATTACKS, "engines.py")
    experiment = Experiment(mode, command, source)
    if engine.startswith("breaching"):
        importlib.import_module("breaching")  # before the clock starts
    jobs = experiment.jobs_of(experiment.session(), set())
    first = next(jobs)
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115  breaching prints
    watch_cls = TurnWatch if how == "turns" else Watch
    victims = []
    for job in [first] if how == "turns" else itertools.chain([first], jobs):
        watch = watch_cls(int(iterations))
        victims.append(attack_one(engine, experiment, job, watch, int(iterations)) | {"times": watch.times})
    print(json.dumps({"victims": victims, "threads": torch.get_num_threads()}), file=sys.__stdout__)


if __name__ == "__main__":
    main()
