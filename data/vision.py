"""Published data sets under `base_datadir`, in torchvision's layouts. All but ImageNet are downloaded if missing.

The official test (or val) images are `test`. Of the official training images a fifth of each class, drawn with a
fixed seed and at most 5000 in total, is `public`, and the rest is `private`. MNIST and CIFAR, which fit in memory, are
searched for exact copies: images that are also in `test` are dropped from `public` and `private`, and images that are
also in `public` are dropped from `private`.
"""

import contextlib
import hashlib
import os
import pickle
import socket
import sys
import tempfile
import threading
import urllib.request
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from http.client import HTTPException
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from core.errors import UsageError
from data.base import register
from data.images import check_regular, class_folders, image_paths, one_line, read_image, square
from data.splits import LazyImages, Split, Splits, Statistics, frozen_rng

PATIENCE = 10.0  # seconds without a byte after which a server counts as unreachable

# mean and std of the training pixels of each channel
MNIST: Statistics = ((0.1307,), (0.3081,))  # pytorch/examples, mnist/main.py
CIFAR10: Statistics = ((0.4914672, 0.4822617, 0.4467701), (0.2470322, 0.2434851, 0.2615879))  # breaching, CIFAR10.yaml
CIFAR100: Statistics = ((0.5071598, 0.4866936, 0.4412019), (0.2673343, 0.2564384, 0.2761505))  # the same, CIFAR100.yaml
IMAGENET: Statistics = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # torchvision, references/classification

TINY_URL = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
TINY_MD5 = "90528d7ca1a48142e341f4ef8d21d0de"

# what torchvision's readers and downloads raise on damaged files and broken connections
DAMAGED = (OSError, RuntimeError, ValueError, TypeError, KeyError, IndexError, AttributeError, AssertionError)
DAMAGED += (EOFError, ArithmeticError, ImportError, MemoryError, HTTPException, pickle.UnpicklingError)
DAMAGED += (zipfile.BadZipFile, zlib.error)


@register
def mnist(base_datadir: Path, image_size: int | None) -> Splits:
    """28 pixels, one channel, from MNIST/raw."""
    from torchvision.datasets import MNIST as Reader

    url = Reader.mirrors[0] + Reader.resources[0][0]
    return _in_memory(Reader, Reader, base_datadir / "MNIST", url, (28, 28, 1), image_size, MNIST)


@register
def cifar10(base_datadir: Path, image_size: int | None) -> Splits:
    """32 pixels, from cifar-10-batches-py."""
    from torchvision.datasets import CIFAR10 as Reader

    read = partial(_Cifar, Reader)
    return _in_memory(Reader, read, base_datadir / Reader.base_folder, Reader.url, (32, 32, 3), image_size, CIFAR10)


@register
def cifar100(base_datadir: Path, image_size: int | None) -> Splits:
    """32 pixels, the fine labels, from cifar-100-python."""
    from torchvision.datasets import CIFAR100 as Reader

    read = partial(_Cifar, Reader)
    return _in_memory(Reader, read, base_datadir / Reader.base_folder, Reader.url, (32, 32, 3), image_size, CIFAR100)


@register
def imagenet(base_datadir: Path, image_size: int | None) -> Splits:
    """224 pixels, from imagenet/{train,val}/<class>/<image>, torchvision's ImageNet layout; not downloaded."""
    root = base_datadir / "imagenet"
    expected = "`base_datadir` (BASE_DATADIR) must hold imagenet/train and imagenet/val with a folder for each class"
    train, val = class_folders(root / "train", expected), class_folders(root / "val", expected)
    if unknown := sorted(val.keys() - train.keys()):
        raise UsageError(f"{root / 'val' / unknown[0]}: no such class in {root / 'train'}; {expected}")
    classes = {name: label for label, name in enumerate(train)}
    return _on_disk(
        root,
        [(path, classes[name]) for name, paths in train.items() for path in paths],
        [(path, classes[name]) for name, paths in val.items() for path in paths],
        image_size or 224,
        tuple(classes),
    )


@register
def tiny_imagenet(base_datadir: Path, image_size: int | None) -> Splits:
    """64 pixels, from tiny-imagenet-200, the contents of the published zip file; classes are sorted by WordNet id."""
    root = base_datadir / "tiny-imagenet-200"
    if not root.exists():
        from torchvision.datasets.utils import download_and_extract_archive

        _download(root, TINY_URL, lambda scratch: download_and_extract_archive(TINY_URL, scratch, md5=TINY_MD5))
    classes = {wnid: label for label, wnid in enumerate(sorted(_lines(root / "wnids.txt")))}
    val = []
    for line in _lines(root / "val" / "val_annotations.txt"):
        file, wnid, *_ = [*line.split("\t"), ""]
        if wnid not in classes:
            raise _damaged(root)
        val.append((str(root / "val" / "images" / file), classes[wnid]))
    if not (classes and val):
        raise _damaged(root)
    expected = "the tree differs from the contents of the published zip file"
    train = [
        (path, label)
        for wnid, label in classes.items()
        for path in image_paths(root / "train" / wnid / "images", expected)
    ]
    return _on_disk(root, train, val, image_size or 64, tuple(classes))


class _Cifar:
    """The training or test images of a CIFAR folder, with the attributes of torchvision's reader.

    torchvision accepts only files with the published checksums, because a pickle may run code. This reader loads
    nothing but arrays, so it can also read copies that were packed again.
    """

    def __init__(self, reader: Any, root: Path, train: bool) -> None:
        folder = root / reader.base_folder
        names = [name for name, _ in (reader.train_list if train else reader.test_list)]
        batches = [self._load(folder / name) for name in names]
        meta = self._load(folder / reader.meta["filename"])
        self.data = np.concatenate([b["data"] for b in batches]).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        self.targets = [label for b in batches for label in b.get("labels", b.get("fine_labels"))]
        self.classes = meta[reader.meta["key"]]

    @staticmethod
    def _load(path: Path) -> Any:
        check_regular(path)
        with path.open("rb") as file:
            return _ArraysOnly(file, encoding="latin1").load()


class _ArraysOnly(pickle.Unpickler):
    """Unpickles NumPy arrays and Python's own containers. Raises UnpicklingError for anything else."""

    ALLOWED = frozenset({"ndarray", "dtype", "_reconstruct", "_frombuffer", "encode"})

    def find_class(self, module: str, name: str) -> Any:
        if name in self.ALLOWED and module.split(".")[0] in ("numpy", "_codecs"):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} is not an array")


def _in_memory(
    reader: Any,
    read: Callable[..., Any],
    folder: Path,
    url: str,
    shape: tuple[int, int, int],
    image_size: int | None,
    published: Statistics,
) -> Splits:
    """The splits of a data set that fits in memory; images are resized when they are taken.

    reader: torchvision's class, which can download the data set. read: called as read(root, train=...), returns an
    object with `data`, `targets` and `classes`. shape: (H, W, C) of an image.
    """
    if not folder.exists():
        _download(folder, url, lambda scratch: reader(scratch, download=True))
    try:
        for path in folder.rglob("*"):
            if not path.is_dir():
                check_regular(path)
        with warnings.catch_warnings():
            # the CIFAR pickles were written by an old NumPy
            warnings.simplefilter("ignore", np.exceptions.VisibleDeprecationWarning)
            train, test = (read(folder.parent, train=part) for part in (True, False))
        (x, y), (x_test, y_test) = (_checked(part, shape) for part in (train, test))
    except DAMAGED as error:
        raise _damaged(folder) from error

    def split(images: np.ndarray, labels: np.ndarray) -> Split:
        if image_size in (None, shape[0]):
            pixels = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
        else:
            content = hashlib.sha256(np.ascontiguousarray(images)).hexdigest()
            pixels = LazyImages(images, partial(_resized, image_size), (shape[2], image_size, image_size), content)
        return Split(torch.from_numpy(labels), pixels)

    private, public = _hold_out(y, len(train.classes))
    digests = [hashlib.sha256(image.tobytes()).digest() for image in x]
    excluded = {hashlib.sha256(image.tobytes()).digest() for image in x_test}
    public = [i for i in public if digests[i] not in excluded]
    excluded |= {digests[i] for i in public}
    private = [i for i in private if digests[i] not in excluded]
    dropped = len(x) - len(private) - len(public)
    note = f"{folder.name}: {dropped} training images dropped as copies of test or public ones"
    return Splits(
        private=split(x[private], y[private]),
        public=split(x[public], y[public]),
        test=split(x_test, y_test),
        class_names=tuple(train.classes),
        published_statistics=published,
        notes=(note,) if dropped else (),
        copies=[digests[i] for i in private],
    )


def _checked(part: Any, shape: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, H, W, C) uint8 and labels (N,) int64 of a torchvision data set; `shape` is (H, W, C).

    Raises ValueError for other shapes and types, and for labels without a class.
    """
    images = np.asarray(part.data)
    images, labels = images.reshape(len(images), *shape), np.asarray(part.targets, dtype=np.int64)
    known = 0 <= labels.min() <= labels.max() < len(part.classes)
    if images.dtype != np.uint8 or labels.shape != images.shape[:1] or not known:
        raise ValueError(f"images {images.shape}, labels {labels.shape}")
    return images, labels


def _resized(image_size: int, image: np.ndarray) -> Tensor:
    """(H, W, C) uint8 -> (C, image_size, image_size) uint8."""
    return square(Image.fromarray(image[..., 0] if image.shape[2] == 1 else image), image_size)


Labelled = Sequence[tuple[str, int]]  # path, label


def _on_disk(root: Path, train: Labelled, test: Labelled, image_size: int, class_names: tuple[str, ...]) -> Splits:
    """The splits of a data set too large for memory: images are decoded when they are taken.

    The fingerprint depends on the names, sizes and modification times of the files instead of their content.
    """

    def split(files: Labelled) -> Split:
        hasher = hashlib.sha256()
        for path, _ in files:
            try:
                status = os.stat(path)
            except OSError as error:
                raise UsageError(f"{path}: cannot be read ({one_line(error)}); {root} is incomplete") from None
            hasher.update(f"{path.removeprefix(str(root))} {status.st_size} {status.st_mtime_ns}\n".encode())
        decode = partial(read_image, image_size=image_size, channels=3)
        shape = (3, image_size, image_size)
        return Split(
            labels=torch.tensor([label for _, label in files], dtype=torch.int64),
            pixels=LazyImages([path for path, _ in files], decode, shape, hasher.hexdigest()),
        )

    private, public = _hold_out(np.array([label for _, label in train]), len(class_names))
    return Splits(
        private=split([train[i] for i in private]),
        public=split([train[i] for i in public]),
        test=split(test),
        class_names=class_names,
        published_statistics=IMAGENET,
    )


def _hold_out(labels: np.ndarray, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """The sorted indices into `labels` (N,) of the private and of the public images."""
    order = frozen_rng(0).permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    counts = np.bincount(labels, minlength=num_classes)  # (K,)
    quota = np.where(counts > 1, np.minimum(counts // 5, 5000 // num_classes).clip(min=1), 0)
    rank = np.arange(len(labels)) - np.repeat(counts.cumsum() - counts, counts)  # (N,), within the class
    public = rank < np.repeat(quota, counts)
    return np.sort(order[~public]), np.sort(order[public])


def _lines(path: Path) -> list[str]:
    """The lines of a text file. Raises UsageError if it cannot be read."""
    try:
        check_regular(path)
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise _damaged(path) from error


def _damaged(path: Path) -> UsageError:
    return UsageError(
        f"{path}: incomplete or damaged; restore the original files, or delete the data set to download it again"
    )


def _download(folder: Path, url: str, fetch: Callable[[str], object]) -> None:
    """Download a data set with `fetch(scratch folder)`, then move it to `folder`: all of it or nothing.

    Raises UsageError if there is no network, disk space or permission.
    """
    try:
        if folder.parent.exists() and not folder.parent.is_dir():
            raise NotADirectoryError(f"{folder.parent} is a file")
        _check_reachable(url)
        nearest = next(parent for parent in folder.parents if parent.is_dir())
        with tempfile.TemporaryDirectory(dir=nearest, prefix=".download-") as scratch, _socket_timeout():
            fetch(scratch)
            folder.parent.mkdir(parents=True, exist_ok=True)
            # another process may have downloaded it in the meantime
            if not folder.exists():
                os.rename(os.path.join(scratch, folder.name), folder)
    except DAMAGED as error:
        raise UsageError(
            f"{folder}: missing, and the download failed ({one_line(error)});"
            f" set `base_datadir` (BASE_DATADIR) to the folder that holds {folder.name}"
        ) from None


def _check_reachable(url: str) -> None:
    """Raise OSError unless `url` answers within PATIENCE, including the name look-up, which has no socket timeout."""
    outcome: list[Exception | None] = []

    def request() -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=PATIENCE).close()
            outcome.append(None)
        except (OSError, HTTPException) as error:
            outcome.append(error)

    thread = threading.Thread(target=request, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    failure = outcome[0] if outcome else TimeoutError(f"no answer in {PATIENCE:g} s")
    if failure:
        raise failure


@contextlib.contextmanager
def _socket_timeout() -> Iterator[None]:
    """Inside the block, sockets time out after PATIENCE, and torchvision prints to standard error."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(PATIENCE)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        socket.setdefaulttimeout(before)
