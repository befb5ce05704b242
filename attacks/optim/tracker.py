"""Progress and checkpoints of one reconstruction.

Whoever runs an attack makes a `Tracker` and enters `tracking(tracker)`; loops look it up with `current_tracker()`.
It is held in a context variable, so that attacks in two threads do not share one.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
from torch import Tensor

R = TypeVar("R")
Progress = Callable[[int, int, float], None]  # iteration, of how many, objective


class Tracker:
    """Reports progress, and saves and restores the state of a long reconstruction; by default it does neither.

    A reconstruction is a sequence of segments, each a function of a random stream that returns a dataclass. After an
    interruption, finished segments return their stored results, and the unfinished one is restored from its last saved
    state (its checkpoint). States are tensors, numbers, strings, and lists, tuples and dictionaries of them.
    """

    def __init__(
        self,
        on_progress: Progress = lambda iteration, total, objective: None,
        saved: Mapping[str, Any] | None = None,
        should_save: Callable[[], bool] = lambda: False,
        save: Callable[[dict[str, Any]], None] = lambda state: None,
        on_step: Callable[[Sequence[Tensor]], None] = lambda variables: None,
    ) -> None:
        """
        saved: what `save` was last given before the reconstruction was interrupted.
        on_step: called with the variables of a descent after each evaluation of its objective.
        """
        self.progress, self.should_save, self.on_step = on_progress, should_save, on_step
        self._save = save
        self._ended: list[tuple[dict[str, Any], Tensor]] = list(saved["ended"]) if saved else []
        self._open: tuple[dict[str, Any], Tensor] | None = saved["open"] if saved else None
        self._segments = 0

    def run_segment(self, kind: type[R], rng: torch.Generator, work: Callable[[], R]) -> R:
        """`work()`, a dataclass of type `kind`.

        After an interruption, the stored result of a finished segment, with `rng` as it was at its end.
        """
        self._segments += 1
        if self._segments <= len(self._ended):
            fields, rng_state = self._ended[self._segments - 1]
            rng.set_state(rng_state.cpu())
            return kind(**fields)
        result = work()
        self._ended.append((dict(vars(result)), rng.get_state()))
        self._open = None
        return result

    def restore(self, rng: torch.Generator) -> dict[str, Any] | None:
        """The last saved state of the unfinished segment, with `rng` as it was then; None if there is none."""
        if self._open is None:
            return None
        (state, rng_state), self._open = self._open, None
        rng.set_state(rng_state.cpu())
        return state

    def save(self, rng: torch.Generator, state: dict[str, Any]) -> None:
        """Save a state from which the current segment can continue."""
        self._save({"ended": self._ended, "open": (state, rng.get_state())})


_current: ContextVar[Tracker | None] = ContextVar("tracker", default=None)


def current_tracker() -> Tracker:
    """The tracker of the reconstruction under way; one that does nothing outside `tracking`."""
    return _current.get() or Tracker()


@contextlib.contextmanager
def tracking(tracker: Tracker) -> Iterator[Tracker]:
    """Make `tracker` the current one inside the block."""
    token = _current.set(tracker)
    try:
        yield tracker
    finally:
        _current.reset(token)
