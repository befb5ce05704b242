"""Covariance matrix adaptation (CMA-ES), an optimiser without gradients.

Hansen, Ostermeier, Evolutionary Computation 9, 2001. By the package `cma`.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from attacks.optim.loop import State
from attacks.optim.tracker import current_tracker

NOT_FINITE = 1e30  # the value that the search gets for an objective that is not finite


def minimize_cma(
    objective: Callable[[Tensor], Tensor],
    center: Tensor,
    std: float,
    evaluations: int,
    rng: torch.Generator,
    run: tuple[int, int] = (0, 1),
) -> State:
    """The best point found from `center` (any shape) with initial standard deviation `std`.

    The search is a function of its seed and of the objective's values, so these are all that is saved: a resumed
    search replays them without evaluating the objective again.
    """
    import cma

    tracker = current_tracker()
    saved = tracker.restore(rng) or {"seed": int(torch.randint(2**31, (), generator=rng)), "trace": []}
    draws, known = np.random.default_rng(saved["seed"]), saved["trace"]
    # at most `evaluations`, though a generation of fewer than four teaches nothing
    population = max(2, min(4 + int(3 * math.log(center.numel())), evaluations))
    options = {"popsize": population, "seed": math.nan, "verbose": -9}
    options |= {"randn": lambda *size: draws.standard_normal(size)}
    strategy = cma.CMAEvolutionStrategy(np.zeros(center.numel()), std, options)
    state = State.start([center])

    def as_tensor(flat: np.ndarray) -> Tensor:
        return torch.from_numpy(flat).to(center).view_as(center)

    while not state.trace or (len(state.trace) + strategy.popsize <= evaluations and not strategy.stop()):
        points = strategy.ask()
        values = known[len(state.trace) : len(state.trace) + len(points)]
        if not values:
            with torch.no_grad():
                values = [objective(as_tensor(flat)).item() for flat in points]
        strategy.tell(points, [v if math.isfinite(v) else NOT_FINITE for v in values])
        state.trace += values
        state.iterations = len(state.trace)
        tracker.progress(run[0] * evaluations + len(state.trace), run[1] * evaluations, min(state.trace))
        if tracker.should_save():
            tracker.save(rng, {"seed": saved["seed"], "trace": state.trace})
    state.best, state.best_variables = float(strategy.best.f), (as_tensor(strategy.best.x),)
    return state
