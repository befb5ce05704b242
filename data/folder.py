"""`folder`: any `<class>/<image>` tree, with `base_datadir` as its root."""

import hashlib
import io
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch

from core.errors import UsageError
from data.base import register
from data.images import UNREADABLE, check_regular, class_folders, open_image, quiet, read_image, unreadable
from data.splits import LazyImages, Split, Splits, frozen_rng

EXPECTED = "`base_datadir` must be the root of a <class>/<image> tree for `dataset=folder`"
SHARES = {"private": 0.5, "public": 0.25, "test": 0.25}  # of each class
EAGER = 5000  # up to this many images, all are decoded at load, so that an unreadable one is found at once
GREY = ("1", "L", "LA", "La", "I")  # Pillow's greyscale modes, and all that start with I;16


@register
def folder(base_datadir: Path, image_size: int | None) -> Splits:
    """Images of one channel if every file is greyscale, otherwise of three.

    `image_size` None keeps square images that share one size of at most 64 pixels, and resizes all others to 32. Raises
    UsageError for a tree that is missing, has no class folders, has only one class, or has a class without images or
    with an unreadable one.
    """
    tree = class_folders(base_datadir, EXPECTED)
    if len(tree) < 2:
        raise UsageError(
            f"{base_datadir}: one class folder only ({', '.join(tree)}); a task needs at least two classes"
        )
    paths = [path for files in tree.values() for path in files]
    labels = np.repeat(np.arange(len(tree)), [len(files) for files in tree.values()])
    names = [f"{class_name}/{Path(path).name}" for class_name, files in tree.items() for path in files]
    digests, modes, sizes = zip(*map(_inspect, paths), strict=True)

    size = image_size or _native_size(set(sizes)) or 32
    channels = 1 if all(_is_grey(mode) for mode in modes) else 3
    decode = partial(read_image, image_size=size, channels=channels)

    def split(indices: list[int]) -> Split:
        identity = " ".join(digests[i] for i in indices)
        pixels = LazyImages([paths[i] for i in indices], decode, (channels, size, size), identity)
        return Split(
            labels=torch.tensor(labels[indices], dtype=torch.int64),
            pixels=pixels[torch.arange(len(indices))] if len(paths) <= EAGER else pixels,
            names=tuple(names[i] for i in indices),
        )

    assigned = _assign_splits(digests, labels)
    return Splits(
        **{name: split(indices) for name, indices in assigned.items()},
        class_names=tuple(tree),
        copies=[digests[i] for i in assigned["private"]],
        notes=_notes(assigned, len(tree), digests, modes, sizes, size, channels),
    )


def _inspect(path: str) -> tuple[str, str, tuple[int, int]]:
    """The digest of a file's bytes, its colour mode, and (width, height). Raises UsageError if it is not an image."""
    try:
        check_regular(path)
        content = Path(path).read_bytes()
        with quiet(), open_image(io.BytesIO(content)) as image:
            return hashlib.sha256(content).hexdigest(), image.mode, image.size
    except UNREADABLE as error:
        raise unreadable(path, error) from None


def _is_grey(mode: str) -> bool:
    return mode in GREY or mode.startswith("I;16")


def _native_size(sizes: set[tuple[int, int]]) -> int | None:
    """The side of all images if they are square, of one size, and at most 64 pixels; otherwise None."""
    (width, height), *others = sizes
    return width if not others and width == height <= 64 else None


def _assign_splits(digests: Sequence[str], labels: np.ndarray) -> dict[str, list[int]]:
    """Split -> the sorted indices of its images.

    Each class is shuffled and distributed on its own: each file goes to the split that is furthest below its share
    (private, public, test, private, and again). Files with equal bytes go to one split, as files of the first one's
    class.
    """
    copies: dict[str, list[int]] = {}
    for i, digest in enumerate(digests):
        copies.setdefault(digest, []).append(i)
    classes: dict[int, list[list[int]]] = {}
    for group in copies.values():
        classes.setdefault(int(labels[group[0]]), []).append(group)

    assigned: dict[str, list[int]] = {name: [] for name in SHARES}
    rng = frozen_rng(0)
    for groups in classes.values():
        counts = dict.fromkeys(SHARES, 0)
        for g in rng.permutation(len(groups)):
            total = sum(counts.values()) + len(groups[g])
            neediest = max(SHARES, key=lambda name: SHARES[name] * total - counts[name])
            counts[neediest] += len(groups[g])
            assigned[neediest] += groups[g]
    return {name: sorted(indices) for name, indices in assigned.items()}


def _notes(
    assigned: dict[str, list[int]],
    num_classes: int,
    digests: Sequence[str],
    modes: Sequence[str],
    sizes: Sequence[tuple[int, int]],
    image_size: int,
    channels: int,
) -> tuple[str, ...]:
    """What was done to the files: one line on splits and sizes, and one each on copies and colours if there are any."""
    split = " / ".join(f"{len(indices)} {name}" for name, indices in assigned.items())
    shapes = sorted(set(sizes), key=lambda size: size[0] * size[1])
    first, last = (f"{width}x{height}" for width, height in (shapes[0], shapes[-1]))
    source = first if len(shapes) == 1 else f"{len(shapes)} sizes ({first} to {last})"
    target = f"{image_size}x{image_size}"
    resized = f"resized from {source} to {target}" if source != target else f"kept at {target}"
    if any(width != height for width, height in shapes):
        resized = f"cropped to the centre square and {resized}"
    notes = [f"folder: {len(digests)} files, {num_classes} classes, split {split} by class, {resized}"]
    if len(set(digests)) < len(digests):
        duplicates = len(digests) - len(set(digests))
        notes.append(f"folder: {duplicates} files are exact copies of others; all copies of a file are in one split")
    counts = Counter(modes)
    if len(counts) > 1 or next(iter(counts)) not in ("L", "RGB"):
        colours = ", ".join(f"{count} {mode}" for mode, count in sorted(counts.items()))
        notes.append(f"folder: colour modes {colours} converted to {'greyscale' if channels == 1 else 'RGB'}")
    return tuple(notes)
