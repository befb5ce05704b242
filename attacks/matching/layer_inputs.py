"""Inputs of layers that the gradient of one example determines, by linear algebra alone. Ours.

A convolution's weight gradient is  dW = D P.  Row p of P is the patch of the layer's input at position p, and D
(channels x positions) is the gradient at the layer's outputs. If there are fewer positions than channels and D has full
rank, the row space of dW is spanned by the patches, whatever D is. Patches overlap. So an input x all of whose patches
lie in a given subspace satisfies more equations than it has entries: it is unique up to its scale, as the eigenvector
with eigenvalue 1 of

    A = M^(-1/2) F V^T V U M^(-1/2)        U: unfold, F: fold, M: patches that hold an entry, rows of V: row space

The gradient of a fully connected layer,  dW = d x^T,  has rank one, and its rows are multiples of x.

An input counts as determined if the rank of dW is the number of positions and the eigenvalue stands alone. Clipping
changes no row space. Noise, several examples and several local steps raise the rank, and nothing is returned then.
"""

import copy
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

RANK_GAP = 0.1  # largest ratio of the first singular value outside the row space to the last one inside
EIGENVALUE_GAP = 0.1  # largest ratio of 1 - e for the largest eigenvalue e to 1 - e for the next one
LINEAR_RESIDUAL = 1e-3  # largest relative norm of what a matrix of rank one leaves of dW
LANCZOS_STEPS = 150
Operator = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class LayerInput:
    """The input of one layer as a unit vector, and the entries on which the layer's gradient depends."""

    layer: str  # its name in the model
    direction: Tensor  # (1, *shape), zero outside the mask
    mask: Tensor  # (1, *shape), 1 or 0

    def distance(self, features: Tensor) -> Tensor:
        """Half the squared distance of the directions, 1 - cos, of inputs (1, *shape): ()."""
        known = features * self.mask
        return (known / known.norm().clamp(min=1e-12) - self.direction).square().sum() / 2


@dataclass(frozen=True)
class InputSubspace:
    """The subspace that holds the input of a fully connected layer, or the patches of a convolution's input."""

    layer: str
    basis: Tensor  # (rank, entries), orthonormal rows
    geometry: dict[str, Any] | None  # of a convolution's patches, for F.unfold
    active: Tensor  # (positions,), which of them have a gradient

    def distance(self, features: Tensor) -> Tensor:
        """The share of the squared norm of inputs (N, *shape) that lies outside the subspace: ()."""
        if self.geometry is None:
            rows = features.flatten(1)
        else:
            patches = F.unfold(features, **self.geometry)  # (N, entries, positions)
            rows = patches[:, :, self.active].transpose(1, 2).flatten(0, 1)
        outside = rows - (rows @ self.basis.T) @ self.basis
        return outside.square().sum() / rows.square().sum().clamp(min=1e-12)


def input_subspaces(
    model: nn.Module, gradient: Sequence[Tensor], probes: Tensor, label: int, count: int
) -> list[InputSubspace]:
    """The subspaces in which the gradient of `count` examples shows layer inputs to lie; arguments as below.

    A layer is left out if its gradient has another rank than one for each example and position.
    """
    gradients = {id(p): g for p, g in zip(model.parameters(), gradient, strict=True)}
    found = []
    for name, (_, active) in _positions(model, probes, label).items():
        layer = model.get_submodule(name)
        weight = gradients[id(layer.weight)].float().flatten(1)
        geometry = None
        if isinstance(layer, nn.Conv2d):
            if layer.groups > 1 or layer.padding_mode != "zeros" or isinstance(layer.padding, str):
                continue
            geometry = _geometry(layer)
        basis = _row_space(weight, [count * (int(active.sum()) if geometry else 1)])
        if basis is not None:
            found.append(InputSubspace(name, basis, geometry, active))
    return found


def determined_inputs(model: nn.Module, gradient: Sequence[Tensor], probes: Tensor, label: int) -> list[LayerInput]:
    """The layer inputs that the gradient of one example determines, in the order in which the layers are called.

    Inputs with entries of both signs are left out, because the sign of a direction with such entries is not known.

    Args:
        model: what the gradient is of. It is not changed.
        gradient: in the order of `model.parameters()`, up to a positive factor.
        probes: (N, *shape), any model inputs. They show at which positions a layer's output has a gradient.
        label: the example's class.
    """
    gradients = {id(p): g for p, g in zip(model.parameters(), gradient, strict=True)}
    found = []
    for name, (shape, active) in _positions(model, probes, label).items():
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Linear | nn.Conv2d)
        weight = gradients[id(layer.weight)].float()
        if not weight.any():
            continue
        x = _linear_input(weight) if isinstance(layer, nn.Linear) else _convolution_input(layer, weight, shape, active)
        if x is None:
            continue
        x = x / x.norm() * x.sum().sign()
        if x.min() > -1e-3 * x.max():
            found.append(LayerInput(name, x.view(1, *shape), (x != 0).to(x).view(1, *shape)))
    return found


def _positions(model: nn.Module, probes: Tensor, label: int) -> dict[str, tuple[torch.Size, Tensor]]:
    """For each layer the shape of its input, without the batch, and which positions (P,) have a gradient.

    Only layers that are called once for each example and share their weight with no other: the gradient of others, such
    as a layer that is applied to every token, is a sum over inputs.
    """
    model = copy.deepcopy(model).eval()
    shapes: dict[str, torch.Size] = {}
    outputs: dict[str, Tensor] = {}
    calls: Counter[int] = Counter()  # of each weight
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d | nn.Linear)}
    for name, layer in layers.items():
        if layer.weight.requires_grad:

            def capture(_: nn.Module, args: tuple[Tensor, ...], output: Tensor, name: str = name) -> None:
                calls[id(layers[name].weight)] += 1
                dims = 2 if isinstance(layers[name], nn.Linear) else 4
                if args and args[0].dim() == dims and len(args[0]) == len(probes):
                    shapes[name], outputs[name] = args[0].shape[1:], output

            layer.register_forward_hook(capture)
    with torch.enable_grad():
        loss = F.cross_entropy(model(probes), torch.full((len(probes),), label, device=probes.device))
        once = [name for name in outputs if calls[id(layers[name].weight)] == 1]
        if not once:
            return {}
        grads = torch.autograd.grad(loss, [outputs[name] for name in once], allow_unused=True)
    pairs = zip(once, grads, strict=True)
    return {name: (shapes[name], (g.abs().sum((0, 1)) > 0).flatten()) for name, g in pairs if g is not None}


def _linear_input(weight: Tensor) -> Tensor | None:
    """The direction x of dW = d x^T (outputs, inputs); None if the rank is not one."""
    row = weight[weight.square().sum(1).argmax()]
    x = row / row.norm()
    rest = weight - (weight @ x)[:, None] * x
    return x if rest.norm() < LINEAR_RESIDUAL * weight.norm() else None


def _convolution_input(layer: nn.Conv2d, weight: Tensor, shape: torch.Size, active: Tensor) -> Tensor | None:
    """The direction of the input, flat and zero where no active patch holds it; None if it is not determined.

    If BatchNorm normalises the outputs by the batch, the gradients of a channel sum to zero over the positions. The
    rank is then one less, and the row space is spanned by patches from which their mean is subtracted.
    """
    positions = int(active.sum())
    if layer.groups > 1 or layer.padding_mode != "zeros" or isinstance(layer.padding, str):
        return None
    basis = _row_space(weight.flatten(1), [positions, positions - 1])
    if basis is None:
        return None
    geometry = _geometry(layer)

    def patches(x: Tensor) -> Tensor:
        return F.unfold(x.view(1, *shape), **geometry)[0] * active

    def sums(p: Tensor) -> Tensor:
        return F.fold((p * active)[None], tuple(shape[1:]), **geometry).flatten()

    def project(p: Tensor) -> Tensor:
        mean = p.sum(1, keepdim=True) / positions * (len(basis) < positions)
        return mean + basis.T @ (basis @ (p - mean))

    held = sums(torch.ones_like(patches(weight.new_zeros(shape))))
    scale = torch.where(held > 0, held.clamp(min=1).rsqrt(), 0.0)
    start = scale * torch.rand(scale.shape, generator=torch.Generator().manual_seed(0)).to(scale)
    eigenvalues, vector = _lanczos(lambda y: scale * sums(project(patches(scale * y))), start)
    # patches that do not overlap satisfy no equations: all eigenvalues are then 0 or 1
    alone = held.max() > 1 and len(eigenvalues) > 1
    alone = alone and abs(1 - eigenvalues[-1]) < EIGENVALUE_GAP * (1 - eigenvalues[-2])
    return vector * scale if alone else None


def _row_space(weight: Tensor, ranks: Sequence[int]) -> Tensor | None:
    """An orthonormal basis (rank, entries) of the row space of a matrix; None if its rank is none of `ranks`."""
    rows = weight.double()
    squares, left = torch.linalg.eigh(rows @ rows.T)  # ascending
    squares = squares.clamp(min=0)
    for rank in ranks:
        if 0 < rank < min(weight.shape) and squares[-rank - 1] < RANK_GAP**2 * squares[-rank]:
            return (left[:, -rank:].T @ rows / squares[-rank:, None].sqrt()).to(weight)
    return None


def _geometry(layer: nn.Conv2d) -> dict[str, Any]:
    """The arguments of F.unfold for the layer's patches."""
    return {name: getattr(layer, name) for name in ("kernel_size", "stride", "padding", "dilation")}


def _lanczos(operator: Operator, start: Tensor) -> tuple[Tensor, Tensor]:
    """Approximate eigenvalues of a symmetric operator, ascending, and the eigenvector of the largest one."""
    vectors = start.new_zeros(LANCZOS_STEPS, len(start))
    vectors[0] = start / start.norm()
    diagonal: list[float] = []
    side: list[float] = []
    for k in range(LANCZOS_STEPS):
        w, used = operator(vectors[k]), vectors[: k + 1]
        diagonal.append(torch.dot(w, vectors[k]).item())
        for _ in range(2):  # once leaves rounding errors
            w = w - used.T @ (used @ w)
        size = w.norm().item()
        if k + 1 == LANCZOS_STEPS or size < 1e-6:
            break
        side.append(size)
        vectors[k + 1] = w / size
    off = torch.tensor(side, dtype=torch.float64)
    matrix = torch.diag(torch.tensor(diagonal, dtype=torch.float64)) + torch.diag(off, 1) + torch.diag(off, -1)
    eigenvalues, weights = torch.linalg.eigh(matrix)
    return eigenvalues, vectors[: len(diagonal)].T @ weights[:, -1].to(start)
