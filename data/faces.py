"""`faces`: 100 grey faces and 100 other pictures, 25 x 25 pixels, of the scikit-image wheel; no download.

scikit-image took them from Labeled Faces in the Wild (Huang, Ramesh, Berg, Learned-Miller 2007,
http://vis-www.cs.umass.edu/lfw/): faces, and pieces of the background. The file has no names, so the classes of the
task are "face" and "other", and not people. Each face is a candidate for identification. Nothing in the file says
whether two faces are of one person, so a person may be in several splits. Some pictures of class "other" show part of a
face.

Half of each class is private, a quarter public, and a quarter test. Pictures with a contrast below MIN_CONTRAST, all of
class "other", are left out: they are nearly black or nearly white, and nearly copies of each other.
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
from data.images import one_line, square
from data.splits import LazyImages, Split, Splits, frozen_rng

FACES = 100  # the first pictures of the file; the others are no faces
SHAPE = (200, 25, 25)
MIN_CONTRAST = 4.0  # grey levels
SHARES = {"private": (0, 2), "public": (2, 3), "test": (3, 4)}  # quarters of each class


@register
def faces(base_datadir: Path, image_size: int | None) -> Splits:
    """25 pixels, one channel; `base_datadir` is not used. Raises UsageError if scikit-image lacks the file."""
    size = image_size or SHAPE[1]
    pictures = _pictures()
    labels = (np.arange(len(pictures)) >= FACES).astype(np.int64)
    used = pictures.std((1, 2)) >= MIN_CONTRAST
    indices: dict[str, list[int]] = {name: [] for name in SHARES}
    rng = frozen_rng(0)
    for label in (0, 1):
        members = rng.permutation(np.flatnonzero(used & (labels == label)))
        for name, (first, last) in SHARES.items():
            indices[name] += members[len(members) * first // 4 : len(members) * last // 4].tolist()

    content = hashlib.sha256(pictures.tobytes()).hexdigest()
    splits = {}
    for name, chosen in indices.items():
        chosen.sort()
        pixels = LazyImages(chosen, partial(_picture, pictures, size), (1, size, size), f"{content} {size} {chosen}")
        splits[name] = Split(torch.from_numpy(labels[chosen]), pixels)
    dropped = int((~used).sum())
    return Splits(
        **splits,
        class_names=("face", "other"),
        notes=(f"faces: {dropped} pictures without contrast left out",) if dropped else (),
    )


def _pictures() -> np.ndarray:
    """All pictures (200, 25, 25) uint8. Raises UsageError if the file is missing or has other content."""
    package = find_spec("skimage")
    path = Path(package.submodule_search_locations[0] if package else "skimage", "data", "lfw_subset.npy")
    try:
        pictures = np.load(path, allow_pickle=False)
        if pictures.shape != SHAPE or not (pictures.min() >= 0 and pictures.max() <= 1):
            raise ValueError(f"shape {pictures.shape}, expected {SHAPE} with pixels in [0, 1]")
    except (OSError, ValueError, EOFError, TypeError, AttributeError) as error:
        raise UsageError(
            f"{path}: cannot be read ({one_line(error)}); reinstall scikit-image or choose another `dataset`"
        ) from None
    return np.rint(255 * pictures).astype(np.uint8)


def _picture(pictures: np.ndarray, image_size: int, index: int) -> Tensor:
    """A picture as (1, image_size, image_size) uint8."""
    return square(Image.fromarray(pictures[index]), image_size)
