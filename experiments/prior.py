"""Trains a generator on the public split of a data set and measures how close it comes to held-out images."""

import time
from pathlib import Path
from typing import Literal

import torch

import data
from core.hyperparameters import hp, hyperparameters
from core.paths import ROOT
from evaluation.bounds import oracle_projection
from evaluation.metrics import psnr
from models.generators import store
from runner.cli import run_script
from runner.experiment import choose_device, commit, public_batch


@hyperparameters
class Flags:
    dataset: str = hp("photos", "data set whose public images are used for training: {datasets}")
    base_datadir: Path = hp(ROOT / "datasets", "folder of all data sets; for folder, the <class>/<image> tree itself")
    image_size: int | None = hp(None, "height and width of images in pixels; default: the data set's own")
    generator: Literal["vae", "wgan"] = hp("vae", "kind of generator: trained in minutes (vae) or hours (wgan)")
    latent_dim: int = hp(32, "number of latents of an image", ge=1)
    steps: int = hp(0, "training steps; 0: the default of the kind", ge=0)
    width: int = hp(0, "channels before the last layer; 0: the default of the kind", ge=0)
    output_normalization: Literal["half", "dataset"] = hp(
        "half", "units of the last layer: tanh about mid-grey, or mean and std of public images"
    )
    seed: int = hp(0, "random seed of the initial weights and the training", ge=0)
    held_out: int = hp(64, "number of test images for the measurement", ge=1)
    device: str = hp("auto", "auto, cpu, cuda or cuda:N")


def main(flags: Flags) -> None:
    device = choose_device(flags.device)
    dataset = data.load(flags.dataset, base_datadir=flags.base_datadir, image_size=flags.image_size)
    config = store.make_config(
        flags.generator,
        latent_dim=flags.latent_dim,
        steps=flags.steps,
        width=flags.width,
        output_normalization=flags.output_normalization,
        seed=flags.seed,
    )
    public, metadata = public_batch(dataset).to(device), {"dataset": flags.dataset, "commit": commit()}
    started = time.monotonic()
    generator, folder = store.load_or_train(config, public, dataset.task.num_classes, metadata)
    seconds, facts = time.monotonic() - started, store.manifest(folder)
    print(
        f"{flags.generator}: {facts['parameters']} parameters, {facts['images']} public images, {config.steps} steps "
        f"in {facts['seconds']:.0f} s ({seconds:.0f} s in this run), last loss {facts['last_loss']:.3f}\n"
        f"{folder / 'samples.png'}"
    )
    count = min(flags.held_out, len(dataset.test))
    if not count:  # a folder whose classes have fewer than three images
        return
    images, labels = dataset.test.take(torch.linspace(0, len(dataset.test) - 1, count).round().long())
    nearest = oracle_projection(generator, images.to(device), labels.to(device)).cpu()  # (count, C, H, W)
    scores = [psnr(image, best) for image, best in zip(images, nearest, strict=True)]
    print(
        f"oracle projection: the nearest images in the generator's range are at {sum(scores) / count:.2f} dB "
        f"({min(scores):.2f} to {max(scores):.2f}) from {count} held-out images"
    )


if __name__ == "__main__":
    run_script(Flags, main, __doc__)
