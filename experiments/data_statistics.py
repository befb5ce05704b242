"""Measures total variation and power spectrum of private images, and how near the mean of public ones comes to them."""

import math
from pathlib import Path

import numpy as np
import torch

import data
from core.errors import UsageError
from core.hyperparameters import hp, hyperparameters
from core.paths import ROOT
from runner.cli import run_script

BOOTSTRAPS = 1000


@hyperparameters
class Flags:
    datasets: str = hp("photos,leaves,faces", "data sets, separated by commas: {datasets}")
    base_datadir: Path = hp(ROOT / "datasets", "folder of all data sets; for folder, the <class>/<image> tree itself")
    image_size: int | None = hp(None, "height and width of images in pixels; default: the data set's own")
    images: int = hp(2000, "number of private images, evenly spaced over the split", ge=2)


def main(flags: Flags) -> None:
    print("dataset | victims | n | total variation | spectrum slope | without window | mean image dB | class mean dB")
    for name in flags.datasets.split(","):
        for victims in ("all", "reporting"):
            dataset = data.load(name, base_datadir=flags.base_datadir, image_size=flags.image_size, victims=victims)
            n = min(flags.images, len(dataset.private))
            if n < 2:
                raise UsageError(f"{name}: two images are needed for an interval")
            chosen = np.linspace(0, len(dataset.private) - 1, n).round().astype(int)
            batch = dataset.private.take(chosen.tolist())
            images = batch.examples.numpy().astype(np.float64)
            cells = [interval(*total_variation(images))]
            cells += [interval(*spectrum_slope(images, window)) for window in (True, False)]
            cells += [interval(*mean_and_interval(each)) for each in mean_psnr(images, batch.labels, dataset.public)]
            print(name, victims, n, *cells, sep=" | ", flush=True)


def interval(value: float, low: float, high: float) -> str:
    return f"{value:.3f} [{low:.3f}, {high:.3f}]"


def total_variation(images: np.ndarray) -> tuple[float, float, float]:
    """Mean |dx| + mean |dy| of images (N, C, H, W) in [0, 1]: mean over images and a 95% interval of that mean.

    The measure is `ImageDomain.regularizer` with mean 0 and std 1.
    """
    dx, dy = np.abs(np.diff(images, axis=3)), np.abs(np.diff(images, axis=2))
    return mean_and_interval(dx.mean((1, 2, 3)) + dy.mean((1, 2, 3)))


def mean_and_interval(values: np.ndarray) -> tuple[float, float, float]:
    """The mean of independent values (N,), and its 95% interval by the normal distribution."""
    margin = 1.96 * values.std(ddof=1) / math.sqrt(len(values))
    return values.mean(), values.mean() - margin, values.mean() + margin


def mean_psnr(images: np.ndarray, labels: torch.Tensor, public: data.Split) -> tuple[np.ndarray, np.ndarray]:
    """PSNR (N,) of images (N, C, H, W) against the mean public image, and against that of their class."""
    examples, classes = public.take(torch.linspace(0, len(public) - 1, min(len(public), 1000)).round().long())
    of_all = examples.mean(0).numpy()
    of_class = {k: examples[classes == k].mean(0).numpy() for k in classes.unique().tolist()}
    nearest = np.stack([of_class.get(k, of_all) for k in labels.tolist()])
    return tuple(-10 * np.log10(((images - guess) ** 2).mean((1, 2, 3))) for guess in (of_all, nearest))


def spectrum_slope(images: np.ndarray, window: bool = True) -> tuple[float, float, float]:
    """The exponent of frequency in the power spectrum of images (N, C, H, W), and its 95% bootstrap interval.

    Power of the mean over channels, averaged over images and over rings of one step of frequency, 1 / side; a straight
    line through log power against log frequency, from 1 / side to 0.4 cycles per pixel. `window`: subtract the mean and
    multiply by a Hann window first, which suppresses the jump between opposite borders. It raises the exponent of white
    noise of 32 pixels from 0 to 0.08.
    """
    frequencies, power = radial_power(images, window)  # (F,), (N, F)

    def fit(mean_power: np.ndarray) -> float:
        return np.polyfit(np.log(frequencies), np.log(mean_power), 1)[0]

    rng, n = np.random.RandomState(0), len(power)
    repeats = [fit(power[rng.randint(n, size=n)].mean(0)) for _ in range(BOOTSTRAPS)]
    return fit(power.mean(0)), *np.percentile(repeats, [2.5, 97.5])


def radial_power(images: np.ndarray, window: bool) -> tuple[np.ndarray, np.ndarray]:
    """Frequencies (F,) in cycles per pixel, and the mean power of each image (N, F) on the ring about each of them."""
    grey, side = images.mean(1), images.shape[-1]  # (N, H, W)
    if window:
        hann = np.hanning(side + 2)[1:-1]
        weights = np.outer(hann, hann)
        grey = (grey - (grey * weights).sum((1, 2), keepdims=True) / weights.sum()) * weights
    power = np.abs(np.fft.fft2(grey)) ** 2  # (N, H, W)
    axis = np.fft.fftfreq(side)
    ring = np.rint(np.hypot(axis[:, None], axis) * side).astype(int)  # (H, W)
    steps = np.arange(1, int(0.4 * side) + 1)
    return steps / side, np.stack([power[:, ring == step].mean(1) for step in steps], 1)


if __name__ == "__main__":
    run_script(Flags, main, __doc__)
