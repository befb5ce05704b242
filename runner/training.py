"""Training of a round's clients: in this process or, where that takes long, in worker processes."""

import pickle
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from itertools import chain

import torch

from federated.simulation import ClientJob, TrainedClient
from runner import workers

WORTHWHILE = 0.2  # seconds of a client's training from which on sending it to a worker pays


class ClientTrainer:
    """Trains clients in `count` processes of `threads` threads each. Updates do not depend on `count`.

    The first client of each round is trained here, and its time decides where the others are. Workers start when they
    are first needed and end with the `with` statement.
    """

    def __init__(self, count: int, threads: int) -> None:
        self.count, self.threads = count, threads
        self.pool: ProcessPoolExecutor | None = None

    def __call__(self, jobs: Iterable[ClientJob]) -> Iterator[TrainedClient]:
        """What the training of each client gives, in order."""
        jobs = iter(jobs)
        for job in jobs:
            start = time.perf_counter()
            result = job()
            seconds = time.perf_counter() - start
            yield result
            if self.count > 1 and seconds > WORTHWHILE:
                break
        second = next(jobs, None)
        if second is not None:
            yield from self._in_workers(chain([second], jobs))

    def _in_workers(self, jobs: Iterator[ClientJob]) -> Iterator[TrainedClient]:
        if self.pool is None:
            self.pool = ProcessPoolExecutor(self.count, workers.context(), initializer=_start, initargs=(self.threads,))
        pending: deque[Future[bytes]] = deque()
        for job in jobs:
            pending.append(self.pool.submit(_train, pickle.dumps(job)))
            if len(pending) > self.count:  # so that memory stays flat
                yield pickle.loads(pending.popleft().result())
        while pending:
            yield pickle.loads(pending.popleft().result())

    def __enter__(self) -> "ClientTrainer":
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if self.pool is not None:
            workers.end(self.pool, finished=kind is None)


def _start(threads: int) -> None:
    workers.start_worker()
    torch.set_num_threads(threads)


def _train(packed: bytes) -> bytes:
    job: ClientJob = pickle.loads(packed)
    return pickle.dumps(job())
