"""Where attacks are run: in this process, in worker processes, or by Ray on one machine or many.

Victims go in and reconstructions come out as they end, in any order and, wherever they were computed, the same. Truth
stays in this process: a worker is sent an `Observation`, and nothing else of the trial.
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
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Protocol, TypeVar

import torch

from attacks.base import Attack, checkpoint, progress
from federated.wire import Batch, Observation, Reconstruction, Task, UsageError
from utils import workers
from utils.cli import ROOT
from utils.memory import keep_pages
from utils.results import Store

DEATHS = 3  # of workers that Ray makes good for a trial
LEFT_AT_HOME = ("results", "datasets", ".git", ".venv")  # not sent to the machines of a cluster, as generators are


class Trial(Protocol):
    """A victim, as far as it may be known here."""

    @property
    def trial(self) -> int: ...
    @property
    def seen(self) -> Observation: ...


V = TypeVar("V", bound=Trial)
Answer = tuple[Reconstruction, Reconstruction | None, float]  # the attack's, its companion's, seconds
Attacked = tuple[V, Reconstruction, Reconstruction | None, float]
Listener = Callable[[int, int, int, float], None]


@dataclass(frozen=True)
class Shared:
    """What all trials of a run have in common."""

    attack: Attack
    public: Batch
    stream: Callable[[str, int], torch.Generator]  # of a purpose, in a trial
    store: Store
    threads: int

    def reconstruct(self, seen: Observation, trial: int) -> Answer:
        """The attack from where it last saved its state, if it did, and its companion's answer; seconds are its own."""
        keep_pages()
        saved = self.store.under_way(trial)
        state = saved.load(seen.update.tensors[0].device)
        start = time.perf_counter() - (state["seconds"] if state else 0)
        checkpoint.attend(state, saved.due, lambda state: saved.save({**state, "seconds": time.perf_counter() - start}))
        rec = _plain(self.attack.reconstruct(seen, self.stream("attack", trial)), seen.task)
        seconds = round(time.perf_counter() - start, 3)
        checkpoint.attend(None, lambda: False, lambda state: None)
        companion = self.attack.companion(seen.update.kind)
        if companion is None:
            return rec, None, seconds
        return rec, _plain(companion.reconstruct(seen, self.stream("companion", trial)), seen.task), seconds

    def unpack(self, packed: bytes, trial: int) -> bytes:
        """`reconstruct` from bytes to bytes."""
        seen: Observation = pickle.loads(packed)
        device = seen.update.tensors[0].device
        seen = dataclasses.replace(seen, public=Batch(*(t.to(device) for t in self.public)))
        return pickle.dumps(self.reconstruct(seen, trial))


def _plain(rec: Reconstruction, task: Task) -> Reconstruction:
    """An answer without graph and device."""
    images = rec.images.detach().float().cpu()
    assert images.ndim == 4 and images.shape[1:] == task.image_shape, f"{images.shape} for {task.image_shape}"
    labels = None if rec.labels is None else rec.labels.detach().cpu()
    sources = None if rec.sources is None else rec.sources.detach().float().cpu()
    return dataclasses.replace(rec, images=images, labels=labels, sources=sources)


def pack(seen: Observation) -> bytes:
    """Bytes rather than tensors: torch would pass those through shared memory, which containers keep small."""
    return pickle.dumps(dataclasses.replace(seen, public=Batch(torch.empty(0), torch.empty(0))))


def here(shared: Shared, victims: Iterator[V], listen: Listener) -> Iterator[Attacked[V]]:
    """One after the other, in this process."""
    for victim in victims:
        progress.listener = functools.partial(listen, victim.trial)
        yield victim, *shared.reconstruct(victim.seen, victim.trial)


def _keep_busy(
    victims: Iterator[V],
    submit: Callable[[bytes, int], Any],
    pending: dict[Any, V],
    jobs: int,
    collect: Callable[[], Iterator[Attacked[V]]],
) -> Iterator[Attacked[V]]:
    """At most one victim more than there are workers is on its way, so that memory stays flat."""
    for victim in victims:
        pending[submit(pack(victim.seen), victim.trial)] = victim
        while len(pending) > jobs:
            yield from collect()
    while pending:
        yield from collect()


# --- worker processes ----------------------------------------------------------------------------------------------


def local(shared: Shared, victims: Iterator[V], listen: Listener, jobs: int) -> Iterator[Attacked[V]]:
    """In processes of this machine."""
    context = workers.context()
    news = context.Queue()
    # by file: a large argument would hold up each worker's start until the one before has come up
    common = tempfile.NamedTemporaryFile(suffix=".pickle")  # noqa: SIM115
    pickle.dump(shared, common)
    common.flush()
    pending: dict[Future[bytes], V] = {}

    def collect() -> Iterator[Attacked[V]]:
        done, _ = wait(pending, timeout=0.5, return_when=FIRST_COMPLETED)
        while not news.empty():
            listen(*news.get())
        for future in done:
            yield pending.pop(future), *pickle.loads(future.result())

    pool = ProcessPoolExecutor(jobs, context, initializer=_start_worker, initargs=(common.name, news))
    try:
        yield from _keep_busy(victims, functools.partial(pool.submit, _work), pending, jobs, collect)
    finally:
        if pending:  # interrupted: attacks under way are not waited for
            for worker in multiprocessing.active_children():
                worker.kill()
        pool.shutdown(wait=not pending, cancel_futures=True)
        common.close()


_shared: Shared | None = None


def _start_worker(common: str, news: Any) -> None:
    global _shared
    gc.freeze()  # pages that are shared with the server, until a collection writes to them
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    progress.listener = _Courier(news)
    with open(common, "rb") as file:
        _shared = pickle.load(file)
    torch.set_num_threads(_shared.threads)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _work(packed: bytes, trial: int) -> bytes:
    assert _shared is not None
    if isinstance(progress.listener, _Courier):
        progress.listener.trial = trial
    return _shared.unpack(packed, trial)


class _Courier:
    """Sends an attack's progress to the main process, twice a second at the most."""

    def __init__(self, news: Any) -> None:
        self.news, self.trial, self.last = news, -1, 0.0

    def __call__(self, iteration: int, total: int, loss: float) -> None:
        if time.monotonic() - self.last > 0.5:
            self.last = time.monotonic()
            self.news.put((self.trial, iteration, total, loss))


# --- Ray -----------------------------------------------------------------------------------------------------------


def check_ray() -> None:
    if find_spec("ray") is None:
        raise UsageError("--backend ray needs Ray, which is not installed: pip install 'ray>=2.40,<3'")


def on_ray(shared: Shared, victims: Iterator[V], jobs: int) -> Iterator[Attacked[V]]:
    """On a Ray of this run's own with as many workers as `jobs` or, if RAY_ADDRESS names one, on all of that cluster.

    A worker that dies is made good DEATHS times in a trial, which goes on from its last saved state where the result
    folder is one that all machines share. Nothing is heard of trials under way.
    """
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import ray

    address = os.environ.get("RAY_ADDRESS", "local")
    size: dict[str, Any] = {"num_cpus": jobs * shared.threads, "include_dashboard": False} if address == "local" else {}
    environment: dict[str, Any] = {"env_vars": {"PYTHONPATH": str(ROOT)}}
    if address != "local":
        environment = {"working_dir": str(ROOT), "excludes": list(LEFT_AT_HOME)}
    ray.init(address=address, runtime_env=environment, log_to_driver=False, logging_level="error", **size)
    try:
        jobs = max(1, int(ray.cluster_resources().get("CPU", 1)) // shared.threads)
        common = ray.put(pickle.dumps(shared))
        work = ray.remote(num_cpus=shared.threads, max_retries=DEATHS, retry_exceptions=False)(_work_on_ray)
        pending: dict[Any, V] = {}

        def collect() -> Iterator[Attacked[V]]:
            (done,), _ = ray.wait(list(pending), num_returns=1)
            try:
                yield pending.pop(done), *pickle.loads(ray.get(done))
            except (ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError) as death:
                raise BrokenProcessPool(str(death)) from None

        yield from _keep_busy(victims, functools.partial(work.remote, common), pending, jobs, collect)
    finally:
        ray.shutdown()


def _work_on_ray(common: bytes, packed: bytes, trial: int) -> bytes:
    shared: Shared = pickle.loads(common)
    torch.set_num_threads(shared.threads)
    shared.store.under_way(trial).path.parent.mkdir(parents=True, exist_ok=True)  # this may be another machine
    return shared.unpack(packed, trial)
