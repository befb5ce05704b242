"""Which private images are victims, and what public data an attacker has: `victims` and `public` of `data.load`."""

from collections.abc import Hashable, Sequence
from functools import partial
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from core.errors import UsageError
from data.splits import LazyImages, Split, Splits, frozen_rng

Victims = Literal["all", "tuning", "reporting"]
Public = Literal["same", "other", "noise"]

HALVES_SEED, NOISE_SEED = 1, 2


def select(name: str, splits: Splits, victims: Victims, public: Public) -> tuple[Split, Split, tuple[str, ...]]:
    """The private and the public split, and one note for each choice that differs from "all" and "same".

    `name` is the data set's, for messages. Raises UsageError for a value out of range and for a choice that leaves no
    images.
    """
    private, notes = _victims(splits, victims), []
    if victims != "all":
        notes.append(f"{name}: {len(private)} {victims} victims")
    if not len(private):
        raise UsageError(f"{name}: too few private images for `victims={victims}`; choose `victims=all`")
    match public:
        case "same":
            auxiliary = splits.public
        case "other":
            private, auxiliary = _of_parity(private, 0), _of_parity(splits.public, 1)
            if not (len(private) and len(auxiliary)):
                raise UsageError(
                    f"{name}: `public=other` needs victims in classes of even index and public images in classes of odd"
                    " index; choose `public=same` or `public=noise`"
                )
            notes.append(
                f"{name}: {len(private)} victims in classes of even index, {len(auxiliary)} public images in classes of"
                " odd index"
            )
        case "noise":
            auxiliary = noise_like(splits.public, len(splits.class_names))
            notes.append(f"{name}: {len(auxiliary)} public images of uniform noise with random labels")
        case _:
            raise UsageError(f"`public={public}`: choose one of same, other, noise")
    return private, auxiliary, tuple(notes)


def _victims(splits: Splits, victims: Victims) -> Split:
    if victims not in ("all", "tuning", "reporting"):
        raise UsageError(f"`victims={victims}`: choose one of all, tuning, reporting")
    if victims == "all":
        return splits.private
    if splits.tuning is not None and splits.reporting is not None:
        return splits.tuning if victims == "tuning" else splits.reporting
    tuning, reporting = halves(splits.private.labels, splits.copies)
    return splits.private.select(tuning if victims == "tuning" else reporting)


def halves(labels: Tensor, copies: Sequence[Hashable] | None = None) -> tuple[Tensor, Tensor]:
    """The tuning and the reporting indices into `labels` (N,): disjoint, sorted, together all indices.

    Images with equal entries in `copies` (N,) go to one half. Without copies the halves of each class differ by at most
    one image. The assignment depends on `labels` and `copies` alone.
    """
    groups: dict[Hashable, list[int]] = {}
    for i, key in enumerate(range(len(labels)) if copies is None else copies):
        groups.setdefault(key, []).append(i)
    members = list(groups.values())
    order = frozen_rng(HALVES_SEED).permutation(len(members))
    # a class at a time, and within the class in random order, so that every second group halves each class
    class_of = labels.numpy()[np.array([group[0] for group in members], dtype=np.int64)]
    order = order[np.argsort(class_of[order], kind="stable")]
    tuning, reporting = (sorted(i for g in half for i in members[g]) for half in (order[1::2], order[::2]))
    return torch.tensor(tuning, dtype=torch.int64), torch.tensor(reporting, dtype=torch.int64)


def _of_parity(split: Split, parity: int) -> Split:
    """The examples whose label is even (`parity` 0) or odd (1)."""
    return split.select((split.labels % 2 == parity).nonzero().flatten())


def noise_like(split: Split, num_classes: int) -> Split:
    """As many images as `split` has, of the same shape: independent uniform pixels and uniform labels."""
    shape = tuple(split.pixels.shape[1:])
    labels = frozen_rng(NOISE_SEED).randint(0, num_classes, len(split))
    pixels = LazyImages(range(len(split)), partial(_noise, shape), shape, f"uniform noise {NOISE_SEED}")
    return Split(torch.from_numpy(labels.astype(np.int64)), pixels)


def _noise(shape: tuple[int, int, int], index: int) -> Tensor:
    return torch.from_numpy(frozen_rng(NOISE_SEED, index).randint(0, 256, shape, dtype=np.uint8))
