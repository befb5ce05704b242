"""FGLA reads the features of every example off the head's gradient and decodes them with a network trained once."""

from pathlib import Path

import pytest
import torch
from torch import nn

import attacks.fgla as fgla
from attacks import ATTACKS
from attacks.linear.features import FeatureExtractor
from core.errors import UsageError
from core.protocol import Batch, Observation, Recipe, image_task
from evaluation.metrics import psnr
from federated.client import gradient, train
from models import build
from models.inspection import head_layer
from tests.test_attacks import smooth_pictures

TASK = image_task((3, 8, 8), 10, (0.5,) * 3, (0.5,) * 3)


def network() -> nn.Module:
    return build("lenet", TASK.domain.shape, TASK.num_classes, rng=torch.Generator().manual_seed(3))


def features_of(net: nn.Module, examples: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return FeatureExtractor(net, head_layer(net))(TASK.domain.to_model(examples))


@pytest.mark.parametrize(("count", "iterations"), [(1, 0), (4, 30)])
def test_features_are_exact_for_one_example_and_after_refinement_for_several(count: int, iterations: int) -> None:
    net, labels = network(), torch.randperm(10, generator=torch.Generator().manual_seed(1))[:count]
    truth = Batch(torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(2)), labels)
    update = gradient(net, truth, TASK, Recipe(count), torch.Generator())
    weight, bias = update.tensors["head.weight"], update.tensors["head.bias"]
    expected, head = features_of(net, truth.examples), head_layer(net)
    first = fgla.offset_features(weight, bias, labels)
    own = head.weight.detach(), head.bias.detach()
    found, errors = fgla.refine(first, weight, bias, labels, *own, iterations)
    assert (found - expected).abs().max() < 1e-3 * expected.abs().max()
    assert len(errors) == iterations + 1
    if count > 1:
        assert (first - expected).abs().max() > 1e-2 * expected.abs().max()


def test_examples_of_one_class_share_their_mean() -> None:
    """Exactly so where the model gives all examples the same probabilities, and the label stands alone."""
    net, labels = network(), torch.tensor([2, 2, 2])
    with torch.no_grad():
        head_layer(net).weight.zero_()
    truth = Batch(torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(2)), labels)
    tensors = gradient(net, truth, TASK, Recipe(3), torch.Generator()).tensors
    found = fgla.offset_features(tensors["head.weight"], tensors["head.bias"], labels)
    assert torch.allclose(found, features_of(net, truth.examples).mean(0).expand(3, -1), rtol=1e-4)


@pytest.mark.parametrize("kind", ["gradient", "delta"])
def test_images_are_closer_than_the_mean_and_the_generator_is_trained_once(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CHECKPOINTS", str(tmp_path))
    net, public = network(), Batch(smooth_pictures(128, 8, 5), torch.arange(128) % 10)
    attack, labels = ATTACKS["fgla"](steps=400, batch=32, channels=8), torch.tensor([1, 4, 7])
    mean, gains, wrong = public.examples.mean(0), [], []
    for seed in range(2):
        truth, other = (Batch(smooth_pictures(3, 8, s), labels) for s in (60 + seed, 80 + seed))
        recipe, rng = Recipe(3, lr=0.1), torch.Generator().manual_seed(0)
        update = (gradient if kind == "gradient" else lambda *a: train(*a)[0])(net, truth, TASK, recipe, rng)
        rec = attack.reconstruct(Observation(TASK, recipe, net, update, public, {"labels": labels}), rng)
        gains += [psnr(t, e) - psnr(t, mean) for t, e in zip(truth.examples, rec.examples, strict=True)]
        wrong += [psnr(t, e) - psnr(t, mean) for t, e in zip(other.examples, rec.examples, strict=True)]
        monkeypatch.setattr(fgla.FGLA, "train", None)  # what is trained already is loaded
    assert sum(gains) / 6 > 1
    assert sum(wrong) / 6 < 0
    assert len(list(tmp_path.glob("fgla-*/network.safetensors"))) == 1


def test_a_head_without_a_bias_is_refused() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 10, bias=False))
    with pytest.raises(UsageError, match="bias"):
        ATTACKS["fgla"]().check(net, TASK, Recipe(1), "gradient", 1)
