"""3x3 convolutions with a quarter of the multiplications. Winograd 1980; Lavin, Gray, CVPR 2016. https://arxiv.org/abs/1509.09308

    y = A^T [ (G w G^T) * (B^T d B) ] A        for each 4x4 tile of the output, from the 6x6 tile d of the input

One tile and one pair of channels take 36 products instead of 144, and all tiles and channels together are 36 matrix
products. The transforms around them are linear with fixed matrices, so second derivatives, which gradient matching
needs, are matrix products as well. In float32 the result equals a convolution's to 1e-6. In bfloat16, in which the
entries of B and A are exact, more than four of five signs of a gradient are kept: all that a signed descent uses.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

POINTS = (0.0, 1.0, -1.0, 2.0, -0.5)  # and infinity; rounding is a third less than at 0, ±1, ±2
TILE, PATCH = 4, 6  # sides of a tile of the output, and of what it sees of the input
FEWEST = 32  # tiles, and channels: below, the transforms cost more than the products they save
FEWEST_CHANNELS_FIRST_ORDER = 256  # likewise, of channels, where no second derivative is taken
FEWEST_TILES_FIRST_ORDER = 64


def bilinear(points: Sequence[float], taps: int) -> tuple[Tensor, Tensor, Tensor]:
    """(A^T, G, B^T) of a 1-D filter with `taps` taps: polynomials multiplied by their values at points, and infinity.

    w and y are polynomials, their product is known at the points (row j of G and A^T holds the powers of point j), and
    the rows of B^T are the coefficients of Lagrange's basis, whose denominators G carries.
    """
    size = len(points) + 1
    a = torch.zeros(size - taps + 1, size, dtype=torch.float64)
    g = torch.zeros(size, taps, dtype=torch.float64)
    b = torch.zeros(size, size, dtype=torch.float64)
    for j, p in enumerate(points):
        others = [q for q in points if q != p]
        a[:, j] = p ** torch.arange(len(a), dtype=torch.float64)
        g[j] = p ** torch.arange(taps, dtype=torch.float64) / math.prod(p - q for q in others)
        b[j, :-1] = _with_roots(others)
    a[-1, -1] = g[-1, -1] = 1
    b[-1] = _with_roots(points)
    return a, g, b


def _with_roots(roots: Sequence[float]) -> Tensor:
    """Coefficients of the monic polynomial with these roots, the constant first."""
    coefficients = torch.ones(1, dtype=torch.float64)
    for root in roots:
        coefficients = F.pad(coefficients, (1, 0)) - root * F.pad(coefficients, (0, 1))
    return coefficients


A, G, B = (torch.kron(m, m) for m in bilinear(POINTS, 3))  # (16, 36), (36, 9), (36, 36)


class WinogradConv(nn.Conv2d):
    """A 3x3 convolution of stride 1 and padding 1, computed in `compute_dtype` between its input and its output."""

    compute_dtype: torch.dtype | None = None

    @staticmethod
    def is_applicable(layer: nn.Module, shape: Sequence[int], second_order: bool = True) -> bool:
        """Whether `layer` is a convolution that is faster this way, on inputs of `shape` (N, C, H, W).

        second_order: whether its gradient is differentiated again; one that is not pays on fewer layers.
        """
        channels, tiles = (FEWEST, FEWEST) if second_order else (FEWEST_CHANNELS_FIRST_ORDER, FEWEST_TILES_FIRST_ORDER)
        return (
            type(layer) is nn.Conv2d
            and (layer.kernel_size, layer.stride, layer.padding) == ((3, 3), (1, 1), (1, 1))
            and (layer.dilation, layer.groups, layer.padding_mode) == ((1, 1), 1, "zeros")
            and min(layer.in_channels, layer.out_channels) >= channels
            and shape[0] * math.ceil(shape[2] / TILE) * math.ceil(shape[3] / TILE) >= tiles
        )

    @staticmethod
    def convert_(layer: nn.Conv2d) -> None:
        """Turn `layer` into a WinogradConv in place; its parameters stay the same objects."""
        layer.__class__ = WinogradConv
        layer.weight.data = taps_first(layer.weight.data)

    def forward(self, x: Tensor) -> Tensor:
        n, _, height, width = x.shape
        rows, columns = math.ceil(height / TILE), math.ceil(width / TILE)
        kind = self.compute_dtype or x.dtype
        w = self.weight.permute(2, 3, 0, 1).reshape(9, -1)
        w = (G.to(x) @ w).view(PATCH**2, self.out_channels, self.in_channels).to(kind)
        d = _Patches.apply(x, rows, columns, kind).view(PATCH**2, -1)
        d = (B.to(d) @ d).view(PATCH**2, self.in_channels, -1)
        y = torch.bmm(w, d)  # (36, O, N * tiles)
        y = (A.to(y) @ y.view(PATCH**2, -1)).to(x.dtype).view(TILE, TILE, self.out_channels, n, rows, columns)
        y = y.permute(3, 2, 4, 0, 5, 1).reshape(n, self.out_channels, TILE * rows, TILE * columns)
        y = y[..., :height, :width]
        return y if self.bias is None else y + self.bias.view(-1, 1, 1)


def use_fast_convs_(module: nn.Module, inputs: Tensor, second_order: bool = True) -> None:
    """Turn the convolutions of `module` that are faster this way on `inputs` (N, *shape) into WinogradConvs, in place.

    The module is called once, in eval mode and without gradients. It keeps its mode, parameters and buffers.
    """
    layers = [m for m in module.modules() if type(m) is nn.Conv2d]
    if not any(WinogradConv.is_applicable(m, (10**6, 0, TILE, TILE), second_order) for m in layers):
        return
    shapes: dict[nn.Module, torch.Size] = {}
    hooks = [m.register_forward_pre_hook(lambda m, x: shapes.update({m: x[0].shape})) for m in layers]
    modes = {m: m.training for m in module.modules()}
    with torch.no_grad():
        module.eval()(inputs)
    for layer, training in modes.items():
        layer.training = training
    for hook in hooks:
        hook.remove()
    for layer in layers:
        if layer in shapes and WinogradConv.is_applicable(layer, shapes[layer], second_order):
            WinogradConv.convert_(layer)


def has_bfloat16(device: torch.device) -> bool:
    """Whether the hardware multiplies matrices in bfloat16 faster than in float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def taps_first(weight: Tensor) -> Tensor:
    """The same tensor (O, C, 3, 3), in memory as (3, 3, O, C): the layout of gradients from the product with G."""
    return weight.permute(2, 3, 0, 1).contiguous().permute(2, 3, 0, 1)


class _Patches(torch.autograd.Function):
    """(N, C, H, W) -> the overlapping patches (6, 6, C, N, rows, columns)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: int, columns: int, kind: torch.dtype) -> Tensor:
        ctx.shape, ctx.back = x.shape, x.dtype
        height, width = x.shape[2:]
        x = F.pad(x.to(kind), (1, TILE * columns + 1 - width, 1, TILE * rows + 1 - height))
        return x.unfold(2, PATCH, TILE).unfold(3, PATCH, TILE).permute(4, 5, 1, 0, 2, 3).contiguous()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None]:
        return _Overlap.apply(grad_outputs[0], ctx.shape, ctx.back), None, None, None


class _Overlap(torch.autograd.Function):
    """The transpose of `_Patches`: each pixel is the sum of all patches that hold it. Autograd's own is much slower."""

    @staticmethod
    def forward(ctx: Any, d: Tensor, shape: torch.Size, kind: torch.dtype) -> Tensor:
        n, channels, height, width = shape
        (rows, columns), ctx.back = d.shape[4:], d.dtype
        ctx.tiles = rows, columns
        image = d.new_zeros(n, channels, rows + 1, TILE, columns + 1, TILE, dtype=kind)
        tiles = image.permute(3, 5, 1, 0, 2, 4)  # (4, 4, C, N, rows + 1, columns + 1)
        over = PATCH - TILE
        tiles[..., :-1, :-1] = d[:TILE, :TILE]
        tiles[:over, :, ..., 1:, :-1] += d[TILE:, :TILE]
        tiles[:, :over, ..., :-1, 1:] += d[:TILE, TILE:]
        tiles[:over, :over, ..., 1:, 1:] += d[TILE:, TILE:]
        image = image.view(n, channels, TILE * (rows + 1), TILE * (columns + 1))
        return image[..., 1 : height + 1, 1 : width + 1]

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        return _Patches.apply(grad_outputs[0], *ctx.tiles, ctx.back), None, None
