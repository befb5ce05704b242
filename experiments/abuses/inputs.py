"""Groups b, c and e: images, weights, CIFAR batches and generators that are damaged, hostile or merely odd."""

import functools
import io
import json
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save, save_file

import models
from core.protocol import Batch
from experiments.abuses import damage
from experiments.abuses.harness import Case
from experiments.abuses.runs import run_here
from models.generators import store

SIDE = 16
BASE = ("baseline", "--trials", "2", "--jobs", "1", "--image-size", str(SIDE), "--model", "cnn", "--out", "@/out")
TREE = (*BASE, "--dataset", "folder", "--base-datadir", "@/images")
HERE = {"CHECKPOINTS": "checkpoints"}
FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF", "PPM")
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "I", "F", "I;16")
NAMES = ("\n.png", "\x1b[31m.png", "a\xffb.png", "\u202egnp.x", "-rf.png", "a b.png", "\xfc.png", ".png")
NAMES += ("a" * 250 + ".png",)


class Evil:
    """Runs a command when it is unpickled."""

    def __reduce__(self) -> tuple:
        return os.system, ("touch executed",)


def tree(folder: Path, classes: int = 2, each: int = 8) -> Path:
    """A small tree of images, of which the first may be damaged."""
    rng = np.random.RandomState(0)
    for c in range(classes):
        (folder / "images" / f"c{c}").mkdir(parents=True)
        for i in range(each):
            pixels = rng.randint(0, 255, (SIDE, SIDE, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "images" / f"c{c}" / f"{i}.png")
    return folder / "images" / "c0" / "0.png"


def images() -> Iterator[Case]:
    """Group b."""
    for name, how in damage.FILES.items():
        yield Case("b", f"image {name}", TREE, prepare=lambda folder, how=how: how(tree(folder)))
    for form in FORMATS:
        for share in (0.05, 0.2, 0.5, 0.8, 0.97):
            for kind in ("cut", "flip"):
                how = damage.cut(share) if kind == "cut" else damage.flip(share)
                prepare = functools.partial(_image, form=form, mode="RGB", how=how)
                yield Case("b", f"{form} {kind} at {share}", TREE, prepare=prepare)
    for mode in MODES:
        for form in ("PNG", "TIFF"):
            yield Case("b", f"{form} of mode {mode}", TREE, prepare=functools.partial(_image, form=form, mode=mode))
    for name in NAMES:
        for c in (False, True):
            yield Case("b", f"{'class' if c else 'file'} named {name[:20]!r}", TREE, prepare=_named(name, c))
    for classes, each in ((0, 0), (1, 8), (2, 0), (2, 1), (2, 2), (2, 3), (20, 1), (30, 2), (3, 2)):
        words = (*TREE, "--batch-size", "2")
        yield Case("b", f"{classes} classes of {each}", words, prepare=_sized(classes, each))
        for attack in ("rtf", "ggl", "analytic"):
            more = (attack, *words[1:], "--model", "cnn" if attack != "analytic" else "fc2")
            few = ("--iterations", "3", "--restarts", "1", "--comparison-iterations", "0") if attack == "ggl" else ()
            yield Case("b", f"{attack} on {classes} classes of {each}", (*more, *few), prepare=_sized(classes, each))
        yield Case("b", f"fed on {classes} classes of {each}", TREE, "fed", prepare=_sized(classes, each))
    for attack in ("rtf", "ggl", "ig_single"):
        few = () if attack == "rtf" else ("--iterations", "3", "--restarts", "1")
        words = (attack, *TREE[1:], *few, *(("--comparison-iterations", "0") if attack == "ggl" else ()))
        yield Case("b", f"{attack} on black images", words, prepare=_black)
    for mode in (0o000, 0o444):
        yield Case("b", f"mode {mode:o}", TREE, prepare=lambda folder, mode=mode: tree(folder).chmod(mode))


def weights() -> Iterator[Case]:
    """Group c."""
    words = (*BASE, "--weights")
    for suffix in ("pt", "safetensors"):
        for name, how in damage.FILES.items():
            prepare = functools.partial(_weights, suffix=suffix, how=how)
            yield Case("c", f"{suffix} {name}", (*words, f"@/w.{suffix}"), prepare=prepare)
    for name, make in WEIGHTS.items():
        prepare = functools.partial(_state, make=make)
        yield Case("c", f"weights: {name}", (*words, "@/w.pt"), prepare=prepare)
    cifar = (*BASE, "--dataset", "cifar10", "--base-datadir", "@/data")
    for file in ("data_batch_1", "test_batch", "batches.meta"):
        for name, how in damage.FILES.items():
            prepare = functools.partial(_cifar, file=file, how=how)
            yield Case("c", f"cifar {file} {name}", cifar, prepare=prepare)
    for name, labels in CIFAR_LABELS.items():
        yield Case("c", f"cifar labels {name}", cifar, prepare=functools.partial(_cifar, labels=labels))


def generators(own_folder: Path) -> Iterator[Case]:
    """Group e. own_folder: where a generator is trained that a run makes for itself."""
    words = ("ggl", *BASE[1:], "--iterations", "3", "--restarts", "1", "--comparison-iterations", "0")
    words += ("--latent-dim", "4", "--generator-file", "@/g")
    for file in ("generator.safetensors", "manifest.json"):
        for name, how in damage.FILES.items():
            prepare = functools.partial(_generator, edit=lambda folder, file=file, how=how: how(folder / file))
            yield Case("e", f"{file} {name}", words, prepare=prepare)
    values = (0, -1, 10**12, 1e400, None, "x", [], {}, True, 10**400)
    for key in ("classes", "image_shape", "data", "checksum"):
        for value in values:
            yield Case("e", f"{key} {str(value)[:20]}", words, prepare=_edited({key: value}))
    for key in ("kind", "latent_dim", "steps", "width", "output_normalization", "seed", "batch_size", "unknown"):
        for value in values:
            yield Case("e", f"config {key} {str(value)[:20]}", words, prepare=_configured({key: value}))
    yield Case("e", "weights of NaN", words, prepare=functools.partial(_generator, edit=_not_finite))
    own = (*words[:-2], "--generator", "vae", "--generator-steps", "2")
    run_here("grad", own, own_folder.with_name("first"), {"CHECKPOINTS": str(own_folder)})
    for file in ("generator.safetensors", "manifest.json", "state.pt"):
        for name, how in list(damage.FILES.items())[::3]:
            yield Case("e", f"own {file} {name}", own, prepare=_own(own_folder, file, how), environment=HERE)


# --- files ----------------------------------------------------------------------------------------------------------


def _image(folder: Path, form: str, mode: str, how: damage.Damage = lambda path: None) -> None:
    first = tree(folder)
    path = first.with_suffix({"JPEG": ".jpg", "WEBP": ".webp", "TIFF": ".tiff"}.get(form, f".{form.lower()}"))
    picture = Image.effect_noise((40, 30), 60).convert("RGB")
    try:
        picture = Image.new("I;16", (40, 30), 999) if mode == "I;16" else picture.convert(mode)
        picture.save(path, form)
    except (OSError, ValueError):  # the format has no such mode
        return
    how(path)


def _named(name: str, is_class: bool) -> Callable[[Path], None]:
    def prepare(folder: Path) -> None:
        first = tree(folder)
        raw = os.fsencode(name) if "\xff" not in name else name.encode("latin1")
        target = first.parent if is_class else first
        os.rename(target, os.path.join(os.fsencode(target.parent), raw))

    return prepare


def _sized(classes: int, each: int) -> Callable[[Path], None]:
    def prepare(folder: Path) -> None:
        (folder / "images").mkdir(exist_ok=True)
        tree(folder, classes, each)

    return prepare


def _black(folder: Path) -> None:
    tree(folder)
    for number, path in enumerate(sorted(folder.rglob("*.png"))):  # files differ, pixels do not
        Image.new("RGB", (SIDE, SIDE)).save(path, pnginfo=_text(str(number)))


def _text(words: str) -> object:
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text("number", words)
    return info


@functools.cache
def _cnn() -> dict[str, torch.Tensor]:
    return models.build("cnn", (3, SIDE, SIDE), 8, rng=torch.Generator()).state_dict()


def _weights(folder: Path, suffix: str, how: damage.Damage) -> None:
    path = folder / f"w.{suffix}"
    path.write_bytes(save(_cnn()) if suffix == "safetensors" else _bytes(_cnn()))
    how(path)


def _bytes(content: object, **options: object) -> bytes:
    torch.save(content, buffer := io.BytesIO(), **options)
    return buffer.getvalue()


def _state(folder: Path, make: Callable[[dict[str, torch.Tensor]], object]) -> None:
    made = make(dict(_cnn()))
    (folder / "w.pt").write_bytes(made if isinstance(made, bytes) else _bytes(made))


def _with_first(value: Callable[[torch.Tensor], object]) -> Callable[[dict[str, torch.Tensor]], object]:
    def make(state: dict[str, torch.Tensor]) -> object:
        name = next(iter(state))
        return state | {name: value(state[name])}

    return make


WEIGHTS: dict[str, Callable[[dict[str, torch.Tensor]], object]] = {
    "whole": lambda state: state,
    "legacy": lambda state: _bytes(state, _use_new_zipfile_serialization=False),
    "legacy cut": lambda state: _bytes(state, _use_new_zipfile_serialization=False)[:-50],
    "in a dictionary": lambda state: {"state_dict": state, "epoch": 3},
    "in another dictionary": lambda state: {"net": state},
    "a list": lambda state: list(state.values()),
    "a number": lambda state: 5,
    "nothing": lambda state: {},
    "a module": lambda state: torch.nn.Linear(2, 2),
    "protocol 0": lambda state: pickle.dumps(Evil(), protocol=0),
    "evil": lambda state: damage.EVIL,
    "evil in a zip": lambda state: {"x": Evil()},
    "NaN": _with_first(lambda t: t * torch.nan),
    "infinite": _with_first(lambda t: t + torch.inf),
    "beyond float32": _with_first(lambda t: t.double() + 1e299),
    "integers": _with_first(lambda t: t.int()),
    "complex": _with_first(lambda t: t + 0j),
    "bool": _with_first(lambda t: t > 0),
    "half": _with_first(lambda t: t.half()),
    "sparse": _with_first(lambda t: t.to_sparse()),
    "meta": _with_first(lambda t: t.to("meta")),
    "transposed": _with_first(lambda t: t.flatten()),
    "empty": _with_first(lambda t: t[:0]),
    "a number in it": _with_first(lambda t: 3),
    "one less": lambda state: dict(list(state.items())[1:]),
    "one more": lambda state: state | {"more": torch.ones(1)},
    "a name that colours": lambda state: state | {"\x1b[31mred": torch.ones(1)},
    "a long name": lambda state: state | {"a" * 10_000: torch.ones(1)},
    "names of numbers": lambda state: {3: torch.ones(1)},
}

CIFAR_LABELS: dict[str, object] = {
    "negative": [-1] * 20,
    "too large": [10] * 20,
    "huge": [2**70] * 20,
    "words": ["x"] * 20,
    "floats": [0.5] * 20,
    "NaN": [float("nan")] * 20,
    "none": [],
    "too few": [1] * 3,
    "nested": [[1]] * 20,
    "null": None,
    "a number": 5,
}


def _cifar(
    folder: Path, file: str = "data_batch_1", how: damage.Damage = lambda path: None, labels: object = "right"
) -> None:
    root, rng = folder / "data" / "cifar-10-batches-py", np.random.RandomState(0)
    root.mkdir(parents=True)
    for name in (*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"):
        own = [k % 10 for k in range(20)] if labels == "right" or name != file else labels
        batch = {"data": rng.randint(0, 255, (20, 3072), dtype=np.uint8), "labels": own}
        (root / name).write_bytes(pickle.dumps(batch))
    (root / "batches.meta").write_bytes(pickle.dumps({"label_names": [str(k) for k in range(10)]}))
    how(root / file)


@functools.cache
def _trained(scratch: str) -> Path:
    os.environ["CHECKPOINTS"] = scratch
    public = Batch(torch.rand(12, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 8)
    return store.load_or_train(store.make_config("vae", latent_dim=4, steps=1, width=4), public, 8)[1]


def _generator(folder: Path, edit: Callable[[Path], object]) -> None:
    shutil.copytree(_trained(str(folder.parent / "trained")), folder / "g")
    edit(folder / "g")


def _edited(facts: dict[str, object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "manifest.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | facts))

    return functools.partial(_generator, edit=edit)


def _configured(settings: dict[str, object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "manifest.json"
        facts = json.loads(path.read_text())
        path.write_text(json.dumps(facts | {"config": facts["config"] | settings}))

    return functools.partial(_generator, edit=edit)


def _not_finite(folder: Path) -> None:
    path = folder / store.WEIGHTS
    save_file({n: t * torch.nan if t.is_floating_point() else t for n, t in load_file(path).items()}, path)
    facts = store.manifest(folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    checksum = store._checksum(facts, path.read_bytes())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"checksum": checksum}))


def _own(kept: Path, file: str, how: damage.Damage) -> Callable[[Path], None]:
    """A damaged file in the folder of the generator that a run has made for itself."""

    def prepare(folder: Path) -> None:
        shutil.copytree(kept, folder / "checkpoints")
        for place in (folder / "checkpoints").glob("vae-*"):
            (place / file).touch()
            how(place / file)
            if file == "state.pt":
                (place / store.WEIGHTS).unlink(missing_ok=True)

    return prepare
