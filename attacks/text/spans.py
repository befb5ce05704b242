"""The span of the inputs of a linear layer, read from its gradient, and the inputs that sentences have there.

    Z = X W^T,    dL/dW = (dL/dZ)^T X    =>    row space of dL/dW  is contained in  span(rows of X)

With n tokens in all and n < d the span is a proper subspace of R^d. The distance of v from it is |v - P v| / |v|.
"""

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from models.zoo.transformers import LoRA

CHUNK = 2**22  # numbers in the hidden states of one forward pass


@dataclass(frozen=True)
class Span:
    """A subspace of R^d with an orthonormal basis (d, r), and the length of the gradient along each of its vectors."""

    basis: Tensor
    sizes: Tensor  # (r,), descending
    projection: Tensor | None = None  # (d, d') A: what is tested of v (d',) is A v

    @property
    def rank(self) -> int:
        return self.basis.shape[1]

    def distances(self, vectors: Tensor) -> Tensor:
        """Vectors (..., d) -> their distances from the span, between 0 and 1: (...)."""
        if self.projection is not None:
            vectors = vectors @ self.projection.T
        units = vectors / vectors.norm(dim=-1, keepdim=True)
        return (units - units @ self.basis @ self.basis.T).norm(dim=-1)


def row_space(gradient: Tensor, most: int, tolerance: float, noise: float = 0.0) -> Span:
    """The span of the right singular vectors of a gradient (3 d, d): at most `most`, and those above the noise.

    tolerance: least singular value in units of the largest. noise: standard deviation of the noise on an entry; the
    largest singular value of such noise is about noise (sqrt(3 d) + sqrt(d)).
    """
    gradient = gradient.double()
    _, sizes, rows = torch.linalg.svd(gradient, full_matrices=False)
    floor = noise * sum(math.sqrt(side) for side in gradient.shape)
    rank = int((sizes > max(floor, tolerance * sizes[0].item())).sum())
    rank = max(1, min(rank, most))
    return Span(rows[:rank].T.contiguous(), sizes[:rank])


def adapter_of(model: nn.Module, layer: nn.Linear) -> LoRA | None:
    """The low-rank adapter around a layer, if it has one."""
    return next((m for m in model.modules() if isinstance(m, LoRA) and m.base is layer), None)


class Probe:
    """The inputs that token sequences give to the first two attention layers of a transformer.

    Works on a copy in float64, whose forward pass stops at the layer in question.
    """

    def __init__(self, model: nn.Module, layers: list[nn.Linear]) -> None:
        """`layers`: the stacked projections [W_Q; W_K; W_V] of the first two blocks."""
        places = [name for layer in layers for name, module in model.named_modules() if module is layer]
        self.model = copy.deepcopy(model).eval().double()
        self.layers = [self.model.get_submodule(name) for name in places]
        for index, layer in enumerate(self.layers):
            layer.register_forward_pre_hook(self._hook(index))
        self._wanted = 0

    def _hook(self, index: int) -> Any:
        def stop(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if index == self._wanted:
                raise _Reached(inputs[0])

        return stop

    @torch.no_grad()
    def inputs(self, ids: Tensor, layer: int, last: bool = False) -> Tensor:
        """Token ids (N, L) -> inputs of attention layer 0 or 1: (N, L, d), or with `last` of the last token (N, d)."""
        self._wanted = layer
        width = self.layers[layer].in_features
        found = []
        for chunk in ids.split(max(1, CHUNK // (ids.shape[1] * width))):
            try:
                self.model(chunk)
            except _Reached as reached:
                found.append(reached.inputs[:, -1] if last else reached.inputs)
        return torch.cat(found)


class _Reached(Exception):
    """Ends a forward pass; no error."""

    def __init__(self, inputs: Tensor) -> None:
        self.inputs = inputs
