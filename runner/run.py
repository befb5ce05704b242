"""A command from its flags to its exit code: attack, score, store, report."""

import contextlib
import functools
import gc
import sys
from pathlib import Path
from typing import Any

import torch

from attacks.base import ATTACKS
from core.errors import UsageError
from core.protocol import Batch
from data import Split
from evaluation.baselines import Baselines
from evaluation.bounds import recoverable_mask, search_space_bound
from evaluation.candidates import Candidates, Pool
from evaluation.evaluator import ScoringContext
from evaluation.metrics import Lpips, metrics_of
from evaluation.objective import objectives
from evaluation.rounds import over_rounds
from evaluation.scoring import scoring_of
from evaluation.verdict import outcome
from federated.simulation import Session, Trial
from report import figures, tables
from report.compare import write_comparison
from runner import cli
from runner.executors import Job, Listener, Result, Results, TrialRunner, run_in_process, run_in_workers, run_on_ray
from runner.experiment import Experiment, MakeSource, commit
from runner.progress import Bar
from runner.store import Store
from utils.files import digest


def main(mode: str, flags_cls: type, make_source: MakeSource) -> None:
    """Run a command; exit code 0, 2 for a mistake of the user (one line), 130 for Ctrl-C."""
    gc.freeze()  # what is imported stays: collecting it again at the end takes half a second
    program = Path(sys.argv[0]).name
    with cli.user_errors():
        commands = cli.parse(sys.argv[1:], flags_cls, ATTACKS, f"python {program}")
        experiments = [Experiment(mode, command, make_source) for command in commands]  # all, before the first starts
        folders = [experiment.folder for experiment in experiments]
        summaries = []
        while experiments:  # each is released with its data once it has run
            summaries.append(execute(experiments.pop(0)))
        if len(folders) > 1:
            folder = folders[0].parent / f"sweep-{digest({'points': [f.name for f in folders]})}"
            print("\n" + write_comparison(folder, [dict(c.swept) for c in commands], summaries))
            print(f"{_shown(folder / 'table.md')}, table.csv, plot.png")


def execute(experiment: Experiment) -> dict[str, Any]:
    """Run one experiment to `done`, continuing a killed run; the summary of a finished one is only printed."""
    torch.set_num_threads(experiment.threads)
    store = Store(experiment.folder)
    if store.done and not experiment.flags.force:
        summary = store.summary()
        print(f"already done ({_shown(store.folder)}; --force runs it again)")
        print(tables.one_run(summary))
        return summary
    if "public" in experiment.attack.requirements():
        metadata = {"dataset": experiment.flags.dataset, "commit": commit()}
        experiment.attack.prepare(experiment.task, experiment.public_on_device, metadata)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(store.writing(experiment.config(), experiment.flags.trials, experiment.flags.force))
        except OSError as error:
            reason = error.strerror or error
            raise UsageError(f"cannot write results to {experiment.flags.out}: {reason}; see `out`") from None
        summary = _Run(experiment, store).run()
    print(tables.one_run(summary))
    for note in _lpips_notes():
        print(f"note: {note}")
    print(_shown(store.folder / tables.VIEWS[experiment.task.domain.name].picture))
    return summary


class _Run:
    """The trials of an experiment that has not finished."""

    def __init__(self, experiment: Experiment, store: Store) -> None:
        self.experiment, self.store = experiment, store
        domain = experiment.task.domain
        self.scoring = scoring_of(domain)
        networks = {metric.name: _lpips() for metric in metrics_of(domain) if metric.pretrained}
        baselines, recipe = Baselines(experiment.public, domain.typical), experiment.source.recipe
        self.context = ScoringContext(experiment.task, baselines, networks, candidates_of(experiment), recipe)
        self.rounds: list[dict[str, Any]] = []
        self.trials_done = 0
        self.scores = [row[self.scoring.key] for row in store.rows()]
        store.restart_log("rounds.jsonl")

    def run(self) -> dict[str, Any]:
        """Attack and score every trial, write the results, and return the summary."""
        experiment = self.experiment
        self._pretrain()
        finished = {record["trial"] for record in self.store.trials()}
        session, rounds = experiment.session(), experiment.source.rounds
        with Bar(experiment.flags.trials + rounds, len(finished)) as bar:
            self.trials_done = len(finished)
            session.on_client = functools.partial(self._on_client, bar)
            session.on_round = functools.partial(self._on_round, bar, session)
            jobs = experiment.jobs_of(session, finished)
            with contextlib.closing(self._results(jobs, functools.partial(self._on_progress, bar))) as results:
                for job, result in results:
                    self._add(job, result)
                    self.trials_done += 1
                    bar.finish(job.index, self._description, self._mean_score)
        return self._finish()

    def _pretrain(self) -> None:
        experiment = self.experiment
        if not experiment.flags.pretrain_epochs:
            return
        with Bar(1) as bar:

            def on_step(step: int, total: int, loss: float) -> None:
                bar.update(
                    "training", step / total, f"training on public data: step {step}/{total}", f"loss {loss:.3f}"
                )

            experiment.pretrain(on_step)

    @property
    def _description(self) -> str:
        experiment = self.experiment
        name = f"{experiment.mode}/{experiment.command.attack_name}"
        return f"{name}: {self.trials_done}/{experiment.flags.trials} trials"

    @property
    def _mean_score(self) -> str:
        return self.scoring.progress(self.scores)

    def _on_client(self, bar: Bar, number: int, trained: int, clients: int) -> None:
        """Client `trained` of a round starts its training."""
        where = f"round {number + 1}/{self.experiment.source.rounds}, client {trained + 1}/{clients}"
        bar.update(("round", number), trained / clients, f"{self._description}, {where}", self._mean_score)

    def _on_round(self, bar: Bar, session: Session, record: dict[str, Any]) -> None:
        """A round has ended."""
        number, rounds = record["round"], self.experiment.source.rounds
        record = {**record, "accuracy": self.experiment.accuracy(session.model)}
        self.rounds.append(record)
        self.store.log("rounds.jsonl", record)
        where = f"round {number + 1}/{rounds}, accuracy {record['accuracy']:.2f}"
        bar.finish(("round", number), f"{self._description}, {where}", self._mean_score)

    def _on_progress(self, bar: Bar, trial: int, iteration: int, total: int, objective: float) -> None:
        """An iteration of a trial's attack has ended."""
        text = f"trial {trial}: {iteration}/{total}, objective {objective:.1e}"
        mean = self._mean_score
        bar.update(trial, iteration / max(total, 1), self._description, f"{mean}, {text}" if mean else text)

    def _results(self, jobs: Any, listen: Listener) -> Results:
        """Jobs in, results out as they end, in any order."""
        experiment = self.experiment
        public = None if experiment.flags.public == "none" else experiment.public
        runner = TrialRunner(experiment.attack, public, experiment.seed, self.store, experiment.threads)
        count = experiment.worker_count
        if experiment.flags.backend == "ray" and experiment.attack.needs_workers():
            return run_on_ray(runner, jobs, count)
        return run_in_workers(runner, jobs, listen, count) if count > 1 else run_in_process(runner, jobs, listen)

    def _add(self, job: Job, result: Result) -> None:
        """Score a finished trial and store it."""
        experiment, trial = self.experiment, job.payload
        assert isinstance(trial, Trial) and trial.truth is not None, "a trial without truth cannot be scored"
        truth, task = trial.truth, experiment.task
        recoverable = recoverable_mask(experiment.attack, job.observation.model, task, truth.examples)
        names = trial.names or ()
        if experiment.attack.singles_out:
            assert recoverable is not None, f"{experiment.attack.name} has no mask"
            alone = int(recoverable.int().argmax())  # if none is alone: the first one, which is then not recovered
            truth, names = Batch(truth.examples[[alone]], truth.labels[[alone]]), names[alone : alone + 1]
            recoverable = recoverable[[alone]]
        unrelated = experiment.negative_controls(len(truth.labels), job.index) if recoverable is not None else None
        score = self.scoring.score(
            truth,
            result.reconstruction,
            self.context,
            comparison=result.comparison,
            projection=search_space_bound(experiment.attack, task, experiment.public_on_device, truth),
            recoverable=recoverable,
            found=objectives(
                experiment.attack, job.observation, truth, result.reconstruction, self.context.missing_example
            ),
            unrelated=unrelated,
            trial=job.index,
        )
        common = {"seconds": result.seconds, **trial.origin}
        knowledge = {"oracle": experiment.oracle, "knows": experiment.knowledge}
        rows = [{"trial": job.index, **row, **common, **knowledge} for row in score.rows]
        for row, name in zip(rows, names, strict=False):
            row["file"] = name
        if experiment.flags.dataset == "photos" and len(rows) == 1:  # crops of one photograph are not independent
            rows[0]["unit"] = f"photograph {experiment.dataset.class_names[rows[0]['label_true']]}"
        record = {"trial": job.index, **score.record, **common}
        self.store.add_trial(rows, record, truth.examples.cpu(), score.rebuilt)
        self.scores += [row[self.scoring.key] for row in rows]

    def _finish(self) -> dict[str, Any]:
        from evaluation.guarantees import guarantee, identified_bound  # scipy: not while flags are parsed

        experiment, store = self.experiment, self.store
        rows, trials = store.rows(), store.trials()
        assert len(trials) == experiment.flags.trials, f"{len(trials)} trials of {experiment.flags.trials}"
        summary = {
            "mode": experiment.mode,
            "attack": experiment.command.attack_name,
            "dataset": experiment.flags.dataset,
            "model": experiment.flags.model,
            **self.scoring.summarize(rows, trials, experiment.flags.thresholds),
            "oracle": experiment.oracle,
            "knows": experiment.knowledge,
            "threat": experiment.attack.threat,
            "believed": list(experiment.flags.believe),
            "notes": list(experiment.dataset.notes),
        }
        comparison = experiment.attack.comparison_attack(experiment.source.kind)
        if comparison is not None:
            summary["companion"] = comparison.name
        summary["verdict"] = outcome(summary)
        source = experiment.source
        found = guarantee(source.recipe, source.kind, source.rounds or 1)
        if found is not None:
            summary["guarantee"] = found
            summary |= identified_bound(found, summary["identified"])
        if self.rounds:
            losses = [record["loss"] for record in self.rounds]
            summary["accuracy"] = self.rounds[-1]["accuracy"]
            summary["training_loss"] = None if None in losses else sum(losses) / len(losses)
            figures.learning_curve(store.folder / "accuracy.png", self.rounds)
        followed = over_rounds(rows, trials)
        if followed is not None:
            summary["over_rounds"] = followed
            figures.leakage_over_rounds(store.folder / "rounds.png", followed)
        names = [row["file"] for row in rows] if all("file" in row for row in rows) else None
        domain = experiment.task.domain
        view = tables.VIEWS[domain.name]
        view.draw(store.folder / view.picture, *store.images(), rows, domain, names)
        store.finish(summary)
        return summary


def candidates_of(experiment: Experiment) -> Candidates:
    """Private examples that no client sends; held-out and then public ones where a class has too few of them."""
    dataset, source = experiment.dataset, experiment.source
    unsent = torch.ones(len(dataset.private), dtype=torch.bool)
    unsent[source.victims(experiment.seed)] = False
    pools = []
    for split, chosen in (
        (dataset.private, unsent.nonzero().flatten()),
        (dataset.test, torch.arange(len(dataset.test))),
        (dataset.public, torch.arange(len(dataset.public))),
    ):
        take = functools.partial(_take, split, chosen)
        pools.append(Pool(split.labels[chosen], take))
    return Candidates(pools, experiment.seed)


def _take(split: Split, chosen: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """The examples at `indices` of those at `chosen`."""
    return split.take(chosen[indices]).examples


@functools.cache
def _lpips() -> Lpips:
    """One network for all runs of a sweep."""
    return Lpips(_lpips_notes().append)


@functools.cache
def _lpips_notes() -> list[str]:
    """Why LPIPS is missing, if it is: printed below the table."""
    return []


def _shown(path: Path) -> str:
    """Relative to the working directory, if below it."""
    path = path.resolve()
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
