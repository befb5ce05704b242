"""Executors of trials: this process, worker processes, or Ray on one machine or many.

Trials go in, and reconstructions come out as they end, in any order; they do not depend on the executor. Truth stays in
this process: a worker is sent an `Observation`, and nothing else of the trial.
"""

import dataclasses
import functools
import gc
import multiprocessing
import os
import pickle
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch

from attacks.base import Attack
from attacks.optim.tracker import Progress, Tracker, tracking
from core.errors import UsageError
from core.paths import ROOT
from core.protocol import Batch, Observation, Reconstruction, Task
from core.rng import stream
from runner import workers
from runner.scratch import scratch_folder
from runner.store import Store
from utils.memory import disable_malloc_trim

MAX_RETRIES = 3  # of a trial whose Ray worker died
NOT_SENT = ("results", "datasets", ".git", ".venv")  # folders that machines of a cluster do not need


@dataclass(frozen=True)
class Job:
    """An observation to attack. `payload` comes back with the result and is never sent to a worker."""

    index: int
    observation: Observation
    payload: Any = None


@dataclass(frozen=True)
class Result:
    """The attack's reconstruction, that of its comparison attack if there is one, and the attack's own seconds."""

    reconstruction: Reconstruction
    comparison: Reconstruction | None
    seconds: float


Listener = Callable[[int, int, int, float], None]  # trial, iteration, of how many, objective
Results = Generator[tuple[Job, Result], None, None]


@dataclass(frozen=True)
class TrialRunner:
    """What all trials of a run have in common."""

    attack: Attack
    public: Batch | None
    seed: int
    store: Store
    threads: int

    def reconstruct(self, observation: Observation, index: int, on_progress: Progress) -> Result:
        """Run the attack from where it last saved its state, if it did, and its comparison attack."""
        if not is_finite(observation):
            return self._diverged(observation)
        disable_malloc_trim()
        checkpoint = self.store.trial_checkpoint(index)
        state = checkpoint.load(observation.update.device)
        start = time.perf_counter() - (state["seconds"] if state else 0)

        def save(state: dict[str, Any]) -> None:
            checkpoint.save({**state, "seconds": time.perf_counter() - start})

        with tracking(Tracker(on_progress, state, checkpoint.should_save, save)):
            reconstruction = self._run(self.attack, observation, "attack", index)
        seconds = round(time.perf_counter() - start, 3)
        comparison = self.attack.comparison_attack(observation.update.kind)
        if comparison is None:
            return Result(reconstruction, None, seconds)
        with tracking(Tracker(on_progress)):
            return Result(reconstruction, self._run(comparison, observation, "companion", index), seconds)

    def _diverged(self, observation: Observation) -> Result:
        """No reconstruction, without a call of the attack: no attack can read numbers that are not there."""
        nothing = Reconstruction(torch.zeros(0, *observation.task.domain.shape), status="diverged")
        compared = self.attack.comparison_attack(observation.update.kind) is not None
        return Result(nothing, nothing if compared else None, 0.0)

    def _run(self, attack: Attack, observation: Observation, purpose: str, index: int) -> Reconstruction:
        found = attack.reconstruct(observation, stream(self.seed, purpose, index))
        return detached(attack, found, observation.task)

    def reconstruct_packed(self, packed: bytes, index: int, on_progress: Progress) -> bytes:
        """`reconstruct` from bytes to bytes."""
        observation: Observation = pickle.loads(packed)
        public = None if self.public is None else self.public.to(observation.update.device)
        observation = dataclasses.replace(observation, public=public)
        return pickle.dumps(self.reconstruct(observation, index, on_progress))


def is_finite(observation: Observation) -> bool:
    """Whether the update and the broadcast model hold finite numbers only; training that diverges leaves others."""
    tensors = (*observation.update.tensors.values(), *observation.model.state_dict().values())
    return all(tensor.isfinite().all() for tensor in tensors)


def detached(attack: Attack, found: Any, task: Task) -> Reconstruction:
    """A reconstruction without graph, on the CPU. Raises UsageError for a result of another type or shape."""
    if not isinstance(found, Reconstruction):
        raise UsageError(f"{attack.name} returned {type(found).__name__} instead of a Reconstruction")
    examples = found.examples.detach().float().cpu()
    if examples.ndim < 1 or examples.shape[1:] != torch.Size(task.domain.shape):
        raise UsageError(
            f"{attack.name} returned examples of shape {tuple(examples.shape)}, not (N, *{task.domain.shape})"
        )
    labels = None if found.labels is None else found.labels.detach().cpu()
    sources = None if found.sources is None else found.sources.detach().float().cpu()
    certainty = None if found.certainty is None else found.certainty.detach().float().cpu()
    return dataclasses.replace(found, examples=examples, labels=labels, sources=sources, certainty=certainty)


def pack(observation: Observation) -> bytes:
    """An observation without public data, as bytes.

    Tensors would travel through shared memory, which containers keep small.
    """
    return pickle.dumps(dataclasses.replace(observation, public=None))


def run_in_process(runner: TrialRunner, jobs: Iterator[Job], listen: Listener) -> Results:
    """One trial after the other, in this process."""
    for job in jobs:
        on_progress = functools.partial(listen, job.index)
        yield job, runner.reconstruct(job.observation, job.index, on_progress)


def _dispatch(
    jobs: Iterator[Job],
    submit: Callable[[bytes, int], Any],
    pending: dict[Any, Job],
    count: int,
    collect: Callable[[], Results],
) -> Results:
    """Submit jobs while workers are free; at most one more than there are workers, so that memory stays flat."""
    for job in jobs:
        pending[submit(pack(job.observation), job.index)] = job
        while len(pending) > count:
            yield from collect()
    while pending:
        yield from collect()


# --- worker processes ----------------------------------------------------------------------------------------------


def run_in_workers(runner: TrialRunner, jobs: Iterator[Job], listen: Listener, count: int) -> Results:
    """In `count` processes of this machine."""
    context = workers.context()
    progress = context.Queue()
    # by file: a large argument would delay each worker's start until the previous one is up
    shared = tempfile.NamedTemporaryFile(suffix=".pickle", dir=scratch_folder())  # noqa: SIM115
    pickle.dump(runner, shared)
    shared.flush()
    pending: dict[Future[bytes], Job] = {}

    def collect() -> Results:
        done, _ = wait(pending, timeout=0.5, return_when=FIRST_COMPLETED)
        while not progress.empty():
            listen(*progress.get())
        for future in done:
            yield pending.pop(future), pickle.loads(future.result())

    pool = ProcessPoolExecutor(count, context, initializer=_start_worker, initargs=(shared.name, progress))
    finished = False
    try:
        yield from _dispatch(jobs, lambda packed, index: pool.submit(_work, packed, index), pending, count, collect)
        finished = True
    finally:
        if not finished:  # interrupted, perhaps while a worker starts: trials under way are not waited for
            for worker in multiprocessing.active_children():
                worker.kill()
        pool.shutdown(wait=finished, cancel_futures=True)
        shared.close()


_worker: dict[str, Any] = {}  # of a worker process: set once, when it starts


def _start_worker(shared: str, progress: Any) -> None:
    gc.freeze()  # pages shared with the server stay shared until a collection writes to them
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with open(shared, "rb") as file:
        _worker.update(runner=pickle.load(file), progress=progress)
    torch.set_num_threads(_worker["runner"].threads)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _work(packed: bytes, index: int) -> bytes:
    return _worker["runner"].reconstruct_packed(packed, index, QueueProgress(_worker["progress"], index))


class QueueProgress:
    """Sends a trial's progress to the main process, at most twice a second."""

    def __init__(self, queue: Any, index: int) -> None:
        self.queue, self.index, self.last = queue, index, 0.0

    def __call__(self, iteration: int, total: int, objective: float) -> None:
        if time.monotonic() - self.last > 0.5:
            self.last = time.monotonic()
            self.queue.put((self.index, iteration, total, objective))


# --- Ray -----------------------------------------------------------------------------------------------------------


def require_ray() -> None:
    if find_spec("ray") is None:
        raise UsageError("`backend=ray` needs Ray, which is not installed: pip install 'ray>=2.40,<3'")


def run_on_ray(runner: TrialRunner, jobs: Iterator[Job], count: int) -> Results:
    """On a local Ray with `count` workers or, if RAY_ADDRESS names one, on all of that cluster.

    A trial whose worker dies is retried MAX_RETRIES times, and continues from its last checkpoint where all machines
    share the results folder. Trials under way report no progress.
    """
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import ray

    address = os.environ.get("RAY_ADDRESS", "local")
    size: dict[str, Any] = (
        {"num_cpus": count * runner.threads, "include_dashboard": False} if address == "local" else {}
    )
    environment: dict[str, Any] = {"env_vars": {"PYTHONPATH": str(ROOT)}}
    if address != "local":
        environment = {"working_dir": str(ROOT), "excludes": list(NOT_SENT)}
    ray.init(address=address, runtime_env=environment, log_to_driver=False, logging_level="error", **size)
    try:
        count = max(1, int(ray.cluster_resources().get("CPU", 1)) // runner.threads)
        shared = ray.put(pickle.dumps(runner))
        work = ray.remote(num_cpus=runner.threads, max_retries=MAX_RETRIES, retry_exceptions=False)(_work_on_ray)
        pending: dict[Any, Job] = {}

        def collect() -> Results:
            (done,), _ = ray.wait(list(pending), num_returns=1)
            try:
                yield pending.pop(done), pickle.loads(ray.get(done))
            except (ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError) as death:
                raise BrokenProcessPool(str(death)) from None

        yield from _dispatch(jobs, functools.partial(work.remote, shared), pending, count, collect)
    finally:
        ray.shutdown()


def _work_on_ray(shared: bytes, packed: bytes, index: int) -> bytes:
    runner: TrialRunner = pickle.loads(shared)
    torch.set_num_threads(runner.threads)
    runner.store.trial_checkpoint(index).path.parent.mkdir(parents=True, exist_ok=True)  # this may be another machine
    return runner.reconstruct_packed(packed, index, lambda iteration, total, objective: None)
