"""The spine both modes share: prepare, observe, attack, score, store, report.

A mode adds one thing, a generator of `Victim`s. Truth stays in this process: an attack that runs in a worker is sent
an `Observation`, and nothing else of the trial.
"""

import contextlib
import copy
import dataclasses
import functools
import gc
import hashlib
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import tyro
from torch import nn
from tqdm import tqdm

import data
import models
from attacks.base import Attack, discover
from federated.server import accuracy, pretrain
from federated.wire import Batch, Observation, Recipe, Task, Update, UsageError
from models.winograd import has_bfloat16
from utils import cli, report
from utils.backends import Attacked, Listener, Shared, check_ray, here, local, on_ray
from utils.evaluator import Evaluator, Lpips, summarise
from utils.results import Store, digest, source_digest
from utils.workers import cores

ROOMS = ("attacks", "data", "defenses", "federated", "models", "utils")
PUBLIC_MOST = 5000  # public images a server keeps at hand, fewer if they are large
PUBLIC_PIXELS = 2**26  # numbers in all of them: 256 MB
TEST_MOST = 2000  # held-out images that accuracy is measured on
LARGE = 1_000_000  # parameters, from which on a second thread is worth more than it costs
# those that cannot change a number
CHEAP_FLAGS = {"out", "jobs", "backend", "force", "sweep", "base_datadir", "weights", "device", "paper"}

F = TypeVar("F")


def stream(*path: int | str) -> torch.Generator:
    """A random stream of its own for every purpose: stream(seed, "model"), stream(seed, "client", round, k), ..."""
    seed = int.from_bytes(hashlib.sha256(repr(path).encode()).digest()[:8], "big") >> 1
    return torch.Generator().manual_seed(seed)


@dataclass(frozen=True)
class Victim:
    """One trial: what a server sees of a private batch, and, kept apart for scoring, the batch."""

    trial: int
    truth: Batch
    seen: Observation
    origin: dict[str, int] = dataclasses.field(default_factory=dict)  # round and client, in federated mode


class Scene:
    """A run made ready: everything checked, nothing written. Raises UsageError for what cannot run."""

    rounds = 0  # of training that `observations` reports by `on_round`

    def __init__(self, mode: str, command: cli.Command) -> None:
        self.mode, self.command, self.run = mode, command, command.run
        self.attack: Attack = command.attack
        run = self.run
        self.seed: int = run.seed
        if run.backend == "ray":
            check_ray()
        self.device = choose_device(run.device)
        self.dataset = _load_data(run.dataset, run.base_datadir, run.image_size, run.normalize)
        self.task: Task = self.dataset.task
        self.model = self._build_model().to(self.device)
        # on the instance: a cache on the class would keep every scene of a sweep alive
        self.class_mean = functools.cache(self._class_mean)
        self.on_round: Callable[[dict[str, Any]], None] = lambda record: None

    def _build_model(self) -> nn.Module:
        run = self.run
        model = models.build(
            run.model,
            self.task.image_shape,
            self.task.num_classes,
            activation=run.activation,
            norm=run.norm,
            dropout=run.dropout,
            width=run.width,
            rng=stream(self.seed, "model"),
        )
        if run.weights is not None:
            models.load_weights(model, run.weights)
        return model

    @functools.cached_property
    def public(self) -> Batch:
        return public_images(self.dataset)

    @functools.cached_property
    def public_on_device(self) -> Batch:
        return Batch(*(t.to(self.device) for t in self.public))

    def _class_mean(self, label: int) -> torch.Tensor | None:
        """Mean image (C, H, W) of a class over the public images at hand; None where it has none."""
        mine = self.public.images[self.public.labels == label]
        return mine.mean(0) if len(mine) else None

    @functools.cached_property
    def test(self) -> Batch:
        return Batch(*(t.to(self.device) for t in _spread_out(self.dataset.test, TEST_MOST)))

    def take(self, indices: torch.Tensor) -> Batch:
        """Private images by index, on the run's device."""
        return Batch(*(t.to(self.device) for t in self.dataset.private.take(indices)))

    def unrelated(self, count: int, trial: int) -> torch.Tensor:
        """Held-out images (count, C, H, W) that no client has; public ones where a data set holds none out."""
        there = self.dataset.test if len(self.dataset.test) else self.dataset.public
        chosen = torch.randint(len(there), (count,), generator=stream(self.seed, "control", trial))
        return there.take(chosen).images

    def prepare_model(self) -> None:
        """Train on public data first, if asked to."""
        if self.run.pretrain_epochs:
            pretrain(self.model, self.public_on_device, self.task, self.run.pretrain_epochs, stream(self.seed, "pre"))

    def broadcast(self, recipe: Recipe) -> None:
        """Let the attack prepare what every client is about to receive with the order `recipe`."""
        self.model = self.attack.implant(self.model, self.task, self.public_on_device, recipe)

    def observe(self, update: Update, recipe: Recipe, truth: Batch) -> Observation:
        """What the server sees of one update; `truth` is looked at only for what --grant hands over."""
        granted = {"labels": truth.labels} if self.run.grant == "labels" else {}
        return Observation(self.task, recipe, copy.deepcopy(self.model), update, self.public_on_device, granted)

    def accuracy(self) -> float:
        return accuracy(self.model, self.test, self.task)

    def jobs(self) -> int:
        """Worker processes, or 1 for none."""
        if self.attack.instant:
            return 1
        wanted = self.run.jobs or (1 if self.device.type == "cuda" else max(1, cores() // self.threads))
        return min(wanted, self.run.trials)

    @property
    def threads(self) -> int:
        """CPU threads of a trial."""
        alone = self.run.trials == 1 and sum(p.numel() for p in self.model.parameters()) > LARGE
        return self.run.threads or (cores() if alone else 1)

    @functools.cached_property
    def folder(self) -> Path:
        """Where its results go. Settled once: code that is edited while it runs must not move it."""
        return self.run.out / self.mode / self.command.attack_name / digest(self.facts())

    def facts(self) -> dict[str, Any]:
        """Everything that can change a number."""
        flags = {k: v for k, v in dataclasses.asdict(self.run).items() if k not in CHEAP_FLAGS}
        flags["threads"] = self.threads  # how sums are split up
        own = dataclasses.asdict(self.attack)
        return {
            "mode": self.mode,
            "attack": self.command.attack_name,
            "hyperparameters": {k: _content(v) if isinstance(v, Path) else v for k, v in own.items()},
            "flags": flags,
            "weights": None if self.run.weights is None else _file_digest(self.run.weights),
            "data": self.dataset.fingerprint,
            "code": source_digest(cli.ROOT, ROOMS),
            "torch": torch.__version__,
            "device": self.device.type,
            "bfloat16": has_bfloat16(self.device),  # what --precision auto comes to
        }

    def config(self) -> dict[str, Any]:
        """The facts and, for the reader, the other flags, and where and how it was computed."""
        return self.facts() | {
            "other_flags": {k: v for k, v in dataclasses.asdict(self.run).items() if k in CHEAP_FLAGS},
            "paper": self.attack.paper,
            "threat": self.attack.threat,
            "oracle": self.oracle,
            "commit": commit(),
            "parameters": sum(p.numel() for p in self.model.parameters()),
        }

    @property
    def oracle(self) -> list[str]:
        return [] if self.run.grant == "none" else [self.run.grant]


Observations = Callable[[Scene], Iterator[Victim]]


@contextlib.contextmanager
def plain_mistakes() -> Iterator[None]:
    """What ends a command early as one line: exit code 2 for bad input, 130 for Ctrl-C."""
    try:
        yield
    except UsageError as problem:
        cli.fail(str(problem))
    except OSError as problem:  # a full disk, a folder that went away
        where = f" ({problem.filename})" if problem.filename else ""
        cli.fail(f"{problem.strerror or problem}{where}; once that is mended the same command goes on")
    except BrokenProcessPool:
        print("error: a worker died (out of memory?); the same command goes on, --jobs 1 needs less", file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        print("\ninterrupted: the same command goes on where it stopped", file=sys.stderr)
        raise SystemExit(130) from None


def main(mode: str, run_cls: type, scene_cls: type[Scene], observations: Observations) -> None:
    """A command from its flags to its exit code: 0, 2 for bad input (one line), 130 for Ctrl-C."""
    gc.freeze()  # what is imported stays: going through it once more at the end takes Python half a second
    program = Path(sys.argv[0]).name
    commands = cli.parse(sys.argv[1:], run_cls, discover(), f"python {program}")
    with plain_mistakes():
        scenes = [scene_cls(mode, command) for command in commands]  # every point is checked before the first starts
        folders = [scene.folder for scene in scenes]
        summaries = []
        while scenes:  # each is let go with its data once it has run
            summaries.append(execute(scenes.pop(0), observations))
        if len(folders) > 1:
            folder = folders[0].parent / f"sweep-{digest({'points': [f.name for f in folders]})}"
            print("\n" + report.write_comparison(folder, [dict(c.swept) for c in commands], summaries))
            print(f"{_shown(folder / 'table.md')}, table.csv, plot.png")


def page(flags: type[F], run: Callable[[F], None], about: str | None = None) -> None:
    """A page of experiments/: flags parsed and held to their limits, and what ends it early said in one line."""
    with plain_mistakes():
        given = tyro.cli(flags, description=about)
        cli.check_limits(given)
        run(given)


def execute(scene: Scene, observations: Observations) -> dict[str, Any]:
    """Run one scene to `done`, going on where a killed run stopped; a finished one is only shown again."""
    torch.set_num_threads(scene.threads)
    store = Store(scene.folder)
    if store.done and not scene.run.force:
        summary = store.summary()
        print(f"already done ({_shown(store.folder)}; --force runs it again)")
        print(report.one_run(summary))
        return summary
    about = {"dataset": scene.run.dataset, "commit": commit()}
    scene.attack.prepare(scene.task, scene.public_on_device, about)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(store.writing(scene.config(), scene.run.force))
        except OSError as problem:
            why = problem.strerror or problem
            raise UsageError(f"cannot write results to {scene.run.out}: {why}; see --out") from None
        summary = _attack_and_score(scene, observations, store)
    print(report.one_run(summary))
    print(f"{_shown(store.folder / 'grid.png')}")
    return summary


def _attack_and_score(scene: Scene, observations: Observations, store: Store) -> dict[str, Any]:
    evaluator = Evaluator(scene.public.images.mean(0), scene.class_mean, _lpips(), scene.task)
    records = {t["trial"]: t for t in store.trials()}
    psnrs = [r["psnr"] for r in store.rows()]
    store.restart_log("rounds.jsonl")
    rounds: list[dict[str, Any]] = []
    name = f"{scene.mode}/{scene.command.attack_name}"
    live = sys.stderr.isatty()
    bar = tqdm(
        total=scene.run.trials + scene.rounds,
        initial=len(records),
        desc=name,
        unit="step" if scene.rounds else "trial",
        mininterval=0.1 if live else 10,
        dynamic_ncols=True,
    )

    def on_round(record: dict[str, Any]) -> None:
        store.log("rounds.jsonl", record)
        rounds.append(record)
        bar.set_description(f"{name} round {record['round'] + 1}, accuracy {record['accuracy']:.3f}", refresh=live)
        bar.update()

    def on_progress(trial: int, iteration: int, of: int, loss: float) -> None:
        now = f"{_mean_psnr(psnrs)}trial {trial}: {iteration}/{of} loss {loss:.2e}"
        bar.set_postfix_str(now, refresh=live)

    scene.on_round = on_round
    scene.prepare_model()
    open_trials = (v for v in observations(scene) if v.trial not in records)
    with bar:
        for victim, rec, beside, seconds in _reconstructions(scene, open_trials, on_progress, store):
            truth = Batch(*(t.cpu() for t in victim.truth))
            best = scene.attack.floor(scene.task, scene.public_on_device, victim.truth)
            scored, rebuilt = evaluator.score(truth, rec, beside, None if best is None else best.cpu())
            rows = [
                {"trial": victim.trial, **row, "seconds": seconds, "oracle": scene.oracle, **victim.origin}
                for row in scored
            ]
            final = rec.trace[-1] if rec.trace and math.isfinite(rec.trace[-1]) else None
            record = {
                "trial": victim.trial,
                "seconds": seconds,
                "iterations": rec.iterations,
                "loss": final,
                "status": rec.status,
                "restarts": rec.restarts,
                **victim.origin,
            }
            told = scene.attack.ceiling(victim.seen.model, scene.task, victim.truth.images)
            if told is not None:
                for row, alone in zip(rows, told.tolist(), strict=True):
                    row["ceiling"] = alone
                unrelated = scene.unrelated(len(rows), victim.trial)
                record |= {"candidates": len(rec.images), "control": evaluator.control(unrelated, rec)}
            store.add_trial(rows, record, truth.images, rebuilt)
            psnrs += [row["psnr"] for row in rows]
            bar.update()
            bar.set_postfix_str(_mean_psnr(psnrs).rstrip(", "), refresh=live)
    rows, trials = store.rows(), store.trials()
    assert len(trials) == scene.run.trials, f"{len(trials)} trials of {scene.run.trials}"
    summary = {
        "mode": scene.mode,
        "attack": scene.command.attack_name,
        "dataset": scene.run.dataset,
        "model": scene.run.model,
        **summarise(rows, trials),
        "oracle": scene.oracle,
    }
    if (companion := scene.attack.companion("gradient" if scene.mode == "grad" else "delta")) is not None:
        summary["companion"] = companion.name
    if rounds:
        losses = [r["loss"] for r in rounds]
        summary["accuracy"] = rounds[-1]["accuracy"]
        summary["training_loss"] = None if None in losses else sum(losses) / len(losses)
        report.learning_curve(store.folder / "accuracy.png", rounds)
    report.grid(store.folder / "grid.png", *store.images(), rows)
    store.finish(summary)
    return summary


def _mean_psnr(psnrs: list[float]) -> str:
    return f"PSNR {sum(psnrs) / len(psnrs):.1f} dB, " if psnrs else ""


def _reconstructions(scene: Scene, victims: Iterator[Victim], listen: Listener, store: Store) -> Iterator[Attacked]:
    """Victims in, reconstructions out as they end, in any order."""
    shared = Shared(scene.attack, scene.public, functools.partial(_attack_stream, scene.seed), store, scene.threads)
    if scene.run.backend == "ray" and not scene.attack.instant:
        return on_ray(shared, victims, scene.jobs())
    return local(shared, victims, listen, scene.jobs()) if scene.jobs() > 1 else here(shared, victims, listen)


def _attack_stream(seed: int, purpose: str, trial: int) -> torch.Generator:
    return stream(seed, purpose, trial)


# --- small matters -----------------------------------------------------------------------------------------------


def choose_device(name: str) -> torch.device:
    """auto, cpu, cuda or cuda:N -> a device that is there, or UsageError."""
    cards = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return torch.device("cuda" if cards else "cpu")
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (":" in name and (kind == "cpu" or not index.isdecimal() or not index.isascii())):
        raise UsageError(f"--device takes auto, cpu, cuda or cuda:N, not {name!r}")
    if kind == "cuda" and int(index or 0) >= cards:
        raise UsageError(f"--device {name}: this machine has {cards} CUDA device(s); --device auto takes what there is")
    return torch.device(name)


@functools.cache
def _lpips() -> Lpips:
    """One for all runs of a sweep: what it has to say it says once."""
    return Lpips(tqdm.write)


@functools.lru_cache(maxsize=2)
def _load_data(name: str, base: Path, image_size: int | None, normalize: str) -> data.Dataset:
    return data.load(name, base_datadir=base, image_size=image_size, normalize=normalize)


def public_images(dataset: data.Dataset) -> Batch:
    """Those a server has at hand in every trial."""
    return _spread_out(dataset.public, min(PUBLIC_MOST, PUBLIC_PIXELS // math.prod(dataset.task.image_shape)))


def _spread_out(split: data.Split, most: int) -> Batch:
    """The whole split or, of a larger one, `most` images evenly spaced over it."""
    count = min(len(split), most)
    return split.take(torch.linspace(0, len(split) - 1, count).round().long())


def _content(path: Path) -> str:
    """What a path a flag names stands for: a digest of the file, or of the generator in the folder."""
    return _file_digest(path / "generator.safetensors" if path.is_dir() else path)


def _file_digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12]


def commit() -> str | None:
    """The commit of the checkout, with + when it has changes; None outside one."""
    git = functools.partial(subprocess.run, cwd=cli.ROOT, capture_output=True, text=True, check=True)
    try:
        head = git(["git", "rev-parse", "--short=12", "HEAD"]).stdout.strip()
        return head + ("+" if git(["git", "status", "--porcelain", "-uno"]).stdout.strip() else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _shown(path: Path) -> str:
    """Relative to where the user stands, if below it."""
    path = path.resolve()
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
