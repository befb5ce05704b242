"""Can matching succeed after many local steps? The objective at the true images plus noise, over steps and rates.

Each client trains on its images for T steps at a rate eta. The unrolled cosine distance, which is 0 for the update
itself, is evaluated at the true images plus Gaussian noise of a given PSNR. Where noise that nobody sees already costs
as much as a grey image, no descent is led to the truth, and an image that is right to the eye has no objective near
zero. An oracle: it uses the truth.
"""

import csv
import dataclasses
import statistics
from pathlib import Path

import torch
from torch import Tensor

from attacks.matching.matcher import GradientMatcher
from core.hyperparameters import hp, hyperparameters
from core.paths import ROOT
from core.protocol import Batch, Observation, Recipe
from core.rng import stream
from federated.simulation import FedAvgSource, Session
from models import build
from report.tables import table
from runner.cli import run_script
from runner.experiment import load_dataset
from runner.flags import Fed


@hyperparameters
class Flags:
    dataset: str = hp("leaves", "data set")
    base_datadir: Path = hp(ROOT / "datasets", "folder of the data sets")
    image_size: int | None = hp(None, "side of the images in pixels")
    model: str = hp("cnn", "network, untrained")
    client_images: int = hp(4, "number of images of a client, which are one batch", ge=1)
    clients: int = hp(3, "number of reporting clients", ge=1)
    settings: tuple[str, ...] = hp(("0.01:20", "0.1:5", "0.1:10", "0.1:20"), "rates and numbers of steps, as eta:T")
    noise: tuple[float, ...] = hp((100, 60, 40, 20), "PSNRs of the noise in dB")
    seed: int = hp(0, "random seed for victims and model", ge=0)
    out: Path = hp(ROOT / "results" / "sensitivity", "folder of sensitivity.md and sensitivity.csv")


@torch.no_grad()
def objectives(observation: Observation, truth: Batch, noise: tuple[float, ...]) -> list[float]:
    """The objective at the truth, at the truth plus noise of each PSNR, and at a grey image."""
    matcher, rng = GradientMatcher(observation, "unrolled"), stream(0, "noise")
    drawn = torch.randn(truth.examples.shape, generator=rng)
    places: list[Tensor] = [truth.examples, *(truth.examples + 10 ** (-psnr / 20) * drawn for psnr in noise)]
    places.append(torch.full_like(truth.examples, 0.5))
    return [matcher.cosine_distance(x, truth.labels).item() for x in places]


def main(flags: Flags) -> None:
    common = {key: getattr(flags, key) for key in ("dataset", "base_datadir", "image_size", "seed")}
    dataset = load_dataset(dataclasses.replace(Fed(), victims="reporting", **common))
    header = ["rate", "steps", "truth", *(f"{psnr:g} dB" for psnr in flags.noise), "grey"]
    rows = []
    for setting in flags.settings:
        rate, steps = setting.split(":")
        recipe = Recipe(0, local_epochs=int(steps), lr=float(rate))
        counts = {"trials": flags.clients, "clients": flags.clients, "rounds": 1, "client_images": flags.client_images}
        source = FedAvgSource.deal(dataset, recipe, seed=flags.seed, **counts)
        task = dataset.task
        model = build(flags.model, task.domain.shape, task.num_classes, rng=stream(flags.seed, "model"))
        session = Session(model, task, torch.device("cpu"), flags.seed, lambda model, recipe: model)
        session.uses_final_model = False
        found = []
        for trial in source.trials(session):
            assert trial.truth is not None
            observation = Observation(task, trial.recipe, trial.model, trial.update)
            found.append(objectives(observation, trial.truth, flags.noise))
        medians = [statistics.median(values) for values in zip(*found, strict=True)]
        rows.append([rate, steps, *(f"{max(value, 0.0):.0e}" for value in medians)])
        print(", ".join(rows[-1]), flush=True)
    note = (
        f"medians over {flags.clients} clients with {flags.client_images} images of {flags.dataset} each, {flags.model}"
    )
    text = "\n".join([table(header, rows), "", note])
    flags.out.mkdir(parents=True, exist_ok=True)
    (flags.out / "sensitivity.md").write_text(text + "\n", encoding="utf-8")
    with (flags.out / "sensitivity.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    print(f"\n{text}\n{flags.out / 'sensitivity.md'}, sensitivity.csv")


if __name__ == "__main__":
    run_script(Flags, main, __doc__)
