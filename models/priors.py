"""Priors that are trained: made once from public images, kept on disk, and found again by what they were made of.

Each has a folder below checkpoints/ with generator.safetensors, manifest.json, samples.png (a row of draws for each of
the first classes) and, while training lasts, state.pt to go on from.
"""

import contextlib
import hashlib
import inspect
import json
import math
import os
import pickle
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from federated.wire import Batch, Task, UsageError
from models import trained, vae, wgan
from models.generators import Prior
from models.trained import Normalize, Order, Trainer

SAVE_EVERY = 20.0  # seconds of training a kill may cost
KINDS: dict[str, tuple[type[Prior], type[Trainer], int, int]] = {  # and its own steps and width
    "vae": (vae.VAE, vae.VAETrainer, 2000, 32),
    "wgan": (wgan.WGAN, wgan.WGANTrainer, 20000, 128),
}


def checkpoints() -> Path:
    """Where trained generators are kept: $CHECKPOINTS, or checkpoints/ of this repository."""
    return Path(os.environ.get("CHECKPOINTS") or Path(__file__).resolve().parent.parent / "checkpoints")


def order(
    kind: str, *, dim: int = 32, steps: int = 0, width: int = 0, normalize: Normalize = "half", seed: int = 0
) -> Order:
    """`steps` and `width` 0: the kind's own."""
    *_, own_steps, own_width = KINDS[kind]
    return Order(kind, dim, steps or own_steps, width or own_width, normalize, seed)


def obtain(what: Order, public: Batch, classes: int, about: Mapping[str, Any] | None = None) -> tuple[Prior, Path]:
    """The prior `what` orders, trained on exactly these public images, and its folder: found there, or made now.

    `about` goes into the manifest of one made now.
    """
    home = checkpoints() / f"{what.kind}-{_key(what, public, classes)}"
    if not (home / "generator.safetensors").exists():
        home.mkdir(parents=True, exist_ok=True)
        with FileLock(home / ".lock"):  # a second run waits for the first, and finds what it has made
            if not (home / "generator.safetensors").exists():
                _train(what, public, classes, home, about or {})
    return load(home, public.images.device), home


def load(home: Path, device: torch.device | str = "cpu") -> Prior:
    """The prior kept in folder `home`, in eval mode. Raises UsageError if there is none, or it is damaged."""
    told = manifest(home)
    try:
        with torch.random.fork_rng(devices=[]):  # weights are drawn, only to be replaced
            prior = KINDS[told["order"].kind][0](told["order"], told["image_shape"], told["classes"])
        prior.load_state_dict(load_file(home / "generator.safetensors", device=str(device)))
    except (OSError, SafetensorError, RuntimeError, KeyError, TypeError, ValueError):
        raise UsageError(f"{home} holds no whole generator: make one with experiments/prior.sh") from None
    return prior.to(device).eval().requires_grad_(False)


def manifest(home: Path) -> dict[str, Any]:
    """What is known of the prior in `home`. Raises UsageError where there is none."""
    try:
        told = json.loads((home / "manifest.json").read_text())
        channels, height, width = told["image_shape"]
        return told | {
            "image_shape": (int(channels), int(height), int(width)),
            "classes": int(told["classes"]),
            "order": Order(**told["order"]),
            "data": str(told["data"]),
        }
    except (OSError, ValueError, LookupError, TypeError):
        raise UsageError(f"{home} holds no generator: make one with experiments/prior.sh") from None


def require(home: Path, task: Task, public: Batch | None = None) -> dict[str, Any]:
    """What is known of the prior in `home`. Raises UsageError unless it was made for this task and, if given, of these
    public images."""
    told = manifest(home)
    shape, classes = told["image_shape"], told["classes"]
    if (shape, classes) != (task.image_shape, task.num_classes):
        want = "x".join(map(str, task.image_shape))
        raise UsageError(
            f"the generator in {home} makes {'x'.join(map(str, shape))} images of {classes} classes, "
            f"and this task wants {want} of {task.num_classes}: leave the flag out, or train one for it"
        )
    if public is not None and told["data"] != data_digest(public):
        raise UsageError(
            f"the generator in {home} was trained on other images ({told.get('dataset', 'unnamed')}) than this run's "
            "public split: victims may be among them; leave the flag out, or train one on it"
        )
    return told


def data_digest(public: Batch) -> str:
    """Of every pixel and label."""
    total = hashlib.sha256(public.images.cpu().numpy().tobytes())
    total.update(public.labels.cpu().numpy().tobytes())
    return total.hexdigest()[:16]


def nearest(prior: Prior, images: Tensor, labels: Tensor, steps: int = 500) -> Tensor:
    """The images of `prior` closest to `images` (N, C, H, W) in squared error, by Adam from z = 0 and two other starts:
    what it can do at its best for somebody who sees them."""
    count, rng = len(images), torch.Generator().manual_seed(0)
    starts = [torch.zeros(count, prior.dim), *(torch.randn(count, prior.dim, generator=rng) for _ in range(2))]
    z = torch.cat(starts).to(images).requires_grad_()
    images, labels = images.repeat(len(starts), 1, 1, 1), labels.repeat(len(starts))
    optimizer = torch.optim.Adam([z], lr=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        misfit = (prior.decode(z, labels) - images).square().sum()
        (z.grad,) = torch.autograd.grad(misfit, z)
        optimizer.step()
        schedule.step()
    made = prior.decode(z.detach(), labels)
    best = (made - images).square().flatten(1).sum(1).view(-1, count).argmin(0)
    return made.view(len(starts), count, *made.shape[1:])[best, torch.arange(count)]


def _key(what: Order, public: Batch, classes: int) -> str:
    """Twelve digits over everything a trained generator depends on, the code that trains it included."""
    modules = (sys.modules[__name__], trained, inspect.getmodule(KINDS[what.kind][0]))
    code = "".join(inspect.getsource(module) for module in modules)
    facts = [asdict(what), classes, data_digest(public), hashlib.sha256(code.encode()).hexdigest()]
    facts += [torch.__version__, public.images.device.type]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:12]


def _train(what: Order, public: Batch, classes: int, home: Path, about: Mapping[str, Any]) -> None:
    """Trains to the end, from where an interrupted training left off; on one thread, for more would sum otherwise."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        _train_on_one_thread(what, public, classes, home, about)
    finally:
        torch.set_num_threads(threads)


def _train_on_one_thread(what: Order, public: Batch, classes: int, home: Path, about: Mapping[str, Any]) -> None:
    rng = torch.Generator().manual_seed(what.seed)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(what.seed)
        trainer = KINDS[what.kind][1](what, public, classes)
    parts, state = trainer.stateful(), home / "state.pt"
    done, spent = 0, 0.0
    # whatever a damaged archive makes of itself: training starts anew
    with contextlib.suppress(OSError, RuntimeError, ValueError, EOFError, KeyError, pickle.UnpicklingError):
        saved = torch.load(state, map_location=public.images.device, weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(saved[name])
        done, spent = saved["done"], saved["spent"]
        rng.set_state(saved["rng"].cpu())
    begun = last = time.monotonic()
    title = f"{what.kind} prior, {len(public.labels)} public images"
    loss = math.nan
    pause = 0.2 if sys.stderr.isatty() else 20
    with tqdm(total=what.steps, initial=done, desc=title, unit="step", mininterval=pause, dynamic_ncols=True) as bar:
        for loss in trainer.steps(done, rng):
            done += 1
            bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
            bar.update()
            if time.monotonic() - last > SAVE_EVERY and done < what.steps:
                last = time.monotonic()
                content = {name: part.state_dict() for name, part in parts.items()}
                content |= {"done": done, "spent": spent + last - begun, "rng": rng.get_state()}
                torch.save(content, state.with_suffix(".half"))
                os.replace(state.with_suffix(".half"), state)
    trainer.finish()
    prior = trainer.prior.eval()
    _samples(prior, classes, home / "samples.png")
    told = {
        "order": asdict(what),
        "image_shape": list(public.images.shape[1:]),
        "classes": classes,
        "data": data_digest(public),
        "images": len(public.labels),
        "parameters": sum(p.numel() for p in prior.parameters()),
        "last_loss": loss,
        "seconds": round(spent + time.monotonic() - begun, 1),
        "torch": torch.__version__,
        **about,
    }
    (home / "manifest.json").write_text(json.dumps(told, indent=2) + "\n")
    whole = {name: t.detach().cpu().contiguous() for name, t in prior.state_dict().items()}
    save_file(whole, home / "generator.half")
    os.replace(home / "generator.half", home / "generator.safetensors")  # last: its presence says all is there
    state.unlink(missing_ok=True)


@torch.no_grad()
def _samples(prior: Prior, classes: int, path: Path, each: int = 10) -> None:
    """Random images of the first classes, a row for each."""
    from torchvision.utils import save_image

    labels = torch.arange(min(classes, 10)).repeat_interleave(each)
    z = torch.randn(len(labels), prior.dim, generator=torch.Generator().manual_seed(0))
    device = next(prior.parameters()).device
    save_image(prior.decode(z.to(device), labels.to(device)), path, nrow=each)
