"""Generators that are trained, how they are kept, and the attacks that search them."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

import data
from attacks.base import REGISTRY, discover
from attacks.common import Matching
from defenses.base import parse
from federated.client import gradient, train
from federated.wire import Batch, Observation, Recipe, Task, UsageError
from models import build, priors, vae, wgan
from models.generators import ClassPCA, Prior
from tests.commands import in_process, only_run, rows, shell
from tests.test_attacks import smooth_pictures
from utils.evaluator import psnr
from utils.run import public_images

discover()
TASK = Task((3, 16, 16), 3, (0.5,) * 3, (0.5,) * 3)


@pytest.fixture
def checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CHECKPOINTS", str(tmp_path / "checkpoints"))
    return tmp_path / "checkpoints"


def public(n: int = 90, channels: int = 3, side: int = 16) -> Batch:
    """Three classes, each its own brightness."""
    labels = torch.arange(n) % 3
    images = smooth_pictures(n, side, seed=3)[:, :channels]
    return Batch(0.1 + 0.5 * images * (0.2 + 0.4 * labels.view(-1, 1, 1, 1)), labels)


def observed(truth: Batch, seen: Batch, defense: str = "none") -> Observation:
    rng = torch.Generator().manual_seed(0)
    net = build("cnn", TASK.image_shape, TASK.num_classes, rng=rng)
    recipe = Recipe(len(truth.labels), defense=parse(defense))
    return Observation(TASK, recipe, net, gradient(net, truth, TASK, recipe, rng), seen)


@pytest.mark.parametrize("kind", ["vae", "wgan"])
@pytest.mark.parametrize(("channels", "side"), [(3, 32), (1, 28), (3, 17)])
def test_makes_images_of_any_shape(kind: str, channels: int, side: int, checkpoints: Path) -> None:
    order = priors.order(kind, dim=5, steps=2, width=8)
    prior, home = priors.obtain(order, public(12, channels, side), 4)  # a fourth class without an image
    assert torch.allclose(prior.label.weight[3], prior.label.weight[:3].mean(0))
    images = prior.decode(3 * torch.randn(4, 5, generator=torch.Generator().manual_seed(0)), torch.arange(4))
    assert images.shape == (4, channels, side, side)
    assert 0 <= images.min() <= images.max() <= 1
    assert (home / "samples.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("kind", "module"), [("vae", vae), ("wgan", wgan)])
def test_an_interrupted_training_ends_as_an_uninterrupted_one(
    kind: str, module: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order, shown = priors.order(kind, dim=4, steps=12, width=4), public(12)
    monkeypatch.setenv("CHECKPOINTS", str(tmp_path / "whole"))
    whole, _ = priors.obtain(order, shown, 3)
    monkeypatch.setenv("CHECKPOINTS", str(tmp_path / "cut"))
    monkeypatch.setattr(priors, "SAVE_EVERY", 0.0)
    show, calls = module.augmented, []

    def cut(*args: object) -> Batch:
        calls.append(1)
        if len(calls) in (8, 12):  # in the middle of the training, twice
            raise KeyboardInterrupt
        return show(*args)

    monkeypatch.setattr(module, "augmented", cut)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            priors.obtain(order, shown, 3)
    mended, home = priors.obtain(order, shown, 3)
    draws = 12 * (1 if kind == "vae" else wgan.CRITIC_STEPS)
    assert len(calls) < draws + 8, "it began anew"
    for a, b in zip(whole.state_dict().values(), mended.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert not (home / "state.pt").exists()


def test_a_prior_is_found_again_and_only_for_the_same_images(checkpoints: Path) -> None:
    order = priors.order("vae", dim=4, steps=2, width=4)
    _, home = priors.obtain(order, public(12), 3, {"dataset": "pictures"})
    made = (home / "generator.safetensors").stat().st_mtime_ns
    assert priors.obtain(order, public(12), 3)[1] == home
    assert (home / "generator.safetensors").stat().st_mtime_ns == made
    told = priors.manifest(home)
    assert (told["dataset"], told["images"], told["order"].seed) == ("pictures", 12, 0)
    (home / "manifest.json").write_text("{}")
    with pytest.raises(UsageError, match="holds no generator"):
        priors.load(home)
    one_pixel = public(12)
    one_pixel.images[0, 0, 0, 0] += 0.01
    assert priors.obtain(order, one_pixel, 3)[1] != home
    assert priors.obtain(dataclasses.replace(order, seed=1), public(12), 3)[1] != home


def test_draws_follow_the_label_and_latents_are_whitened(checkpoints: Path) -> None:
    """Classes of brightness .2, .3 and .4: what random latents make of a class is as bright as the class."""
    shown = public()
    prior, _ = priors.obtain(priors.order("vae", dim=8, steps=200, width=8), shown, 3)
    z = torch.randn(300, 8, generator=torch.Generator().manual_seed(0))
    drawn = prior.decode(z, torch.arange(300) % 3)
    for label in range(3):
        theirs = shown.images[shown.labels == label].mean()
        assert drawn[torch.arange(300) % 3 == label].mean() == pytest.approx(theirs.item(), abs=0.04)
    # and latents of the images themselves are standard normal, up to what a class of 30 leans on the others
    mean, log_variance = prior.encode(*shown)
    raw = mean + torch.randn(mean.shape, generator=torch.Generator().manual_seed(1)) * (log_variance / 2).exp()
    for label in range(3):
        mine = raw[shown.labels == label] - prior.mean[label]
        z = torch.linalg.solve_triangular(prior.root[label], mine.T, upper=False)
        assert z.mean(1).abs().max() < 0.7  # of 30 draws
        assert z.square().mean() == pytest.approx(1, abs=0.3)


@pytest.fixture(scope="module")
def trained() -> tuple[Batch, Prior]:
    shown = public()
    return shown, priors.obtain(priors.order("vae", dim=32, steps=200), shown, 3)[0]


def test_the_floor_is_the_image_itself_in_range(trained: tuple[Batch, Prior]) -> None:
    _, prior = trained
    z = 0.7 * torch.randn(4, 32, generator=torch.Generator().manual_seed(1))
    labels = torch.tensor([0, 1, 2, 0])
    truth = prior.decode(z, labels)
    best = priors.nearest(prior, truth, labels)
    assert min(psnr(a, b) for a, b in zip(truth, best, strict=True)) > 35


def test_cma_finds_an_image_in_range_without_slopes() -> None:
    """At least 20 dB, and 3 dB above z = 0."""
    shown, label = public(), torch.tensor([2])
    prior = ClassPCA(shown, 8)
    truth = prior.decode(torch.randn(1, 8, generator=torch.Generator().manual_seed(4)), label)
    attack = REGISTRY["ggl"](optimizer="cma", latents=8, evaluations=1200, prior=0.0)
    found = attack.reconstruct(observed(Batch(truth, label), shown), torch.Generator().manual_seed(0))
    nothing = prior.decode(torch.zeros(1, 8), label)
    assert psnr(truth[0], found.images[0]) > max(20, 3 + psnr(truth[0], nothing[0]))
    assert found.iterations <= 1200


def test_gias_leaves_its_generator_s_range(trained: tuple[Batch, Prior]) -> None:
    """The second stage explains the update better than any latent did, and the image with it."""
    shown, _ = trained
    truth = Batch(public(96).images[90:91], torch.tensor([0]))
    flags = {"generator_steps": 200, "iterations": 150, "pixels": 0}
    seen = observed(truth, shown)
    latent = REGISTRY["ggl"](generator="vae", **flags).reconstruct(seen, torch.Generator().manual_seed(0))
    both = REGISTRY["gias"](**flags).reconstruct(seen, torch.Generator().manual_seed(0))
    assert both.trace[:150] == latent.trace
    assert min(both.trace) < 0.5 * min(latent.trace)
    assert psnr(truth.images[0], both.images[0]) > psnr(truth.images[0], latent.images[0]) + 1
    again = REGISTRY["ggl"](generator="vae", **flags).reconstruct(seen, torch.Generator().manual_seed(0))
    assert torch.equal(again.images, latent.images), "GIAS moved the generator on disk"


def test_the_noise_of_a_defence_is_known_and_weighs_the_prior() -> None:
    shown = public()
    seen = observed(Batch(shown.images[:1], shown.labels[:1]), shown, defense="clip=0.5+gauss=0.02")

    def answer(**flags: object) -> torch.Tensor:
        attack = REGISTRY["ggl"](iterations=20, latents=4, **flags)
        return attack.reconstruct(seen, torch.Generator().manual_seed(0)).images

    assert torch.equal(answer(), answer(noise=0.02))
    assert not torch.equal(answer(), answer(noise=0.0))


@pytest.mark.parametrize("kind", ["gradient", "delta"])
def test_under_known_noise_the_objective_is_the_posterior(kind: str) -> None:
    """-log p(z | g*) = |g(G(z)) - g*|^2 / (2 s^2) + |z|^2 / 2, up to a factor and a constant: differences tell."""
    shown, rng = public(), torch.Generator().manual_seed(0)
    truth = Batch(shown.images[:1], shown.labels[:1])
    net = build("cnn", TASK.image_shape, TASK.num_classes, rng=rng)
    recipe = Recipe(1, 1, lr=0.1, defense=parse("gauss=0.02"))
    update = gradient(net, truth, TASK, recipe, rng) if kind == "gradient" else train(net, truth, TASK, recipe, rng)[0]
    match = Matching(Observation(TASK, recipe, net, update, shown))
    prior = ClassPCA(shown, 4)
    objective = REGISTRY["ggl"]().score(match, prior, truth.labels)
    s = 0.02 if kind == "gradient" else 0.02 / 0.1  # a delta is read as a gradient, its noise with it

    def both(z: torch.Tensor) -> tuple[float, float]:
        images = prior.decode(z, truth.labels)
        told = sum(
            (a - b).square().sum() for a, b in zip(match.simulate(images, truth.labels), match.target, strict=True)
        )
        return objective(images, z).item(), (told / (2 * s**2) + z.square().sum() / 2).item()

    points = [both(k * torch.ones(1, 4)) for k in (0.0, 1.0, 3.0)]
    (a, b, c), (p, q, r) = zip(*points, strict=True)
    assert (c - a) / (b - a) == pytest.approx((r - p) / (q - p), rel=0.02)


def test_what_comes_after_noise_makes_it_unknown() -> None:
    """Clipped noise is another noise: GGL then goes by direction."""
    assert parse("clip=0.5+gauss=0.02").noise == 0.02
    assert parse("gauss=0.03+gauss=0.04").noise == pytest.approx(0.05)
    assert parse("gauss=0.02+clip=0.5").noise == 0


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--dataset", "photos", "--image-size", "24"], "makes 3x16x16 images of 8 classes"),
        (["--dataset", "folder", "--base-datadir", "PICTURES", "--image-size", "16"], "trained on other images"),
        (["--generator-file", "nowhere"], "holds no generator"),
        (["--image-size", "16", "--latents", "64"], "--latents 4"),
        (["--generator", "class_pca", "--generator-steps", "5"], "belong to --generator vae"),
        (["--reading", "unrolled"], "belongs to main_fed.py"),
    ],
)
def test_a_prior_of_other_images_is_refused_in_a_line(
    flags: list[str],
    says: str,
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
    shown = public_images(data.load("photos", base_datadir=tmp_path, image_size=16))
    _, home = priors.obtain(priors.order("vae", dim=4, steps=1, width=4), shown, 8, {"dataset": "photos"})
    capsys.readouterr()
    flags = [str(tmp_path / "pictures") if f == "PICTURES" else f for f in flags]
    common = ["ggl", "--model", "cnn", "--trials", "1", "--out", str(tmp_path / "out")]
    if "--generator-file" not in flags and "--generator" not in flags and "--reading" not in flags:
        flags += ["--generator-file", str(home)]
        flags += [] if "--latents" in flags else ["--latents", "4"]
    assert in_process("main_grad.py", [*common, *flags], monkeypatch) == 2
    said = capsys.readouterr().err
    assert says in said
    assert said.strip().count("\n") == 0
    assert not (tmp_path / "out").exists()


def test_a_script_trains_its_prior_on_public_images_and_scores_beside_it(tmp_path: Path) -> None:
    quick = ("--image-size", "16", "--trials", "2", "--jobs", "2", "--iterations", "60", "--pixels", "40")
    quick += ("--generator-steps", "60", "--latents", "8", "--weight-iterations", "20", "--out", str(tmp_path))
    done = shell("grad/gias.sh", *quick, CHECKPOINTS=str(tmp_path / "made"))
    assert done.returncode == 0, done.stderr
    (told,) = (tmp_path / "made").glob("vae-*/manifest.json")
    shown = public_images(data.load("photos", base_datadir=tmp_path, image_size=16))
    assert json.loads(told.read_text())["data"] == priors.data_digest(shown)
    for row in rows(only_run(tmp_path)):
        assert row["companion_psnr"] is not None
        assert row["oracle_floor_psnr"] > row["class_baseline_psnr"] - 1  # sixty steps make a poor generator
    assert "ig_single on the same updates" in done.stdout


def test_prior_sh_says_what_it_has_made(tmp_path: Path) -> None:
    flags = ("--image-size", "16", "--steps", "5", "--width", "4", "--latents", "4", "--held-out", "2")
    done = shell("prior.sh", *flags, CHECKPOINTS=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "5 steps" in done.stdout
    assert list(tmp_path.glob("vae-*/samples.png"))
    bad = shell("prior.sh", "--dataset", "nothing", CHECKPOINTS=str(tmp_path))
    assert bad.returncode == 2
    assert bad.stderr.strip().count("\n") == 0
