"""Trains a generative prior on the public split of a data set, and says how near it comes to images it has not seen."""

import time
from pathlib import Path
from typing import Literal

import torch

import data
from federated.wire import Batch
from models import priors
from utils.cli import ROOT, hp, settings
from utils.evaluator import psnr
from utils.run import choose_device, commit, page, public_images


@settings
class Flags:
    dataset: str = hp("photos", "whose public images it is trained on")
    base_datadir: Path = hp(ROOT / "datasets", "where data sets lie; for folder, the <class>/<image> tree itself")
    image_size: int | None = hp(None, "side in pixels; default: the data set's own")
    generator: Literal["vae", "wgan"] = hp("vae", "minutes on one core, or hours")
    latents: int = hp(32, "of an image", least=1)
    steps: int = hp(0, "of its optimiser; 0: its own default", least=0)
    width: int = hp(0, "channels before its last layer; 0: its own default", least=0)
    units: Literal["half", "dataset"] = hp("half", "of its last layer: tanh about mid-grey, or public mean and std")
    seed: int = hp(0, "of its weights and draws", least=0)
    held_out: int = hp(64, "test images it is measured on", least=1)
    device: str = hp("auto", "auto, cpu, cuda or cuda:N")


def main(flags: Flags) -> None:
    device = choose_device(flags.device)
    source = data.load(flags.dataset, base_datadir=flags.base_datadir, image_size=flags.image_size, normalize="none")
    public = Batch(*(t.to(device) for t in public_images(source)))
    order = priors.order(
        flags.generator,
        dim=flags.latents,
        steps=flags.steps,
        width=flags.width,
        normalize=flags.units,
        seed=flags.seed,
    )
    start = time.monotonic()
    prior, home = priors.obtain(order, public, source.task.num_classes, {"dataset": flags.dataset, "commit": commit()})
    took = time.monotonic() - start
    told = priors.manifest(home)
    print(
        f"{flags.generator} of {told['parameters']} numbers, {told['images']} public images, {order.steps} steps in "
        f"{told['seconds']:.0f} s ({took:.0f} s of them now), last loss {told['last_loss']:.3f}\n{home / 'samples.png'}"
    )
    count = min(flags.held_out, len(source.test))
    if not count:  # a folder whose classes have fewer than three images
        return
    images, labels = source.test.take(torch.linspace(0, len(source.test) - 1, count).round().long())
    made = priors.nearest(prior, images.to(device), labels.to(device)).cpu()
    floor = [psnr(x, best) for x, best in zip(images, made, strict=True)]
    print(
        f"floor: held-out images come back at {sum(floor) / count:.2f} dB on the mean, {min(floor):.2f} to "
        f"{max(floor):.2f}, when the latents are sought that suit them best"
    )


if __name__ == "__main__":
    page(Flags, main, __doc__)
