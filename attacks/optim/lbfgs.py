"""L-BFGS with its history in two matrices. Byrd, Nocedal, Schnabel, Mathematical Programming 1994.

    H g = c g + [S  cY] [ R^-T (D + c Y^T Y) R^-1   -R^-T ] [  S^T ] g       c = s'y / y'y of the last pair
                        [ -R^-1                       0   ] [ cY^T ]

S and Y hold the steps and the changes of the gradient, R is the upper triangle of S^T Y, D its diagonal. The same
direction as torch.optim.LBFGS's loop over pairs, which for a small network takes longer than the gradient does.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.lbfgs import _strong_wolfe

from attacks.optim.loop import Closure

CHUNK = 20  # iterations between two evaluations of the stopping rule: one step of the DLG authors' loop
CURVATURE = 1e-8  # least cosine between a step and the change of the gradient for the pair to be stored


class Lbfgs:
    """L-BFGS on `variables`, in place. One step of the descent loop is up to `CHUNK` iterations."""

    def __init__(self, variables: Sequence[Tensor], lr: float, history: int, line_search: bool) -> None:
        self.variables = list(variables)
        self.lr, self.line_search = lr, line_search
        size = sum(v.numel() for v in variables)
        self.pairs = variables[0].new_zeros(history, 2, size)  # s and y; the oldest pair is overwritten first
        self.products = torch.zeros(2, history, history, dtype=torch.float64)  # S^T Y and Y^T Y, in the order of pairs
        self.reset()

    def reset(self) -> None:
        self.stored = 0  # pairs ever stored
        self.iterations = 0
        self.loss: float | None = None
        self.grad = self.pairs.new_zeros(self.pairs.shape[2])

    def state_dict(self) -> dict[str, Any]:
        used = min(self.stored, len(self.pairs))
        history = {"pairs": self.pairs[:used].clone(), "products": self.products[:, :used, :used].clone()}
        return history | {
            "stored": self.stored,
            "iterations": self.iterations,
            "loss": self.loss,
            "grad": self.grad.clone(),
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        used = len(saved["pairs"])
        self.pairs[:used], self.products[:, :used, :used] = saved["pairs"], saved["products"].cpu()
        self.stored, self.iterations = saved["stored"], saved["iterations"]
        self.loss, self.grad = saved["loss"], saved["grad"]

    def evaluate(self, closure: Closure, at_most: int) -> tuple[float, int]:
        count = min(CHUNK, at_most)
        return self.iterate(closure, count), count

    def update(self, rates: Sequence[float]) -> None:
        """Nothing: the line searches of `evaluate` have moved the variables."""

    def iterate(self, closure: Closure, count: int) -> float:
        """Up to `count` iterations; returns the objective at their start. Ends early where no descent is left.

        As in torch, `count` * 5/4 evaluations end it too: where pooling bends the objective, line searches without
        success would take most of the time.
        """
        if self.loss is None:
            self.loss, self.grad = self._evaluate(closure)
        first, evaluations_left = self.loss, count * 5 // 4
        for _ in range(count):
            if evaluations_left <= 0:
                break
            direction = self._direction()
            descent = torch.dot(self.grad, direction).item()
            if not descent < 0:
                break
            # without a stored pair the direction has the size of the gradient; torch, and so the DLG authors' loop,
            # scales only the first step of all
            scaled = not self.stored if self.line_search else not self.iterations
            length = self.lr * min(1.0, 1 / self.grad.abs().sum().item()) if scaled else self.lr
            self.iterations += 1
            origin, before = self._flatten(self.variables), self.grad
            if self.line_search:
                self.loss, self.grad, length, taken = _strong_wolfe(
                    lambda x, t, d: self._evaluate(closure, x + t * d),
                    origin,
                    length,
                    direction,
                    self.loss,
                    before,
                    descent,
                )
                self._assign(origin + length * direction)
            else:
                taken = 1
                self.loss, self.grad = self._evaluate(closure, origin + length * direction)
            evaluations_left -= taken
            if self.loss != self.loss:
                break
            self._store(length * direction, self.grad - before)
        return first

    def _direction(self) -> Tensor:
        used = min(self.stored, len(self.pairs))
        if not used:
            return -self.grad
        oldest = self.stored % used if self.stored > used else 0
        sy, yy = (
            self.products[:, :used, :used].roll((-oldest, -oldest), (1, 2))
            if oldest
            else self.products[:, :used, :used]
        )
        scale = (sy[-1, -1] / yy[-1, -1]).item()
        basis = self.pairs[:used].flatten(0, 1)  # (2 used, size)
        p, q = (basis @ self.grad).double().cpu().view(used, 2).roll(-oldest, 0).T
        upper = sy.triu()
        u = torch.linalg.solve_triangular(upper, p[:, None], upper=True)[:, 0]
        w = sy.diagonal() * u + scale * (yy @ u) - scale * q
        w = torch.linalg.solve_triangular(upper.T, w[:, None], upper=False)[:, 0]
        weights = torch.stack([w, -scale * u], 1).roll(oldest, 0)
        return -(scale * self.grad + basis.T @ weights.flatten().to(self.grad))

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

    def _evaluate(self, closure: Closure, point: Tensor | None = None) -> tuple[float, Tensor]:
        if point is not None:
            self._assign(point)
        loss, grads = closure()
        return loss, self._flatten(grads)

    @staticmethod
    def _flatten(tensors: Sequence[Tensor]) -> Tensor:
        return torch.cat([t.detach().flatten() for t in tensors])

    @torch.no_grad()
    def _assign(self, point: Tensor) -> None:
        parts = point.split([v.numel() for v in self.variables])
        for v, part in zip(self.variables, parts, strict=True):
            v.copy_(part.view_as(v))
