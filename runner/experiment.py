"""An experiment: loads and checks everything that its flags name; writes nothing."""

import copy
import dataclasses
import functools
import hashlib
import math
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

import data
import models
from attacks.base import ATTACKS, Attack
from core.domain import TextDomain
from core.errors import UsageError
from core.paths import ROOT
from core.protocol import Batch, Observation, Recipe
from core.references import source_file
from core.rng import stream
from defenses.base import Defense, canonical
from defenses.base import parse as parse_defense
from federated.server import accuracy, pretrain
from federated.simulation import Session, Source, Trial
from models import external
from models.external import is_external
from models.generators.store import data_digest, load_or_compute, model_digest
from models.validation import validate
from models.winograd import has_bfloat16
from runner.beliefs import parse as parse_beliefs
from runner.cli import Command, command_line
from runner.executors import Job, require_ray
from runner.flags import NOT_IN_KEY
from runner.store import source_digest
from runner.workers import cores
from utils.files import digest

SOURCE_DIRS = ("core", "attacks", "data", "defenses", "evaluation", "federated", "models", "report", "runner", "utils")
MAX_PUBLIC_EXAMPLES = 5000  # public examples that a server uses, fewer if they are large
MAX_PUBLIC_NUMBERS = 2**26  # numbers in all of them: 256 MB
MAX_TEST_EXAMPLES = 2000  # held-out examples on which accuracy is measured
LARGE_MODEL = 1_000_000  # parameters from which on a second thread is worth more than it costs

MakeSource = Callable[[Any, data.Dataset], Source]  # flags, data set -> where trials come from


class Experiment:
    """An attack, its flags and everything they name. Raises UsageError for what cannot run."""

    def __init__(self, mode: str, command: Command, make_source: MakeSource) -> None:
        flags = command.flags
        self.mode, self.command, self.flags = mode, command, flags
        self.attack: Attack = command.attack
        self.seed: int = flags.seed
        if flags.backend == "ray":
            require_ray()
        self.defense = canonical(flags.defense)
        self.beliefs = parse_beliefs(flags.believe)
        self.device = choose_device(flags.device)
        self.dataset = load_dataset(flags)
        self.task = self.dataset.task
        self.model = self._build_model().to(self.device)
        if is_external(flags.model) or flags.loss != "cross_entropy":
            validate(self.model, self.task, mode=flags.model_mode, loss=flags.loss)
        self.source = make_source(flags, self.dataset)
        recipe = self.beliefs.about(self.source.recipe)
        parse_defense(recipe.defense).counter()  # refuses defences that cannot be countered together
        count = self.beliefs.num_examples or self.source.num_examples
        if self.beliefs.num_examples and flags.grant == "labels":
            raise UsageError("`grant=labels` tells the attacker how many images there are: leave out `believe`")
        recipe.steps(count)  # raises UsageError for too many
        self.attack.check(self.model, self.task, recipe, self.source.kind, count)
        if getattr(flags, "accumulate", False):
            self._check_accumulation(recipe, count)
        if getattr(flags, "engine", "own") == "flower":
            self._check_flower()
        if flags.public == "none" and "public" in self.attack.requirements():
            raise UsageError(f"{command.attack_name} needs public images, and `public=none` withholds them")

    def _check_flower(self) -> None:
        """Raise UsageError for what Flower's rounds cannot do: several queries, and clients that remember."""
        if type(self.attack).query is not Attack.query:
            raise UsageError(f"{self.command.attack_name} asks the same clients several times: leave out `engine`")
        if any(type(step).for_client is not Defense.for_client for step in parse_defense(self.flags.defense).steps):
            raise UsageError(f"`defense={self.defense}` stores something in each client: leave out `engine`")

    def _check_accumulation(self, recipe: Recipe, count: int) -> None:
        """Raise UsageError where updates of several rounds cannot be matched together."""
        if not self.attack.accumulates:
            able = ", ".join(name for name, cls in ATTACKS.items() if cls.accumulates)
            raise UsageError(f"`accumulate` applies to {able}: {self.command.attack_name} attacks one update")
        if not self.flags.attack_rounds:
            raise UsageError("`accumulate` follows one client: name its rounds by `attack_rounds`")
        if parse_defense(recipe.defense).counter().start(self.model, count).variables:
            raise UsageError("`accumulate` does not apply to a defence that draws secrets anew in every round")

    def _build_model(self) -> nn.Module:
        flags = self.flags
        rng = stream(self.seed, "model")
        if is_external(flags.model):
            model = external.load(flags.model, self.task.domain.shape, self.task.num_classes, rng=rng)  # type: ignore[arg-type]
            for option in ("activation", "norm", "dropout", "width"):
                if getattr(flags, option) is not None:
                    raise UsageError(f"`{option}` belongs to networks of the zoo, not to `model={flags.model}`")
            if flags.weights is not None:
                models.load_weights(model, flags.weights)
            return model
        model = models.build(
            flags.model,
            self.task.domain.shape,
            self.task.num_classes,
            activation=flags.activation,
            norm=flags.norm,
            dropout=flags.dropout,
            width=flags.width,
            vocabulary=len(self.task.domain.words) if isinstance(self.task.domain, TextDomain) else None,
            rng=rng,
        )
        model = parse_defense(flags.defense).on_architecture(model, stream(self.seed, "architecture"))
        if flags.weights is not None:
            models.load_weights(model, flags.weights)
        return model

    @functools.cached_property
    def public(self) -> Batch:
        return public_batch(self.dataset)

    @functools.cached_property
    def public_on_device(self) -> Batch:
        return self.public.to(self.device)

    @functools.cached_property
    def test(self) -> Batch:
        return _evenly_spaced(self.dataset.test, MAX_TEST_EXAMPLES).to(self.device)

    def negative_controls(self, count: int, trial: int) -> torch.Tensor:
        """Held-out examples (count, *shape) that no client has; public ones if a data set holds none out."""
        split = self.dataset.test if len(self.dataset.test) else self.dataset.public
        chosen = torch.randint(len(split), (count,), generator=stream(self.seed, "control", trial))
        return split.take(chosen).examples

    def pretrain(self, on_step: Callable[[int, int, float], None]) -> None:
        """Train on public data first, if the flags ask for it; a network of the zoo is trained once and stored."""
        epochs, loss = self.flags.pretrain_epochs, self.source.recipe.loss
        if not epochs:
            return

        def trained() -> dict[str, torch.Tensor]:
            pretrain(self.model, self.public_on_device, self.task, epochs, stream(self.seed, "pre"), on_step, loss)
            return {name: t.detach().clone().contiguous() for name, t in self.model.state_dict().items()}

        if is_external(self.flags.model) or ":" in loss:  # what their code imports is not known
            trained()
            return
        code = source_digest(ROOT, ("core", "federated", "models"))
        start = [repr(self.model), model_digest(self.model), data_digest(self.public)]
        facts = [code, *start, epochs, loss, self.seed, self.threads]
        self.model.load_state_dict(load_or_compute("pretrained", facts, trained, self.device))

    def session(self) -> Session:
        """The federation's side of the run, whose server prepares each broadcast as the attack does."""

        def on_broadcast(model: nn.Module, recipe: Recipe) -> nn.Module:
            return self.attack.implant(model, self.task, self.public_on_device, recipe)

        attack = self.attack
        return Session(
            self.model,
            self.task,
            self.device,
            self.seed,
            on_broadcast,
            attack.personalize,
            attack.isolates,
            uses_final_model=bool(getattr(self.flags, "eval_every", 0)),
            query=attack.query,
        )

    def jobs_of(self, session: Session, finished: set[int]) -> Iterator[Job]:
        """The trials of the source that have not finished, as jobs; truth stays in their payload."""
        earlier: dict[int, tuple[Observation, ...]] = {}  # by client
        for trial in self.source.trials(session):
            accumulates = getattr(self.flags, "accumulate", False)
            if trial.index in finished and not accumulates:
                continue
            observation = self.observe(trial)
            if accumulates:
                client = trial.origin["client"]
                before = earlier.get(client, ())
                earlier[client] = (*before, dataclasses.replace(observation, public=None))
                observation = dataclasses.replace(observation, earlier=before)
            if trial.index not in finished:
                yield Job(trial.index, observation, trial)

    def observe(self, trial: Trial) -> Observation:
        """What the server sees of one update. The truth is read only for what `--grant` hands over."""
        granted = {}
        if self.flags.grant == "labels":
            assert trial.truth is not None, "labels cannot be granted without truth"
            granted["labels"] = trial.truth.labels
        model = copy.deepcopy(trial.model)
        public = None if self.flags.public == "none" else self.public_on_device
        recipe, update = self.beliefs.about(trial.recipe), self.beliefs.of(trial.update)
        return Observation(self.task, recipe, model, update, public, granted, trial.aggregate)

    def accuracy(self, model: nn.Module) -> float:
        return accuracy(model, self.test, self.task, loss=self.source.recipe.loss)

    @property
    def worker_count(self) -> int:
        """Worker processes, or 1 for none."""
        if not self.attack.needs_workers():
            return 1
        count = self.flags.jobs or (1 if self.device.type == "cuda" else max(1, cores() // self.threads))
        return min(count, self.flags.trials)

    @property
    def training_processes(self) -> int:
        """Processes that train clients: one for each core, unless trials are attacked in worker processes."""
        if self.worker_count > 1 or self.device.type == "cuda":
            return 1
        return self.flags.jobs or max(1, cores() // self.threads)

    def measures_accuracy(self, number: int) -> bool:
        """Whether test accuracy is measured after round `number`."""
        every = getattr(self.flags, "eval_every", 0)
        return bool(every) and ((number + 1) % every == 0 or number + 1 == self.source.rounds)

    @property
    def threads(self) -> int:
        """CPU threads of a trial."""
        single = self.flags.trials == 1 and sum(p.numel() for p in self.model.parameters()) > LARGE_MODEL
        return self.flags.threads or (cores() if single else 1)

    @functools.cached_property
    def folder(self) -> Path:
        """Where the results go. Computed once: code that is edited while it runs must not move it."""
        return self.flags.out / self.mode / self.command.attack_name / digest(self.key())

    def key(self) -> dict[str, Any]:
        """Everything that can change a number."""
        flags = {k: v for k, v in dataclasses.asdict(self.flags).items() if k not in NOT_IN_KEY}
        flags |= {"threads": self.threads, "defense": self.defense}
        hyperparameters = dataclasses.asdict(self.attack)  # type: ignore[call-overload]
        return {
            "mode": self.mode,
            "attack": self.command.attack_name,
            "hyperparameters": {k: _content(v) if isinstance(v, Path) else v for k, v in hyperparameters.items()},
            "flags": flags,
            "weights": None if self.flags.weights is None else _file_digest(self.flags.weights),
            "own_code": {
                r: _file_digest(path) for r in (self.flags.model, self.flags.loss) if (path := source_file(r))
            },
            "data": self.dataset.fingerprint,
            "code": source_digest(ROOT, SOURCE_DIRS),
            "torch": torch.__version__,
            "device": self.device.type,
            "bfloat16": has_bfloat16(self.device),  # what --precision auto means here
        }

    def config(self) -> dict[str, Any]:
        """The key and, for the reader, the other flags, and where and how the run was computed."""
        return self.key() | {
            "command": command_line(self.mode, self.command),
            "other_flags": {k: v for k, v in dataclasses.asdict(self.flags).items() if k in NOT_IN_KEY},
            "paper": self.attack.citation,
            "threat": self.attack.threat,
            "requires": sorted(self.attack.requirements()),
            "oracle": self.oracle,
            "knows": self.knowledge,
            "recipe": dataclasses.asdict(self.source.recipe),
            "dataset_notes": list(self.dataset.notes),
            "commit": commit(),
            "parameters": sum(p.numel() for p in self.model.parameters()),
        }

    @functools.cached_property
    def knowledge(self) -> list[str]:
        """What the attacker was assumed to know or to have, besides the task, the model and the update."""
        flags, recipe = self.flags, self.beliefs.about(self.source.recipe)
        count = self.beliefs.num_examples or self.source.num_examples
        uses = self.attack.knowledge(count, flags.grant == "labels")
        facts = []
        if "num_examples" in uses:
            facts.append("number of images")
        if "recipe" in uses and self.source.kind == "delta":
            facts.append("training recipe")
        if "defense" in uses and recipe.defense != "none":
            facts.append(f"defence {recipe.defense}")
        if "public" in uses and flags.public != "none":
            kind = {"same": "of the same source", "other": "of other classes", "noise": "of noise"}[flags.public]
            facts.append(f"{len(self.public.examples)} public images {kind}")
        if getattr(flags, "accumulate", False):
            facts.append("the client's earlier updates")
        facts += [f"{name} (granted)" for name in self.oracle]
        return facts + [f"{belief} (believed)" for belief in flags.believe]

    @property
    def oracle(self) -> list[str]:
        """The facts that are granted to the attack."""
        return [] if self.flags.grant == "none" else [self.flags.grant]


def choose_device(name: str) -> torch.device:
    """auto, cpu, cuda or cuda:N -> a device that exists. Raises UsageError for any other."""
    cards = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return torch.device("cuda" if cards else "cpu")
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (":" in name and (kind == "cpu" or not index.isdecimal() or not index.isascii())):
        raise UsageError(f"`device` takes auto, cpu, cuda or cuda:N, not {name!r}")
    if kind == "cuda" and int(index or 0) >= cards:
        raise UsageError(f"`device={name}`: this machine has {cards} CUDA device(s); auto uses what there is")
    return torch.device(name)


def load_dataset(flags: Any) -> data.Dataset:
    """The data set that the flags of a mode name."""
    public = "same" if flags.public == "none" else flags.public
    options = (("image_size", flags.image_size), ("tokens", flags.tokens), ("schema", flags.schema))
    return _load_data(flags.dataset, flags.base_datadir, options, flags.normalize, flags.victims, public)


@functools.lru_cache(maxsize=2)
def _load_data(
    name: str, base: Path, options: tuple[tuple[str, Any], ...], normalize: str, victims: str, public: str
) -> data.Dataset:
    chosen: dict[str, Any] = {"normalize": normalize, "victims": victims, "public": public}
    return data.load(name, base_datadir=base, **dict(options), **chosen)


def public_batch(dataset: data.Dataset) -> Batch:
    """The public examples that a server uses in every trial."""
    size = math.prod(dataset.task.domain.shape)
    return _evenly_spaced(dataset.public, min(MAX_PUBLIC_EXAMPLES, MAX_PUBLIC_NUMBERS // size))


def _evenly_spaced(split: data.Split, at_most: int) -> Batch:
    """The whole split or, of a larger one, `at_most` examples evenly spaced over it."""
    count = min(len(split), at_most)
    return split.take(torch.linspace(0, len(split) - 1, count).round().long())


def _content(path: Path) -> str:
    """What a path stands for: a digest of the file, or of the generator in the folder."""
    return _file_digest(path / "generator.safetensors" if path.is_dir() else path)


def _file_digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12]


def commit() -> str | None:
    """The commit of the checkout, with + if it has changes; None outside of one."""
    git = functools.partial(subprocess.run, cwd=ROOT, capture_output=True, text=True, check=True)
    try:
        head = git(["git", "rev-parse", "--short=12", "HEAD"]).stdout.strip()
        return head + ("+" if git(["git", "status", "--porcelain", "-uno"]).stdout.strip() else "")
    except (OSError, subprocess.CalledProcessError):
        return None
