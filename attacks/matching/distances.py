"""Distances between two updates, each all its layers as one vector, and the balance of a gradient and a prior's."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

TINY = 1e-30  # keeps 0 / 0 finite


def inner(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """<a, b>."""
    return torch.stack([(p * q).sum() for p, q in zip(a, b, strict=True)]).sum()


def squared_distance(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> Tensor:
    """DLG's objective, the sum over layers of ||ours - theirs||^2."""
    return torch.stack([(a - b).square().sum() for a, b in zip(ours, theirs, strict=True)]).sum()


def cosine_distance(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> Tensor:
    """Inverting Gradients' objective, 1 - <ours, theirs> / (||ours|| ||theirs||); differentiable in `ours`."""
    norm_sq = torch.stack([t.square().sum() for t in theirs]).sum()
    product, square = inner_and_square(ours, theirs)
    return 1 - product / (square * norm_sq).sqrt().clamp(min=TINY)


def inner_and_square(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """<ours, theirs> and <ours, ours>, differentiable once in `ours`."""
    return _InnerAndSquare.apply(tuple(theirs), *ours)


class _InnerAndSquare(torch.autograd.Function):
    """(theirs, *ours) -> <ours, theirs>, <ours, ours>, with both gradients from one pass over the tensors."""

    @staticmethod
    def forward(ctx: Any, theirs: tuple[Tensor, ...], *ours: Tensor) -> tuple[Tensor, Tensor]:
        ctx.theirs = theirs
        ctx.save_for_backward(*ours)
        product = torch.stack([(a * t).sum() for a, t in zip(ours, theirs, strict=True)]).sum()
        return product, torch.stack([a.square().sum() for a in ours]).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        of_product, of_square = grad_outputs
        pairs = zip(ctx.saved_tensors, ctx.theirs, strict=True)
        return None, *((t * of_product).addcmul_(a, 2 * of_square) for a, t in pairs)


def add_balanced(grad: Tensor, prior_grad: Tensor, share: float) -> Tensor:
    """`grad` plus `prior_grad` (N, *shape), scaled per example to `share` times the mean size of `grad`."""
    ours, its = (g.abs().flatten(1).mean(1).view(-1, *[1] * (g.ndim - 1)) for g in (grad, prior_grad))
    return grad + share * ours / its.clamp(min=TINY) * prior_grad
