"""Pictures inside the page: chosen examples of a run beside their reconstructions, as small PNGs."""

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

MOST = 12  # pairs of a run

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Pair:
    """A true example beside its reconstruction.

    rank: "most exposed", "median", "least exposed", or "" for others. left, right: `data:` URIs of images, or text for
    examples that are no images; right is None where the attack returned nothing. size: width and height of the pictures
    in pixels, None for text. shrunk: the factor by which the pictures are smaller than the examples.
    """

    row: Row
    rank: str
    left: str
    right: str | None
    size: tuple[int, int] | None
    shrunk: int = 1


def pairs_of(folder: Path, rows: Sequence[Row], budget: int) -> list[Pair]:
    """Most exposed, median and least exposed example of a run, then the next most exposed ones, within `budget` bytes.

    Pictures that would exceed a third of the budget are averaged over blocks of pixels. Empty if there is no file of
    reconstructions, or if it does not fit the rows.
    """
    try:
        with safe_open(folder / "reconstructions.safetensors", "pt") as file:
            above, below = file.get_slice("truth"), file.get_slice("reconstruction")
            if above.get_shape() != below.get_shape() or above.get_shape()[0] != len(rows):
                return []
            return select_pairs(rows, lambda i: above[i : i + 1][0], lambda i: below[i : i + 1][0], budget)
    except (OSError, SafetensorError, ValueError, RuntimeError, TypeError, KeyError, IndexError):
        return []


def select_pairs(
    rows: Sequence[Row], truth: Callable[[int], Tensor], rebuilt: Callable[[int], Tensor], budget: int
) -> list[Pair]:
    """Pairs of rows within `budget` bytes: the extremes and the median, then the most exposed ones.

    truth, rebuilt: the true example and the reconstruction (*shape) of a row, by its position.
    """
    pairs: list[Pair] = []
    spent = 0
    for index, rank in _chosen(rows):
        row = rows[index]
        below = None if row.get("match") is None else rebuilt(index)
        pair = _pair(row, rank, truth(index), below, budget // 3)
        spent += len(pair.left) + len(pair.right or "")
        if pairs and not rank and spent > budget:
            break
        pairs.append(pair)
    return pairs


def png(example: Tensor) -> str:
    """The `data:` URI of an image (C, H, W) with pixels in [0, 1]; of other than 1 or 3 channels, of their mean."""
    from PIL import Image

    pixels = example.float().nan_to_num().clamp(0, 1).mul(255).round().to(torch.uint8)
    if len(pixels) != 3:
        pixels = pixels if len(pixels) == 1 else pixels.float().mean(0, keepdim=True).round().to(torch.uint8)
    array = pixels.permute(1, 2, 0).contiguous().numpy()
    out = io.BytesIO()
    Image.fromarray(array if array.shape[-1] == 3 else array[..., 0]).save(out, "PNG")
    return f"data:image/png;base64,{base64.b64encode(out.getvalue()).decode()}"


def _chosen(rows: Sequence[Row]) -> list[tuple[int, str]]:
    """Positions of the rows to show, with their ranks."""

    def exposure(i: int) -> tuple[bool, float, float]:  # of equal scores, the one that is harder to guess comes first
        return rows[i].get("match") is None, -rows[i]["psnr"], rows[i].get("null_psnr") or 0.0

    order = sorted(range(len(rows)), key=exposure)
    if not order:
        return []
    ranked = {order[0]: "most exposed"}
    if len(order) > 2:
        ranked[order[len(order) // 2]] = "median"
    if len(order) > 1:
        ranked[order[-1]] = "least exposed"
    return [*ranked.items(), *((i, "") for i in order if i not in ranked)][:MOST]


def _pair(row: Row, rank: str, above: Tensor, below: Tensor | None, budget: int) -> Pair:
    if above.ndim != 3:
        return Pair(row, rank, _numbers(above), None if below is None else _numbers(below), None)
    shrunk = 1
    while True:
        left, right = png(_pooled(above, shrunk)), None if below is None else png(_pooled(below, shrunk))
        if len(left) + len(right or "") <= budget or min(above.shape[1:]) < 16 * shrunk:
            height, width = _pooled(above, shrunk).shape[1:]
            return Pair(row, rank, left, right, (width, height), shrunk)
        shrunk *= 2


def _pooled(image: Tensor, factor: int) -> Tensor:
    return image if factor == 1 else torch.nn.functional.avg_pool2d(image.float()[None], factor, ceil_mode=True)[0]


def _numbers(example: Tensor, most: int = 64) -> str:
    values = example.flatten().tolist()
    text = " ".join(f"{value:.3g}" for value in values[:most])
    return text + (" …" if len(values) > most else "")
