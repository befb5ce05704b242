"""Generators that are trained, how they are stored, and the attacks that search their latents."""

import dataclasses
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import data
from attacks.base import ATTACKS
from attacks.matching.matcher import GradientMatcher
from core.errors import UsageError
from core.protocol import Batch, Observation, Recipe, image_task
from defenses.base import parse
from evaluation.bounds import oracle_projection
from evaluation.metrics import psnr
from federated.client import gradient, train
from models import build
from models.generators import store, training, vae, wgan
from models.generators.base import ClassPCA, Generator
from models.generators.store import WEIGHTS
from runner.experiment import public_batch
from tests.commands import in_process, only_run, rows, shell
from tests.test_attacks import smooth_pictures

TASK = image_task((3, 16, 16), 3, (0.5,) * 3, (0.5,) * 3)


@pytest.fixture
def checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CHECKPOINTS", str(tmp_path / "checkpoints"))
    return tmp_path / "checkpoints"


def public_images(n: int = 90, channels: int = 3, side: int = 16) -> Batch:
    """Three classes, each with a brightness of its own."""
    labels = torch.arange(n) % 3
    images = smooth_pictures(n, side, seed=3)[:, :channels]
    return Batch(0.1 + 0.5 * images * (0.2 + 0.4 * labels.view(-1, 1, 1, 1)), labels)


def observe(truth: Batch, public: Batch, defense: str = "none", seed: int = 0) -> Observation:
    rng = torch.Generator().manual_seed(seed)
    net = build("cnn", TASK.domain.shape, TASK.num_classes, rng=rng)
    recipe = Recipe(len(truth.labels), defense=defense)
    return Observation(TASK, recipe, net, gradient(net, truth, TASK, recipe, rng), public)


@pytest.mark.parametrize("kind", ["vae", "wgan"])
@pytest.mark.parametrize(("channels", "side"), [(3, 32), (1, 28), (3, 17)])
def test_generators_make_images_of_any_shape(kind: str, channels: int, side: int, checkpoints: Path) -> None:
    config = store.make_config(kind, latent_dim=5, steps=2, width=8)
    generator, folder = store.load_or_train(config, public_images(12, channels, side), 4)  # class 3 has no image
    assert torch.allclose(generator.label.weight[3], generator.label.weight[:3].mean(0))
    images = generator.decode(3 * torch.randn(4, 5, generator=torch.Generator().manual_seed(0)), torch.arange(4))
    assert images.shape == (4, channels, side, side)
    assert 0 <= images.min() <= images.max() <= 1
    assert (folder / "samples.png").read_bytes().startswith(b"\x89PNG")


def test_an_unknown_kind_of_generator_is_refused() -> None:
    with pytest.raises(UsageError, match="did you mean vae"):
        store.make_config("vea")


@pytest.mark.parametrize(("kind", "module"), [("vae", vae), ("wgan", wgan)])
def test_an_interrupted_training_ends_as_an_uninterrupted_one(
    kind: str, module: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, public = store.make_config(kind, latent_dim=4, steps=12, width=4), public_images(12)
    monkeypatch.setenv("CHECKPOINTS", str(tmp_path / "uninterrupted"))
    uninterrupted, _ = store.load_or_train(config, public, 3)
    monkeypatch.setenv("CHECKPOINTS", str(tmp_path / "interrupted"))
    monkeypatch.setattr(training, "SAVE_EVERY", 0.0)
    draw, calls = module.augmented_batch, []

    def interrupt(*args: object) -> Batch:
        calls.append(1)
        if len(calls) in (8, 12):  # in the middle of the training, twice
            raise KeyboardInterrupt
        return draw(*args)

    monkeypatch.setattr(module, "augmented_batch", interrupt)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            store.load_or_train(config, public, 3)
    resumed, folder = store.load_or_train(config, public, 3)
    draws = 12 * (1 if kind == "vae" else wgan.CRITIC_STEPS)
    assert len(calls) < draws + 8, "training started from the beginning"
    for a, b in zip(uninterrupted.state_dict().values(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert {p.name for p in folder.iterdir()} - {".lock"} == {"generator.safetensors", "manifest.json", "samples.png"}


def test_a_generator_is_trained_once_for_the_same_images(checkpoints: Path) -> None:
    config = store.make_config("vae", latent_dim=4, steps=2, width=4)
    _, folder = store.load_or_train(config, public_images(12), 3, {"dataset": "pictures"})
    written = (folder / WEIGHTS).stat().st_mtime_ns
    assert store.load_or_train(config, public_images(12), 3)[1] == folder
    assert (folder / WEIGHTS).stat().st_mtime_ns == written
    facts = store.manifest(folder)
    assert (facts["dataset"], facts["images"], facts["config"].seed) == ("pictures", 12, 0)
    assert facts["config"] == config
    (folder / "manifest.json").write_text("{}")
    with pytest.raises(UsageError, match="holds no generator"):
        store.load(folder)
    one_pixel = public_images(12)
    one_pixel.examples[0, 0, 0, 0] += 0.01
    assert store.load_or_train(config, one_pixel, 3)[1] != folder
    assert store.load_or_train(dataclasses.replace(config, seed=1), public_images(12), 3)[1] != folder


def flip(content: bytes) -> bytes:
    return content[:-50] + bytes([content[-50] ^ 1]) + content[-49:]


def edited(**facts: object) -> Callable[[Path], object]:
    """The manifest with other entries."""

    def edit(folder: Path) -> None:
        path = folder / "manifest.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | facts))

    return edit


def configured(**settings: object) -> Callable[[Path], object]:
    def edit(folder: Path) -> None:
        config = json.loads((folder / "manifest.json").read_text())["config"]
        edited(config=config | settings)(folder)

    return edit


def not_finite(folder: Path) -> None:
    """Weights of NaN with a checksum that fits."""
    state = load_file(folder / WEIGHTS)
    save_file({n: t * torch.nan if t.is_floating_point() else t for n, t in state.items()}, folder / WEIGHTS)
    edited(checksum=store._checksum(store.manifest(folder), (folder / WEIGHTS).read_bytes()))(folder)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut": (lambda folder: os.truncate(folder / WEIGHTS, 2000), "damaged"),
    "a flipped bit": (lambda f: (f / WEIGHTS).write_bytes(flip((f / WEIGHTS).read_bytes())), "damaged"),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), "damaged"),
    "a pipe": (lambda folder: ((folder / WEIGHTS).unlink(), os.mkfifo(folder / WEIGHTS)), "damaged"),
    "not finite": (not_finite, "not finite"),
    "no checksum": (edited(checksum=None), "damaged"),
    "endless classes": (edited(classes=math.inf), "holds no generator"),
    "too wide for any memory": (configured(width=10**12), "damaged"),
    "wider than it was": (configured(width=8), "damaged"),
    "no width": (configured(width=0), "holds no generator"),
    "unknown units": (configured(output_normalization="x"), "holds no generator"),
    "a module": (configured(kind="os.system"), "holds no generator"),
    "deep": (lambda folder: (folder / "manifest.json").write_text("[" * 100_000), "holds no generator"),
    "no text": (lambda folder: (folder / "manifest.json").write_bytes(b"\xff"), "holds no generator"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_generator_is_refused_or_trained_again(damage: str, checkpoints: Path) -> None:
    config, public = store.make_config("vae", latent_dim=4, steps=1, width=4), public_images(12)
    whole, folder = store.load_or_train(config, public, 3)
    edit, message = DAMAGE[damage]
    edit(folder)
    task = image_task((3, 16, 16), 3)
    for read in (store.load, lambda place: store.check_compatible(place, task)):
        with pytest.raises(UsageError, match=message):
            read(folder)
    again, place = store.load_or_train(config, public, 3)
    assert place == folder
    assert all(torch.equal(t, again.state_dict()[name]) for name, t in whole.state_dict().items())


@pytest.mark.parametrize("state", [b"", b"5", b"\x80\x04junk", b"PK\x03\x04"])
def test_a_damaged_state_starts_the_training_anew(state: bytes, checkpoints: Path) -> None:
    config, public = store.make_config("vae", latent_dim=4, steps=1, width=4), public_images(12)
    whole, folder = store.load_or_train(config, public, 3)
    (folder / WEIGHTS).unlink()
    (folder / "state.pt").write_bytes(state)
    again, _ = store.load_or_train(config, public, 3)
    assert all(torch.equal(t, again.state_dict()[name]) for name, t in whole.state_dict().items())


def test_random_images_follow_the_label_and_latents_are_whitened(checkpoints: Path) -> None:
    """The classes have brightness .2, .3 and .4, and so have images of random latents."""
    public = public_images()
    generator, _ = store.load_or_train(store.make_config("vae", latent_dim=8, steps=200, width=8), public, 3)
    z = torch.randn(300, 8, generator=torch.Generator().manual_seed(0))
    images = generator.decode(z, torch.arange(300) % 3)
    for label in range(3):
        brightness = public.examples[public.labels == label].mean()
        assert images[torch.arange(300) % 3 == label].mean() == pytest.approx(brightness.item(), abs=0.04)
    # latents of the images themselves are standard normal, up to the shrinkage of the covariance of 30 images
    mean, log_variance = generator.encode(*public)
    raw = mean + torch.randn(mean.shape, generator=torch.Generator().manual_seed(1)) * (log_variance / 2).exp()
    for label in range(3):
        centred = raw[public.labels == label] - generator.latent_mean[label]
        z = torch.linalg.solve_triangular(generator.latent_root[label], centred.T, upper=False)
        assert z.mean(1).abs().max() < 0.7  # of 30 draws
        assert z.square().mean() == pytest.approx(1, abs=0.3)


@pytest.fixture(scope="module")
def trained() -> tuple[Batch, Generator]:
    public = public_images()
    return public, store.load_or_train(store.make_config("vae", latent_dim=32, steps=200), public, 3)[0]


def test_the_oracle_projection_of_an_image_in_range_is_the_image(trained: tuple[Batch, Generator]) -> None:
    _, generator = trained
    z = 0.7 * torch.randn(4, 32, generator=torch.Generator().manual_seed(1))
    labels = torch.tensor([0, 1, 2, 0])
    truth = generator.decode(z, labels)
    nearest = oracle_projection(generator, truth, labels)
    assert min(psnr(a, b) for a, b in zip(truth, nearest, strict=True)) > 35


def test_cma_finds_an_image_in_range_without_gradients() -> None:
    """At least 20 dB, and 3 dB above z = 0."""
    public, label = public_images(), torch.tensor([2])
    generator = ClassPCA(public, 8)
    truth = generator.decode(torch.randn(1, 8, generator=torch.Generator().manual_seed(4)), label)
    attack = ATTACKS["ggl"](optimizer="cma", latent_dim=8, evaluations=1200, latent_weight=0.0)
    result = attack.reconstruct(observe(Batch(truth, label), public), torch.Generator().manual_seed(0))
    class_mean = generator.decode(torch.zeros(1, 8), label)
    assert psnr(truth[0], result.examples[0]) > max(20, 3 + psnr(truth[0], class_mean[0]))
    assert result.iterations <= 1200


def test_gias_improves_on_ggl_by_moving_the_weights(trained: tuple[Batch, Generator]) -> None:
    """GIAS's first stage is GGL. Its second starts there, and explains the update and the image better.

    Over four victims and networks the cosine distance falls to a quarter and PSNR rises by 2.9 dB, on each of torch
    2.6, 2.9 and 2.15; single victims differ more between versions.
    """
    public, _ = trained
    victims, steps = public_images(94), 60
    shared = {"generator_steps": 200, "iterations": steps, "comparison_iterations": 0}
    distances, scores = torch.zeros(4, 2), torch.zeros(4, 2)
    for k in range(4):
        truth = Batch(victims.examples[90 + k : 91 + k], victims.labels[90 + k : 91 + k])
        observation = observe(truth, public, seed=k)
        ggl, gias = ATTACKS["ggl"](generator="vae", **shared), ATTACKS["gias"](weight_iterations=steps, **shared)
        first = ggl.reconstruct(observation, torch.Generator().manual_seed(k))
        both = gias.reconstruct(observation, torch.Generator().manual_seed(k))
        assert both.trace[:steps] == first.trace, "the first stage is not GGL"
        assert both.trace[steps] == pytest.approx(min(first.trace), rel=1e-3), "the second stage starts elsewhere"
        assert min(both.trace[steps:]) < both.trace[steps]
        matcher = GradientMatcher(observation)
        for stage, result in enumerate((first, both)):
            distances[k, stage] = matcher.cosine_distance(result.examples, result.labels).item()
            scores[k, stage] = psnr(truth.examples[0], result.examples[0])
        assert distances[k, 1] < distances[k, 0], "the answer is not the best of the second stage"
    assert distances[:, 1].mean() < 0.6 * distances[:, 0].mean()
    assert scores[:, 1].mean() > scores[:, 0].mean() + 1
    again = ggl.reconstruct(observation, torch.Generator().manual_seed(k))
    assert torch.equal(again.examples, first.examples), "GIAS changed the generator on disk"


def test_the_noise_of_a_defense_is_known_and_weights_the_prior() -> None:
    public = public_images()
    observation = observe(Batch(public.examples[:1], public.labels[:1]), public, defense="clip=0.5+gauss=0.02")

    def answer(**hyperparameters: Any) -> torch.Tensor:
        attack = ATTACKS["ggl"](iterations=20, latent_dim=4, **hyperparameters)
        return attack.reconstruct(observation, torch.Generator().manual_seed(0)).examples

    assert torch.equal(answer(), answer(noise=0.02))
    assert not torch.equal(answer(), answer(noise=0.0))


@pytest.mark.parametrize("kind", ["gradient", "delta"])
def test_under_known_noise_the_objective_is_the_posterior(kind: str) -> None:
    """-log p(z | g*) = |g(G(z)) - g*|^2 / (2 s^2) + |z|^2 / 2, up to a factor and a constant: differences show it."""
    public, rng = public_images(), torch.Generator().manual_seed(0)
    truth = Batch(public.examples[:1], public.labels[:1])
    net = build("cnn", TASK.domain.shape, TASK.num_classes, rng=rng)
    recipe = Recipe(1, 1, lr=0.1, defense="gauss=0.02")
    update = gradient(net, truth, TASK, recipe, rng) if kind == "gradient" else train(net, truth, TASK, recipe, rng)[0]
    matcher = GradientMatcher(Observation(TASK, recipe, net, update, public))
    generator = ClassPCA(public, 4)
    objective = ATTACKS["ggl"]().objective(matcher, generator, truth.labels)
    s = 0.02 if kind == "gradient" else 0.02 / 0.1  # a delta is matched as a gradient, and so is its noise

    def both(z: torch.Tensor) -> tuple[float, float]:
        images = generator.decode(z, truth.labels)
        pairs = zip(matcher.simulate(images, truth.labels), matcher.target, strict=True)
        misfit = sum((a - b).square().sum() for a, b in pairs)
        return objective(images, z).item(), (misfit / (2 * s**2) + z.square().sum() / 2).item()

    points = [both(k * torch.ones(1, 4)) for k in (0.0, 1.0, 3.0)]
    (a, b, c), (p, q, r) = zip(*points, strict=True)
    assert (c - a) / (b - a) == pytest.approx((r - p) / (q - p), rel=0.02)


def test_noise_is_unknown_after_a_later_step_of_the_defense() -> None:
    """Clipping changes the noise, so GGL then uses the cosine distance."""

    def noise(text: str) -> float:
        return parse(text).counter().noise or 0.0

    assert noise("clip=0.5+gauss=0.02") == 0.02
    assert noise("gauss=0.03+gauss=0.04") == pytest.approx(0.05)
    assert noise("gauss=0.02+clip=0.5") == 0


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--dataset", "photos", "--image-size", "24"], "makes 3x16x16 images of 8 classes"),
        (["--dataset", "folder", "--base-datadir", "PICTURES", "--image-size", "16"], "trained on other images"),
        (["--generator-file", "nowhere"], "holds no generator"),
        (["--image-size", "16", "--latent-dim", "64"], "--latent-dim 4"),
        (["--generator", "class_pca", "--generator-steps", "5"], "belong to training a generator: --generator vae"),
        (["--update-model", "unrolled"], "does not apply to a gradient"),
    ],
)
def test_a_generator_of_other_images_is_refused_in_one_line(
    flags: list[str],
    words: str,
    tmp_path: Path,
    checkpoints: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from torchvision.utils import save_image

    for label in range(8):  # as many classes as photos has
        (tmp_path / "pictures" / str(label)).mkdir(parents=True)
        for k, image in enumerate(smooth_pictures(6, 16, seed=label)):
            save_image(image, tmp_path / "pictures" / str(label) / f"{k}.png")
    public = public_batch(data.load("photos", base_datadir=tmp_path, image_size=16))
    config = store.make_config("vae", latent_dim=4, steps=1, width=4)
    _, folder = store.load_or_train(config, public, 8, {"dataset": "photos"})
    capsys.readouterr()
    flags = [str(tmp_path / "pictures") if f == "PICTURES" else f for f in flags]
    common = ["ggl", "--model", "cnn", "--trials", "1", "--out", str(tmp_path / "out")]
    if not {"--generator-file", "--generator", "--update-model"} & set(flags):
        flags += ["--generator-file", str(folder)]
        flags += [] if "--latent-dim" in flags else ["--latent-dim", "4"]
    assert in_process("main_grad.py", [*common, *flags], monkeypatch) == 2
    message = capsys.readouterr().err
    assert words in message
    assert message.strip().count("\n") == 0
    assert not (tmp_path / "out").exists()


def test_a_script_trains_its_generator_on_public_images_and_is_scored_beside_it(tmp_path: Path) -> None:
    quick = ("--image-size", "16", "--trials", "2", "--jobs", "2", "--iterations", "60", "--out", str(tmp_path))
    quick += ("--generator-steps", "60", "--latent-dim", "8", "--weight-iterations", "20")
    done = shell("grad/gias.sh", *quick, "--comparison-iterations", "40", CHECKPOINTS=str(tmp_path / "checkpoints"))
    assert done.returncode == 0, done.stderr
    (manifest,) = (tmp_path / "checkpoints").glob("vae-*/manifest.json")
    public = public_batch(data.load("photos", base_datadir=tmp_path, image_size=16))
    assert json.loads(manifest.read_text())["data"] == store.data_digest(public)
    for row in rows(only_run(tmp_path)):
        assert row["companion_psnr"] is not None
        assert row["oracle_floor_psnr"] > row["class_baseline_psnr"] - 1  # sixty steps make a poor generator
    assert "ig_single on the same updates" in " ".join(done.stdout.split())


def test_prior_sh_reports_the_generator_and_its_oracle_projection(tmp_path: Path) -> None:
    flags = ("--image-size", "16", "--steps", "5", "--width", "4", "--latent-dim", "4", "--held-out", "2")
    done = shell("prior.sh", *flags, CHECKPOINTS=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "5 steps" in done.stdout
    assert "dB" in done.stdout
    assert list(tmp_path.glob("vae-*/samples.png"))
    bad = shell("prior.sh", "--dataset", "nothing", CHECKPOINTS=str(tmp_path))
    assert bad.returncode == 2
    assert bad.stderr.strip().count("\n") == 0
