"""`photos`: crops of the eight colour photographs in the scikit-image wheel. Each photograph is a class; no download.

Each photograph is divided into 4 x 4 tiles. Each tile belongs to one split, and each crop lies within one tile, so no
pixel of a victim is in the public data. There are 2048 private, 1024 public and 512 test crops.

Private crops overlap each other. The tuning and the reporting victims do not: each has half of the private tiles, which
are cut into disjoint windows of 1, 2 and 4 times the image size. Public crops are of the victims' photographs unless
`public` is "other".
"""

import hashlib
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from core.errors import UsageError
from data.base import register
from data.images import UNREADABLE, one_line, open_image, square
from data.splits import LazyImages, Split, Splits, frozen_rng

FILES = (
    "astronaut.png",
    "chelsea.png",
    "coffee.png",
    "hubble_deep_field.jpg",
    "ihc.png",
    "motorcycle_left.png",
    "retina.jpg",
    "rocket.jpg",
)
GRID = 4
SPLIT_OF_DIAGONAL = ("private", "public", "private", "test")  # of tile (row, column), by (row + column) % 4
DIAGONAL_OF_VICTIMS = {"tuning": 0, "reporting": 2}  # both are private
SCALES = (1, 2, 4)  # side of a disjoint window, in image sizes
MAX_DISJOINT = 16  # per tile
CROPS = {"private": 32, "public": 32, "test": 16}  # per tile
MIN_CONTRAST = 4.0  # grey levels; the black around the retina and the sky behind the rocket have less
MAX_DRAWS = 64  # of a crop

Window = tuple[int, int, int, int]  # photograph, left, top, side


@register
def photos(base_datadir: Path, image_size: int | None) -> Splits:
    """32 pixels; `base_datadir` is not used. Raises UsageError if scikit-image is installed without its photographs."""
    size = image_size or 32
    pictures = [_photograph(file) for file in FILES]
    windows: dict[str, list[Window]] = {name: [] for name in SPLIT_OF_DIAGONAL}
    for photo, picture in enumerate(pictures):
        for tile in range(GRID * GRID):
            name = SPLIT_OF_DIAGONAL[sum(divmod(tile, GRID)) % GRID]
            windows[name] += _windows(np.asarray(picture), photo, tile, size, CROPS[name])
    for name, diagonal in DIAGONAL_OF_VICTIMS.items():
        windows[name] = [
            window
            for photo, picture in enumerate(pictures)
            for tile in range(GRID * GRID)
            if sum(divmod(tile, GRID)) % GRID == diagonal
            for window in _disjoint_windows(np.asarray(picture), photo, tile, size)
        ]
    content = hashlib.sha256(b"".join(picture.tobytes() for picture in pictures)).hexdigest()
    splits = {
        name: Split(
            labels=torch.tensor([photo for photo, *_ in crops]),
            pixels=LazyImages(crops, partial(_crop, pictures, size), (3, size, size), f"{content} {crops}"),
        )
        for name, crops in windows.items()
    }
    return Splits(**splits, class_names=tuple(Path(file).stem for file in FILES))


def _photograph(file: str) -> Image.Image:
    """The photograph as RGB. Raises UsageError if it cannot be read."""
    package = find_spec("skimage")
    path = Path(package.submodule_search_locations[0] if package else "skimage", "data", file)
    try:
        with open_image(path) as image:
            return image.convert("RGB")
    except UNREADABLE as error:
        raise UsageError(
            f"{path}: cannot be read ({one_line(error)}); reinstall scikit-image or choose another `dataset`"
        ) from None


def _windows(picture: np.ndarray, photo: int, tile: int, image_size: int, count: int) -> list[Window]:
    """`count` windows within one tile of `picture` (H, W, 3).

    The side of a window is twice the image size, or 3/4 of the tile's shorter side if that is less. A window with less
    than MIN_CONTRAST is drawn again; after MAX_DRAWS draws the one with the most contrast is used.
    """
    height, width = picture.shape[:2]
    left, top, right, bottom = _tile_bounds(picture, tile)
    side = min(2 * image_size, 3 * (min(height, width) // GRID) // 4)
    # one stream for each tile, so that the content of a tile does not change the crops of another
    rng = frozen_rng(photo, tile)
    windows = []
    for _ in range(count):
        best, most = None, -1.0
        for _ in range(MAX_DRAWS):
            x, y = rng.randint(left, right - side + 1), rng.randint(top, bottom - side + 1)
            contrast = _contrast(picture, x, y, side)
            if contrast > most:
                best, most = (photo, x, y, side), contrast
            if contrast >= MIN_CONTRAST:
                break
        windows.append(best)
    return windows


def _disjoint_windows(picture: np.ndarray, photo: int, tile: int, image_size: int) -> list[Window]:
    """At most MAX_DISJOINT windows within one tile of `picture` (H, W, 3), no two of which share a pixel.

    Their sides are those of SCALES times the image size that fit in the tile, or the tile's shorter side if none does.
    Windows with less than MIN_CONTRAST are left out.
    """
    bounds = _tile_bounds(picture, tile)
    shortest = min(bounds[2] - bounds[0], bounds[3] - bounds[1])
    sides = [scale * image_size for scale in SCALES if scale * image_size <= shortest] or [shortest]
    rng = frozen_rng(photo, tile, image_size)
    windows = _pack(*bounds, sides, rng)
    windows = [window for window in windows if _contrast(picture, *window) >= MIN_CONTRAST]
    chosen = sorted(rng.permutation(len(windows))[:MAX_DISJOINT])
    return [(photo, *windows[i]) for i in chosen]


def _pack(
    left: int, top: int, right: int, bottom: int, sides: list[int], rng: np.random.RandomState
) -> list[tuple[int, int, int]]:
    """Disjoint windows (left, top, side) in a rectangle: one of a random side in a corner, and others in the rest."""
    fitting = [side for side in sides if side <= min(right - left, bottom - top)]
    if not fitting:
        return []
    side = fitting[rng.randint(len(fitting))]
    beside = _pack(left + side, top, right, top + side, sides, rng)
    below = _pack(left, top + side, right, bottom, sides, rng)
    return [(left, top, side), *beside, *below]


def _tile_bounds(picture: np.ndarray, tile: int) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of a tile of `picture` (H, W, 3)."""
    height, width = picture.shape[:2]
    row, column = divmod(tile, GRID)
    return (
        column * width // GRID,
        row * height // GRID,
        (column + 1) * width // GRID,
        (row + 1) * height // GRID,
    )


def _contrast(picture: np.ndarray, left: int, top: int, side: int) -> float:
    """Standard deviation of a window of `picture` (H, W, 3), mean over channels, in grey levels."""
    step = max(1, side // 16)  # of about 16 x 16 pixels
    return picture[top : top + side : step, left : left + side : step].std(axis=(0, 1)).mean()


def _crop(pictures: list[Image.Image], image_size: int, window: Window) -> Tensor:
    """A window of a photograph as (3, image_size, image_size) uint8."""
    photo, left, top, side = window
    return square(pictures[photo].crop((left, top, left + side, top + side)), image_size)
