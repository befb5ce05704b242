"""What a layer's gradient reveals exactly: Robbing the Fed, dW/db, trap weights, the Cocktail Party Attack."""

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import data
from attacks.base import ATTACKS, Attack
from attacks.linear.bins import bins_of
from attacks.linear.features import (
    EmbeddingWhitening,
    FeatureExtractor,
    Head,
    cosine_annealing,
    layer_problem,
)
from attacks.linear.ica import centred, differences, fast_ica, unmix, whitening
from attacks.linear.layer import (
    alone_on_a_neuron,
    distinct,
    layer_gradient,
    match_class_gradients,
    output_gradients,
    pixel_problem,
    scale_from_head,
)
from attacks.linear.refinement import refine_by_consistency
from attacks.optim.tracker import Tracker, tracking
from core.errors import UsageError
from core.protocol import Batch, Observation, Recipe, Reconstruction, Task, image_task
from evaluation.metrics import psnr
from evaluation.pairing import pair
from federated.client import gradient, train
from models import build
from models.implants.calibration import thresholds
from models.implants.imprint import Imprint, find_imprint
from models.inspection import hidden_layer, pixel_layer

PHOTOS = data.load("photos", base_datadir=Path("unused"))
TASK = PHOTOS.task
PUBLIC = PHOTOS.public.take(torch.arange(len(PHOTOS.public)))


def victims(n: int, seed: int) -> Batch:
    order = torch.randperm(len(PHOTOS.private), generator=torch.Generator().manual_seed(seed))
    return PHOTOS.private.take(order[:n])


def network(name: str, seed: int = 0, task: Task = TASK, **options: Any) -> nn.Module:
    rng = torch.Generator().manual_seed(seed)
    return build(name, task.domain.shape, task.num_classes, rng=rng, **options)


def first_layer(model: nn.Module, task: Task = TASK) -> nn.Linear:
    layer = pixel_layer(model, task)
    assert layer is not None
    return layer


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


def rebuild(attack: Attack, observation: Observation) -> Reconstruction:
    return attack.reconstruct(observation, torch.Generator().manual_seed(1))


def scores(truth: Tensor, images: Tensor) -> Tensor:
    pairs = pair(truth, images)
    return torch.tensor([0.0 if j is None else psnr(x, images[j]) for x, j in zip(truth, pairs, strict=True)])


def nearest(truth: Tensor, images: Tensor) -> Tensor:
    """(n,) PSNR of each truth's nearest image, which it may share."""
    return torch.tensor([max(psnr(x, image) for image in images) for x in truth])


def bins_and_their_means(model: nn.Module, truth: Batch) -> tuple[Tensor, Tensor]:
    """(n,) which images are alone in their bin, and (n, C, H, W) what the rows reveal of each image's bin.

    That is the mean of its images, each weighted by its gradient at the block, from the images' own gradients.
    """
    assert isinstance(model, Imprint)
    bins = torch.bucketize(truth.examples.mean((1, 2, 3)), model.edges[1:-1].contiguous(), right=True)
    rng = torch.Generator().manual_seed(0)
    singles = [gradient(model, Batch(x[None], y[None]), TASK, Recipe(1), rng) for x, y in zip(*truth, strict=True)]
    grads = torch.stack([u.tensors["bias"][b] for u, b in zip(singles, bins, strict=True)]).double()  # (n,)
    shares = (bins[:, None] == bins) * grads
    return torch.bincount(bins)[bins] == 1, torch.einsum(
        "ij,jchw->ichw", shares / shares.sum(1, keepdim=True), truth.examples.double()
    )


def alone(bins: Tensor) -> Tensor:
    return (bins[:, None] == bins).sum(1) == 1


@pytest.mark.parametrize("connection", ["addition", "split", "cat", "linear"])
@pytest.mark.parametrize("sparse", [False, True])
def test_rtf_recovers_the_images_alone_in_their_bin(connection: str, sparse: bool) -> None:
    """All of them, and of the others only those whose bin has no other image with a gradient of any size."""
    attack = ATTACKS["rtf"](connection=connection, sparse=sparse)
    for seed in (4, 7):
        truth = victims(64, seed)
        observation = observe(attack, network("lenet"), truth)
        single, means = bins_and_their_means(observation.model, truth)
        assert torch.equal(alone(bins_of(observation.model, TASK, truth.examples)), single)
        found = nearest(truth.examples, rebuild(attack, observation).examples) > 40
        assert torch.equal(found, torch.tensor([psnr(x, y) > 40 for x, y in zip(truth.examples, means, strict=True)]))
        assert found[single].all()
        assert 32 < single.sum() < 64


def sources(truth: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    """The true example nearest to each reconstruction."""
    return torch.cdist(found.flatten(1).double(), truth.flatten(1).double()).argmin(1)


@pytest.mark.parametrize("connection", ["addition", "split", "cat"])
def test_rtf_certifies_exactly_the_images_alone_in_their_bin(connection: str) -> None:
    attack, truth = ATTACKS["rtf"](connection=connection, bins=64), victims(24, seed=1)
    observation = observe(attack, network("cnn"), truth)
    rec, single = rebuild(attack, observation), alone(bins_of(observation.model, TASK, truth.examples))
    assert rec.certified is not None
    assert sorted(sources(truth.examples, rec.examples[rec.certified]).tolist()) == single.nonzero().flatten().tolist()
    assert 8 < single.sum() < 24


def test_a_certified_image_is_right_after_local_steps_and_without_a_second_neuron_there_is_none() -> None:
    attack, truth = ATTACKS["rtf"](), victims(32, seed=0)
    rec = rebuild(attack, observe(attack, network("cnn"), truth, Recipe(8, 1, lr=0.1)))
    assert rec.certified is not None
    assert rec.certified.sum() >= 16
    assert nearest(rec.examples[rec.certified], truth.examples).min() > 30
    for options in ({"neurons": 1}, {"connection": "linear"}):
        attack = ATTACKS["rtf"](**options)
        assert rebuild(attack, observe(attack, network("lenet"), truth)).certified is None


def test_trap_certifies_exactly_the_images_alone_on_a_group_of_neurons() -> None:
    attack, truth = ATTACKS["trap"](neurons=3), victims(32, seed=2)
    observation = observe(attack, network("fc2"), truth)
    rec = rebuild(attack, observation)
    layer = next(m for m in observation.model.modules() if isinstance(m, torch.nn.Linear))
    single = alone_on_a_neuron(layer, TASK.domain.to_model(truth.examples))
    assert rec.certified is not None
    assert sorted(sources(truth.examples, rec.examples[rec.certified]).tolist()) == single.nonzero().flatten().tolist()
    assert 4 < single.sum() < 32


def test_rtf_keeps_both_of_two_that_look_alike() -> None:
    attack, truth = ATTACKS["rtf"](), victims(8, seed=0)
    truth.examples[5] = truth.examples[2] * 0.9
    found = nearest(truth.examples, rebuild(attack, observe(attack, network("lenet"), truth)).examples)
    assert found[[2, 5]].min() > 60


def test_rtf_reaches_the_closed_form() -> None:
    """(1 - 1/k)^(n-1) = 0.78 for 256 bins and 64 images, over ten batches."""
    attack = ATTACKS["rtf"]()
    shares = []
    for seed in range(10):
        truth = victims(64, seed)
        shares.append(scores(truth.examples, rebuild(attack, observe(attack, network("lenet"), truth)).examples) > 30)
    assert torch.cat(shares).double().mean() > 0.78 - 0.05


def test_rtf_finds_the_image_in_the_top_bin() -> None:
    """The last row has no neighbour above it; the published decoder loses what is in it."""
    attack = ATTACKS["rtf"]()
    truth = victims(4, seed=0)
    truth.examples[2] = 0.9 + 0.1 * truth.examples[2]
    observation = observe(attack, network("lenet"), truth)
    assert truth.examples[2].mean() > observation.model.edges[-2]
    assert scores(truth.examples, rebuild(attack, observation).examples)[2] > 60


@pytest.mark.parametrize("lr", [1e-3, 1e-1])
def test_rtf_survives_local_steps_and_the_published_scale_does_not(lr: float) -> None:
    attack, published = ATTACKS["rtf"](), ATTACKS["rtf"](threshold_drift=0, connection="linear", decoder="bias")
    truth, recipe = victims(64, seed=0), Recipe(8, 1, lr=lr)
    found = scores(truth.examples, rebuild(attack, observe(attack, network("lenet"), truth, recipe)).examples)
    assert (found >= 30).double().mean() >= 0.7
    rng = torch.Generator().manual_seed(0)
    model = published.implant(network("lenet"), TASK, PUBLIC, recipe)
    update, _ = train(model, truth, TASK, recipe, rng)
    lost = rebuild(published, Observation(TASK, recipe, model, update, PUBLIC)).examples
    usable = lost[lost.isfinite().flatten(1).all(1)]
    assert (scores(truth.examples, usable) >= 30).double().mean() <= 0.2


def test_rtf_split_block_is_exact_after_local_steps() -> None:
    attack, truth = ATTACKS["rtf"](connection="split", threshold_drift=1e-8), victims(64, seed=0)
    observation = observe(attack, network("lenet"), truth, Recipe(8, 2, lr=0.01))
    found = scores(truth.examples, rebuild(attack, observation).examples)
    assert found[found > 30].median() > 80


def test_rtf_one_shot_takes_one_image_at_most_from_many() -> None:
    attack, truth = ATTACKS["rtf"](one_shot=True, bins=64), victims(64, seed=1)
    observation = observe(attack, network("lenet"), truth)
    assert len(observation.update.tensors["bias"]) == 2 * attack.neurons
    assert len(rebuild(attack, observation).examples) <= 1


def test_rtf_deeper_in_the_net_gives_features_and_images_that_have_them() -> None:
    """One candidate for each bin that is passed, in both rounds; images well above what their mean would score."""
    attack, truth = ATTACKS["rtf"](position="features", feature_inversion_iterations=60), victims(4, seed=0)
    plain = network("cnn")
    expected = plain(truth.examples)
    observation = observe(attack, network("cnn"), truth)
    assert torch.allclose(observation.model(truth.examples), expected, atol=0.05)
    again = observe(attack, observation.model, truth, Recipe(4, 1, lr=0.01))
    assert sum(isinstance(m, Imprint) for m in again.model.modules()) == 1
    baseline = scores(truth.examples, PUBLIC.examples.mean(0).expand(4, -1, -1, -1))
    for observed in (observation, again):
        assert alone(bins_of(observed.model, TASK, truth.examples)).all()
        rec = rebuild(attack, observed)
        assert len(rec.examples) == 4
        assert (scores(truth.examples, rec.examples) - baseline).mean() > 3


@pytest.mark.parametrize(("name", "options"), [("fc2", {}), ("lenet", {}), ("cnn", {"activation": "tanh"})])
def test_rtf_refuses_features_that_it_cannot_sort(name: str, options: dict[str, str]) -> None:
    model = build(name, TASK.domain.shape, TASK.num_classes, **options)
    ATTACKS["rtf"]().check(model, TASK, Recipe(8), "gradient", 8)
    with pytest.raises(UsageError, match=r"`position=input`|`activation=relu`") as refusal:
        ATTACKS["rtf"](position="features").check(model, TASK, Recipe(8), "gradient", 8)
    assert "\n" not in str(refusal.value)


def test_near_copies_are_dropped_and_neighbours_are_kept() -> None:
    images = victims(3, seed=0).examples
    assert distinct(torch.cat([images, images[:2] * 0.995 + 0.001])) == [0, 1, 2]


@pytest.mark.parametrize("name", ["fc2", "mlp"])
def test_analytic_is_exact_for_one_image(name: str) -> None:
    attack = ATTACKS["analytic"]()
    for seed in range(5):
        truth = victims(1, seed)
        rec = rebuild(attack, observe(attack, network(name, seed), truth))
        assert scores(truth.examples, rec.examples).min() >= 60
        assert rec.labels is not None and rec.labels.tolist() == truth.labels.tolist()


def share_alone(name: str, **fields: object) -> tuple[float, float]:
    """Of 32 images: found exactly, and on a neuron of their own."""
    found, single = [], []
    for seed in range(3):
        attack, truth = ATTACKS[name](**fields), victims(32, seed)
        observation = observe(attack, network("fc2", seed), truth)
        layer = pixel_layer(observation.model, TASK)
        passed = layer(truth.examples.flatten(1)) > 0  # (32, h)
        single.append(passed[:, passed.sum(0) == 1].any(1))
        found.append(scores(truth.examples, rebuild(attack, observation).examples) > 40)
    return torch.cat(found).double().mean().item(), torch.cat(single).double().mean().item()


def test_calibrated_biases_double_what_a_layer_leaks_by_itself() -> None:
    """Untouched < trap weights < calibrated biases; and the images found are those on a neuron of their own."""
    passive, trap = share_alone("analytic"), share_alone("trap", weight_init="trap", bias="zero")
    calibrated = share_alone("trap")
    for found, single in (passive, trap, calibrated):
        assert found == pytest.approx(single, abs=0.02)
    assert calibrated[0] >= 2 * passive[0]
    assert calibrated[0] > trap[0]


def mixed(n: int, seed: int) -> tuple[Observation, Batch]:
    """A gradient of fc2 near its initialisation, with two hundred classes."""
    task = image_task(TASK.domain.shape, 200, TASK.domain.mean, TASK.domain.std)
    rng = torch.Generator().manual_seed(seed)
    truth = Batch(victims(n, seed).examples, torch.randint(200, (n,), generator=rng))
    public = Batch(PUBLIC.examples, torch.randint(200, (len(PUBLIC.labels),), generator=rng))
    model = network("fc2", seed, task)
    return Observation(task, Recipe(n), model, gradient(model, truth, task, Recipe(n), rng), public), truth


def correlation(truth: Tensor, sources: Tensor) -> float:
    """Mean |corr| of the truths with the sources (r, d), each source once."""
    a, b = (nn.functional.normalize(t - t.mean(1, keepdim=True), dim=1) for t in (truth.flatten(1).double(), sources))
    alike = (a @ b.T).abs()
    return max(alike[range(len(a)), order].mean().item() for order in itertools.permutations(range(len(b)), len(a)))


def unmixed(observation: Observation, seed: int, **fields: object) -> Tensor:
    """Sources (r, d) of the Cocktail Party Attack before it resolves sign and scale."""
    attack, layer = ATTACKS["cpa"](**fields), first_layer(observation.model, observation.task)
    problem = pixel_problem(observation, layer, project=True)
    return attack.unmix(problem, attack.view(observation, None), torch.Generator().manual_seed(seed))[0]


def test_cpa_whitened_rows_span_the_images() -> None:
    observation, truth = mixed(8, seed=0)
    sources = unmixed(observation, 0, unmixing="random")
    x = truth.examples.flatten(1).double()
    weights = torch.linalg.lstsq(sources.T, x.T).solution
    assert (sources.T @ weights - x.T).norm() / x.norm() < 1e-4


def test_cpa_unmixes_and_random_rotations_do_not() -> None:
    good, bad = [], []
    for seed in range(3):
        observation, truth = mixed(6, seed)
        for unmixing, results in (("differences", good), ("random", bad)):
            results.append(correlation(truth.examples, unmixed(observation, seed, unmixing=unmixing)))
    assert sum(good) / 3 >= 0.9
    assert sum(bad) / 3 < 0.8


def test_cpa_resolves_sign_scale_and_label_without_the_truth() -> None:
    """Pixels to 60 dB, once the head and the gradient agree."""
    observation, truth = mixed(8, seed=1)
    rec = rebuild(ATTACKS["cpa"](), observation)
    assert rec.labels is not None
    assert sorted(rec.labels.tolist()) == sorted(truth.labels.tolist())
    assert scores(truth.examples, rec.examples).min() > 60


def test_a_flat_image_does_not_spoil_the_unmixing() -> None:
    """It has no differences, and so no eigenvalue; without the tolerance it takes the others with it."""
    observation, truth = mixed(6, seed=2)
    truth.examples[3] = 0.0
    update = gradient(observation.model, truth, observation.task, Recipe(6), torch.Generator())
    sources = unmixed(replace(observation, update=update), 0)
    assert len(sources) == 5
    others = truth.examples[[0, 1, 2, 4, 5]]
    assert correlation(others, sources) > 0.85


@pytest.mark.parametrize("name", ["analytic", "trap", "spear"])
def test_refuses_a_network_that_does_not_begin_with_a_linear_layer(name: str) -> None:
    with pytest.raises(UsageError, match="first layer") as refusal:
        ATTACKS[name]().check(network("cnn"), TASK, Recipe(8), "gradient", 8)
    assert "\n" not in str(refusal.value)


def test_cpa_behind_convolutions_finds_images_that_have_the_embeddings() -> None:
    """Four images of an untrained cnn, well above what their mean would score."""
    attack, truth = ATTACKS["cpa"](feature_inversion_iterations=100), victims(4, seed=0)
    rec = rebuild(attack, observe(attack, network("cnn"), truth))
    mean = PUBLIC.examples.mean(0)
    baseline = torch.tensor([psnr(x, mean) for x in truth.examples])
    assert (scores(truth.examples, rec.examples) - baseline).mean() > 3


@pytest.mark.parametrize(
    ("name", "options", "says"), [("convnet64", {}, "before the head"), ("cnn", {"activation": "tanh"}, "ReLU")]
)
def test_cpa_refuses_what_has_no_embedding(name: str, options: dict[str, str], says: str) -> None:
    model = build(name, TASK.domain.shape, TASK.num_classes, **options)
    with pytest.raises(UsageError, match=says) as refusal:
        ATTACKS["cpa"]().check(model, TASK, Recipe(8), "gradient", 8)
    assert "\n" not in str(refusal.value)


def test_cpa_refuses_more_images_than_the_layer_carries() -> None:
    with pytest.raises(UsageError, match="256"):
        ATTACKS["cpa"]().check(network("fc2"), TASK, Recipe(257), "gradient", 257)


def test_trap_refuses_a_network_without_relu() -> None:
    smooth = build("mlp", TASK.domain.shape, TASK.num_classes, activation="sigmoid")
    with pytest.raises(UsageError, match="ReLU"):
        ATTACKS["trap"]().check(smooth, TASK, Recipe(8), "gradient", 8)


def test_rtf_takes_long_only_where_features_are_inverted() -> None:
    assert not ATTACKS["rtf"]().needs_workers()
    assert ATTACKS["rtf"](position="features").needs_workers()
    assert not ATTACKS["analytic"]().needs_workers()
    assert not ATTACKS["trap"]().needs_workers()


def test_one_shot_bins_begin_at_the_middle() -> None:
    attack, truth = ATTACKS["rtf"](one_shot=True, bins=4), victims(64, seed=1)
    model = attack.implant(network("lenet"), TASK, PUBLIC, Recipe(8))
    bins, block = bins_of(model, TASK, truth.examples), find_imprint(model)
    assert block is not None
    low, high, _ = block.edges
    brightness = truth.examples.mean((1, 2, 3))
    assert torch.equal(bins == -1, brightness < low)
    assert torch.equal(bins == 0, (brightness >= low) & (brightness < high))


@pytest.mark.parametrize("quantiles", ["smooth", "empirical", "normal", "laplace"])
def test_thresholds_put_about_as_many_public_images_in_each_bin(quantiles: str) -> None:
    brightness = PUBLIC.examples.mean((1, 2, 3))
    edges = thresholds(brightness, 4, quantiles)  # type: ignore[arg-type]
    counts = torch.bincount(torch.bucketize(brightness, edges[1:-1].contiguous(), right=True), minlength=4)
    assert len(edges) == 5
    assert (edges.diff() > 0).all()
    assert (counts / len(brightness) - 0.25).abs().max() < 0.1


@pytest.mark.parametrize("name", ["analytic", "trap"])
def test_dividing_rows_needs_no_public_examples(name: str) -> None:
    attack, truth = ATTACKS[name](), victims(1, seed=0)
    observation = observe(attack, network("fc2"), truth)
    alone_with_update, without = (rebuild(attack, replace(observation, public=p)) for p in (PUBLIC, None))
    assert torch.equal(alone_with_update.examples, without.examples)
    zero = {name: torch.zeros_like(t) for name, t in observation.update.tensors.items()}
    failed = rebuild(attack, replace(observation, public=None, update=replace(observation.update, tensors=zero)))
    assert failed.status == "diverged"
    assert failed.examples.shape == (0, *TASK.domain.shape)


def test_attacks_without_public_examples_are_refused_in_one_line() -> None:
    model, truth = network("fc2"), victims(2, seed=0)
    grads = gradient(model, truth, TASK, Recipe(2), torch.Generator()).tensors
    assert len(ATTACKS["analytic"]()(model, grads, task=TASK, num_examples=2).examples)
    assert "public" not in ATTACKS["trap"](bias="zero").requirements()
    for name in ("trap", "spear", "cpa"):
        with pytest.raises(UsageError, match="public"):
            ATTACKS[name]()(model, grads, task=TASK, num_examples=2)


@pytest.mark.parametrize("name", ["fc2", "cnn"])
def test_cpa_assigns_granted_labels_to_the_images_they_explain(name: str) -> None:
    """The right label for every image, in whatever order labels were granted."""
    attack, truth = ATTACKS["cpa"](feature_inversion_iterations=60), victims(4, seed=3)
    observation = observe(attack, network(name), truth)
    for order in ([0, 1, 2, 3], [3, 1, 0, 2]):
        rec = rebuild(attack, replace(observation, granted={"labels": truth.labels[order]}))
        assert rec.labels is not None
        pairs = pair(truth.examples, rec.examples)
        assert [rec.labels[j] for j in pairs] == truth.labels.tolist()


def test_output_gradients_are_those_of_single_examples() -> None:
    truth, model = victims(3, seed=0), network("fc2")
    layer = first_layer(model)
    d = output_gradients(model, layer, TASK.domain.to_model(truth.examples))  # (3, C, h)
    for i, (x, y) in enumerate(zip(*truth, strict=True)):
        update = gradient(model, Batch(x[None], y[None]), TASK, Recipe(1), torch.Generator())
        _, bias = layer_gradient(Observation(TASK, Recipe(1), model, update), layer)
        assert torch.allclose(d[i, y].double(), bias, atol=1e-6)


def test_class_gradients_give_factor_and_class() -> None:
    rng = torch.Generator().manual_seed(0)
    class_gradients = torch.randn(3, 5, 20, generator=rng)
    delta = torch.tensor([2.0, -0.5, 3.0])[:, None] * class_gradients[torch.arange(3), [4, 0, 2]]
    factors, labels = match_class_gradients(delta, class_gradients)
    assert torch.allclose(factors, torch.tensor([2.0, -0.5, 3.0]))
    assert labels.tolist() == [4, 0, 2]


def test_consistency_makes_rough_images_exact() -> None:
    """From images with 5% noise and of unknown scale to 60 dB; the head determines scale and label."""
    truth = victims(4, seed=0)
    observation = observe(ATTACKS["cpa"](), network("fc2"), truth)
    problem = pixel_problem(observation, first_layer(observation.model), project=True)
    x = TASK.domain.to_model(truth.examples).flatten(1).double()
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sources = (x + 0.05 * noise) / x.norm(dim=1, keepdim=True)
    scale, labels = scale_from_head(problem, sources)
    assert (scale > 0).all()
    assert labels.tolist() == truth.labels.tolist()
    refined = refine_by_consistency(problem, sources, rounds=8)
    assert refined.labels.tolist() == truth.labels.tolist()
    assert refined.unexplained < 1e-3
    found = TASK.domain.decode(problem.to_input(refined.inputs))
    assert scores(truth.examples, found).min() > 60


def test_fast_ica_separates_what_is_not_gaussian() -> None:
    rng = torch.Generator().manual_seed(0)
    sources = torch.rand(3, 8000, generator=rng, dtype=torch.float64).log() * torch.randn(3, 8000, generator=rng).sign()
    rows = torch.randn(10, 3, generator=rng, dtype=torch.float64) @ sources
    found = unmix(rows, 3, centred, torch.Generator().manual_seed(1))
    assert correlation(sources, found) > 0.99
    white = whitening(centred(rows), 3, 1e-11) @ centred(rows)
    assert torch.allclose(white @ white.T / (white.shape[1] - 1), torch.eye(3, dtype=torch.float64), atol=1e-6)
    result = fast_ica(white, torch.Generator().manual_seed(1))
    assert torch.allclose(result.matrix @ result.matrix.T, torch.eye(3, dtype=torch.float64), atol=1e-6)
    assert result.trace[-1] < result.trace[0]


def test_differences_are_linear() -> None:
    rows = victims(3, seed=0).examples.flatten(1).double()
    mixing = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.allclose(differences(mixing @ rows, TASK), mixing @ differences(rows, TASK))


def test_a_network_is_its_extractor_and_its_head() -> None:
    model, x = network("cnn"), victims(3, seed=0).examples
    layer = hidden_layer(model, TASK)
    assert layer is not None
    extractor, head = FeatureExtractor(model, layer), Head(model, layer, TASK)
    assert torch.allclose(head(extractor(x)), model.eval()(x), atol=1e-6)
    assert torch.equal(extractor.in_chunks(x), extractor(x).detach())


def test_whitened_embeddings_vary_evenly_about_zero() -> None:
    """The mean is gone, and all but one of the directions along which they varied are as weak as `min_gain` says."""
    model = network("cnn")
    layer = hidden_layer(model, TASK)
    assert layer is not None
    z = FeatureExtractor(model, layer).in_chunks(PUBLIC.examples[:512]).double()
    whitened = EmbeddingWhitening(z)(z)
    assert whitened.mean(0).norm() < 0.01 * z.mean(0).norm()
    before, after = (torch.linalg.svdvals(t - t.mean(0)) for t in (z, whitened))
    assert before[10] > 0.05 * before[0]
    assert after[1] < 0.006 * before[0]


def plain_feature_inversion(attack: Any, observation: Observation, truth: Batch, rng: torch.Generator) -> Tensor:
    """Feature inversion as the authors' loop does it, with torch's own optimiser and schedule."""
    layer = hidden_layer(observation.model, TASK)
    assert layer is not None
    extractor = FeatureExtractor(observation.model, layer)
    target = extractor(truth.examples).detach()
    x = TASK.domain.to_model(TASK.domain.init(len(target), rng)).requires_grad_()
    optimizer = torch.optim.Adam([x], lr=attack.feature_inversion_lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, attack.feature_inversion_iterations)
    for _ in range(attack.feature_inversion_iterations):
        distance = (1 - F.cosine_similarity(extractor(x), target)).sum()
        (grad,), (prior,) = torch.autograd.grad(distance, x), torch.autograd.grad(TASK.domain.regularizer(x), x)
        ours, its = (g.abs().mean((1, 2, 3), keepdim=True) for g in (grad, prior))
        x.grad = (grad + attack.feature_inversion_tv * ours / its * prior).sign()
        optimizer.step()
        schedule.step()
        TASK.domain.project_(x)
    return TASK.domain.decode(x)


def test_feature_inversion_is_the_plain_loop() -> None:
    attack, truth = ATTACKS["cpa"](feature_inversion_iterations=25), victims(2, seed=0)
    observation = observe(attack, network("cnn"), truth)
    expected = plain_feature_inversion(attack, observation, truth, torch.Generator().manual_seed(0))
    _, extractor = layer_problem(observation, hidden_layer(observation.model, TASK))  # type: ignore[arg-type]
    assert extractor is not None
    target = extractor(truth.examples).detach()
    found = attack.invert_features(extractor, target, TASK, torch.Generator().manual_seed(0))
    assert torch.allclose(found.examples, expected, atol=1e-4)
    assert len(found.trace) == 25


def test_unmixing_by_adam_is_the_plain_loop() -> None:
    """The published objective, minimised by torch's own optimiser at a constant rate, as the authors do."""
    paper = ATTACKS["cpa"](unmixing="adam", restarts=1, iterations=30, lr=1e-3, schedule="constant", refine=0)
    observation, _ = mixed(4, seed=0)
    gradient_, _ = layer_gradient(observation, first_layer(observation.model, observation.task))
    data_ = gradient_ - gradient_.mean(1, keepdim=True)
    whiten = whitening(data_, 4, 1e-11)
    white, rows = whiten @ data_, whiten @ gradient_
    v = torch.eye(4, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([v], lr=paper.lr)
    trace = []
    for _ in range(paper.iterations):
        unit = F.normalize(v, dim=1)
        negentropy = (torch.log(torch.cosh(unit @ white)).mean(1) - 0.3746).square().mean()
        independence = (paper.sharpness * (unit @ unit.T - torch.eye(4)).abs()).exp().mean() - 1
        images = (unit @ rows).view(-1, *TASK.domain.shape)
        smooth = images.diff(dim=2).abs().mean() + images.diff(dim=3).abs().mean()
        loss = paper.tv * smooth + paper.independence_weight * independence - negentropy
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        trace.append(loss.item())
    problem = pixel_problem(observation, first_layer(observation.model, observation.task), project=True)
    sources, found = paper.unmix(problem, paper.view(observation, None), torch.Generator())
    assert found == pytest.approx(trace, rel=1e-9)
    assert torch.allclose(sources, F.normalize(v.detach(), dim=1) @ rows)


@pytest.mark.parametrize("end", [0.0, 0.3])
def test_cosine_annealing_is_torchs(end: float) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.5)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20, end)
    for step in range(20):
        assert cosine_annealing(0.5, step, 20, end) == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert cosine_annealing(0.5, 7, 20, end=0.5) == 0.5


@pytest.mark.parametrize("stop_after", [5, 28, 45])
def test_cpa_resumes_in_the_middle_of_either_segment(stop_after: int) -> None:
    """Killed during the unmixing by Adam (30 iterations) or the feature inversion (20), with the same result."""
    attack = ATTACKS["cpa"](unmixing="adam", refine=0, iterations=30, feature_inversion_iterations=20)
    observation = observe(attack, network("cnn"), victims(3, seed=0))
    expected, saved, calls = rebuild(attack, observation), [], itertools.count(1)

    def save(state: dict[str, Any]) -> None:
        saved.append(state)
        if next(calls) == stop_after:
            raise InterruptedError

    with pytest.raises(InterruptedError), tracking(Tracker(should_save=lambda: True, save=save)):
        rebuild(attack, observation)
    steps: list[int] = []
    tracker = Tracker(lambda iteration, total, objective: steps.append(iteration), saved[-1])
    with tracking(tracker):
        resumed = rebuild(attack, observation)
    assert torch.equal(resumed.examples, expected.examples)
    assert resumed.trace == expected.trace
    assert len(steps) == 50 - stop_after


def noisy(n: int, sigma: float) -> tuple[Observation, Batch]:
    truth, model = victims(n, seed=0), network("fc2")
    recipe = Recipe(n, defense=f"gauss(sigma={sigma})") if sigma else Recipe(n)
    update = gradient(model, truth, TASK, recipe, torch.Generator().manual_seed(0))
    return Observation(TASK, recipe, model, update, PUBLIC), truth


@pytest.mark.parametrize(("n", "least"), [(1, 20), (8, 12)])
def test_low_rank_takes_most_of_the_noise_from_a_layers_gradient(n: int, least: float) -> None:
    """About 10 log10(h d / (n (h + d))) dB of it: 24 and 15 for 256 x 3072."""
    (clean, _), (observed, _) = noisy(n, 0.0), noisy(n, 1e-3)
    layer = next(m for m in observed.model.modules() if isinstance(m, torch.nn.Linear))
    truth, sent = (o.update.ordered(o.model)[0].double() for o in (clean, observed))
    ours, bias = layer_gradient(observed, layer)
    assert bias is not None
    assert 20 * torch.log10((sent - truth).norm() / (ours - truth).norm()) > least


def test_a_gradient_without_noise_is_left_alone() -> None:
    observed, _ = noisy(8, 0.0)
    layer = next(m for m in observed.model.modules() if isinstance(m, torch.nn.Linear))
    assert torch.equal(layer_gradient(observed, layer)[0], observed.update.ordered(observed.model)[0].double())


def test_denoising_serves_an_attack_that_knows_the_noise_and_no_other() -> None:
    observed, truth = noisy(1, 1e-3)
    unaware = replace(observed, recipe=Recipe(1))
    found = [scores(truth.examples, rebuild(ATTACKS["analytic"](), o).examples).item() for o in (observed, unaware)]
    assert found[0] > found[1] + 10
