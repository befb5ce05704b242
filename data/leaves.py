"""`leaves`: dead-leaves images, which are drawn from a seed: independent, as many as wanted, no download.

Opaque shapes of random size hide each other, as objects in a photograph do. With radii r of density r^-3 the images are
alike at every scale, and their power spectrum falls near f^-2, as that of photographs does.

Lee, Mumford, Huang 2001, "Occlusion models for natural images", https://doi.org/10.1023/A:1011109015675.
Baradad et al. 2021, "Learning to see by looking at noise", https://arxiv.org/abs/2106.05963, trains networks on them.

A class is a palette of three hues and a texture: stripes for classes of even index, checks for odd ones. Each image has
its own seed (SEED, split, index).
"""

from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data.base import register
from data.splits import LazyImages, Split, Splits, Statistics, frozen_rng

VERSION = 1  # raise it when a change of this file changes pixels
SEED = 0
COUNTS = {"private": 2000, "public": 1000, "test": 500}
PALETTES = {  # hues as shares of the colour circle
    "autumn": (0.02, 0.08, 0.13),
    "meadow": (0.17, 0.28, 0.38),
    "lagoon": (0.45, 0.52, 0.60),
    "dusk": (0.66, 0.75, 0.97),
    "harlequin": (0.00, 0.33, 0.62),
}
TEXTURES = ("stripes", "checks")
CLASSES = tuple(f"{palette} {texture}" for palette in PALETTES for texture in TEXTURES)

SUPERSAMPLING = 2  # samples per pixel and axis
MIN_RADIUS = 1.75  # pixels
MAX_RADIUS = 1.0  # of the image side
COVERAGE = 5.0  # mean number of leaves over a point; a share of e^-5 shows the rearmost leaf
MIN_ASPECT = 0.5  # of a leaf's axes
ELLIPSES = 0.5  # share of leaves; the others are convex polygons
MAX_SIDES = 5
INRADIUS = 0.6  # of a polygon, which the unit disc bounds as well
LIGHTNESS = (0.05, 0.95)
CONTRAST = (0.1, 0.9)  # share of this range that the leaves of one image span: uniform
SATURATION = (0.1, 0.7)
SHADING = 0.35  # largest relative change of lightness from a leaf's centre to its edge
TEXTURE = 0.25  # largest relative amplitude
WAVELENGTH = (3.0, 12.0)  # pixels, log-uniform

STATISTICS: Statistics = ((0.502, 0.521, 0.494), (0.232, 0.223, 0.230))  # of 2000 private images of 32 pixels


@register
def leaves(base_datadir: Path, image_size: int | None) -> Splits:
    """32 pixels, ten classes; `base_datadir` is not used. 2000 private, 1000 public and 500 test images."""
    size = image_size or 32
    splits = {}
    for number, (name, count) in enumerate(COUNTS.items()):
        identity = f"leaves {VERSION} {SEED} {number} {size} numpy {np.__version__}"
        draw = partial(_leaves, number, size)
        splits[name] = Split(
            labels=torch.arange(count) % len(CLASSES),
            pixels=LazyImages(range(count), draw, (3, size, size), identity),
        )
    return Splits(**splits, class_names=CLASSES, published_statistics=STATISTICS)


def _leaves(split: int, image_size: int, index: int) -> Tensor:
    """Image `index` of a split, of class index % 10, as (3, image_size, image_size) uint8."""
    palette, texture = divmod(index % len(CLASSES), len(TEXTURES))
    pixels = draw(image_size, list(PALETTES.values())[palette], TEXTURES[texture], frozen_rng(SEED, split, index))
    return torch.from_numpy(np.rint(255 * pixels).astype(np.uint8))


def draw(image_size: int, hues: tuple[float, ...], texture: str, rng: np.random.RandomState) -> np.ndarray:
    """One image (3, image_size, image_size) in [0, 1]."""
    n = image_size * SUPERSAMPLING
    x, y, r = _places(image_size, rng)
    shape = _Shapes(len(r), rng)
    owner = _front(n, x * SUPERSAMPLING, y * SUPERSAMPLING, r * SUPERSAMPLING, shape)  # (n, n)

    colours = _colours(len(r), hues, rng)  # (K, 3)
    light = rng.uniform(0, 2 * np.pi)
    shading = rng.uniform(0, SHADING, len(r))
    amplitude = rng.uniform(0, TEXTURE, len(r))
    frequency = 2 * np.pi / np.exp(rng.uniform(*np.log(WAVELENGTH), len(r)))  # radians a pixel
    angle, phase = rng.uniform(0, 2 * np.pi, (2, len(r)))

    rows, columns = (axis / SUPERSAMPLING for axis in np.mgrid[:n, :n] + 0.5)
    dx, dy = columns - x[owner], rows - y[owner]  # (n, n), pixels
    slant = shading[owner] * ((dx * np.cos(light) + dy * np.sin(light)) / r[owner]).clip(-1, 1)
    along = frequency * np.cos(angle), frequency * np.sin(angle)
    wave = np.sin(dx * along[0][owner] + dy * along[1][owner] + phase[owner])
    if texture == "checks":
        wave *= np.sin(dy * along[0][owner] - dx * along[1][owner] + phase[owner]) * 2**0.5  # the variance of stripes
    brightness = 1 + slant + amplitude[owner] * wave
    sampled = (colours.T[:, owner] * brightness).clip(0, 1)  # (3, n, n)
    return sampled.reshape(3, image_size, SUPERSAMPLING, image_size, SUPERSAMPLING).mean((2, 4))


def _places(image_size: int, rng: np.random.RandomState) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Centres x, y and radii r (K,) in pixels of the leaves that may touch the image, in order from back to front.

    The number of leaves of radius r over the whole plane has density r^-3; of those, the ones with a centre within r of
    the image are drawn.
    """
    low, high, side = MIN_RADIUS, MAX_RADIUS * image_size, image_size
    # leaves per unit of r: rate * r^-3 * (side + 2 r)^2, integrated term by term; mean area pi * 3/4 * r^2
    rate = COVERAGE / (0.75 * np.pi * np.log(high / low))
    terms = side**2 * (low**-2 - high**-2) / 2, 4 * side * (1 / low - 1 / high), 4 * np.log(high / low)
    count = max(1, rng.poisson(rate * sum(terms)))
    # inverse distribution functions of r^-3, r^-2 and r^-1, mixed
    u, term = rng.uniform(size=count), rng.choice(3, count, p=np.array(terms) / sum(terms))
    r = np.choose(
        term,
        (
            (low**-2 - u * (low**-2 - high**-2)) ** -0.5,
            1 / (1 / low - u * (1 / low - 1 / high)),
            low * (high / low) ** u,
        ),
    )
    x, y = rng.uniform(-r, side + r, (2, count))
    return x, y, r


class _Shapes:
    """Ellipses and convex polygons of radius 1.

    An ellipse is an affine image of the unit disc; a polygon is one of the intersection of the disc with half-planes.
    """

    def __init__(self, count: int, rng: np.random.RandomState) -> None:
        angle, aspect = rng.uniform(0, 2 * np.pi, count), rng.uniform(MIN_ASPECT, 1, count)
        self.is_ellipse = rng.uniform(size=count) < ELLIPSES
        # rows of the map onto the disc
        first = np.stack([np.cos(angle), np.sin(angle)], 1)  # (K, 2)
        second = np.stack([-np.sin(angle), np.cos(angle)], 1) / aspect[:, None]
        # normals of the polygon's sides, evenly spaced up to a jitter, at distance INRADIUS from the centre
        sides = rng.randint(3, MAX_SIDES + 1, (count, 1))
        steps = np.arange(MAX_SIDES) % sides + rng.uniform(-0.25, 0.25, (count, MAX_SIDES))
        normals = 2 * np.pi * steps[..., None] / sides[..., None]  # (K, MAX_SIDES, 1)
        planes = np.cos(normals) * first[:, None] + np.sin(normals) * second[:, None]
        self.axes = np.stack([first, second], 1).astype(np.float32)  # (K, 2, 2)
        self.planes = (planes / INRADIUS).astype(np.float32)  # (K, MAX_SIDES, 2)

    def contains(self, which: np.ndarray, dx: np.ndarray, dy: np.ndarray) -> np.ndarray:
        """Whether points (k, p, p) are inside shapes `which` (k,); dx, dy (k, p) relative to centre and radius."""
        u, v = _forms(self.axes[which], dx, dy)
        inside = u * u + v * v <= 1
        polygons = np.flatnonzero(~self.is_ellipse[which])
        distances = _forms(self.planes[which[polygons]], dx[polygons], dy[polygons])
        inside[polygons] &= np.maximum.reduce(distances) <= 1
        return inside


def _forms(coefficients: np.ndarray, dx: np.ndarray, dy: np.ndarray) -> list[np.ndarray]:
    """The linear forms (k, m, 2) of the points (k, p, p) with coordinates dx, dy (k, p): m arrays (k, p, p)."""
    x, y = (coefficients[..., i, None] * d[:, None] for i, d in enumerate((dx, dy)))  # (k, m, p)
    return [x[:, m, None, :] + y[:, m, :, None] for m in range(coefficients.shape[1])]


def _front(n: int, x: np.ndarray, y: np.ndarray, r: np.ndarray, shapes: _Shapes) -> np.ndarray:
    """The index (n, n) of the front leaf at each sample, 0 where there is none; x, y, r in samples.

    Leaves are tested in groups of similar size, each on a patch of its own, so that the many small ones cost little.
    """
    owner = np.zeros((n, n), dtype=np.int32)
    # side of the patch in samples, a power of the square root of 2
    patch = np.minimum(np.ceil(2 ** (np.ceil(2 * np.log2(2 * r + 1)) / 2)), n).astype(int)
    for side in np.unique(patch):
        which = np.flatnonzero(patch == side)
        # a patch that would reach beyond the image is moved inside
        columns, rows = (
            np.clip(np.floor(z[which] - side / 2).astype(int), 0, n - side)[:, None] + np.arange(side) for z in (x, y)
        )  # (k, side)
        dx, dy = (
            ((axis + 0.5 - z[which, None]) / r[which, None]).astype(np.float32) for axis, z in ((columns, x), (rows, y))
        )
        leaf, row, column = shapes.contains(which, dx, dy).nonzero()
        # indices ascend, so that of several leaves at one sample the last one stays
        group = np.zeros((n, n), dtype=np.int32)
        group[rows[leaf, row], columns[leaf, column]] = which[leaf]
        np.maximum(owner, group, out=owner)
    return owner


def _colours(count: int, hues: tuple[float, ...], rng: np.random.RandomState) -> np.ndarray:
    """RGB (count, 3) in [0, 1] of random lightness and saturation, and of hues near those of the palette."""
    low, high = LIGHTNESS
    span = rng.uniform(*CONTRAST) * (high - low)
    lightness = rng.uniform(low, high - span) + span * rng.uniform(size=count)
    saturation = rng.uniform(*SATURATION, count)
    hue = np.take(hues, rng.randint(len(hues), size=count)) + rng.uniform(-0.02, 0.02, count)
    wheel = np.cos(2 * np.pi * (hue[:, None] - np.arange(3) / 3))  # (count, 3), mean 0
    chroma = saturation * np.minimum(lightness, 1 - lightness)
    return lightness[:, None] + chroma[:, None] * wheel
