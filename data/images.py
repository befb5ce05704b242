"""Image files: which files are images, how a tree of class folders is listed, how a file becomes a uint8 tensor."""

import contextlib
import os
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from core.errors import UsageError
from utils.terminal import silent_stderr

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
# Pillow identifies files by content; without this list it would pass an EPS file with another suffix to Ghostscript
FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF", "PPM")

# what Pillow's decoders raise on damaged files
UNREADABLE = (OSError, SyntaxError, ValueError, TypeError, KeyError, IndexError, EOFError, OverflowError)
UNREADABLE += (RuntimeError, struct.error, zlib.error, Image.DecompressionBombError)


def class_folders(root: Path, expected: str) -> dict[str, list[str]]:
    """Class name -> the sorted paths of its images, in a `<class>/<image>` tree; classes are sorted by name.

    Hidden entries and files that are not images are ignored. Raises UsageError, which ends in `expected`, if the root
    is missing or has no class folders, or if a class folder has no images.
    """
    if not root.is_dir():
        raise UsageError(f"{root}: no such folder; {expected}")
    classes = {name: path for name, path in _entries(root) if os.path.isdir(path)}
    if not classes:
        raise UsageError(f"{root}: no class folders in it; {expected}")
    return {name: image_paths(folder, expected) for name, folder in classes.items()}


def image_paths(folder: str | Path, expected: str) -> list[str]:
    """Sorted paths of the images in a class folder. Raises UsageError, which ends in `expected`, if there are none."""
    paths = [path for name, path in _entries(folder) if name.lower().endswith(SUFFIXES) and not os.path.isdir(path)]
    if not paths:
        raise UsageError(f"{folder}: no images in this class folder; {expected}")
    return paths


def _entries(folder: str | Path) -> list[tuple[str, str]]:
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise UsageError(f"{folder}: cannot be listed ({one_line(error)}); check its permissions") from None
    return [(name, os.path.join(folder, name)) for name in names if not name.startswith(".")]


def one_line(error: BaseException) -> str:
    """The message of an error on one line; its type if it has no message."""
    if isinstance(error, UnidentifiedImageError):
        return "unknown format"
    return " ".join((getattr(error, "strerror", None) or str(error)).split()) or type(error).__name__


def unreadable(path: str | Path, error: BaseException) -> UsageError:
    """What to raise for an image file that cannot be decoded."""
    return UsageError(f"{path}: not a readable image ({one_line(error)}); remove or replace it")


def open_image(file: str | Path | BinaryIO) -> Image.Image:
    """The image, of which only the header has been read. Raises one of UNREADABLE."""
    if isinstance(file, str | Path):
        check_regular(file)
    return Image.open(file, formats=FORMATS)


def check_regular(path: str | Path) -> None:
    """Raise OSError for a pipe, a socket, a device or a folder: reading them may never end."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise OSError("not a regular file")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Discard Pillow's warnings: a file is read or refused."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def read_image(path: str | Path, *, image_size: int, channels: int) -> Tensor:
    """The image as (channels, image_size, image_size) uint8, channels 1 or 3.

    Raises UsageError, which names the file, if it cannot be decoded.
    """
    try:
        with quiet(), open_image(path) as image, silent_stderr() if image.format == "TIFF" else nullcontext():
            return square(_eight_bit(image, "L" if channels == 1 else "RGB"), image_size)
    except UNREADABLE as error:
        raise unreadable(path, error) from None


def _eight_bit(image: Image.Image, mode: str) -> Image.Image:
    """The image upright, on white where it is transparent, with 8 bits a channel in `mode` L or RGB."""
    if image.mode == "F":
        raise ValueError("floating-point pixels have no agreed range")
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        # 16 bits a pixel: Pillow's conversion clips at 255 instead of scaling
        image = Image.fromarray(np.rint(np.asarray(image).clip(0, 65535) / 257).astype(np.uint8))
    if image.has_transparency_data:
        background = Image.new("RGBA", image.size, "white")
        background.alpha_composite(image.convert("RGBA"))
        image = background
    return image.convert(mode)


def square(image: Image.Image, image_size: int) -> Tensor:
    """The largest centred square of an 8-bit L or RGB image, resampled to (C, image_size, image_size) uint8."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    # cropped first, because the filter of `resize(box=...)` would read pixels outside the box
    image = image.crop((left, top, left + side, top + side))
    if side != image_size:
        image = image.resize((image_size, image_size), Image.Resampling.BILINEAR)  # antialiased when it reduces
    return torch.from_numpy(np.array(np.atleast_3d(image).transpose(2, 0, 1)))
