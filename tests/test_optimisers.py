"""Optimisers of our own take torch's steps, and go on from a state to the bit."""

import pytest
import torch

from attacks.adam import Adam
from attacks.lbfgs import Lbfgs


def valley(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Two variables, and the curvatures of a bent valley over them."""
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(12, generator=rng, dtype=torch.float64), torch.logspace(-1, 1, 12, dtype=torch.float64)


def objective(a: torch.Tensor, b: torch.Tensor, curvature: torch.Tensor) -> torch.Tensor:
    x = torch.cat([a.flatten(), b])
    return 0.5 * (curvature * x.square()).sum() + (x[1:] - x[:-1].square()).square().sum() / 10


def ours(history: int, line_search: bool) -> tuple[Lbfgs, list[torch.Tensor]]:
    start, curvature = valley()
    variables = [start[:6].view(2, 3).clone().requires_grad_(), start[6:].clone().requires_grad_()]

    def slopes() -> tuple[float, tuple[torch.Tensor, ...]]:
        loss = objective(*variables, curvature)
        return loss.item(), torch.autograd.grad(loss, variables)

    return Lbfgs(variables, slopes, 0.5, history, line_search), variables


@pytest.mark.parametrize("history", [1, 4, 100])
@pytest.mark.parametrize("line_search", [True, False])
def test_torchs_steps(history: int, line_search: bool) -> None:
    optimizer, variables = ours(history, line_search)
    start, curvature = valley()
    theirs = [start[:6].view(2, 3).clone().requires_grad_(), start[6:].clone().requires_grad_()]
    search = "strong_wolfe" if line_search else None
    limits = {"max_iter": 12, "max_eval": 500, "history_size": history, "tolerance_grad": 0, "tolerance_change": 0}
    torchs = torch.optim.LBFGS(theirs, lr=0.5, line_search_fn=search, **limits)

    def closure() -> torch.Tensor:
        torchs.zero_grad()
        loss = objective(*theirs, curvature)
        loss.backward()
        return loss

    first = torchs.step(closure).item()
    assert optimizer.step(12) == pytest.approx(first)
    torch.testing.assert_close(variables, theirs, rtol=1e-6, atol=1e-8)
    assert objective(*variables, curvature) < 0.5 * first


def test_it_goes_on_from_a_state() -> None:
    whole, there = ours(4, True)
    whole.step(7)
    saved, stood = whole.state(), [v.detach().clone() for v in there]
    whole.step(5)
    again, here = ours(4, True)
    with torch.no_grad():
        for v, value in zip(here, stood, strict=True):
            v.copy_(value)
    again.load(saved)
    again.step(5)
    assert all(torch.equal(a, b) for a, b in zip(here, there, strict=True))


def test_nothing_left_to_descend_ends_it() -> None:
    x = torch.zeros(3, requires_grad=True)
    optimizer = Lbfgs([x], lambda: (1.0, (torch.zeros(3),)), 1.0, 5, True)
    assert optimizer.step(10) == 1.0
    assert torch.equal(x.detach(), torch.zeros(3))


def test_adam_is_torchs_and_goes_on_from_a_state() -> None:
    rng = torch.Generator().manual_seed(0)
    start = [torch.randn(3, 2, generator=rng), torch.randn((), generator=rng)]
    a, b = ([v.clone() for v in start] for _ in range(2))
    rates = [0.1, 0.003]
    optimizer = Adam(a)
    torchs = torch.optim.Adam([{"params": [v], "lr": lr} for v, lr in zip(b, rates, strict=True)])
    for step in range(9):
        slopes = [torch.randn(v.shape, generator=rng) for v in a]
        optimizer.step(slopes, rates)
        for v, g in zip(b, slopes, strict=True):
            v.grad = g
        torchs.step()
        if step == 4:
            again, c = optimizer.state(), [v.clone() for v in a]
            optimizer = Adam(c)
            optimizer.load(again)
            a = c
    torch.testing.assert_close(a, b)
