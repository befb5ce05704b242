"""`load`, the registry of data sets, and the type of a loaded one."""

import hashlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import PIL
import torch

from core.errors import UsageError
from core.protocol import Task, image_task
from core.registry import Registry
from data.selection import Public, Victims, select
from data.splits import LazyImages, Split, Splits, Statistics

Normalize = Literal["none", "dataset", "half"]


@dataclass(frozen=True, eq=False)
class Dataset:
    """Three splits that share no image.

    private: the images of victims and clients. public: auxiliary images that a server may own. test: held-out images
    for accuracy; empty only in a `folder` whose classes have fewer than three images each. fingerprint: 64 hexadecimal
    digits that change with any pixel, label or assignment to a split. notes: one line for each decision of the loader
    that a user may want to know, such as how files were split and resized.
    """

    name: str
    task: Task
    private: Split
    public: Split
    test: Split
    fingerprint: str
    class_names: tuple[str, ...]
    notes: tuple[str, ...] = ()


Loader = Callable[[Path, Any], Splits]  # (base_datadir, the option that its second parameter is named after)
DATASETS: Registry[Loader] = Registry("data set", package="data")


def register(loader: Loader) -> Loader:
    """Register `loader` as the data set that has the function's name."""
    DATASETS.add(loader.__name__, loader)
    return loader


def load(
    name: str,
    *,
    base_datadir: Path,
    image_size: int | None = None,
    tokens: int | None = None,
    schema: str | None = None,
    normalize: Normalize = "none",
    victims: Victims = "all",
    public: Public = "same",
) -> Dataset:
    """The data set `name`: square images, sentences or records of a table.

    image_size: height and width of images in pixels, 8 to 1024; None: the data set's own.
    tokens: length of sentences; None: the data set's own.
    schema: columns of a table: "auto", or a JSON file; None: auto.
    normalize: mean and std of the task's domain: "none" 0 and 1, "half" 0.5 and 0.5, "dataset" the published values or
        else those of the data set's own public images, whichever `victims` and `public` are.
    victims: the images of the split `private`. "tuning" and "reporting" share no image: attacks are tuned on one of
        them and reported on the other. Together they are the images of "all", but for `photos`.
    public: the images of the split `public`. "same": of the victims' classes. "other": victims have classes of even
        index and public images classes of odd index. "noise": uniform noise with random labels.

    The split `test` and the classes of the task depend on neither choice. Raises UsageError for an unknown name, an
    argument out of range, a choice that leaves no images, and files that are missing or unreadable.
    """
    loader = DATASETS.find(name)
    if image_size is not None and not 8 <= image_size <= 1024:
        raise UsageError(f"`image_size={image_size}`: choose 8 to 1024 pixels")
    base_datadir = Path(base_datadir).expanduser()
    splits = loader(base_datadir, _option(name, loader, {"image_size": image_size, "tokens": tokens, "schema": schema}))
    if not (len(splits.private) and len(splits.public)):
        raise UsageError(f"{base_datadir}: too few images; {name} needs a class with at least two different ones")
    # before the selection: what the attacker knows must not change the task
    task = _task(name, splits, normalize, public)
    private, auxiliary, notes = select(name, splits, victims, public)
    return Dataset(
        name=name,
        task=task,
        private=private,
        public=auxiliary,
        test=splits.test,
        fingerprint=_fingerprint(splits, private, auxiliary, splits.test),
        class_names=splits.class_names,
        notes=splits.notes + notes,
    )


def _option(name: str, loader: Loader, options: dict[str, Any]) -> Any:
    """The option that the loader takes. Raises UsageError if another one is given."""
    takes = list(inspect.signature(loader).parameters)[1]
    for option, value in options.items():
        if value is not None and option != takes:
            raise UsageError(f"`{option}` does not apply to `dataset={name}`")
    return options[takes]


def _task(name: str, splits: Splits, normalize: Normalize, public: Public) -> Task:
    if splits.domain is None:
        mean, std = _statistics(normalize, splits)
        return image_task(tuple(splits.private.pixels.shape[1:]), len(splits.class_names), mean, std)
    if normalize != "none":
        raise UsageError(f"`normalize={normalize}` applies to images, and `dataset={name}` has none")
    if public == "noise":
        raise UsageError(f"`public=noise` applies to images, and `dataset={name}` has none")
    return Task(splits.domain, len(splits.class_names))


def _statistics(normalize: Normalize, splits: Splits) -> Statistics:
    channels = splits.private.pixels.shape[1]
    match normalize:
        case "none":
            return (0.0,) * channels, (1.0,) * channels
        case "half":
            return (0.5,) * channels, (0.5,) * channels
        case "dataset":
            return splits.published_statistics or _pixel_statistics(splits.public)
        case _:
            raise UsageError(f"`normalize={normalize}`: choose one of none, dataset, half")


def _pixel_statistics(split: Split) -> Statistics:
    """Mean and std of all pixels of each channel, rounded to four digits."""
    count, total, squares = 0, 0, 0
    for indices in torch.arange(len(split)).split(256):
        pixels = split.pixels[indices].transpose(0, 1).flatten(1).to(torch.int64)  # (C, n*H*W)
        count += pixels.shape[1]
        total = total + pixels.sum(1)
        squares = squares + pixels.square().sum(1)
    mean = total.double() / count / 255  # (C,)
    variance = squares.double() / count / 255**2 - mean.square()
    # the std of a constant channel is 0, which cannot be divided by
    std = variance.clamp(min=1 / 255**2).sqrt()
    return tuple(round(m, 4) for m in mean.tolist()), tuple(round(s, 4) for s in std.tolist())


def _fingerprint(loaded: Splits, *used: Split) -> str:
    hasher = hashlib.sha256(repr(loaded.class_names).encode())
    if loaded.domain is not None:
        hasher.update(repr(loaded.domain).encode())
    for split in used:
        hasher.update(repr(tuple(split.pixels.shape)).encode())
        hasher.update(split.labels.numpy())
        if isinstance(split.pixels, LazyImages):
            # Pillow versions decode and resize the same file differently
            hasher.update(f"{split.pixels.identity} pillow {PIL.__version__}".encode())
        else:
            hasher.update(np.ascontiguousarray(split.pixels.numpy()))
    return hasher.hexdigest()
