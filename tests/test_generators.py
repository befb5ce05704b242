"""Generators fitted to public images, and the search of their latents."""

import pytest
import torch

from attacks.base import REGISTRY, discover
from federated.client import gradient, train
from federated.wire import Batch, Observation, Recipe, Task
from models import build
from models.generators import ClassPCA
from tests.test_attacks import smooth_pictures
from utils.evaluator import psnr, summarise
from utils.report import verdict

discover()
TASK = Task((3, 16, 16), 4, (0.5,) * 3, (0.5,) * 3)


def public() -> Batch:
    """Classes 0 to 2, each its own brightness; class 3 has no image."""
    labels = torch.arange(90) % 3
    return Batch(0.15 + 0.6 * smooth_pictures(90, 16, seed=3) * (0.4 + 0.3 * labels.view(-1, 1, 1, 1)), labels)


def test_zero_latents_are_the_class_mean_and_a_class_unseen_the_mean_of_all() -> None:
    seen = public()
    images = ClassPCA(seen, 8).decode(torch.zeros(4, 8), torch.arange(4))
    for label in range(3):
        assert torch.allclose(images[label], seen.images[seen.labels == label].mean(0), atol=1e-6)
    assert torch.allclose(images[3], seen.images.mean(0), atol=1e-6)


def test_components_are_orthogonal_and_fall_in_size() -> None:
    _, components = ClassPCA(public(), 8).of_class(1)
    gram = components @ components.T
    sizes = gram.diagonal()
    assert (sizes[:-1] >= sizes[1:]).all()
    assert (gram - sizes.diag()).abs().max() < 1e-9 * sizes[0]


def test_every_latent_makes_a_picture_even_with_more_latents_than_images() -> None:
    few = Batch(public().images[:3], public().labels[:3])
    z = 3 * torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    images = ClassPCA(few, 32).decode(z, torch.tensor([0, 1, 2, 3, 0]))
    assert images.isfinite().all()
    assert images.min() >= 0
    assert images.max() <= 1


@pytest.mark.parametrize(("kind", "matching"), [("gradient", "cosine"), ("gradient", "l2"), ("delta", "cosine")])
def test_ggl_finds_an_image_its_generator_can_make(kind: str, matching: str) -> None:
    """In range, x* = G(z*): at least 35 dB, and the matching loss below 1% of its start."""
    seen = public()
    for k in range(2):
        rng = torch.Generator().manual_seed(k)
        label = torch.tensor([k])
        truth = Batch(ClassPCA(seen, 16).decode(0.7 * torch.randn(1, 16, generator=rng), label), label)
        net = build("cnn", TASK.image_shape, TASK.num_classes, rng=rng)
        recipe = Recipe(1) if kind == "gradient" else Recipe(1, 3, lr=0.01)
        update = (
            gradient(net, truth, TASK, recipe, rng) if kind == "gradient" else train(net, truth, TASK, recipe, rng)[0]
        )
        attack = REGISTRY["ggl"](latents=16, matching=matching, iterations=500)
        found = attack.reconstruct(Observation(TASK, recipe, net, update, seen, {}), rng)
        assert found.labels.item() == k
        assert psnr(truth.images[0], found.images[0]) >= 35
        assert min(found.trace) < 0.01 * found.trace[0]


def test_the_gain_over_the_class_mean_is_paired_and_its_interval_is_students() -> None:
    def row(gain: float) -> dict[str, object]:
        scores = {"psnr": 15 + gain, "ssim": None, "lpips": None, "mse": 0.1, "label": 0, "label_hat": 0}
        return scores | {
            "trial": gain,
            "match": 0,
            "baseline_psnr": 12.0,
            "class_baseline_psnr": 15.0,
            "label_ok": True,
        }

    trials = [{"seconds": 1.0, "status": "ok"}]
    gain = summarise([row(g) for g in (1.0, 2.0, 3.0)], trials)["over_class_mean"]
    # Student's t at 97.5%, two degrees of freedom, from printed tables: 4.303
    assert gain["mean"] == pytest.approx(2)
    assert gain["high"] - 2 == pytest.approx(4.303 / 3**0.5, rel=1e-3)
    assert gain["low"] < 0
    assert verdict(gain).startswith("not shown to leak more")
    assert verdict(summarise([row(2 + g / 100) for g in range(3)], trials)["over_class_mean"]).startswith(
        "pixels leaked"
    )
    assert summarise([row(1.0)], trials)["over_class_mean"] is None
    # images of one update are not independent: as often as they are repeated, they count as one
    assert summarise([row(g) for g in (1.0, 2.0, 3.0) for _ in range(5)], trials)["over_class_mean"] == gain
