"""What a loader returns: labelled examples in three splits."""

import hashlib
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from core.domain import Domain
from core.protocol import Batch

Statistics = tuple[tuple[float, ...], tuple[float, ...]]  # mean and std of each channel, of pixels in [0, 1]


@dataclass(frozen=True, eq=False)
class LazyImages:
    """Images that are decoded when they are indexed, in place of a uint8 tensor (N, C, H, W).

    `identity` is a string that changes whenever the pixels may have changed.
    """

    sources: Sequence[Any]
    decode: Callable[[Any], Tensor]  # one source -> (C, H, W) uint8
    image_shape: tuple[int, int, int]
    identity: str

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return (len(self.sources), *self.image_shape)

    def __getitem__(self, indices: Tensor) -> Tensor:
        """(n,) int64 -> (n, C, H, W) uint8. Raises UsageError for a source that cannot be read."""
        pixels = torch.empty(len(indices), *self.image_shape, dtype=torch.uint8)
        for row, index in zip(pixels, indices.tolist(), strict=True):
            row.copy_(self.decode(self.sources[index]))
        return pixels

    def select(self, indices: Tensor) -> "LazyImages":
        """The images at `indices` (n,), still undecoded."""
        chosen = indices.tolist()
        identity = hashlib.sha256(f"{self.identity} {chosen}".encode()).hexdigest()
        return LazyImages([self.sources[i] for i in chosen], self.decode, self.image_shape, identity)


@dataclass(frozen=True, eq=False)
class Split:
    """Labelled images, in memory or decoded when they are taken, or other examples in memory.

    pixels: uint8 images, which `take` scales to [0, 1], or examples of another dtype, which it returns as they are.
    `names` are the files of the images, relative to the root of a `folder` data set; None where images have no files of
    their own.
    """

    labels: Tensor  # (N,) int64
    pixels: Tensor | LazyImages  # (N, C, H, W) uint8, or (N, *shape)
    names: tuple[str, ...] | None = None  # (N,)

    def __post_init__(self) -> None:
        assert self.labels.dtype == torch.int64, self.labels.dtype
        assert self.labels.shape == self.pixels.shape[:1], f"{self.labels.shape} labels, {self.pixels.shape} pixels"
        assert self.names is None or len(self.names) == len(self.labels), f"{len(self.names or ())} names"

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: Tensor | Sequence[int]) -> Batch:
        """The examples at `indices` (n,), in that order: images (n, C, H, W) float32 in [0, 1] and labels (n,).

        Raises UsageError for an image file that cannot be read any more.
        """
        indices = torch.as_tensor(indices, device="cpu")
        assert indices.dtype != torch.bool, "take needs indices, not a mask"
        indices = indices.to(torch.int64)
        taken = self.pixels[indices]
        return Batch(taken.to(torch.float32) / 255 if taken.dtype == torch.uint8 else taken, self.labels[indices])

    def names_at(self, indices: Tensor) -> tuple[str, ...] | None:
        """The file names of the images at `indices` (n,); None if images have no files of their own."""
        return None if self.names is None else tuple(self.names[i] for i in indices.tolist())

    def select(self, indices: Tensor) -> "Split":
        """The split that holds the examples at `indices` (n,) alone, in that order."""
        pixels = self.pixels.select(indices) if isinstance(self.pixels, LazyImages) else self.pixels[indices]
        return Split(self.labels[indices], pixels, self.names_at(indices))


@dataclass(frozen=True, eq=False)
class Splits:
    """What a loader returns.

    published_statistics: None where nobody has published the mean and std of the data set. notes: see `Dataset`.
    tuning, reporting: the victims that `load(victims=...)` chooses; None, for both: two halves of `private`. copies:
    one entry for each image of `private`, equal where images are copies, which belong to one half; None: all differ.
    domain: of examples other than images.
    """

    private: Split
    public: Split
    test: Split
    class_names: tuple[str, ...]
    published_statistics: Statistics | None = None
    notes: tuple[str, ...] = ()
    tuning: Split | None = None
    reporting: Split | None = None
    copies: Sequence[Hashable] | None = None
    domain: Domain | None = None


def frozen_rng(*seed: int) -> np.random.RandomState:
    """A random generator with the same stream in every NumPy version (NEP 19), unlike `default_rng`."""
    return np.random.RandomState(seed)
