"""What an audit attacks: clients of a simulated federation, or a captured update; and the flags of an audit."""

import copy
import dataclasses
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

import models
from attacks.base import ATTACKS, Attack, Threat
from core.errors import UsageError
from core.hyperparameters import hp, hyperparameters
from core.protocol import Batch, Kind, Observation, Recipe, Task
from core.references import absolute, is_reference
from core.rng import stream
from data.images import class_folders, read_image
from evaluation.baselines import Baselines
from evaluation.candidates import Candidates
from evaluation.evaluator import ScoringContext
from federated.capture import Capture, load_capture, read_update
from models import external
from models.validation import validate
from runner.beliefs import parse as parse_beliefs
from runner.cli import Command
from runner.executors import Job
from runner.experiment import Experiment, choose_device, load_dataset, public_batch
from runner.flags import Fed
from runner.run import candidates_of
from runner.sources import federated_source, gradient_source


@hyperparameters
class Audit(Fed):
    """Flags of an audit."""

    update: Path | None = hp(None, "folder of a captured update, which is attacked instead of simulated clients")
    truth: Path | None = hp(None, "<class>/<image> tree of the private images behind the captured update, for scores")
    kind: Literal["delta", "gradient"] = hp("delta", "content of an update: a weight delta, or one gradient")
    threat: Threat = hp("honest-but-curious", "strongest server that is assumed; weaker ones are included")
    minutes: float = hp(10.0, "time limit", gt=0)
    threshold: float = hp(0.0, "largest acceptable share of recovered records; above it the exit code is 1", ge=0, le=1)
    attacks: tuple[str, ...] = hp((), "names of the attacks; default: all that apply")
    verdict_only: bool = hp(False, "no search for the weakest setting that passes")
    show_victims: bool = hp(False, "pictures of private images and their reconstructions on the page")
    trials: int = hp(4, "number of attacked updates", ge=1)


@dataclass(frozen=True)
class Subject:
    """What is audited. jobs: the updates that a server receives which prepares its broadcasts as an attack does."""

    task: Task
    model: nn.Module
    recipe: Recipe
    kind: Kind
    num_examples: int
    public: Batch | None
    jobs: Callable[[Attack], list[Job]]
    context: ScoringContext | None  # None without truth
    scope: Mapping[str, Any]
    device: torch.device
    granted: tuple[str, ...] = ()

    @property
    def one_step(self) -> bool:
        """Whether an update is one gradient, of all examples at once."""
        return self.kind == "gradient" or self.recipe.steps(self.num_examples) == 1


def subject_of(flags: Any) -> Subject:
    """What the flags of an audit name. Raises UsageError for what cannot be audited."""
    return simulated(flags) if flags.update is None else captured(flags)


def simulated(flags: Any) -> Subject:
    """Clients of a simulated federation, which hold the private images of a data set."""
    rounds = flags.rounds or -(-flags.trials // flags.clients)
    flags = dataclasses.replace(flags, rounds=rounds, loss=absolute(flags.loss))
    if flags.kind == "gradient":
        flags = dataclasses.replace(flags, batch_size=flags.batch_size or flags.client_images or 1)
    make_source: Any = gradient_source if flags.kind == "gradient" else federated_source
    mode = "grad" if flags.kind == "gradient" else "fed"

    def experiment(attack: Attack) -> Experiment:
        return Experiment(mode, Command(attack.name, attack, flags), make_source)

    base = experiment(ATTACKS["baseline"]())

    def jobs(attack: Attack) -> list[Job]:
        own = experiment(attack)
        if flags.pretrain_epochs:
            own.pretrain(lambda step, total, loss: None)
        return list(itertools.islice(own.jobs_of(own.session(), set()), flags.trials))

    if flags.pretrain_epochs:
        base.pretrain(lambda step, total, loss: None)
    public = None if flags.public == "none" else base.public_on_device
    scope = {"data": flags.dataset, "victims": flags.victims, "private_records": len(base.dataset.private)}
    return Subject(
        task=base.task,
        model=base.model,
        recipe=base.beliefs.about(base.source.recipe),
        kind=base.source.kind,
        num_examples=base.source.num_examples,
        public=public,
        jobs=jobs,
        context=ScoringContext(base.task, Baselines(base.public), {}, candidates_of(base)),
        scope=scope,
        device=base.device,
        granted=tuple(base.oracle),
    )


def captured(flags: Any) -> Subject:
    """One update from files, with the truth if the user has it."""
    assert flags.update is not None
    if flags.threat != "honest-but-curious":
        raise UsageError(f"`threat={flags.threat}`: a captured update is of a model that has been broadcast already")
    capture = load_capture(flags.update)
    device, task = choose_device(flags.device), capture.task
    loss = absolute(flags.loss) if flags.loss != "cross_entropy" else capture.recipe.loss
    model = _model(flags, task).to(device)
    validate(model, task, mode=capture.recipe.model_mode, loss=loss)
    if flags.weights is not None:
        models.load_weights(model, flags.weights)
    elif capture.model_header is None:
        raise UsageError(f"{flags.update} has no weights as broadcast: pass `weights`")
    update = read_update(capture, model)
    beliefs = parse_beliefs(flags.believe)
    recipe, update = beliefs.about(dataclasses.replace(capture.recipe, loss=loss)), beliefs.of(update)
    public, notes, candidates = _public_for(flags, capture)
    truth = None if flags.truth is None else _read_truth(flags.truth, capture)
    if truth is not None and len(truth.labels) != update.num_examples and "num_examples" not in capture.unknown:
        raise UsageError(f"`truth={flags.truth}` has {len(truth.labels)} images, and the update {update.num_examples}")
    observation = Observation(task, recipe, model, update, None if public is None else public.to(device))
    scope = {
        "data": f"captured update {flags.update}",
        "captured_model": capture.model,
        "unknown": list(capture.unknown),
        "origin": dict(capture.origin),
        "notes": notes,
    }
    return Subject(
        task=task,
        model=model,
        recipe=recipe,
        kind=update.kind,
        num_examples=update.num_examples,
        public=observation.public,
        jobs=lambda attack: [Job(0, copy.copy(observation), truth)],
        context=None if truth is None else ScoringContext(task, Baselines(public), {}, candidates),
        scope=scope,
        device=device,
    )


def _model(flags: Any, task: Task) -> nn.Module:
    shape: Any = task.domain.shape
    rng = stream(flags.seed, "model")
    if is_reference(flags.model):
        return external.load(flags.model, shape, task.num_classes, rng=rng)
    options = {name: getattr(flags, name) for name in ("activation", "norm", "dropout", "width")}
    return models.build(flags.model, shape, task.num_classes, rng=rng, **options)


def _public_for(flags: Any, capture: Capture) -> tuple[Batch | None, list[str], Candidates | None]:
    """Public examples of the captured task, if the data set has images of its size and classes."""
    if flags.public == "none":
        return None, [], None
    shape = capture.task.domain.shape
    dataset = load_dataset(dataclasses.replace(flags, image_size=shape[-1]))
    if dataset.task.domain.shape != shape or dataset.task.num_classes != capture.task.num_classes:
        found = f"{'x'.join(map(str, dataset.task.domain.shape))} and {dataset.task.num_classes} classes"
        note = (
            f"{flags.dataset} has images of {found}, unlike the update: attacks that need public examples are left out"
        )
        return None, [note], None
    return public_batch(dataset), [], None


def _read_truth(folder: Path, capture: Capture) -> Batch:
    """The private images in a <class>/<image> tree, in the order of their names."""
    channels, height, width = capture.task.domain.shape
    if channels not in (1, 3) or height != width:
        raise UsageError(f"`truth` reads square images of 1 or 3 channels, not {channels}x{height}x{width}")
    tree = class_folders(folder, "`truth` must be the root of a <class>/<image> tree")
    examples, labels = [], []
    for position, (name, paths) in enumerate(tree.items()):
        if capture.class_names is not None and name in capture.class_names:
            label = capture.class_names.index(name)
        else:
            label = int(name) if name.isdecimal() else position
        if label >= capture.task.num_classes:
            raise UsageError(f"`truth={folder}`: class folder {name} is beyond {capture.task.num_classes} classes")
        examples += [read_image(path, image_size=height, channels=channels).float() / 255 for path in paths]
        labels += [label] * len(paths)
    return Batch(torch.stack(examples), torch.tensor(labels))
