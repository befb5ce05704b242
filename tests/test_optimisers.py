"""Our Adam and L-BFGS take torch's steps, and continue from a saved state bit for bit."""

import pytest
import torch

from attacks.optim.adam import Adam
from attacks.optim.lbfgs import Lbfgs
from attacks.optim.loop import Closure


def valley(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Start values of twelve variables, and the curvatures of a bent valley over them."""
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(12, generator=rng, dtype=torch.float64), torch.logspace(-1, 1, 12, dtype=torch.float64)


def objective(a: torch.Tensor, b: torch.Tensor, curvature: torch.Tensor) -> torch.Tensor:
    x = torch.cat([a.flatten(), b])
    return 0.5 * (curvature * x.square()).sum() + (x[1:] - x[:-1].square()).square().sum() / 10


def ours(history: int, line_search: bool) -> tuple[Lbfgs, Closure, list[torch.Tensor]]:
    start, curvature = valley()
    variables = [start[:6].view(2, 3).clone().requires_grad_(), start[6:].clone().requires_grad_()]

    def closure() -> tuple[float, tuple[torch.Tensor, ...]]:
        loss = objective(*variables, curvature)
        return loss.item(), torch.autograd.grad(loss, variables)

    return Lbfgs(variables, 0.5, history, line_search), closure, variables


@pytest.mark.parametrize("history", [1, 4, 100])
@pytest.mark.parametrize("line_search", [True, False])
def test_lbfgs_takes_torchs_steps(history: int, line_search: bool) -> None:
    optimizer, closure, variables = ours(history, line_search)
    start, curvature = valley()
    theirs = [start[:6].view(2, 3).clone().requires_grad_(), start[6:].clone().requires_grad_()]
    search = "strong_wolfe" if line_search else None
    limits = {"max_iter": 12, "max_eval": 500, "history_size": history, "tolerance_grad": 0, "tolerance_change": 0}
    reference = torch.optim.LBFGS(theirs, lr=0.5, line_search_fn=search, **limits)

    def reference_closure() -> torch.Tensor:
        reference.zero_grad()
        loss = objective(*theirs, curvature)
        loss.backward()
        return loss

    first = reference.step(reference_closure).item()
    assert optimizer.iterate(closure, 12) == pytest.approx(first)
    torch.testing.assert_close(variables, theirs, rtol=1e-6, atol=1e-8)
    assert objective(*variables, curvature) < 0.5 * first


@pytest.mark.parametrize("history", [4, 100])  # before the oldest pair is overwritten, and after
def test_lbfgs_continues_from_a_saved_state(history: int) -> None:
    whole, closure, expected = ours(history, True)
    whole.iterate(closure, 7)
    saved, values = whole.state_dict(), [v.detach().clone() for v in expected]
    whole.iterate(closure, 5)
    resumed, closure, variables = ours(history, True)
    with torch.no_grad():
        for variable, value in zip(variables, values, strict=True):
            variable.copy_(value)
    resumed.load_state_dict(saved)
    resumed.iterate(closure, 5)
    assert all(torch.equal(a, b) for a, b in zip(variables, expected, strict=True))


def test_lbfgs_ends_where_no_descent_is_left() -> None:
    x = torch.zeros(3, requires_grad=True)
    optimizer = Lbfgs([x], 1.0, 5, True)
    assert optimizer.iterate(lambda: (1.0, (torch.zeros(3),)), 10) == 1.0
    assert torch.equal(x.detach(), torch.zeros(3))


def test_adam_takes_torchs_steps_and_continues_from_a_saved_state() -> None:
    rng = torch.Generator().manual_seed(0)
    start = [torch.randn(3, 2, generator=rng), torch.randn((), generator=rng)]
    a, b = ([v.clone() for v in start] for _ in range(2))
    rates = [0.1, 0.003]
    optimizer = Adam(a)
    reference = torch.optim.Adam([{"params": [v], "lr": lr} for v, lr in zip(b, rates, strict=True)])
    for step in range(9):
        grads = [torch.randn(v.shape, generator=rng) for v in a]
        optimizer.step(grads, rates)
        for v, g in zip(b, grads, strict=True):
            v.grad = g
        reference.step()
        if step == 4:
            saved, a = optimizer.state_dict(), [v.clone() for v in a]
            optimizer = Adam(a)
            optimizer.load_state_dict(saved)
    torch.testing.assert_close(a, b)


def test_adam_leaves_a_variable_without_a_gradient_in_place() -> None:
    a, b = torch.ones(2), torch.ones(3)
    Adam([a, b]).step([torch.ones(2), None], [0.1, 0.1])
    assert not torch.equal(a, torch.ones(2))
    assert torch.equal(b, torch.ones(3))
