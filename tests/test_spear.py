"""SPEAR: small batches to the last digit, and a plain word where it fails."""

from pathlib import Path

import pytest
import torch
from torch import nn

import data
from attacks.base import REGISTRY, discover
from federated.client import gradient, train
from federated.wire import Batch, Observation, Recipe, Reconstruction, UsageError
from models import build
from utils.evaluator import match, psnr
from utils.run import stream

discover()


def victims(n: int, seed: int, normalize: str) -> tuple[data.Dataset, Batch, Batch]:
    photos = data.load("photos", base_datadir=Path("unused"), normalize=normalize)
    order = torch.randperm(len(photos.private), generator=torch.Generator().manual_seed(seed))
    public = photos.public.take(torch.linspace(0, len(photos.public) - 1, 256).long())
    return photos, photos.private.take(order[:n]), public


def network(photos: data.Dataset, seed: int, name: str = "fc2", **options: object) -> nn.Module:
    rng = torch.Generator().manual_seed(seed)
    return build(name, photos.task.image_shape, photos.task.num_classes, rng=rng, width=200, **options)


def observe(
    photos: data.Dataset, model: nn.Module, truth: Batch, public: Batch, recipe: Recipe | None = None
) -> Observation:
    """One gradient of `truth` or, with a recipe, a client's delta."""
    rng, ordered = torch.Generator().manual_seed(0), recipe or Recipe(len(truth.labels))
    if recipe is None:
        update = gradient(model, truth, photos.task, ordered, rng)
    else:
        update, _ = train(model, truth, photos.task, ordered, rng)
    return Observation(photos.task, ordered, model, update, public)


def rebuild(seen: Observation, **fields: object) -> Reconstruction:
    return REGISTRY["spear"](**fields).reconstruct(seen, torch.Generator().manual_seed(1))


def exact(truth: Batch, rec: Reconstruction) -> list[bool]:
    pairs = match(truth.images, rec.images)
    return [j is not None and psnr(x, rec.images[j]) >= 60 for x, j in zip(truth.images, pairs, strict=True)]


@pytest.mark.parametrize("normalize", ["dataset", "none"])
@pytest.mark.parametrize("n", [1, 2, 4, 6])
def test_every_image_of_a_small_batch_is_exact(n: int, normalize: str) -> None:
    for seed in range(5):
        photos, truth, public = victims(n, seed, normalize)
        rec = rebuild(observe(photos, network(photos, seed), truth, public))
        assert rec.status == "ok"
        assert all(exact(truth, rec)), f"batch {seed}"
        assert rec.labels is not None
        assert sorted(rec.labels.tolist()) == sorted(truth.labels.tolist())


@pytest.mark.parametrize(
    ("n", "normalize"), [(8, "none"), (12, "none"), (16, "none"), (16, "dataset"), (32, "dataset")]
)
def test_larger_batches_without_a_single_draw(n: int, normalize: str) -> None:
    for seed in range(3):
        photos, truth, public = victims(n, seed, normalize)
        rec = rebuild(observe(photos, network(photos, seed), truth, public))
        assert all(exact(truth, rec))
        assert rec.iterations == 0


@pytest.mark.parametrize(("start", "n"), [(12, 4), (12, 6), (8, 8)])
def test_images_of_which_one_passes_all_neurons_of_another_but_one(start: int, n: int) -> None:
    """Bright images in [0, 1]: batches of `spear.sh --seed 3 --normalize none` in which d_i plus some of d_j is as
    sparse as d_i."""
    photos, _, public = victims(1, 0, "none")
    order = torch.randperm(len(photos.private), generator=stream(3, "data"))
    truth = photos.private.take(order[start : start + n])
    model = build("fc2", photos.task.image_shape, photos.task.num_classes, rng=stream(3, "model"), width=200)
    passed = model.body(photos.task.to_model(truth.images)) > 0  # (n, h)
    only = (~passed[:, None] & passed).sum(2)  # (n, n): neurons that j passes and i does not
    assert (only + n * torch.eye(n)).min() <= 2
    assert all(exact(truth, rebuild(observe(photos, model, truth, public))))


@pytest.mark.parametrize("n", [8, 12])
def test_draws_alone(n: int) -> None:
    """At least two of three; each image shares its pattern of zeros with none other."""
    whole = 0
    for seed in range(3):
        photos, truth, public = victims(n, seed, "dataset")
        whole += all(exact(truth, rebuild(observe(photos, network(photos, seed), truth, public), start="draws")))
    assert whole >= 2


def test_the_head_gives_the_lengths_where_there_is_no_bias() -> None:
    for seed in range(3):
        photos, truth, public = victims(4, seed, "dataset")
        model = network(photos, seed)
        first = model.body[1]
        model.body[1] = nn.Linear(first.in_features, first.out_features, bias=False)
        model.body[1].weight = first.weight
        rec = rebuild(observe(photos, model, truth, public))
        assert all(exact(truth, rec))
        assert rec.labels is not None
        assert sorted(rec.labels.tolist()) == sorted(truth.labels.tolist())


def test_a_deeper_head_and_local_steps_are_no_obstacle() -> None:
    photos, truth, public = victims(4, 1, "dataset")
    assert all(exact(truth, rebuild(observe(photos, network(photos, 1, "mlp"), truth, public))))
    stepped = observe(photos, network(photos, 1), truth, public, Recipe(2, 1, lr=0.01))
    assert sum(exact(truth, rebuild(stepped))) >= 3


def test_one_image_twice_is_found_once() -> None:
    """Two equal images are one source: rank three of four."""
    photos, truth, public = victims(4, 0, "dataset")
    truth = Batch(truth.images[[0, 1, 2, 2]], truth.labels[[0, 1, 2, 2]])
    rec = rebuild(observe(photos, network(photos, 0), truth, public))
    assert len(rec.images) == 3
    assert sum(exact(truth, rec)) == 3


def test_a_batch_beyond_its_budget_counts_as_diverged() -> None:
    photos, truth, public = victims(24, 0, "dataset")
    rec = rebuild(observe(photos, network(photos, 0), truth, public), start="draws", subsets=512)
    assert rec.status == "diverged"
    assert len(rec.images) == 24
    assert rec.iterations == 512


def test_the_descent_does_the_work_of_many_draws() -> None:
    photos, truth, public = victims(12, 2, "dataset")
    seen = observe(photos, network(photos, 2), truth, public)
    assert rebuild(seen, start="draws", subsets=2048).status == "ok"
    assert rebuild(seen, start="draws", subsets=2048, descent=0).status == "diverged"


@pytest.mark.parametrize(
    ("name", "options", "n", "fields", "says"),
    [
        ("fc2", {}, 200, {}, "fewer images"),
        ("mlp", {"activation": "sigmoid"}, 4, {}, "ReLU"),
        ("fc2", {"bias": False}, 4, {"lengths": "bias"}, "bias"),
    ],
)
def test_refuses_what_it_does_not_apply_to(name: str, options: dict, n: int, fields: dict, says: str) -> None:
    photos, *_ = victims(1, 0, "none")
    biased = options.pop("bias", True)
    model = network(photos, 0, name, **options)
    if not biased:
        model.body[1].bias = None
    with pytest.raises(UsageError, match=says) as refusal:
        REGISTRY["spear"](**fields).check(model, photos.task, Recipe(n), "gradient", n)
    assert "\n" not in str(refusal.value)
