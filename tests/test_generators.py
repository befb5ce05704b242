"""Generators fitted to public images, and the search of their latents."""

import pytest
import torch

from attacks.base import ATTACKS
from core.protocol import Batch, Observation, Recipe, image_task
from evaluation.metrics import psnr
from evaluation.summary import summarize
from federated.client import gradient, train
from models import build
from models.generators.base import ClassPCA
from report.tables import verdict
from tests.test_attacks import smooth_pictures

TASK = image_task((3, 16, 16), 4, (0.5,) * 3, (0.5,) * 3)


def public_images() -> Batch:
    """Classes 0 to 2, each with a brightness of its own; class 3 has no image."""
    labels = torch.arange(90) % 3
    return Batch(0.15 + 0.6 * smooth_pictures(90, 16, seed=3) * (0.4 + 0.3 * labels.view(-1, 1, 1, 1)), labels)


def test_zero_latents_are_the_class_mean_and_for_a_class_without_images_the_mean_of_all() -> None:
    public = public_images()
    images = ClassPCA(public, 8).decode(torch.zeros(4, 8), torch.arange(4))
    for label in range(3):
        assert torch.allclose(images[label], public.examples[public.labels == label].mean(0), atol=1e-6)
    assert torch.allclose(images[3], public.examples.mean(0), atol=1e-6)


def test_components_are_orthogonal_and_fall_in_size() -> None:
    _, components = ClassPCA(public_images(), 8).class_components(1)
    gram = components @ components.T
    sizes = gram.diagonal()
    assert (sizes[:-1] >= sizes[1:]).all()
    assert (gram - sizes.diag()).abs().max() < 1e-9 * sizes[0]


def test_every_latent_decodes_to_an_image_even_with_more_latents_than_images() -> None:
    few = Batch(*(t[:3] for t in public_images()))
    z = 3 * torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    images = ClassPCA(few, 32).decode(z, torch.tensor([0, 1, 2, 3, 0]))
    assert images.isfinite().all()
    assert images.min() >= 0
    assert images.max() <= 1


@pytest.mark.parametrize(("kind", "distance"), [("gradient", "cosine"), ("gradient", "l2"), ("delta", "cosine")])
def test_ggl_finds_an_image_in_the_range_of_its_generator(kind: str, distance: str) -> None:
    """For x* = G(z*): at least 35 dB, and the objective falls below 1% of its start."""
    public = public_images()
    for k in range(2 if (kind, distance) == ("gradient", "cosine") else 1):
        rng = torch.Generator().manual_seed(k)
        label = torch.tensor([k])
        truth = Batch(ClassPCA(public, 16).decode(0.7 * torch.randn(1, 16, generator=rng), label), label)
        net = build("cnn", TASK.domain.shape, TASK.num_classes, rng=rng)
        if kind == "gradient":
            recipe = Recipe(1)
            update = gradient(net, truth, TASK, recipe, rng)
        else:
            recipe = Recipe(1, 3, lr=0.01)
            update, _ = train(net, truth, TASK, recipe, rng)
        attack = ATTACKS["ggl"](latent_dim=16, distance=distance, iterations=300)
        result = attack.reconstruct(Observation(TASK, recipe, net, update, public), rng)
        assert result.labels.item() == k
        assert psnr(truth.examples[0], result.examples[0]) >= 35
        assert min(result.trace) < 0.01 * result.trace[0]


def test_the_gain_over_the_class_mean_is_paired_and_has_students_interval() -> None:
    def row(gain: float) -> dict[str, object]:
        scores = {"psnr": 15 + gain, "ssim": None, "lpips": None, "mse": 0.1, "label_true": 0, "label_pred": 0}
        baselines = {"baseline_psnr": 12.0, "class_baseline_psnr": 15.0}
        return scores | baselines | {"trial": gain, "match": 0, "label_ok": True}

    def summary(rows: list[dict[str, object]]) -> dict[str, object]:
        return {"attack": "ggl", **summarize(rows, [{"seconds": 1.0, "status": "solved"}] * 10)}

    gains = summary([row(g) for g in (1.0, 2.0, 3.0)])
    gain = gains["over_class_mean"]
    # Student's t at 97.5%, two degrees of freedom, from printed tables: 4.303
    assert gain["mean"] == pytest.approx(2)
    assert gain["high"] - 2 == pytest.approx(4.303 / 3**0.5, rel=1e-3)
    assert gain["low"] < 0
    assert not verdict(gains).startswith("Leaks")
    assert verdict(summary([row(2 + g / 100) for g in range(3)])).startswith("Leaks")
    assert summary([row(1.0)])["over_class_mean"] == {"mean": 1, "low": None, "high": None, "n": 1}
    # images of one update are not independent: however often they are repeated, they count as one observation
    assert summary([row(g) for g in (1.0, 2.0, 3.0) for _ in range(5)])["over_class_mean"] == gain
