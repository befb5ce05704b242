"""What a layer's gradient gives away exactly: Robbing the Fed, dW/db, trap weights, the Cocktail Party."""

import itertools
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import data
from attacks.base import REGISTRY, Attack, discover
from attacks.linear import distinct, layer_gradient, pixel_layer
from federated.client import gradient, train
from federated.wire import Batch, Observation, Recipe, Reconstruction, Task, UsageError
from models import build
from models.imprint import Imprint
from utils.evaluator import match, psnr

discover()
PHOTOS = data.load("photos", base_datadir=Path("unused"))
TASK = PHOTOS.task
PUBLIC = PHOTOS.public.take(torch.arange(len(PHOTOS.public)))


def victims(n: int, seed: int) -> Batch:
    order = torch.randperm(len(PHOTOS.private), generator=torch.Generator().manual_seed(seed))
    return PHOTOS.private.take(order[:n])


def network(name: str, seed: int = 0, task: Task = TASK) -> nn.Module:
    return build(name, task.image_shape, task.num_classes, rng=torch.Generator().manual_seed(seed))


def observe(attack: Attack, model: nn.Module, truth: Batch, recipe: Recipe | None = None) -> Observation:
    """One gradient of `truth` or, with a recipe, a client's delta."""
    rng, ordered = torch.Generator().manual_seed(0), recipe or Recipe(len(truth.labels))
    model = attack.implant(model, TASK, PUBLIC, ordered)
    if recipe is None:
        update = gradient(model, truth, TASK, ordered, rng)
    else:
        update, loss = train(model, truth, TASK, ordered, rng)
        assert torch.isfinite(torch.tensor(loss))
    return Observation(TASK, ordered, model, update, PUBLIC)


def rebuild(attack: Attack, seen: Observation) -> Reconstruction:
    return attack.reconstruct(seen, torch.Generator().manual_seed(1))


def scores(truth: Tensor, images: Tensor) -> Tensor:
    pairs = match(truth, images)
    return torch.tensor([0.0 if j is None else psnr(x, images[j]) for x, j in zip(truth, pairs, strict=True)])


def nearest(truth: Tensor, images: Tensor) -> Tensor:
    """(n,) PSNR of each truth's nearest image, which it may share."""
    return torch.tensor([max(psnr(x, image) for image in images) for x in truth])


def said_of_bins(model: nn.Module, truth: Batch) -> tuple[Tensor, Tensor]:
    """(n,) which images are alone in their bin, and (n, C, H, W) what the rows say of each bin: its images' mean, each
    weighted by how hard it pulls at the block. From the gradients of the images one by one."""
    assert isinstance(model, Imprint)
    bins = torch.bucketize(truth.images.mean((1, 2, 3)), model.edges[1:-1].contiguous(), right=True)
    rng = torch.Generator().manual_seed(0)
    singles = [gradient(model, Batch(x[None], y[None]), TASK, Recipe(1), rng) for x, y in zip(*truth, strict=True)]
    pulls = torch.stack([u.tensors[1][b] for u, b in zip(singles, bins, strict=True)]).double()  # (n,)
    shares = (bins[:, None] == bins) * pulls
    return torch.bincount(bins)[bins] == 1, torch.einsum(
        "ij,jchw->ichw", shares / shares.sum(1, keepdim=True), truth.images.double()
    )


@pytest.mark.parametrize("connection", ["addition", "split", "cat", "linear"])
@pytest.mark.parametrize("sparse", [False, True])
def test_rtf_recovers_the_images_alone_in_their_bin(connection: str, sparse: bool) -> None:
    """All of them, and of the others only those beside which the rest of their bin pulls next to nothing."""
    attack = REGISTRY["rtf"](connection=connection, sparse=sparse)
    for seed in (4, 7):
        truth = victims(64, seed)
        seen = observe(attack, network("lenet"), truth)
        single, said = said_of_bins(seen.model, truth)
        assert torch.equal(attack.ceiling(seen.model, TASK, truth.images), single)
        found = nearest(truth.images, rebuild(attack, seen).images) > 40
        assert torch.equal(found, torch.tensor([psnr(x, y) > 40 for x, y in zip(truth.images, said, strict=True)]))
        assert found[single].all()
        assert 32 < single.sum() < 64


def test_rtf_keeps_both_of_two_that_look_alike() -> None:
    attack, truth = REGISTRY["rtf"](), victims(8, seed=0)
    truth.images[5] = truth.images[2] * 0.9
    found = nearest(truth.images, rebuild(attack, observe(attack, network("lenet"), truth)).images)
    assert found[[2, 5]].min() > 60


def test_rtf_reaches_the_closed_form() -> None:
    """(1 - 1/k)^(n-1) = 0.78 for 256 bins and 64 images, over ten batches."""
    attack = REGISTRY["rtf"]()
    shares = []
    for seed in range(10):
        truth = victims(64, seed)
        shares.append(scores(truth.images, rebuild(attack, observe(attack, network("lenet"), truth)).images) > 30)
    assert torch.cat(shares).double().mean() > 0.78 - 0.05


def test_rtf_finds_the_image_in_the_top_bin() -> None:
    """The last row has no neighbour above it; the published decoder loses what is in it."""
    attack = REGISTRY["rtf"]()
    truth = victims(4, seed=0)
    truth.images[2] = 0.9 + 0.1 * truth.images[2]
    seen = observe(attack, network("lenet"), truth)
    assert truth.images[2].mean() > seen.model.edges[-2]
    assert scores(truth.images, rebuild(attack, seen).images)[2] > 60


@pytest.mark.parametrize("lr", [1e-3, 1e-1])
def test_rtf_survives_local_steps_and_the_published_scale_does_not(lr: float) -> None:
    attack, published = REGISTRY["rtf"](), REGISTRY["rtf"](drift=0, connection="linear", decoder="bias")
    truth, recipe = victims(64, seed=0), Recipe(8, 1, lr=lr)
    found = scores(truth.images, rebuild(attack, observe(attack, network("lenet"), truth, recipe)).images)
    assert (found >= 30).double().mean() >= 0.7
    rng = torch.Generator().manual_seed(0)
    model = published.implant(network("lenet"), TASK, PUBLIC, recipe)
    update, _ = train(model, truth, TASK, recipe, rng)
    lost = rebuild(published, Observation(TASK, recipe, model, update, PUBLIC)).images
    usable = lost[lost.isfinite().flatten(1).all(1)]
    assert (scores(truth.images, usable) >= 30).double().mean() <= 0.2


def test_rtf_split_block_is_exact_after_local_steps() -> None:
    attack, truth = REGISTRY["rtf"](connection="split", drift=1e-8), victims(64, seed=0)
    seen = observe(attack, network("lenet"), truth, Recipe(8, 2, lr=0.01))
    found = scores(truth.images, rebuild(attack, seen).images)
    assert found[found > 30].median() > 80


def test_rtf_one_shot_takes_one_image_at_most_from_many() -> None:
    attack, truth = REGISTRY["rtf"](one_shot=True, bins=64), victims(64, seed=1)
    seen = observe(attack, network("lenet"), truth)
    assert len(seen.update.tensors[1]) == 2
    assert len(rebuild(attack, seen).images) <= 1


def test_rtf_deeper_in_the_net_gives_features_and_images_that_have_them() -> None:
    """One candidate for each bin that is passed, in both rounds; images well above what their mean would score."""
    attack, truth = REGISTRY["rtf"](position="features", fi_iterations=60), victims(4, seed=0)
    plain = network("cnn")
    expected = plain(truth.images)
    seen = observe(attack, network("cnn"), truth)
    assert torch.allclose(seen.model(truth.images), expected, atol=0.05)
    again = observe(attack, seen.model, truth, Recipe(4, 1, lr=0.01))
    assert sum(isinstance(m, Imprint) for m in again.model.modules()) == 1
    baseline = scores(truth.images, PUBLIC.images.mean(0).expand(4, -1, -1, -1))
    for observed in (seen, again):
        assert attack.ceiling(observed.model, TASK, truth.images).all()
        rec = rebuild(attack, observed)
        assert len(rec.images) == 4
        assert (scores(truth.images, rec.images) - baseline).mean() > 3


@pytest.mark.parametrize(("name", "options"), [("fc2", {}), ("lenet", {}), ("cnn", {"activation": "tanh"})])
def test_rtf_refuses_features_it_cannot_sort(name: str, options: dict[str, str]) -> None:
    model = build(name, TASK.image_shape, TASK.num_classes, **options)
    REGISTRY["rtf"]().check(model, TASK, Recipe(8), "gradient", 8)
    with pytest.raises(UsageError, match=r"--position input|--activation relu") as refusal:
        REGISTRY["rtf"](position="features").check(model, TASK, Recipe(8), "gradient", 8)
    assert "\n" not in str(refusal.value)


def test_near_copies_are_dropped_and_neighbours_are_kept() -> None:
    images = victims(3, seed=0).images
    assert distinct(torch.cat([images, images[:2] * 0.995 + 0.001])) == [0, 1, 2]


@pytest.mark.parametrize("name", ["fc2", "mlp"])
def test_analytic_is_exact_for_one_image(name: str) -> None:
    attack = REGISTRY["analytic"]()
    for seed in range(5):
        truth = victims(1, seed)
        rec = rebuild(attack, observe(attack, network(name, seed), truth))
        assert scores(truth.images, rec.images).min() >= 60
        assert rec.labels is not None and rec.labels.tolist() == truth.labels.tolist()


def share_alone(name: str, **fields: object) -> tuple[float, float]:
    """Of 32 images: found exactly, and on a neuron of their own."""
    found, single = [], []
    for seed in range(3):
        attack, truth = REGISTRY[name](**fields), victims(32, seed)
        seen = observe(attack, network("fc2", seed), truth)
        layer = pixel_layer(seen.model, TASK)
        passed = layer(truth.images.flatten(1)) > 0  # (32, h)
        single.append(passed[:, passed.sum(0) == 1].any(1))
        found.append(scores(truth.images, rebuild(attack, seen).images) > 40)
    return torch.cat(found).double().mean().item(), torch.cat(single).double().mean().item()


def test_calibrated_biases_double_what_a_layer_leaks_by_itself() -> None:
    """Untouched < trap weights < calibrated biases; and the images found are those on a neuron of their own."""
    passive, trap = share_alone("analytic"), share_alone("trap", rows="trap", bias="zero")
    calibrated = share_alone("trap")
    for found, single in (passive, trap, calibrated):
        assert found == pytest.approx(single, abs=0.02)
    assert calibrated[0] >= 2 * passive[0]
    assert calibrated[0] > trap[0]


def mixed(n: int, seed: int) -> tuple[Observation, Batch]:
    """A gradient of fc2 near its initialisation, with two hundred classes."""
    task = Task(TASK.image_shape, 200, TASK.mean, TASK.std)
    rng = torch.Generator().manual_seed(seed)
    truth = Batch(victims(n, seed).images, torch.randint(200, (n,), generator=rng))
    public = Batch(PUBLIC.images, torch.randint(200, (len(PUBLIC.labels),), generator=rng))
    model = network("fc2", seed, task)
    return Observation(task, Recipe(n), model, gradient(model, truth, task, Recipe(n), rng), public), truth


def correlation(truth: Tensor, sources: Tensor) -> float:
    """Mean |corr| of the truths with the sources (r, d), each source once."""
    a, b = (nn.functional.normalize(t - t.mean(1, keepdim=True), dim=1) for t in (truth.flatten(1).double(), sources))
    alike = (a @ b.T).abs()
    return max(alike[range(len(a)), order].mean().item() for order in itertools.permutations(range(len(b)), len(a)))


def test_cpa_whitened_rows_span_the_images() -> None:
    seen, truth = mixed(8, seed=0)
    rows, _ = layer_gradient(seen, pixel_layer(seen.model, seen.task))
    sources, _ = REGISTRY["cpa"](start="random").unmix(rows, 8, seen.task, torch.Generator().manual_seed(0))
    x = truth.images.flatten(1).double()
    weights = torch.linalg.lstsq(sources.T, x.T).solution
    assert (sources.T @ weights - x.T).norm() / x.norm() < 1e-4


def test_cpa_unmixes_and_random_rotations_do_not() -> None:
    good, bad = [], []
    for seed in range(3):
        seen, truth = mixed(6, seed)
        rows, _ = layer_gradient(seen, pixel_layer(seen.model, seen.task))
        for start, results in (("differences", good), ("random", bad)):
            attack, rng = REGISTRY["cpa"](start=start), torch.Generator().manual_seed(seed)
            results.append(correlation(truth.images, attack.unmix(rows, 6, seen.task, rng)[0]))
    assert sum(good) / 3 >= 0.9
    assert sum(bad) / 3 < 0.8


def test_cpa_names_sign_scale_and_label_without_the_truth() -> None:
    """Pixels to 60 dB, once the head and the gradient agree."""
    seen, truth = mixed(8, seed=1)
    rec = rebuild(REGISTRY["cpa"](), seen)
    assert rec.labels is not None
    assert sorted(rec.labels.tolist()) == sorted(truth.labels.tolist())
    assert scores(truth.images, rec.images).min() > 60


def test_a_flat_image_does_not_spoil_the_unmixing() -> None:
    """It has no differences, and so no eigenvalue; without the cut it takes the others with it."""
    seen, truth = mixed(6, seed=2)
    truth.images[3] = 0.0
    update = gradient(seen.model, truth, seen.task, Recipe(6), torch.Generator())
    rows, _ = layer_gradient(
        Observation(seen.task, Recipe(6), seen.model, update, PUBLIC), pixel_layer(seen.model, seen.task)
    )
    sources, _ = REGISTRY["cpa"]().unmix(rows, 6, seen.task, torch.Generator().manual_seed(0))
    assert len(sources) == 5
    others = truth.images[[0, 1, 2, 4, 5]]
    assert correlation(others, sources) > 0.85


@pytest.mark.parametrize("name", ["analytic", "trap", "spear"])
def test_refuses_a_network_that_does_not_begin_with_a_linear_layer(name: str) -> None:
    with pytest.raises(UsageError, match="first layer") as refusal:
        REGISTRY[name]().check(network("cnn"), TASK, Recipe(8), "gradient", 8)
    assert "\n" not in str(refusal.value)


def test_cpa_behind_convolutions_finds_images_that_have_the_embeddings() -> None:
    """Four images of an untrained cnn, well above what their mean would score."""
    attack, truth = REGISTRY["cpa"](fi_iterations=100), victims(4, seed=0)
    rec = rebuild(attack, observe(attack, network("cnn"), truth))
    mean = PUBLIC.images.mean(0)
    baseline = torch.tensor([psnr(x, mean) for x in truth.images])
    assert (scores(truth.images, rec.images) - baseline).mean() > 3


@pytest.mark.parametrize(
    ("name", "options", "says"), [("convnet64", {}, "before the head"), ("cnn", {"activation": "tanh"}, "ReLU")]
)
def test_cpa_refuses_what_has_no_embedding(name: str, options: dict[str, str], says: str) -> None:
    model = build(name, TASK.image_shape, TASK.num_classes, **options)
    with pytest.raises(UsageError, match=says) as refusal:
        REGISTRY["cpa"]().check(model, TASK, Recipe(8), "gradient", 8)
    assert "\n" not in str(refusal.value)


def test_cpa_refuses_more_images_than_the_layer_carries() -> None:
    with pytest.raises(UsageError, match="256"):
        REGISTRY["cpa"]().check(network("fc2"), TASK, Recipe(257), "gradient", 257)


def test_trap_refuses_a_network_without_relu() -> None:
    smooth = build("mlp", TASK.image_shape, TASK.num_classes, activation="sigmoid")
    with pytest.raises(UsageError, match="ReLU"):
        REGISTRY["trap"]().check(smooth, TASK, Recipe(8), "gradient", 8)
