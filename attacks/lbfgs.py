"""L-BFGS with its history in two matrices. Byrd, Nocedal, Schnabel, Mathematical Programming 1994.

    H g = c g + [S  cY] [ R^-T (D + c Y^T Y) R^-1   -R^-T ] [  S^T ] g       c = s'y / y'y of the last pair
                        [ -R^-1                       0   ] [ cY^T ]

S and Y hold the steps and the changes of the gradient, R is the upper triangle of S^T Y, D its diagonal. The same
direction as torch.optim.LBFGS's loop over pairs, which for a small network takes longer than the gradient does.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.lbfgs import _strong_wolfe

CURVATURE = 1e-8  # least cosine between a step and the change of the gradient for the pair to be kept


class Lbfgs:
    """Minimises over `variables`, in place; `slopes` returns the objective and its slopes at where they stand."""

    def __init__(
        self,
        variables: Sequence[Tensor],
        slopes: Callable[[], tuple[float, Sequence[Tensor]]],
        lr: float,
        history: int,
        line_search: bool,
    ) -> None:
        self.variables, self.slopes = list(variables), slopes
        self.lr, self.line_search = lr, line_search
        size = sum(v.numel() for v in variables)
        self.pairs = variables[0].new_zeros(history, 2, size)  # s and y; the oldest pair is the first to be overwritten
        self.products = torch.zeros(2, history, history, dtype=torch.float64)  # S^T Y and Y^T Y, in the order of pairs
        self.stored = 0  # pairs ever stored
        self.loss: float | None = None
        self.slope = variables[0].new_zeros(size)

    def state(self) -> dict[str, Any]:
        """What `load` takes, all but the variables."""
        used = min(self.stored, len(self.pairs))
        kept = {"pairs": self.pairs[:used].clone(), "products": self.products[:, :used, :used].clone()}
        return kept | {"stored": self.stored, "loss": self.loss, "slope": self.slope.clone()}

    def load(self, state: dict[str, Any]) -> None:
        used = len(state["pairs"])
        self.pairs[:used], self.products[:, :used, :used] = state["pairs"], state["products"].cpu()
        self.stored, self.loss, self.slope = state["stored"], state["loss"], state["slope"]

    def step(self, count: int) -> float:
        """Up to `count` iterations, and the objective where they started; fewer where no descent is left.

        As in torch a quarter more evaluations end it too: where pooling bends the objective, line searches that find
        nothing would take most of the time.
        """
        if self.loss is None:
            self.loss, self.slope = self._evaluate()
        started, left = self.loss, count * 5 // 4
        for _ in range(count):
            if left <= 0:
                break
            direction = self._direction()
            descent = torch.dot(self.slope, direction).item()
            if not descent < 0:
                break
            length = self.lr if self.stored else self.lr * min(1.0, 1 / self.slope.abs().sum().item())
            origin, before = self._gather(self.variables), self.slope
            if self.line_search:
                self.loss, self.slope, length, taken = _strong_wolfe(
                    lambda x, t, d: self._evaluate(x + t * d), origin, length, direction, self.loss, before, descent
                )
                self._put(origin + length * direction)
            else:
                taken = 1
                self.loss, self.slope = self._evaluate(origin + length * direction)
            left -= taken
            if self.loss != self.loss:
                break
            self._store(length * direction, self.slope - before)
        return started

    def _direction(self) -> Tensor:
        used = min(self.stored, len(self.pairs))
        if not used:
            return -self.slope
        first = self.stored % used if self.stored > used else 0  # where the oldest pair is
        sy, yy = (
            self.products[:, :used, :used].roll((-first, -first), (1, 2)) if first else self.products[:, :used, :used]
        )
        scale = (sy[-1, -1] / yy[-1, -1]).item()
        basis = self.pairs[:used].flatten(0, 1)  # (2 used, size)
        p, q = (basis @ self.slope).double().cpu().view(used, 2).roll(-first, 0).T
        upper = sy.triu()
        u = torch.linalg.solve_triangular(upper, p[:, None], upper=True)[:, 0]
        w = sy.diagonal() * u + scale * (yy @ u) - scale * q
        w = torch.linalg.solve_triangular(upper.T, w[:, None], upper=False)[:, 0]
        weights = torch.stack([w, -scale * u], 1).roll(first, 0)
        return -(scale * self.slope + basis.T @ weights.flatten().to(self.slope))

    def _store(self, s: Tensor, y: Tensor) -> None:
        if not torch.dot(s, y) > CURVATURE * s.norm() * y.norm():
            return
        place, used = self.stored % len(self.pairs), min(self.stored + 1, len(self.pairs))
        self.pairs[place] = torch.stack([s, y])
        self.stored += 1
        with_s, with_y = ((self.pairs[:used].flatten(0, 1) @ t).double().cpu().view(used, 2).T for t in (s, y))
        self.products[0, place, :used] = with_s[1]
        self.products[:, :used, place] = with_y
        self.products[1, place, :used] = with_y[1]

    def _evaluate(self, point: Tensor | None = None) -> tuple[float, Tensor]:
        if point is not None:
            self._put(point)
        loss, slopes = self.slopes()
        return loss, self._gather(slopes)

    @staticmethod
    def _gather(tensors: Sequence[Tensor]) -> Tensor:
        return torch.cat([t.detach().flatten() for t in tensors])

    @torch.no_grad()
    def _put(self, point: Tensor) -> None:
        parts = point.split([v.numel() for v in self.variables])
        for v, part in zip(self.variables, parts, strict=True):
            v.copy_(part.view_as(v))
