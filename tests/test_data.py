"""Data sets through their public interface: `load`, `Split.take` and `partition`."""

import gzip
import hashlib
import http.server
import os
import pickle
import shutil
import socket
import threading
import time
import zipfile
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import data.leaves
from core.domain import ImageDomain
from core.errors import UsageError
from data import DATASETS, load, partition
from data.photos import _pack
from data.selection import halves
from experiments.data_statistics import spectrum_slope, total_variation
from models.generators.store import data_digest
from runner.experiment import public_batch

torch.set_num_threads(1)
VISION = {
    "mnist": "MNIST",
    "cifar10": "cifar-10-batches-py",
    "cifar100": "cifar-100-python",
    "imagenet": "imagenet",
    "tiny_imagenet": "tiny-imagenet-200",
}


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Redirect every request to a closed local port, where it fails at once."""
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY", "HTTP_PROXY", "HTTPS_PROXY", "REQUEST_METHOD"):
        monkeypatch.delenv(name, raising=False)


def refusal(name, base, **options):
    """The message, one line, of the UsageError that `load` raises."""
    with pytest.raises(UsageError) as caught:
        load(name, base_datadir=base, **options)
    line = str(caught.value)
    assert "\n" not in line and line
    return line


def splits(dataset):
    return {"private": dataset.private, "public": dataset.public, "test": dataset.test}


def assert_sound(dataset):
    """Check shapes, types, ranges and labels, and that no image is in two splits."""
    assert len(dataset.class_names) == dataset.task.num_classes
    contents = []
    for split in splits(dataset).values():
        images, labels = split.take(range(len(split)))
        assert images.shape == (len(split), *dataset.task.domain.shape) and images.dtype == torch.float32
        assert labels.dtype == torch.int64 and torch.equal(labels, split.labels)
        assert ((labels >= 0) & (labels < dataset.task.num_classes)).all()
        assert images.min() >= 0 and images.max() <= 1 and torch.equal((images * 255).round() / 255, images)
        contents.append({image.numpy().tobytes() for image in images})
        assert split.names is None or len(split.names) == len(split)
    private, public, test = contents
    assert private and public
    assert not (private & public or private & test or public & test)


def noise(seed, height, width, channels=3):
    shape = (height, width) if channels == 1 else (height, width, channels)
    return np.random.RandomState(seed).randint(0, 256, shape).astype(np.uint8)


def save(path, seed, height=12, width=12, channels=3):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noise(seed, height, width, channels)).save(path)
    return path


# --- load -----------------------------------------------------------------------------------------------------------


def test_registry_names():
    others = "text textfile csv cancer photostats"
    assert set(DATASETS) == {"photos", "leaves", "faces", "folder", *others.split(), *VISION}


def test_load_refuses_unknown_names_and_values_out_of_range(tmp_path):
    assert "photos" in refusal("celeba", tmp_path)
    assert "`normalize=full`" in refusal("photos", tmp_path, normalize="full")
    for size in (-1, 0, 7, 1025):
        assert f"`image_size={size}`" in refusal("photos", tmp_path, image_size=size)


# --- photos ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def photos():
    return load("photos", base_datadir=Path("nowhere"))


@pytest.mark.parametrize("size", [16, 32, 64, 224])
def test_photos_at_every_size(size):
    started = time.process_time()
    dataset = load("photos", base_datadir=Path("nowhere"), image_size=size)
    assert time.process_time() - started < 3  # measured below 1
    assert dataset.task.domain.shape == (3, size, size) and dataset.task.num_classes == 8
    assert {name: len(split) for name, split in splits(dataset).items()} == {
        "private": 2048,
        "public": 1024,
        "test": 512,
    }
    for split in splits(dataset).values():
        assert split.labels.bincount().tolist() == [len(split) // 8] * 8
        images = split.take(range(0, len(split), 16)).examples
        assert images.shape[1:] == (3, size, size) and 0 <= images.min() < 0.1 and 0.9 < images.max() <= 1
        assert (images.flatten(1).std(1) > 0.01).all()


def test_photos_are_sound(photos):
    assert_sound(photos)
    assert "astronaut" in photos.class_names
    assert photos.private.names is None and photos.notes == ()


def test_photos_are_the_same_every_time(photos):
    again = load("photos", base_datadir=Path("elsewhere"), image_size=32, normalize="half")
    assert again.fingerprint == photos.fingerprint
    assert again.task.domain.mean == again.task.domain.std == (0.5,) * 3
    assert again.fingerprint != load("photos", base_datadir=Path("nowhere"), image_size=33).fingerprint
    some = torch.tensor([5, 0, 2047, 5])
    assert torch.equal(again.private.take(some).examples, photos.private.take(some).examples)


def test_photos_normalisation(photos):
    assert photos.task.domain.mean == (0,) * 3 and photos.task.domain.std == (1,) * 3
    task = load("photos", base_datadir=Path("nowhere"), normalize="dataset").task
    x = task.domain.to_model(photos.public.take(range(1024)).examples)
    torch.testing.assert_close(x.mean((0, 2, 3)), torch.zeros(3), atol=1e-3, rtol=0)
    torch.testing.assert_close(x.std((0, 2, 3)), torch.ones(3), atol=1e-3, rtol=0)


def skimage_photographs():
    return Path(find_spec("skimage").submodule_search_locations[0]) / "data"


@pytest.fixture
def altered(tmp_path, monkeypatch, photos):
    """altered(change): `photos` made from photographs to which change(picture, photo number) was applied."""

    def make(change, size=32):
        for number, name in enumerate(photos.class_names):
            (file,) = (f for f in skimage_photographs().iterdir() if f.stem == name)
            picture = np.asarray(Image.open(file).convert("RGB"))
            (tmp_path / "data").mkdir(exist_ok=True)
            # Pillow goes by content: an exact BMP may carry any name
            Image.fromarray(change(picture.copy(), number)).save(tmp_path / "data" / file.name, format="BMP")
        location = type("Package", (), {"submodule_search_locations": [str(tmp_path)]})
        with monkeypatch.context() as patch:
            patch.setattr("data.photos.find_spec", lambda name: location)
            return load("photos", base_datadir=Path("nowhere"), image_size=size)

    return make


def tiles(picture):
    """The 16 tiles of a photograph, as views."""
    height, width = picture.shape[:2]
    for tile in range(16):
        row, column = divmod(tile, 4)
        yield picture[row * height // 4 : (row + 1) * height // 4, column * width // 4 : (column + 1) * width // 4]


def tiles_reached(dataset):
    """Split -> the tiles of its crops, of photographs whose red channel is 10 x the number of the tile."""
    reached = {}
    for name, split in splits(dataset).items():
        red = (split.take(range(0, len(split), 4)).examples[:, 0] * 255).round().flatten(1)
        assert torch.equal(red.amin(1), red.amax(1)), "a crop extends over several tiles"
        reached[name] = set((red[:, 0] / 10).tolist())
    return reached


def paint(picture, number):
    picture[:] = noise(number, *picture.shape[:2])
    for tile, block in enumerate(tiles(picture)):
        block[..., 0] = 10 * tile
    return picture


@pytest.mark.parametrize("size", [16, 32, 224])
def test_photos_crops_lie_in_one_tile_of_one_split(altered, size):
    reached = tiles_reached(altered(paint, size))
    assert {name: len(own) for name, own in reached.items()} == {"private": 8, "public": 4, "test": 4}
    assert len(set.union(*reached.values())) == 16


def test_no_pixel_of_a_victim_is_in_the_images_that_generators_are_trained_on(altered, photos):
    """When all private tiles are replaced by noise, all victims change and no bit of the public batch does."""
    private = {tile for tile in range(16) if sum(divmod(tile, 4)) % 2 == 0}
    assert tiles_reached(altered(paint))["private"] == private

    def scramble(picture, number):
        for tile, block in enumerate(tiles(picture)):
            if tile in private:
                block[:] = noise(number, *block.shape[:2])
        return picture

    other = altered(scramble)
    victims = range(0, len(photos.private), 64)
    assert (other.private.take(victims).examples != photos.private.take(victims).examples).any((1, 2, 3)).all()
    assert data_digest(public_batch(other)) == data_digest(public_batch(photos))


def test_photos_splits_are_independent_of_each_others_content(altered, photos):
    reached = tiles_reached(altered(paint))
    for disturbed, own in reached.items():

        def scramble(picture, number, own=own):
            for tile, block in enumerate(tiles(picture)):
                if tile in own:
                    block[:] = noise(number, *block.shape[:2])
            return picture

        dataset = altered(scramble)
        assert dataset.fingerprint != photos.fingerprint
        for name, split in splits(dataset).items():
            some = range(0, len(split), 4)
            same = torch.equal(split.take(some).examples, splits(photos)[name].take(some).examples)
            assert same == (name != disturbed), f"{name} images when the tiles of {disturbed} change"


def test_photos_without_their_files(monkeypatch):
    monkeypatch.setattr("data.photos.find_spec", lambda name: None)
    assert "scikit-image" in refusal("photos", Path("nowhere"))


# --- folder ---------------------------------------------------------------------------------------------------------


def tree(root, classes=("ant", "bee", "cat"), images=8, **size):
    for c, name in enumerate(classes):
        for i in range(images):
            save(root / name / f"{i:02}.png", 100 * c + i, **size)
    return root


def test_folder_splits(tmp_path):
    dataset = load("folder", base_datadir=tree(tmp_path))
    assert_sound(dataset)
    assert dataset.class_names == ("ant", "bee", "cat") and dataset.task.domain.shape == (3, 12, 12)
    assert [s.labels.bincount().tolist() for s in splits(dataset).values()] == [[4] * 3, [2] * 3, [2] * 3]
    original = {(noise(100 * c + i, 12, 12).tobytes(), c) for c in range(3) for i in range(8)}
    images, labels = zip(*(s.take(range(len(s))) for s in splits(dataset).values()), strict=True)
    pixels = (torch.cat(images) * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
    assert {(i.numpy().tobytes(), int(y)) for i, y in zip(pixels, torch.cat(labels), strict=True)} == original
    assert load("folder", base_datadir=tmp_path).fingerprint == dataset.fingerprint


@pytest.mark.parametrize("lazy", [False, True])
def test_folder_names_are_the_files_of_the_images(tmp_path, monkeypatch, lazy):
    if lazy:
        monkeypatch.setattr("data.folder.EAGER", 3)
    dataset = load("folder", base_datadir=tree(tmp_path))
    for split in splits(dataset).values():
        for name, image, label in zip(split.names, *split.take(range(len(split))), strict=True):
            file = torch.from_numpy(np.array(Image.open(tmp_path / name))).permute(2, 0, 1)
            assert torch.equal((image * 255).round().to(torch.uint8), file)
            assert name.startswith(dataset.class_names[label] + "/")
    assert len({name for split in splits(dataset).values() for name in split.names}) == 24


def test_folder_notes_say_how_files_were_split_resized_and_converted(tmp_path):
    same = load("folder", base_datadir=tree(tmp_path / "same"))
    assert same.notes == ("folder: 24 files, 3 classes, split 12 private / 6 public / 6 test by class, kept at 12x12",)
    wide = load("folder", base_datadir=tree(tmp_path / "wide", images=4, height=48, width=64))
    (line,) = wide.notes
    assert line.endswith("cropped to the centre square and resized from 64x48 to 32x32")
    mixed = tree(tmp_path / "mixed")
    save(mixed / "ant" / "grey.png", 7, 20, 20, channels=1)
    shutil.copy(mixed / "ant" / "00.png", mixed / "bee" / "copy.png")
    first, copies, colours = load("folder", base_datadir=mixed, image_size=16).notes
    assert first.startswith("folder: 26 files, 3 classes")
    assert first.endswith("by class, resized from 2 sizes (12x12 to 20x20) to 16x16")
    assert "1 files are exact copies" in copies and "1 L, 25 RGB converted to RGB" in colours


@pytest.mark.parametrize("lazy", [False, True])
def test_folder_fingerprint_depends_on_pixels_labels_and_sizes(tmp_path, monkeypatch, lazy):
    if lazy:
        monkeypatch.setattr("data.folder.EAGER", 3)
    fingerprints = {load("folder", base_datadir=tree(tmp_path)).fingerprint}
    fingerprints.add(load("folder", base_datadir=tmp_path, image_size=16).fingerprint)
    save(tmp_path / "ant" / "03.png", 999)
    fingerprints.add(load("folder", base_datadir=tmp_path).fingerprint)
    shutil.move(tmp_path / "ant" / "03.png", tmp_path / "bee" / "98.png")
    fingerprints.add(load("folder", base_datadir=tmp_path).fingerprint)
    (tmp_path / "cat").rename(tmp_path / "cow")
    fingerprints.add(load("folder", base_datadir=tmp_path).fingerprint)
    assert len(fingerprints) == 5


@pytest.mark.parametrize(
    ("size", "asked", "given"),
    [((12, 12), None, 12), ((64, 64), None, 64), ((65, 65), None, 32), ((12, 40), None, 32), ((12, 40), 16, 16)],
)
def test_folder_image_size(tmp_path, size, asked, given):
    dataset = load("folder", base_datadir=tree(tmp_path, images=2, height=size[0], width=size[1]), image_size=asked)
    assert dataset.task.domain.shape == (3, given, given)


def test_folder_of_mixed_sizes_is_cropped_about_the_centre(tmp_path):
    tree(tmp_path, images=3)
    wide = np.zeros((40, 120, 3), np.uint8)
    wide[:, 40:80] = 200
    for c in ("ant", "bee", "cat"):
        for i in range(3):
            Image.fromarray(wide + np.uint8(i)).save(tmp_path / c / f"wide{i}.bmp")
    dataset = load("folder", base_datadir=tmp_path)
    images = torch.cat([split.take(range(len(split))).examples for split in splits(dataset).values()])
    constant = {int(image.max() * 255) for image in images if image.min() == image.max()}
    assert len(images) == 18 and constant == {200, 201, 202}


@pytest.mark.parametrize("lazy", [False, True])
def test_folder_keeps_copies_together(tmp_path, monkeypatch, lazy):
    if lazy:
        monkeypatch.setattr("data.folder.EAGER", 3)
    tree(tmp_path, images=12)
    for i in range(10):
        shutil.copy(tmp_path / "ant" / f"{i:02}.png", tmp_path / "ant" / f"copy{i}.png")
        shutil.copy(tmp_path / "ant" / f"{i:02}.png", tmp_path / "bee" / f"other{i}.png")
    dataset = load("folder", base_datadir=tmp_path)
    assert_sound(dataset)
    assert sum(map(len, splits(dataset).values())) == 56


def test_folder_channels(tmp_path):
    dataset = load("folder", base_datadir=tree(tmp_path, channels=1), normalize="dataset")
    assert dataset.task.domain.shape == (1, 12, 12) and len(dataset.task.domain.mean) == 1
    assert_sound(dataset)
    save(tmp_path / "ant" / "colour.png", 7)
    assert load("folder", base_datadir=tmp_path).task.domain.shape == (3, 12, 12)


def one_picture(tmp_path, write):
    """The pixels (3, 10, 10) in 0..255 of the image that `write(folder)` saves, as `folder` reads it."""
    for c in ("ant", "bee"):
        (tmp_path / c).mkdir()
        save(tmp_path / c / "other.png", ord(c[0]), 10, 10)
    write(tmp_path / "ant")
    dataset = load("folder", base_datadir=tmp_path, image_size=10)
    known = [noise(ord(c), 10, 10).transpose(2, 0, 1) for c in "ab"]
    images = torch.cat([split.take(range(len(split))).examples for split in splits(dataset).values()])
    (new,) = (i for i in (images * 255).round().numpy() if not any(np.array_equal(i, k) for k in known))
    return new


def test_folder_reads_alpha_on_white(tmp_path):
    rgba = np.zeros((10, 10, 4), np.uint8)
    rgba[:, :5] = (200, 0, 0, 255)
    new = one_picture(tmp_path, lambda folder: Image.fromarray(rgba).save(folder / "x.png"))
    assert new[:, 0, 0].tolist() == [200, 0, 0] and new[:, 0, 9].tolist() == [255] * 3


def test_folder_reads_a_transparent_palette(tmp_path):
    image = Image.new("P", (10, 10), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    image.putpixel((9, 0), 0)
    new = one_picture(tmp_path, lambda folder: image.save(folder / "x.png", transparency=0))
    assert new[:, 5, 5].tolist() == [10, 20, 30] and new[:, 0, 9].tolist() == [255] * 3


def test_folder_scales_sixteen_bits(tmp_path):
    deep = np.full((10, 10), 257 * 100, np.uint16)
    deep[0] = 65535
    new = one_picture(tmp_path, lambda folder: Image.fromarray(deep).save(folder / "x.png"))
    assert (new[:, 1:] == 100).all() and (new[:, 0] == 255).all()


def test_folder_obeys_exif_and_upper_case(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: rotate by 90 degrees clockwise
    flat = np.zeros((10, 10, 3), np.uint8)
    flat[:3] = 255
    new = one_picture(tmp_path, lambda folder: Image.fromarray(flat).save(folder / "X.JPG", exif=exif, quality=100))
    assert new[:, :, -2:].min() > 200 and new[:, :, :5].max() < 60


def test_folder_ignores_files_that_are_not_images(tmp_path):
    before = load("folder", base_datadir=tree(tmp_path)).fingerprint
    (tmp_path / "notes.txt").write_text("not a class")
    (tmp_path / ".git").mkdir()
    (tmp_path / "ant" / ".DS_Store").write_bytes(b"x")
    (tmp_path / "ant" / "._00.png").write_bytes(b"x")
    (tmp_path / "ant" / "labels.csv").write_text("x")
    (tmp_path / "ant" / "nested.png").mkdir()
    (tmp_path / "ant" / "loop").symlink_to(tmp_path)
    assert load("folder", base_datadir=tmp_path).fingerprint == before


def test_folder_refusals(tmp_path):
    missing = tmp_path / "missing"
    assert str(missing) in refusal("folder", missing) and not missing.exists()

    file = save(tmp_path / "file.png", 0)
    assert str(file) in refusal("folder", file)

    flat = tmp_path / "flat"
    save(flat / "a.png", 0)
    assert str(flat) in refusal("folder", flat) and "<class>/<image>" in refusal("folder", flat)

    lone = tree(tmp_path / "lone", classes=["ant"])
    assert str(lone) in refusal("folder", lone) and "two classes" in refusal("folder", lone)

    hollow = tree(tmp_path / "hollow")
    (hollow / "dog").mkdir()
    (hollow / "dog" / "readme.txt").write_text("soon")
    assert str(hollow / "dog") in refusal("folder", hollow)

    loop = tree(tmp_path / "loop")
    (loop / "self").symlink_to(loop)
    assert str(loop / "self") in refusal("folder", loop)

    few = tree(tmp_path / "few", images=1)
    assert str(few) in refusal("folder", few) and "too few" in refusal("folder", few)

    same = tmp_path / "same"
    for name in ("ant/1.png", "ant/2.png", "bee/1.png"):
        save(same / name, 5)
    assert "too few" in refusal("folder", same)


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "webp", "tif", "ppm"])
@pytest.mark.parametrize("length", [0, 10, 0.5, 0.9])
def test_folder_refuses_truncated_images(tmp_path, suffix, length):
    broken = save(tree(tmp_path) / "bee" / f"broken.{suffix}", 1, 40, 40)
    raw = broken.read_bytes()
    broken.write_bytes(raw[: int(length * len(raw)) if length < 1 else length])
    assert str(broken) in refusal("folder", tmp_path)


def test_folder_refuses_other_files_with_the_suffix_of_an_image(tmp_path):
    fake = tree(tmp_path) / "ant" / "fake.png"
    fake.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    assert str(fake) in refusal("folder", tmp_path)
    fake.unlink()
    fake.symlink_to(fake)
    assert str(fake) in refusal("folder", tmp_path)


def test_large_folder_decodes_on_use(tmp_path, monkeypatch):
    whole = load("folder", base_datadir=tree(tmp_path))
    monkeypatch.setattr("data.folder.EAGER", 3)
    lazy = load("folder", base_datadir=tmp_path)
    for split, same in zip(splits(lazy).values(), splits(whole).values(), strict=True):
        assert torch.equal(split.take(range(len(split))).examples, same.take(range(len(same))).examples)
    for path in tmp_path.glob("*/*.png"):
        path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(UsageError, match=str(tmp_path)):
        lazy.private.take([0])


# --- vision ---------------------------------------------------------------------------------------------------------


def mnist_tree(base, train=100, test=20):
    raw = base / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for seed, (prefix, n) in enumerate({"train": train, "t10k": test}.items()):
        pixels = np.random.RandomState(seed).randint(0, 256, (n, 28, 28)).astype(np.uint8)
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(
            np.array([2051, n, 28, 28], ">i4").tobytes() + pixels.tobytes()
        )
        labels = (np.arange(n) % 10).astype(np.uint8)
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(np.array([2049, n], ">i4").tobytes() + labels.tobytes())


def cifar_tree(base, name):
    """The pickles of CIFAR-10 or -100 with other pixels."""
    import torchvision.datasets

    reader = getattr(torchvision.datasets, name.upper())
    folder = base / reader.base_folder
    folder.mkdir(parents=True)
    classes, per_file = {"cifar10": (10, 50), "cifar100": (100, 500)}[name]
    key = "labels" if classes == 10 else "fine_labels"
    for seed, (file, _) in enumerate(reader.train_list + reader.test_list):
        pixels = np.random.RandomState(seed).randint(0, 256, (per_file, 3072)).astype(np.uint8)
        pixels[0] = 77  # one image that is in every file
        (folder / file).write_bytes(
            pickle.dumps({"data": pixels, key: [(i + seed) % classes for i in range(per_file)]}, protocol=2)
        )
    names = [f"class {i}" for i in range(classes)]
    (folder / reader.meta["filename"]).write_bytes(pickle.dumps({reader.meta["key"]: names}, protocol=2))


WNIDS = ("n02", "n01", "n03")


def tiny_tree(base, images=10):
    root = base / "tiny-imagenet-200"
    for c, wnid in enumerate(WNIDS):
        for i in range(images):
            save(root / "train" / wnid / "images" / f"{wnid}_{i}.JPEG", 100 * c + i, 64, 64)
        (root / "train" / wnid / f"{wnid}_boxes.txt").write_text("")
    lines = []
    for i in range(6):
        save(root / "val" / "images" / f"val_{i}.JPEG", 900 + i, 64, 64, channels=1 if i == 0 else 3)
        lines.append(f"val_{i}.JPEG\t{WNIDS[i % 3]}\t0\t0\t62\t62\n")
    (root / "val" / "val_annotations.txt").write_text("".join(lines))
    (root / "wnids.txt").write_text("".join(f"{wnid}\n" for wnid in WNIDS))
    return root


def imagenet_tree(base, images=6):
    for part, n in (("train", images), ("val", 2)):
        for c, wnid in enumerate(sorted(WNIDS)):
            for i in range(n):
                seed = 1000 * (part == "val") + 100 * c + i
                save(base / "imagenet" / part / wnid / f"{part}_{i}.JPEG", seed, 50, 70)


def plant(name, base):
    """A tiny set `name` in its true layout under `base`."""
    if name.startswith("cifar"):
        cifar_tree(base, name)
    else:
        {"mnist": mnist_tree, "imagenet": imagenet_tree, "tiny_imagenet": tiny_tree}[name](base)


@pytest.mark.parametrize(
    ("name", "shape", "mean"),
    [
        ("mnist", (1, 28, 28), 0.1307),
        ("cifar10", (3, 32, 32), 0.4915),
        ("cifar100", (3, 32, 32), 0.5072),
        ("imagenet", (3, 224, 224), 0.485),
        ("tiny_imagenet", (3, 64, 64), 0.485),
    ],
)
def test_vision_sets(tmp_path, name, shape, mean):
    plant(name, tmp_path)
    dataset = load(name, base_datadir=tmp_path, normalize="dataset")
    assert dataset.task.domain.shape == shape and dataset.task.domain.mean[0] == pytest.approx(mean, abs=1e-4)
    assert_sound(dataset)
    assert len(dataset.private) > 2 * len(dataset.public) > 0 and len(dataset.test)
    assert load(name, base_datadir=tmp_path).fingerprint == dataset.fingerprint
    resized = load(name, base_datadir=tmp_path, image_size=20)
    assert resized.task.domain.shape == (shape[0], 20, 20) and resized.fingerprint != dataset.fingerprint
    assert torch.equal(resized.private.labels, dataset.private.labels)
    assert resized.private.take([0, 1]).examples.shape == (2, shape[0], 20, 20)
    # resizing keeps the content
    small = torch.nn.functional.interpolate(dataset.private.take([0]).examples, 20, mode="bilinear", antialias=True)
    assert (small - resized.private.take([0]).examples).abs().mean() < 0.1


def test_mnist_pixels_and_labels(tmp_path):
    mnist_tree(tmp_path)
    dataset = load("mnist", base_datadir=tmp_path)
    expected = torch.from_numpy(np.random.RandomState(1).randint(0, 256, (20, 28, 28)).astype(np.uint8))
    images, labels = dataset.test.take(range(20))
    assert torch.equal(images, expected[:, None].float() / 255) and labels.tolist() == [i % 10 for i in range(20)]
    assert dataset.public.labels.bincount().tolist() == [2] * 10
    assert dataset.private.labels.bincount().tolist() == [8] * 10


class Payload:
    """An object whose unpickling runs code: it creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_a_pickle_that_runs_code_is_refused(tmp_path):
    cifar_tree(tmp_path, "cifar10")
    mark = tmp_path / "ran"
    (tmp_path / "cifar-10-batches-py" / "data_batch_1").write_bytes(pickle.dumps({"data": Payload(mark)}))
    assert "cifar-10-batches-py" in refusal("cifar10", tmp_path)
    assert not mark.exists()


def test_cifar_channels_and_copies(tmp_path):
    cifar_tree(tmp_path, "cifar10")
    dataset = load("cifar10", base_datadir=tmp_path)
    expected = np.random.RandomState(5).randint(0, 256, (50, 3072)).astype(np.uint8)
    expected[0] = 77
    images = dataset.test.take(range(50)).examples
    assert torch.equal(images, torch.from_numpy(expected).view(50, 3, 32, 32).float() / 255)
    # the image that is also in the test file is in neither part of the training files
    assert len(dataset.private) + len(dataset.public) == 245
    assert dataset.notes == ("cifar-10-batches-py: 5 training images dropped as copies of test or public ones",)
    assert dataset.class_names[3] == "class 3"


def test_disk_labels(tmp_path):
    tiny_tree(tmp_path)
    dataset = load("tiny_imagenet", base_datadir=tmp_path)
    assert dataset.class_names == ("n01", "n02", "n03")
    assert dataset.test.labels.tolist() == [sorted(WNIDS).index(WNIDS[i % 3]) for i in range(6)]
    assert dataset.public.labels.bincount().tolist() == [2] * 3
    saved = Image.open(tmp_path / "tiny-imagenet-200" / "val" / "images" / "val_1.JPEG")
    assert torch.equal(
        dataset.test.take([1]).examples[0] * 255, torch.from_numpy(np.array(saved)).permute(2, 0, 1).float()
    )


def test_disk_fingerprint_changes_with_a_file(tmp_path):
    imagenet_tree(tmp_path)
    before = load("imagenet", base_datadir=tmp_path).fingerprint
    file = tmp_path / "imagenet" / "train" / "n01" / "train_0.JPEG"
    raw = bytearray(file.read_bytes())
    raw[-20] ^= 1
    file.write_bytes(raw)
    assert load("imagenet", base_datadir=tmp_path).fingerprint != before


@pytest.mark.parametrize(("name", "folder"), VISION.items())
def test_missing_set_names_the_folder_and_leaves_nothing(tmp_path, name, folder):
    started = time.monotonic()
    missing = tmp_path / "not" / "there"
    for base in (tmp_path, missing):
        line = refusal(name, base)
        assert str(base / folder) in line and "`base_datadir` (BASE_DATADIR)" in line
    assert time.monotonic() - started < 12
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", sorted(VISION))
def test_file_in_place_of_a_base_datadir(tmp_path, name):
    (tmp_path / "file").write_text("")
    assert str(tmp_path / "file") in refusal(name, tmp_path / "file")


def damage(path):
    path.write_bytes(path.read_bytes()[:-18])


@pytest.mark.parametrize("change", [damage, Path.unlink, lambda path: path.write_bytes(b"")])
@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("mnist", "raw/train-images-idx3-ubyte"),
        ("mnist", "raw/t10k-labels-idx1-ubyte"),
        ("cifar10", "data_batch_3"),
        ("cifar100", "meta"),
        ("tiny_imagenet", "val/val_annotations.txt"),
        ("tiny_imagenet", "wnids.txt"),
        ("tiny_imagenet", "train/n01/images/n01_0.JPEG"),
        ("imagenet", "train/n01/train_0.JPEG"),
    ],
)
def test_damaged_set(tmp_path, name, file, change):
    plant(name, tmp_path)
    path = tmp_path / VISION[name] / file
    change(path)
    if path.suffix != ".JPEG":
        assert str(tmp_path / VISION[name]) in refusal(name, tmp_path)
    elif path.exists():
        dataset = load(name, base_datadir=tmp_path)
        with pytest.raises(UsageError, match=path.name):
            assert_sound(dataset)


def test_disk_refusals(tmp_path):
    imagenet_tree(tmp_path)
    val = tmp_path / "imagenet" / "val"
    (val / "n01").rename(val / "n99")
    assert str(val / "n99") in refusal("imagenet", tmp_path)
    shutil.rmtree(val)
    save(val / "ILSVRC2012_val_00000001.JPEG", 0)
    assert str(val) in refusal("imagenet", tmp_path)
    root = tiny_tree(tmp_path)
    (root / "val" / "images" / "val_3.JPEG").unlink()
    assert "val_3.JPEG" in refusal("tiny_imagenet", tmp_path)


@pytest.fixture
def serve(monkeypatch):
    """serve(folder): the URL of a local web server with the files in it."""
    running = []
    monkeypatch.setenv("no_proxy", "127.0.0.1")

    def start(folder):
        class Quiet(http.server.SimpleHTTPRequestHandler):
            def __init__(self, *args):
                super().__init__(*args, directory=folder)

            def log_message(self, *args):
                pass

        running.append(http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet))
        threading.Thread(target=running[-1].serve_forever, kwargs={"poll_interval": 0.01}).start()
        return f"http://127.0.0.1:{running[-1].server_port}/"

    yield start
    for server in running:
        server.shutdown()
        server.server_close()


@pytest.fixture
def tiny_server(tmp_path, monkeypatch, serve):
    """A local server with a zip file of a tiny data set, in place of the published one."""
    root = tiny_tree(tmp_path / "server")
    archive = tmp_path / "server" / "tiny-imagenet-200.zip"
    with zipfile.ZipFile(archive, "w") as out:
        for path in sorted(root.rglob("*")):
            out.write(path, path.relative_to(root.parent))
    monkeypatch.setattr("data.vision.TINY_URL", serve(archive.parent) + archive.name)
    monkeypatch.setattr("data.vision.TINY_MD5", hashlib.md5(archive.read_bytes()).hexdigest())


def test_download_into_a_new_folder(tmp_path, tiny_server):
    base = tmp_path / "new" / "datasets"
    assert_sound(load("tiny_imagenet", base_datadir=base))
    assert [p.name for p in base.iterdir()] == ["tiny-imagenet-200"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["new", "server"]


def test_download_of_something_else_leaves_nothing(tmp_path, monkeypatch, tiny_server):
    monkeypatch.setattr("data.vision.TINY_MD5", "0" * 32)
    assert "tiny-imagenet-200" in refusal("tiny_imagenet", tmp_path / "new")
    assert [p.name for p in tmp_path.iterdir()] == ["server"]


def test_mnist_download(tmp_path, monkeypatch, serve, capsys):
    from torchvision.datasets import MNIST

    mnist_tree(tmp_path / "server")
    raw = tmp_path / "server" / "MNIST" / "raw"
    resources = []
    for path in sorted(raw.iterdir()):
        packed = gzip.compress(path.read_bytes())
        path.with_name(f"{path.name}.gz").write_bytes(packed)
        resources.append((f"{path.name}.gz", hashlib.md5(packed).hexdigest()))
    monkeypatch.setattr(MNIST, "mirrors", [serve(raw)])
    monkeypatch.setattr(MNIST, "resources", resources)
    (tmp_path / "base").mkdir()
    assert len(load("mnist", base_datadir=tmp_path / "base").test) == 20
    assert [p.name for p in (tmp_path / "base").iterdir()] == ["MNIST"]
    assert capsys.readouterr().out == ""


def test_silent_server_is_given_up(tmp_path, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr("data.vision.PATIENCE", 0.3)
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        monkeypatch.setattr("data.vision.TINY_URL", f"http://127.0.0.1:{server.getsockname()[1]}/tiny.zip")
        started = time.monotonic()
        assert "BASE_DATADIR" in refusal("tiny_imagenet", tmp_path)
        assert time.monotonic() - started < 5
    assert not os.listdir(tmp_path)


# --- victims and public data ----------------------------------------------------------------------------------------

CHOICES = [(victims, public) for victims in ("all", "tuning", "reporting") for public in ("same", "other", "noise")]


def contents(split):
    return {image.numpy().tobytes() for image in split.take(range(len(split))).examples}


@pytest.mark.parametrize("name", ["photos", "leaves", "faces", "folder", "mnist", "cifar10", "imagenet"])
def test_tuning_and_reporting_victims_share_no_image_with_any_other_split(tmp_path, monkeypatch, name):
    if name == "folder":
        for i in range(9):
            shutil.copy(tree(tmp_path) / "ant" / f"0{i % 8}.png", tmp_path / "bee" / f"copy{i}.png")
    elif name in VISION:
        plant(name, tmp_path)
    elif name == "leaves":
        monkeypatch.setattr("data.leaves.COUNTS", {"private": 60, "public": 30, "test": 20})
    whole, tuning, reporting = (
        load(name, base_datadir=tmp_path, image_size=16, victims=victims) for victims in ("all", "tuning", "reporting")
    )
    parts = [contents(s) for s in (tuning.private, reporting.private, whole.public, whole.test)]
    assert all(parts) and len(set.union(*parts)) == sum(map(len, parts))
    assert len({whole.fingerprint, tuning.fingerprint, reporting.fingerprint}) == 3
    for dataset in (tuning, reporting):
        assert_sound(dataset)
        assert dataset.task == whole.task and dataset.notes[:-1] == whole.notes
        assert contents(dataset.public) == parts[2] and contents(dataset.test) == parts[3]
    if name != "photos":
        assert parts[0] | parts[1] == contents(whole.private)
        assert len(tuning.private) + len(reporting.private) == len(whole.private)
    again = load(name, base_datadir=tmp_path, image_size=16, victims="tuning")
    assert again.fingerprint == tuning.fingerprint and contents(again.private) == parts[0]


@given(st.lists(st.integers(0, 5), max_size=60))
def test_halves_of_each_class_differ_by_at_most_one_image(labels):
    tuning, reporting = halves(torch.tensor(labels, dtype=torch.int64))
    assert sorted(torch.cat([tuning, reporting]).tolist()) == list(range(len(labels)))
    assert tuning.tolist() == sorted(tuning.tolist()) and reporting.tolist() == sorted(reporting.tolist())
    counts = [torch.tensor(labels, dtype=torch.int64)[half].bincount(minlength=6) for half in (tuning, reporting)]
    assert (counts[0] - counts[1]).abs().max() <= 1 and 0 <= len(reporting) - len(tuning) <= 1


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 9)), max_size=60))
def test_copies_go_to_one_half(images):
    labels, copies = torch.tensor([y for y, _ in images], dtype=torch.int64), [key for _, key in images]
    tuning, reporting = halves(labels, copies)
    assert sorted(torch.cat([tuning, reporting]).tolist()) == list(range(len(images)))
    assert not {copies[i] for i in tuning} & {copies[i] for i in reporting}


def test_the_fingerprint_changes_with_every_choice(photos):
    options = {"base_datadir": Path("nowhere")}
    chosen = [load("photos", **options, victims=victims, public=public) for victims, public in CHOICES]
    assert len({dataset.fingerprint for dataset in chosen}) == len(CHOICES)
    assert chosen[0].fingerprint == photos.fingerprint and not chosen[0].notes
    assert [len(dataset.notes) for dataset in chosen] == [0, 1, 1, 1, 2, 2, 1, 2, 2]
    assert all(torch.equal(dataset.test.labels, photos.test.labels) for dataset in chosen)


@pytest.mark.parametrize("name", ["photos", "leaves", "faces"])
def test_other_public_images_are_of_classes_without_victims(name):
    whole, other = (load(name, base_datadir=Path("nowhere"), public=public) for public in ("same", "other"))
    assert set(other.private.labels.tolist()) == set(range(0, whole.task.num_classes, 2))
    assert set(other.public.labels.tolist()) == set(range(1, whole.task.num_classes, 2))
    for split, of_all, parity in ((other.private, whole.private, 0), (other.public, whole.public, 1)):
        expected = of_all.take((of_all.labels % 2 == parity).nonzero().flatten()[:20])
        assert all(torch.equal(a, b) for a, b in zip(split.take(range(20)), expected, strict=True))
    assert other.task == whole.task


def test_other_public_images_need_classes_of_their_own(tmp_path):
    tree(tmp_path, classes=["ant"])
    save(tmp_path / "bee" / "only.png", 777)  # private, so that there is no public image of its class
    assert "`public=other`" in refusal("folder", tmp_path, public="other")


def test_selected_images_keep_their_names(tmp_path):
    dataset = load("folder", base_datadir=tree(tmp_path), victims="reporting")
    for name, image in zip(dataset.private.names, dataset.private.take(range(6)).examples, strict=True):
        file = torch.from_numpy(np.array(Image.open(tmp_path / name))).permute(2, 0, 1)
        assert torch.equal((image * 255).round().to(torch.uint8), file)


def test_noise_as_public_images_leaves_the_task_as_it_is():
    options = {"base_datadir": Path("nowhere"), "normalize": "dataset", "image_size": 16}
    same, noise = (load("photos", **options, public=public) for public in ("same", "noise"))
    assert noise.task == same.task and torch.equal(noise.private.labels, same.private.labels)
    images, labels = noise.public.take(range(1024))
    assert images.shape == (1024, 3, 16, 16) and len(contents(noise.public)) == 1024
    counts = torch.histc(images * 255, 256, -0.5, 255.5)
    assert (counts / counts.mean() - 1).abs().max() < 5 * counts.mean() ** -0.5  # uniform, to five sigma
    assert labels.bincount(minlength=8).min() > 80  # 128 in the mean, sigma 10.6
    a, b = images.flatten()[:-1] - 0.5, images.flatten()[1:] - 0.5
    assert (a * b).mean().abs() < 5 / 12 / len(a) ** 0.5


def test_choices_out_of_range(tmp_path):
    assert "`victims=some`" in refusal("photos", tmp_path, victims="some")
    assert "`public=none`" in refusal("photos", tmp_path, public="none")
    for file, seed in (("ant/0.png", 0), ("ant/1.png", 1), ("bee/0.png", 0)):  # one private image and its copy
        save(tmp_path / file, seed)
    assert "`victims=tuning`" in refusal("folder", tmp_path, victims="tuning")


# --- photos: victims that do not overlap ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "digests"),
    [
        (16, ("287a12e3b1299f08", "c25b5232e03dbef7", "cc582eb24e7a8bf3")),
        (32, ("91dcaaaf948c9647", "3e9a701a71fbfec5", "405ef345befc2f36")),
    ],
)
def test_photos_crops_of_all_victims_stay_what_they_were(size, digests):
    """Published numbers stand on these windows."""
    dataset = load("photos", base_datadir=Path("nowhere"), image_size=size)
    for split, digest in zip(splits(dataset).values(), digests, strict=True):
        windows = repr([tuple(map(int, window)) for window in split.pixels.sources])
        assert hashlib.sha256(windows.encode()).hexdigest()[:16] == digest


@pytest.mark.parametrize("size", [8, 16, 32, 64, 224])
def test_photos_victims_share_no_pixel(photos, size):
    chosen = [
        load("photos", base_datadir=Path("nowhere"), image_size=size, victims=v).private
        for v in ("tuning", "reporting")
    ]
    pictures = [np.zeros((1500, 1500), dtype=int) for _ in photos.class_names]
    for split in chosen:
        assert len(split.labels.unique()) == 8
        for label, (photo, left, top, side) in zip(split.labels.tolist(), split.pixels.sources, strict=True):
            assert label == photo
            pictures[photo][top : top + side, left : left + side] += 1
    assert all(picture.max() == 1 for picture in pictures)
    if size == 32:
        for split in chosen:
            scales = np.bincount([side // size for *_, side in split.pixels.sources])
            assert len(split) > 200 and scales[1] > scales[2] > scales[4] > 4 and len(scales) == 5


def test_photos_victims_lie_in_tiles_of_their_own(altered, monkeypatch):
    original = load
    reached = {}
    for victims in ("tuning", "reporting"):
        monkeypatch.setattr(f"{__name__}.load", lambda *a, v=victims, **k: original(*a, **k, victims=v))
        reached[victims] = tiles_reached(altered(paint))["private"]
    assert reached == {
        half: {tile for tile in range(16) if sum(divmod(tile, 4)) % 4 == diagonal}
        for half, diagonal in (("tuning", 0), ("reporting", 2))
    }


@given(
    st.integers(0, 50),
    st.integers(0, 50),
    st.integers(0, 90),
    st.integers(0, 90),
    st.integers(4, 40),
    st.integers(0, 99),
)
def test_packed_windows_are_disjoint(left, top, width, height, smallest, seed):
    sides = [smallest, 2 * smallest, 4 * smallest]
    windows = _pack(left, top, left + width, top + height, sides, np.random.RandomState(seed))
    covered = np.zeros((200, 200), dtype=int)
    for x, y, side in windows:
        assert side in sides and x >= left and y >= top and x + side <= left + width and y + side <= top + height
        covered[y : y + side, x : x + side] += 1
    assert covered.max() <= 1 and bool(windows) == (min(width, height) >= smallest)


# --- leaves ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def leaves():
    return load("leaves", base_datadir=Path("nowhere"))


def test_leaves_are_drawn_when_they_are_taken(monkeypatch):
    drawn = []
    monkeypatch.setattr("data.leaves._leaves", lambda split, size, index: drawn.append(index) or torch.zeros(3, 32, 32))
    dataset = load("leaves", base_datadir=Path("nowhere"), normalize="dataset")
    assert [len(split) for split in splits(dataset).values()] == [2000, 1000, 500] and not drawn
    dataset.test.take([3, 1])
    assert drawn == [3, 1]


def test_leaves_are_independent_images_of_ten_classes(leaves):
    assert leaves.task.num_classes == 10 and leaves.task.domain.shape == (3, 32, 32)
    assert leaves.private.labels.bincount().tolist() == [200] * 10
    some = torch.arange(40)
    images = torch.cat([split.take(some).examples for split in splits(leaves).values()])
    assert len({image.numpy().tobytes() for image in images}) == 120
    assert torch.equal(leaves.private.take([7, 3]).examples, images[:40][[7, 3]])
    centred = (images - images.mean(0)).flatten(1)
    correlation = torch.corrcoef(centred).fill_diagonal_(0)
    assert correlation.abs().max() < 0.9  # near copies are at 1
    again = load("leaves", base_datadir=Path("elsewhere"), image_size=32)
    assert again.fingerprint == leaves.fingerprint
    assert leaves.fingerprint != load("leaves", base_datadir=Path("nowhere"), image_size=33).fingerprint


def test_leaves_stay_what_they_were(leaves):
    """A change of these pixels needs a new VERSION."""
    images = leaves.private.take(range(4)).examples
    torch.testing.assert_close(
        images.mean((1, 2, 3)), torch.tensor([0.5386, 0.3618, 0.3176, 0.3889]), atol=1e-3, rtol=0
    )


@settings(max_examples=25, deadline=None)
@given(st.integers(8, 96), st.integers(0, 499), st.integers(0, 2))
def test_leaves_at_every_size(size, index, split):
    image = data.leaves._leaves(split, size, index)
    assert image.shape == (3, size, size) and image.dtype == torch.uint8 and image.float().std() > 1
    assert torch.equal(image, data.leaves._leaves(split, size, index))
    assert not torch.equal(image, data.leaves._leaves(split, size, index + 10))
    assert not torch.equal(image, data.leaves._leaves(split + 1, size, index))


@settings(max_examples=25, deadline=None)
@given(st.integers(8, 40), st.integers(0, 10**6))
def test_front_leaf_is_the_last_that_contains_the_sample(n, seed):
    rng = np.random.RandomState(seed)
    x, y, r = data.leaves._places(n, rng)
    shapes = data.leaves._Shapes(len(r), rng)
    expected = np.zeros((n, n), dtype=int)
    for k in range(len(r)):
        columns, rows = ((np.arange(n) + 0.5 - z[k]) / r[k] for z in (x, y))
        inside = shapes.contains(np.array([k]), columns[None].astype(np.float32), rows[None].astype(np.float32))[0]
        assert not inside[(columns**2 + rows[:, None] ** 2) > 1.001].any(), "a leaf reaches beyond its radius"
        expected[inside] = k
    assert np.array_equal(data.leaves._front(n, x, y, r, shapes), expected)


def test_radii_of_leaves_follow_an_inverse_cube():
    """Of leaves whose centre is in the image, which the borders do not select by size."""
    r = []
    for seed in range(60):
        x, y, radius = data.leaves._places(64, np.random.RandomState(seed))
        r.append(radius[(x >= 0) & (x < 64) & (y >= 0) & (y < 64)])
    r = np.sort(np.concatenate(r))
    low, high = data.leaves.MIN_RADIUS, data.leaves.MAX_RADIUS * 64
    expected = (low**-2 - r**-2) / (low**-2 - high**-2)
    empirical = (np.arange(len(r)) + 0.5) / len(r)
    assert len(r) > 5000 and np.abs(expected - empirical).max() < 1.95 / len(r) ** 0.5  # Kolmogorov-Smirnov, p = .001


def test_leaves_have_the_statistics_of_photographs(leaves):
    images = leaves.private.take(range(400)).examples
    variation, low, high = total_variation(images.numpy())
    assert 0.12 < low < variation < high < 0.15
    for window in (True, False):
        slope, low, high = spectrum_slope(images.numpy(), window)
        assert -2.2 < low < slope < high < -1.8
    mean, std = data.leaves.STATISTICS
    torch.testing.assert_close(images.mean((0, 2, 3)), torch.tensor(mean), atol=0.03, rtol=0)
    torch.testing.assert_close(images.std((0, 2, 3)), torch.tensor(std), atol=0.02, rtol=0)


def test_statistics_of_images_with_known_ones():
    rng = np.random.RandomState(0)
    images = rng.uniform(size=(300, 3, 32, 32))
    tv = total_variation(images)
    assert tv[1] < 2 / 3 < tv[2]  # E|u - v| = 1/3 along each axis
    assert tv[0] == pytest.approx(float(ImageDomain((3, 32, 32), (0,) * 3, (1,) * 3).regularizer(torch.tensor(images))))
    slope, low, high = spectrum_slope(images, window=False)
    assert low < slope < high and abs(slope) < 0.05  # white
    assert 0 < spectrum_slope(images)[0] < 0.1  # the subtracted mean lowers the power of the first rings
    axis = np.fft.fftfreq(32)
    amplitude = 1 / np.hypot(axis[:, None], axis).clip(1 / 32)
    images = np.fft.ifft2(np.fft.fft2(images - 0.5) * amplitude).real
    assert spectrum_slope(images, window=False)[0] == pytest.approx(-2, abs=0.15)


# --- faces ----------------------------------------------------------------------------------------------------------


def test_faces():
    dataset = load("faces", base_datadir=Path("nowhere"))
    assert_sound(dataset)
    assert dataset.class_names == ("face", "other") and dataset.task.domain.shape == (1, 25, 25)
    assert [split.labels.bincount().tolist() for split in splits(dataset).values()] == [[50, 47], [25, 23], [25, 24]]
    assert dataset.notes == ("faces: 6 pictures without contrast left out",)
    file = (np.load(skimage_photographs() / "lfw_subset.npy") * 255).round()
    for split in splits(dataset).values():
        for index, image, label in zip(split.pixels.sources, *split.take(range(len(split))), strict=True):
            assert label == (index >= 100) and np.array_equal(image[0].numpy() * 255, file[index])
    large = load("faces", base_datadir=Path("nowhere"), image_size=32)
    assert large.task.domain.shape == (1, 32, 32) and large.fingerprint != dataset.fingerprint
    assert torch.equal(large.private.labels, dataset.private.labels)


@pytest.mark.parametrize("content", [None, "zeros", "range", "pickle", "text", "nan"])
def test_faces_without_their_file(tmp_path, monkeypatch, content):
    location = type("Package", (), {"submodule_search_locations": [str(tmp_path)]})
    monkeypatch.setattr("data.faces.find_spec", lambda name: location)
    (tmp_path / "data").mkdir()
    file = tmp_path / "data" / "lfw_subset.npy"
    if content == "text":
        file.write_text("none")
    elif content is not None:
        arrays = {
            "zeros": np.zeros((3, 25, 25)),
            "range": np.full((200, 25, 25), 2.0),
            "pickle": np.array([Path("x")], dtype=object),
            "nan": np.full((200, 25, 25), np.nan),
        }
        np.save(file, arrays[content], allow_pickle=True)
    line = refusal("faces", tmp_path)
    assert str(file) in line and "scikit-image" in line


# --- partition ------------------------------------------------------------------------------------------------------


def split_among(labels, clients, n, scheme, seed=0, beta=0.5, classes=2):
    return partition(torch.as_tensor(labels), clients, n, scheme, beta, classes, torch.Generator().manual_seed(seed))


@st.composite
def cases(draw):
    labels = torch.tensor(draw(st.lists(st.integers(0, 5), min_size=1, max_size=80)))
    clients = draw(st.integers(1, len(labels)))
    n = draw(st.none() | st.integers(1, len(labels) // clients))
    smallest = n or len(labels) // clients
    return {
        "labels": labels,
        "clients": clients,
        "n": n,
        "scheme": draw(st.sampled_from(["iid", "dirichlet", "classes"])),
        "seed": draw(st.integers(0, 2**40)),
        "beta": draw(st.sampled_from([1e-300, 1e-3, 0.1, 1.0, 1e6])),
        "classes": draw(st.integers(1, min(len(labels.unique()), smallest))),
    }


@settings(max_examples=150, deadline=None)
@given(cases())
def test_partition(case):
    clients = split_among(**case)
    together = torch.cat(clients)
    total = len(case["labels"])
    assert len(clients) == case["clients"] and together.dtype == torch.int64
    assert len(together.unique()) == len(together) and together.min() >= 0 and together.max() < total
    sizes = [len(own) for own in clients]
    if case["n"] is None:
        assert len(together) == total and max(sizes) - min(sizes) <= 1 and min(sizes) > 0
    else:
        assert sizes == [case["n"]] * case["clients"]
    again = split_among(**case)
    assert all(torch.equal(a, b) for a, b in zip(clients, again, strict=True))


@given(st.integers(1, 60), st.integers(1, 12), st.integers(0, 2**40), st.data())
@settings(deadline=None)
def test_iid_is_consecutive_slices_of_one_permutation(total, clients, seed, data):
    if clients <= total:
        n = data.draw(st.integers(1, total // clients))
        order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
        for k, own in enumerate(split_among([0] * total, clients, n, "iid", seed)):
            assert torch.equal(own, order[k * n : (k + 1) * n])


def test_schemes_differ_by_seed():
    labels = torch.arange(1000) % 10
    for scheme in ("iid", "dirichlet", "classes"):
        first, second = (split_among(labels, 10, 20, scheme, seed) for seed in (0, 1))
        assert not all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_beta_sets_the_skew():
    labels = torch.arange(20_000) % 10

    def largest_share(beta):
        clients = split_among(labels, 100, 50, "dirichlet", beta=beta)
        return np.mean([labels[own].bincount(minlength=10).max() / 50 for own in clients])

    assert largest_share(0.01) > 0.9 > 0.7 > largest_share(0.5) > 0.3 > largest_share(1000)


@pytest.mark.parametrize("clients", [5, 10, 50])
@pytest.mark.parametrize("n", [20, None])
def test_classes_are_distributed_evenly(clients, n):
    labels = torch.arange(1000) % 10
    parts = split_among(labels, clients, n, "classes", classes=2)
    assert all(sorted(labels[own].bincount()[labels[own].unique()].tolist()) == [len(own) // 2] * 2 for own in parts)
    holders = torch.stack([labels[own].bincount(minlength=10) > 0 for own in parts]).sum(0)
    assert holders.tolist() == [clients * 2 // 10] * 10


def test_exhausted_classes_are_replaced():
    labels = [0] * 97 + [1, 2, 3]
    for scheme in ("dirichlet", "classes"):
        clients = split_among(labels, 10, 10, scheme, beta=0.05)
        assert sorted(torch.cat(clients).tolist()) == list(range(100))


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"clients": 0}, "`clients=0`"),
        ({"clients": 11, "n": None}, "`clients=11`"),
        ({"n": 0}, "`client_images=0`"),
        ({"n": 6}, "`clients` or `client_images`"),
        ({"scheme": "dirichlet", "beta": 0.0}, "`beta=0.0`"),
        ({"scheme": "dirichlet", "beta": float("nan")}, "`beta=nan`"),
        ({"scheme": "dirichlet", "beta": float("inf")}, "`beta=inf`"),
        ({"scheme": "classes", "classes": 0}, "`classes_per_client=0`"),
        ({"scheme": "classes", "classes": 3}, "`classes_per_client=3`"),
        ({"scheme": "classes", "classes": 2, "n": 1}, "`classes_per_client=2`"),
        ({"scheme": "sorted"}, "`partition=sorted`"),
    ],
)
def test_partition_refusals(wrong, named):
    with pytest.raises(UsageError, match=named) as caught:
        split_among(**{"labels": [0, 1] * 5, "clients": 2, "n": 5, "scheme": "iid", **wrong})
    assert "\n" not in str(caught.value)
