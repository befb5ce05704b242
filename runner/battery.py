"""Attacks on one subject within a time limit: each runs with as many iterations, on as many updates, as fit."""

import contextlib
import copy
import dataclasses
import itertools
import signal
import statistics
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from attacks.base import ATTACKS, Attack, Threat
from attacks.matching.matcher import GradientMatcher
from attacks.optim.tracker import Tracker, tracking
from core.errors import UsageError
from core.protocol import Observation, Reconstruction
from core.references import describe
from core.rng import stream
from evaluation.applicability import refusal
from evaluation.evaluator import score_trial
from evaluation.inspect import Inspection, inspect_model
from evaluation.metrics import psnr
from evaluation.pairing import pair
from evaluation.summary import RECOVERED_PSNR, is_recovered
from runner.executors import Job, detached
from runner.experiment import commit
from runner.subjects import Subject

# the order in which attacks are run: those that take seconds first, then the strongest
ORDER = (
    "analytic",
    "spear",
    "cpa",
    "april",
    "trap",
    "rtf",
    "ig_single",
    "sme",
    "dlg",
    "idlg",
    "ig_multi",
    "dlf",
    "ggl",
    "gias",
)
# on one gradient, or one local step on all examples, these are ig_single
SAME_ON_ONE_STEP = ("ig_weight", "ig_multi", "dlf", "sme")
THREATS: tuple[Threat, ...] = get_args(Threat)
LEAST_ITERATIONS = 20  # an attack that has time for fewer is not run
BATTERY_SHARE = 0.6  # of the time; the rest is for what follows from the attacks
AGREEMENT = 6.0  # dB by which two reconstructions must be closer to one another than to their mean colour


class _OutOfTime(Exception):
    """An attack has used up its time."""


@dataclass
class Outcome:
    """What one attack did."""

    attack: Attack
    status: Literal["ran", "refused", "left out", "out of time", "failed"]
    reason: str = ""
    rows: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    records: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    found: list[Reconstruction] = dataclasses.field(default_factory=list)
    rebuilt: list[Tensor] = dataclasses.field(default_factory=list)
    truths: list[Tensor] = dataclasses.field(default_factory=list)
    changed: dict[str, Any] = dataclasses.field(default_factory=dict)
    seconds: float = 0.0

    @property
    def share(self) -> float:
        """The share of records that it recovered."""
        return statistics.fmean(is_recovered(row) for row in self.rows) if self.rows else 0.0


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise _OutOfTime after so many seconds, even in code that reports no progress; in the main thread alone."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def stop(number: int, frame: object) -> None:
        raise _OutOfTime("stopped when its time was over")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.01))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Battery:
    """The attacks that apply to a subject, with one clock for all of them."""

    def __init__(self, flags: Any, subject: Subject) -> None:
        self.flags, self.subject = flags, subject
        self.start = time.monotonic()
        self.inspection: Inspection = inspect_model(
            subject.model, subject.task, subject.recipe, subject.kind, subject.num_examples, subject.public
        )
        self._honest_jobs: list[Job] | None = None

    def left(self, share: float = 1.0) -> float:
        """Seconds until `share` of the time limit has passed."""
        return self.start + 60 * self.flags.minutes * share - time.monotonic()

    def all(self) -> list[Outcome]:
        """Every attack that applies to the assumed server, the fastest first."""
        allowed = THREATS[: THREATS.index(self.flags.threat) + 1]
        names = [n for n in (*ORDER, *sorted(set(ATTACKS) - set(ORDER))) if n in ATTACKS and n != "baseline"]
        outcomes, waiting = [], []
        for name in names:
            attack = ATTACKS[name]()
            reason = self._left_out(attack, allowed)
            refused = None if reason else self._refused(attack)
            if reason or refused:
                outcomes.append(Outcome(attack, "left out" if reason else "refused", reason or refused or ""))
            else:
                waiting.append(attack)
        for position, attack in enumerate(waiting):
            seconds = self.left(BATTERY_SHARE) / (len(waiting) - position)
            found = self.run(attack, self._jobs(attack), seconds)
            print(f"{attack.name}: {_line(found)}", file=sys.stderr, flush=True)
            outcomes.append(found)
        return outcomes

    def _left_out(self, attack: Attack, allowed: tuple[Threat, ...]) -> str | None:
        """Why an attack that may apply is not run; None if it is."""
        subject = self.subject
        if self.flags.attacks and attack.name not in self.flags.attacks:
            return "not among the chosen attacks"
        if attack.threat not in allowed:
            return f"assumes a server that the audit does not: {attack.threat}"
        if subject.one_step and attack.name in SAME_ON_ONE_STEP:
            return "is ig_single on an update of one step"
        if attack.trains and not self.flags.attacks:
            return "trains a network first: name it in `attacks`"
        return None

    def _refused(self, attack: Attack) -> str | None:
        subject = self.subject
        public = subject.public is not None
        return refusal(attack, subject.model, subject.task, subject.recipe, subject.kind, subject.num_examples, public)

    def _jobs(self, attack: Attack) -> list[Job]:
        if attack.threat != "honest-but-curious":
            return self.subject.jobs(attack)
        if self._honest_jobs is None:
            self._honest_jobs = self.subject.jobs(attack)
        return self._honest_jobs

    def run(self, attack: Attack, jobs: list[Job], seconds: float) -> Outcome:
        """Attack as many of the updates as the time allows, with fewer iterations if it must be."""
        start = time.monotonic()
        deadline = start + max(seconds, 0)
        outcome = Outcome(attack, "ran")
        try:
            if "public" in attack.requirements() and self.subject.public is not None:
                attack.prepare(
                    self.subject.task, self.subject.public, {"dataset": self.flags.dataset, "commit": commit()}
                )
            attack, outcome.changed = self._fit(attack, jobs[0], deadline - time.monotonic(), len(jobs))
            for job in jobs:
                if outcome.found and time.monotonic() > deadline:
                    break
                self._add(outcome, job, self._reconstruct(attack, job, 2 * deadline - start))
        except _OutOfTime as stop:
            if not outcome.found:
                outcome.status, outcome.reason = "out of time", str(stop)
        except UsageError as error:
            outcome.status, outcome.reason = "refused", str(error)
        except (RuntimeError, ValueError, LookupError) as error:  # one attack that breaks must not cost the others
            outcome.status, outcome.reason = "failed", describe(error)
        outcome.seconds = time.monotonic() - start
        return outcome

    def _fit(self, attack: Attack, job: Job, seconds: float, trials: int) -> tuple[Attack, dict[str, Any]]:
        """The attack with as many iterations as fit into the time, and what was changed. Raises _OutOfTime."""
        names = [field.name for field in dataclasses.fields(attack)]  # type: ignore[arg-type]
        loops = [name for name in names if name.endswith("iterations") and getattr(attack, name)]
        if not loops or not attack.needs_workers():
            return attack, {}
        own: Any = attack
        once = {"restarts": 1} if "restarts" in names else {}
        begin = time.monotonic()
        self._reconstruct(dataclasses.replace(own, **dict.fromkeys(loops, 3), **once), job, begin + seconds)
        each = (time.monotonic() - begin) / 3
        runs, most = own.restarts if once else 1, max(getattr(own, name) for name in loops)
        affordable = seconds / each
        if affordable >= trials * runs * most:
            return attack, {}
        if affordable < LEAST_ITERATIONS:
            raise _OutOfTime(f"{LEAST_ITERATIONS} iterations need {LEAST_ITERATIONS * each / 60:.1f} minutes")
        # all iterations of one run on fewer updates are worth more than few iterations on all
        scale = min(1.0, affordable / most)
        changed = {name: max(1, int(scale * getattr(own, name))) for name in loops if scale < 1}
        changed |= once if runs > 1 else {}
        return dataclasses.replace(own, **changed), changed

    def _reconstruct(self, attack: Attack, job: Job, deadline: float, seed: str = "attack") -> Reconstruction:
        def on_progress(iteration: int, total: int, objective: float) -> None:
            if time.monotonic() > deadline:
                raise _OutOfTime(f"stopped at iteration {iteration} of {total}, when its time was over")

        with time_limit(deadline - time.monotonic()), tracking(Tracker(on_progress)):
            found = attack.reconstruct(job.observation, stream(self.flags.seed, seed, job.index))
        return detached(attack, found, self.subject.task)

    def _add(self, outcome: Outcome, job: Job, found: Reconstruction) -> None:
        """Score a reconstruction if the truth is known, and compare the update it would have caused."""
        outcome.found.append(found)
        record: dict[str, Any] = {
            "trial": job.index,
            "status": found.status,
            "iterations": found.iterations,
            "seconds": 0.0,
        }
        record["mismatch"] = _mismatch(job.observation, found.examples, found.labels)
        truth = job.payload.truth if hasattr(job.payload, "truth") else job.payload
        if truth is not None and self.subject.context is not None:
            score = score_trial(truth, found, self.subject.context, trial=job.index)
            unit = getattr(job.payload, "origin", {})
            outcome.rows += [{"attack": outcome.attack.name, "trial": job.index, **row, **unit} for row in score.rows]
            outcome.rebuilt.append(score.rebuilt)
            outcome.truths.append(truth.examples.cpu())
            record |= {k: v for k, v in score.record.items() if k != "trace"}
            record["mismatch_at_truth"] = _mismatch(job.observation, truth.examples, truth.labels)
        outcome.records.append(record)

    def agreement(self, outcomes: list[Outcome]) -> dict[str, Any]:
        """How closely attacks agree on the examples, and the best attack with itself from another start: in dB."""
        ran = [o for o in outcomes if o.status == "ran" and len(o.found[0].examples)]
        pairs = []
        for one, other in itertools.combinations(ran, 2):
            values = _agreement(one.found[0].examples, other.found[0].examples)
            pairs.append({"attacks": [one.attack.name, other.attack.name], "psnr": values})
        known = [o for o in ran if o.records[0]["mismatch"] is not None]
        restart = None
        if known:
            best = min(known, key=lambda o: o.records[0]["mismatch"])
            if best.attack.needs_workers() and self.left() > best.seconds:
                attack: Any = best.attack
                own = dataclasses.replace(attack, **best.changed)
                with contextlib.suppress(_OutOfTime, UsageError):
                    again = self._reconstruct(own, self._jobs(own)[0], time.monotonic() + self.left(), seed="restart")
                    values = _agreement(best.found[0].examples, again.examples)
                    restart = {"attack": own.name, "psnr": values}
        agreed = _agreed(ran)
        return {"between_attacks": pairs, "between_restarts": restart, "agreed_records": agreed}


def with_subject(battery: Battery, subject: Subject) -> Battery:
    """The same audit, with the same clock, of another subject."""
    other = copy.copy(battery)
    other.subject, other._honest_jobs = subject, None
    return other


def _mismatch(observation: Observation, examples: Tensor, labels: Tensor | None) -> float | None:
    """1 - cosine between the observed update and the one that these examples would have caused; None without labels."""
    if labels is None or len(examples) != observation.update.num_examples or len(labels) != len(examples):
        return None
    device = observation.update.device
    with torch.no_grad():
        matcher = GradientMatcher(observation)
        unknowns = [v.init.to(device) for v in matcher.counter.variables if isinstance(v.init, Tensor)]
        value = float(matcher.cosine_distance(examples.to(device), labels.to(device), *unknowns))
    return max(value, 0.0) if value == value else None


def _agreement(one: Tensor, other: Tensor) -> list[float]:
    """PSNR of each example of `one` and its partner in `other`, in dB."""
    return [round(psnr(x, other[j]), 2) for x, j in zip(one, pair(one, other), strict=True) if j is not None]


def _agreed(ran: list[Outcome]) -> int:
    """The largest number of examples on which two attacks agree to 20 dB, and far better than on their mean colour."""
    most = 0
    for one, other in itertools.combinations(ran, 2):
        a, b = one.found[0].examples, other.found[0].examples
        count = 0
        for x, j in zip(a, pair(a, b), strict=True):
            if j is None:
                continue
            flat = x.mean(tuple(range(1, x.ndim)), keepdim=True).expand_as(x)
            value = psnr(x, b[j])
            count += value >= RECOVERED_PSNR and value >= psnr(x, flat) + AGREEMENT
        most = max(most, count)
    return most


def _line(o: Outcome) -> str:
    if o.status != "ran":
        return f"{o.status} ({o.reason})"
    scored = f"{sum(map(is_recovered, o.rows))} of {len(o.rows)} records recovered" if o.rows else "not scored"
    return f"{scored}, {o.seconds:.0f} s"
