"""Trained generators on disk: each is trained once on given public images and loaded from then on.

Each has a folder below checkpoints/, named by everything that the result depends on. It holds generator.safetensors,
manifest.json, samples.png (random images of the first classes, a row for each) and, during training, state.pt, from
which an interrupted training continues.
"""

import contextlib
import hashlib
import inspect
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from safetensors.torch import load as load_tensors
from safetensors.torch import load_file, save_file
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from core.errors import UsageError
from core.paths import ROOT
from core.protocol import Batch, Task
from models.generators import parts, training
from models.generators.base import Generator
from models.generators.parts import KINDS, GeneratorConfig, OutputNormalization
from models.generators.training import train
from utils.files import digest, read_json, write_atomically, write_bytes, write_json

WEIGHTS = "generator.safetensors"
SAMPLED_CLASSES, SAMPLES_PER_CLASS = 10, 10  # rows and columns of samples.png


def checkpoint_dir() -> Path:
    """The folder of all trained generators: $CHECKPOINTS, or checkpoints/ of this repository."""
    return Path(os.environ.get("CHECKPOINTS") or ROOT / "checkpoints")


def make_config(
    kind: str,
    *,
    latent_dim: int = 32,
    steps: int = 0,
    width: int = 0,
    output_normalization: OutputNormalization = "half",
    seed: int = 0,
) -> GeneratorConfig:
    """The configuration of a generator; 0 `steps` or `width` stands for the kind's own default.

    Raises UsageError for an unknown kind.
    """
    _, default_steps, default_width = KINDS.find(kind)
    return GeneratorConfig(kind, latent_dim, steps or default_steps, width or default_width, output_normalization, seed)


def load_or_train(
    config: GeneratorConfig, public: Batch, classes: int, metadata: Mapping[str, Any] | None = None
) -> tuple[Generator, Path]:
    """The generator that `config` describes, trained on exactly these public images, and its folder.

    Trains it only if the folder does not hold it yet; `metadata` (data set, commit) is then added to its manifest. A
    second process that asks for the same generator waits for the first.
    """
    folder = checkpoint_dir() / f"{config.kind}-{_key(config, public, classes)}"
    device = public.examples.device
    with contextlib.suppress(UsageError):  # not trained yet
        return load(folder, device), folder
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):
        with contextlib.suppress(UsageError):  # another process has trained it meanwhile
            return load(folder, device), folder
        for name in (WEIGHTS, "manifest.json", "state.pt", "samples.png"):
            if (folder / name).is_dir():
                raise UsageError(f"{folder / name} is a folder: remove it")
        damaged = (folder / WEIGHTS).exists()
        for name in (WEIGHTS, "manifest.json", "state.pt", "samples.png"):
            if (folder / name).exists() and not (folder / name).is_file():
                (folder / name).unlink()  # a pipe or a socket
        if damaged:
            print(f"the generator in {folder} is damaged and is trained again", file=sys.stderr)
        _train(config, public, classes, folder, metadata or {})
        return load(folder, device), folder


def load(folder: Path, device: torch.device | str = "cpu") -> Generator:
    """The generator in `folder`, in eval mode, without `requires_grad`.

    Raises UsageError if it cannot be read, if its weights are not those it was saved with, or if they are not finite.
    """
    facts = manifest(folder)
    path, config = folder / WEIGHTS, facts["config"]
    damaged = UsageError(
        f"the generator in {folder} is incomplete or damaged: train it again with experiments/prior.sh"
    )
    if not path.is_file():
        raise damaged
    try:
        content = path.read_bytes()
        if facts["checksum"] != _checksum(facts, content):
            raise damaged
        state = load_tensors(content)
        with torch.random.fork_rng(devices=[]):  # the initial weights, which are replaced, are drawn from the stream
            generator = KINDS[config.kind].trainer.generator_class(config, facts["image_shape"], facts["classes"])
        generator.load_state_dict(state)
    except (OSError, SafetensorError, RuntimeError, LookupError, TypeError, ValueError, ArithmeticError):
        raise damaged from None
    if not all(tensor.isfinite().all() for tensor in state.values()):
        raise UsageError(f"the generator in {folder} has weights that are not finite: train another one")
    return generator.to(device).eval().requires_grad_(False)


def _checksum(facts: Mapping[str, Any], content: bytes) -> str:
    """16 hexadecimal digits over the weights and what they belong to: an edited manifest fits no weights."""
    config: GeneratorConfig = facts["config"]
    described = digest([asdict(config), list(facts["image_shape"]), facts["classes"]])
    return hashlib.sha256(described.encode() + content).hexdigest()[:16]


def manifest(folder: Path) -> dict[str, Any]:
    """The facts about the generator in `folder`. Raises UsageError if there is none.

    "config" is its GeneratorConfig, "image_shape" (C, H, W), "classes" their number, "data" the `data_digest` of the
    images it was trained on and "checksum" that of its weights with config, shape and classes. The rest is for
    information: number of images and parameters, last loss, seconds, and the metadata given to `load_or_train`.
    """
    facts = read_json(folder / "manifest.json")
    try:
        shape, config = facts["image_shape"], GeneratorConfig(**facts["config"])
        counts = [*shape, facts["classes"], config.latent_dim, config.steps, config.width, config.batch_size]
        if len(shape) != 3 or not all(type(n) is int and n > 0 for n in counts):
            raise ValueError(f"{counts} are not all positive")
        if config.output_normalization not in get_args(OutputNormalization) or config.kind not in KINDS:
            raise ValueError(f"unknown: {config.output_normalization} or {config.kind}")
        return facts | {
            "image_shape": tuple(shape),
            "config": config,
            "data": str(facts["data"]),
            "checksum": facts["checksum"],
        }
    except (ValueError, LookupError, TypeError):
        raise UsageError(f"{folder} holds no generator: train one with experiments/prior.sh") from None


def check_compatible(folder: Path, task: Task, public: Batch | None = None) -> dict[str, Any]:
    """The manifest of the generator in `folder`.

    Raises UsageError unless the generator can be loaded, makes images of this task's shape and number of classes and,
    if `public` is given, was trained on exactly these images.
    """
    facts = manifest(folder)
    load(folder)  # before anything is written
    shape, classes = facts["image_shape"], facts["classes"]
    if (shape, classes) != (task.domain.shape, task.num_classes):
        expected = "x".join(map(str, task.domain.shape))
        raise UsageError(
            f"the generator in {folder} makes {'x'.join(map(str, shape))} images of {classes} classes, but this task "
            f"has {expected} images of {task.num_classes}: leave out `generator_file`, or train a generator for it"
        )
    if public is not None and facts["data"] != data_digest(public):
        source = facts.get("dataset", "unnamed")
        raise UsageError(
            f"the generator in {folder} was trained on other images ({source}) than this run's public split, and "
            "victims may be among them: leave out `generator_file`, or train one on this split"
        )
    return facts


def load_or_compute(
    name: str, facts: Sequence[Any], compute: Callable[[], dict[str, Tensor]], device: torch.device | str
) -> dict[str, Tensor]:
    """Tensors that depend on `facts` alone, from a folder called after them, or computed once and stored there.

    A second process that asks for the same tensors waits for the first. A damaged file is computed anew. `facts` can
    be written as JSON.
    """
    folder = checkpoint_dir() / f"{name}-{digest([*facts, torch.__version__, str(device)])}"
    file = folder / "network.safetensors"
    if (found := _stored(file, device)) is not None:
        return found
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):
        if (found := _stored(file, device)) is None:
            found = compute()
            if file.exists() and not file.is_file() and not file.is_dir():
                file.unlink()  # a pipe or a socket
            write_atomically(file, partial(save_file, found, metadata={"checksum": _tensors_digest(found)}))
    return found


def _stored(file: Path, device: torch.device | str) -> dict[str, Tensor] | None:
    """The tensors of a file that `load_or_compute` wrote; None if there is none, or if it is damaged."""
    if not file.is_file():
        return None
    try:
        tensors = load_file(file, device=str(device))
        with safe_open(file, "pt") as opened:
            checksum = (opened.metadata() or {}).get("checksum")
    except (OSError, SafetensorError, ValueError, RuntimeError, TypeError, KeyError):
        return None
    return tensors if checksum == _tensors_digest(tensors) else None


def _tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """64 hexadecimal digits that depend on every tensor."""
    hasher = hashlib.sha256()
    for name in sorted(tensors):
        hasher.update(name.encode() + b"\0" + tensors[name].detach().cpu().contiguous().numpy().tobytes())
    return hasher.hexdigest()


def model_digest(model: nn.Module) -> str:
    """64 hexadecimal digits that depend on every parameter and buffer."""
    return _tensors_digest(model.state_dict())


def data_digest(public: Batch) -> str:
    """16 hexadecimal digits that depend on every pixel and label."""
    hasher = hashlib.sha256(public.examples.cpu().numpy().tobytes())
    hasher.update(public.labels.cpu().numpy().tobytes())
    return hasher.hexdigest()[:16]


def _key(config: GeneratorConfig, public: Batch, classes: int) -> str:
    """12 hexadecimal digits that depend on everything a trained generator does, including the code that trains it."""
    modules = (sys.modules[__name__], parts, training, inspect.getmodule(KINDS[config.kind].trainer))
    code = "".join(inspect.getsource(module) for module in modules)
    device = public.examples.device.type
    return digest([asdict(config), classes, data_digest(public), digest(code), torch.__version__, device])


def _train(config: GeneratorConfig, public: Batch, classes: int, folder: Path, metadata: Mapping[str, Any]) -> None:
    """Train a generator and write everything that its folder holds."""
    checkpoint = folder / "state.pt"
    generator, last_loss, seconds = train(config, public, classes, checkpoint)
    tensors = {name: t.detach().cpu().contiguous() for name, t in generator.state_dict().items()}
    if not all(tensor.isfinite().all() for tensor in tensors.values()):
        raise UsageError(f"the training of the {config.kind} generator diverged: its weights are not finite")
    content = save_tensors(tensors)
    write_atomically(folder / "samples.png", partial(_save_samples, generator, classes))
    facts = {
        "config": config,
        "image_shape": list(public.examples.shape[1:]),
        "classes": classes,
        "data": data_digest(public),
        "images": len(public.labels),
        "parameters": sum(p.numel() for p in generator.parameters()),
        "last_loss": last_loss,
        "seconds": round(seconds, 1),
        "torch": torch.__version__,
        **metadata,
    }
    write_json(folder / "manifest.json", facts | {"config": asdict(config), "checksum": _checksum(facts, content)})
    # last: where this file exists, everything else does
    write_bytes(folder / WEIGHTS, content)
    checkpoint.unlink(missing_ok=True)


@torch.no_grad()
def _save_samples(generator: Generator, classes: int, path: Path) -> None:
    """Write a PNG of random images of the first classes, a row for each."""
    from torchvision.utils import save_image

    labels = torch.arange(min(classes, SAMPLED_CLASSES)).repeat_interleave(SAMPLES_PER_CLASS)
    z = torch.randn(len(labels), generator.latent_dim, generator=torch.Generator().manual_seed(0))
    device = next(generator.parameters()).device
    images: Tensor = generator.decode(z.to(device), labels.to(device))
    save_image(images, path, nrow=SAMPLES_PER_CLASS, format="png")
