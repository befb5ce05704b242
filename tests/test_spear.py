"""SPEAR: small batches to the last digit, status "diverged" where it fails; and its column space, piece by piece."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import data
from attacks.base import ATTACKS
from attacks.linear.column_space import ColumnSpace, economy_svd, unit
from attacks.linear.ica import differences
from attacks.linear.layer import LinearProblem, layer_gradient, pixel_problem
from attacks.linear.selection import (
    EXACT,
    Selection,
    Solution,
    assign_labels,
    repair_column,
    resolve_scales,
    select_best,
    solve_by_zeros,
)
from attacks.linear.sparse_columns import (
    Candidates,
    search_from_ica,
    search_from_random_rows,
    split_pairs,
    unmix_beside,
)
from core.errors import UsageError
from core.protocol import Batch, Observation, Recipe, Reconstruction
from core.rng import stream
from evaluation.metrics import psnr
from evaluation.pairing import pair
from federated.client import gradient, train
from models import build
from models.inspection import pixel_layer


def victims(n: int, seed: int, normalize: str) -> tuple[data.Dataset, Batch, Batch]:
    photos = data.load("photos", base_datadir=Path("unused"), normalize=normalize)
    order = torch.randperm(len(photos.private), generator=torch.Generator().manual_seed(seed))
    public = photos.public.take(torch.linspace(0, len(photos.public) - 1, 256).long())
    return photos, photos.private.take(order[:n]), public


def network(photos: data.Dataset, seed: int, name: str = "fc2", **options: object) -> nn.Module:
    rng = torch.Generator().manual_seed(seed)
    return build(name, photos.task.domain.shape, photos.task.num_classes, rng=rng, width=200, **options)


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


def rebuild(observation: Observation, **fields: object) -> Reconstruction:
    return ATTACKS["spear"](**fields).reconstruct(observation, torch.Generator().manual_seed(1))


def exact(truth: Batch, rec: Reconstruction) -> list[bool]:
    pairs = pair(truth.examples, rec.examples)
    return [j is not None and psnr(x, rec.examples[j]) >= 60 for x, j in zip(truth.examples, pairs, strict=True)]


@pytest.mark.parametrize(("n", "normalize"), [(1, "none"), (2, "dataset"), (4, "none"), (6, "dataset")])
def test_every_image_of_a_small_batch_is_exact(n: int, normalize: str) -> None:
    for seed in range(4):
        photos, truth, public = victims(n, seed, normalize)
        rec = rebuild(observe(photos, network(photos, seed), truth, public))
        assert rec.status == "ok"
        assert all(exact(truth, rec)), f"batch {seed}"
        assert rec.labels is not None
        assert sorted(rec.labels.tolist()) == sorted(truth.labels.tolist())


@pytest.mark.parametrize(("n", "normalize"), [(12, "none"), (16, "none"), (32, "dataset")])
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
    model = build("fc2", photos.task.domain.shape, photos.task.num_classes, rng=stream(3, "model"), width=200)
    passed = model.body(photos.task.domain.to_model(truth.examples)) > 0  # (n, h)
    only = (~passed[:, None] & passed).sum(2)  # (n, n): neurons that j passes and i does not
    assert (only + n * torch.eye(n)).min() <= 2
    assert all(exact(truth, rebuild(observe(photos, model, truth, public))))


def test_draws_alone() -> None:
    """At least two of three; each image shares its pattern of zeros with none other."""
    whole = 0
    for seed in range(3):
        photos, truth, public = victims(10, seed, "dataset")
        whole += all(exact(truth, rebuild(observe(photos, network(photos, seed), truth, public), search="draws")))
    assert whole >= 2


def test_the_head_gives_the_scale_where_there_is_no_bias() -> None:
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
    truth = Batch(truth.examples[[0, 1, 2, 2]], truth.labels[[0, 1, 2, 2]])
    rec = rebuild(observe(photos, network(photos, 0), truth, public))
    assert len(rec.examples) == 3
    assert sum(exact(truth, rec)) == 3


def test_a_batch_beyond_its_budget_counts_as_diverged() -> None:
    photos, truth, public = victims(24, 0, "dataset")
    rec = rebuild(observe(photos, network(photos, 0), truth, public), search="draws", subsets=512)
    assert rec.status == "diverged"
    assert len(rec.examples) == 24
    assert rec.iterations == 512


def test_the_descent_does_the_work_of_many_draws() -> None:
    photos, truth, public = victims(12, 2, "dataset")
    observation = observe(photos, network(photos, 2), truth, public)
    assert rebuild(observation, search="draws", subsets=2048).status == "ok"
    assert rebuild(observation, search="draws", subsets=2048, descent=0).status == "diverged"


@pytest.mark.parametrize(
    ("name", "options", "n", "fields", "says"),
    [
        ("fc2", {}, 200, {}, "fewer images"),
        ("mlp", {"activation": "sigmoid"}, 4, {}, "ReLU"),
        ("fc2", {"bias": False}, 4, {"scale_from": "bias"}, "bias"),
    ],
)
def test_refuses_what_it_does_not_apply_to(name: str, options: dict, n: int, fields: dict, says: str) -> None:
    photos, *_ = victims(1, 0, "none")
    biased = options.pop("bias", True)
    model = network(photos, 0, name, **options)
    if not biased:
        model.body[1].bias = None
    with pytest.raises(UsageError, match=says) as refusal:
        ATTACKS["spear"](**fields).check(model, photos.task, Recipe(n), "gradient", n)
    assert "\n" not in str(refusal.value)


class Known:
    """The gradient of four images, and their d_i, which the tests compare with."""

    def __init__(self, n: int = 4, seed: int = 0) -> None:
        photos, self.truth, public = victims(n, seed, "dataset")
        self.domain = photos.task.domain
        model = network(photos, seed)
        self.observation = observe(photos, model, self.truth, public)
        layer = pixel_layer(model, photos.task)
        assert layer is not None
        self.problem: LinearProblem = pixel_problem(self.observation, layer, project=False)
        inputs = self.domain.to_model(public.examples).flatten(1)
        self.space = ColumnSpace.of(layer, self.problem.gradient, n, inputs)
        rng = torch.Generator()
        singles = [
            gradient(model, Batch(x[None], y[None]), photos.task, Recipe(1), rng)
            for x, y in zip(*self.truth, strict=True)
        ]
        biases = [layer_gradient(replace(self.observation, update=update), layer)[1] for update in singles]
        self.d = torch.stack(biases, 1)  # type: ignore[arg-type]  # (H, n)
        self.vectors = unit(self.d[self.space.active_rows].T)  # (n, h)
        self.x = self.domain.to_model(self.truth.examples).flatten(1).double()  # (n, d)
        self.view = partial(differences, task=photos.task)

    def are_known(self, vectors: Tensor) -> bool:
        """Whether unit vectors (n, h) are the d_i, in any order."""
        return bool(((vectors @ self.vectors.T).abs().max(0).values > 1 - 1e-8).all())


def rng() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_the_column_space_is_that_of_the_d_i() -> None:
    known = Known()
    space = known.space
    assert space.rank == 4
    assert torch.allclose(space.basis @ (space.basis.T @ known.vectors.T), known.vectors.T, atol=1e-6)
    inputs = space.inputs(space.columns(known.vectors))
    assert torch.allclose(
        inputs / inputs.norm(dim=1, keepdim=True), known.x / known.x.norm(dim=1, keepdim=True), atol=1e-5
    )
    with pytest.raises(AttributeError):
        space.noise = 0.0  # type: ignore[misc]


def test_the_d_i_score_highest_and_mixtures_score_less() -> None:
    known = Known()
    mixtures = unit(known.vectors + 0.1 * known.vectors.roll(1, 0))
    own, mixed = known.space.sparsity_score(known.vectors), known.space.sparsity_score(mixtures)
    assert (own > 0.8 * known.space.min_zeros).all()
    assert (mixed < own).all()


def test_refining_makes_nearly_sparse_vectors_sparse() -> None:
    known = Known()
    near = unit(known.vectors + 1e-6 * known.vectors.roll(1, 0))
    assert known.are_known(known.space.refine(near))
    assert torch.equal(known.space.is_zero(known.space.refine(near).T), known.space.is_zero(known.vectors.T))


def test_the_nearest_sparse_vector_needs_only_most_of_the_zeros() -> None:
    """From anchors that are not d_i themselves, with one expected zero in twenty wrong."""
    known = Known()
    mask = (~known.space.is_zero(known.vectors.T).T).logical_not().double()
    flips = torch.rand(mask.shape, generator=rng()) < 0.05
    mask = torch.where(flips, 1 - mask, mask)
    anchors = (known.vectors + 0.3 * known.vectors.roll(1, 0)) @ known.space.basis
    q = known.space.nearest_sparse(anchors, mask)
    assert known.are_known(known.space.refine(q @ known.space.basis.T))


def test_the_complement_mixes_the_other_images_only() -> None:
    known = Known()
    span, rows = known.space.complement(known.vectors[:1])
    assert span.shape == (4, 3)
    others = known.x[1:]
    fit = torch.linalg.lstsq(others.T, rows.T).solution
    assert (others.T @ fit - rows.T).norm() / rows.norm() < 1e-4


def test_inactive_neurons_follow_from_an_image_and_its_norm() -> None:
    known = Known()
    mask = known.space.inactive_mask(known.x, known.x[:1].norm(dim=1))
    expected = known.space.layer(known.x[:1].float())[0, known.space.active_rows] < 0
    assert mask.shape == (2, 4, len(known.space.basis))
    assert torch.equal(mask[0, 0].bool(), expected)


def test_candidates_are_sorted_without_copies() -> None:
    known, q = Known(), Known().vectors @ Known().space.basis
    candidates = Candidates(known.space)
    candidates.add(torch.cat([q[:2], -q[:2], q]))
    assert len(candidates.vectors) == 4
    assert (candidates.scores.diff() <= 0).all()
    assert known.are_known(candidates.vectors)
    assert candidates.independent() == candidates.certain() == [0, 1, 2, 3]
    assert 2 not in candidates.independent(excluded=2)
    before = candidates.ids.tolist()
    candidates.add(q)
    assert candidates.ids.tolist() == before


@pytest.mark.parametrize("strategy", ["ica", "random rows"])
def test_each_strategy_finds_the_d_i(strategy: str) -> None:
    known = Known()
    candidates = Candidates(known.space)
    if strategy == "ica":
        assert len(search_from_ica(candidates, known.view, rng())) == 4
    else:
        search_from_random_rows(candidates, 512, 20, rng())
    assert known.are_known(candidates.vectors[candidates.independent()])


def test_pairs_are_split() -> None:
    """d_i plus a tenth of d_j is replaced by the sparser d_i."""
    known = Known()
    candidates = Candidates(known.space)
    mixed = unit(torch.cat([known.vectors[:1] + 0.1 * known.vectors[1:2], known.vectors[1:]]))
    candidates._merge(mixed, known.space.sparsity_score(mixed))
    assert not known.are_known(candidates.vectors[candidates.independent()])
    split_pairs(candidates)
    assert known.are_known(candidates.vectors[candidates.independent()])


def test_sources_beside_certain_ones_span_all_images() -> None:
    known = Known()
    candidates = Candidates(known.space)
    candidates.add(known.vectors[:2] @ known.space.basis)
    sources = unmix_beside(candidates, candidates.certain(), known.view, rng())
    assert len(sources) == 4
    fit = torch.linalg.lstsq(sources.T, known.x.T).solution
    assert (sources.T @ fit - known.x.T).norm() / known.x.norm() < 1e-4


@pytest.mark.parametrize("scale_from", ["bias", "head"])
def test_scales_are_resolved(scale_from: str) -> None:
    known = Known()
    problem = known.problem if scale_from == "bias" else replace(known.problem, bias_gradient=None)
    columns = known.space.columns(known.vectors) * torch.tensor([1.0, -1.0, 1.0, 1.0])
    solution = resolve_scales(problem, known.space, columns)
    assert torch.allclose(solution.inputs, known.x, atol=1e-3)
    assert torch.allclose(solution.columns * problem.n, known.d, atol=1e-3 * known.d.abs().max().item())
    labels, similarity = assign_labels(problem, solution.inputs, solution.columns.T)
    assert labels.tolist() == known.truth.labels.tolist()
    assert torch.equal(similarity.argmax(1), labels)


def test_a_column_with_a_share_of_another_is_repaired() -> None:
    known = Known()
    wrong = known.vectors.clone()
    wrong[0] = unit((known.vectors[0] - 0.3 * known.vectors[1])[None])[0]
    solution = resolve_scales(known.problem, known.space, known.space.columns(wrong))
    repaired = repair_column(known.space, solution)[known.space.active_rows]
    assert known.are_known(unit(repaired.T))


def test_the_selection_keeps_the_better_solution() -> None:
    known, selection = Known(), Selection(Known().space)
    good = resolve_scales(known.problem, known.space, known.space.columns(known.vectors))
    bad = Solution(-good.inputs, good.columns)
    assert selection.accept_if_better(bad)
    assert selection.accept_if_better(good)
    assert not selection.accept_if_better(bad)
    assert selection.best is good
    assert selection.sign_mismatch <= EXACT


def test_selecting_finds_the_right_set_among_more_candidates() -> None:
    known = Known()
    candidates, selection = Candidates(known.space), Selection(known.space)
    mixtures = unit(known.vectors + 0.1 * known.vectors.roll(1, 0))
    candidates.add(torch.cat([mixtures, known.vectors]) @ known.space.basis)
    select_best(candidates, selection, partial(resolve_scales, known.problem, known.space))
    assert selection.best is not None
    assert selection.sign_mismatch <= EXACT
    assert torch.allclose(selection.best.inputs.norm(dim=1).sort().values, known.x.norm(dim=1).sort().values, rtol=1e-3)


def test_zeros_alone_solve_the_problem() -> None:
    known = Known()
    selection, starts = solve_by_zeros(known.problem, known.view, rng())
    assert selection.sign_mismatch <= EXACT
    assert starts == []


@pytest.mark.parametrize("shape", [(7, 20), (20, 7)])
def test_the_economy_svd_is_one(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=rng(), dtype=torch.float64)
    left, sizes, right = economy_svd(matrix)
    assert left.shape == (shape[0], 7)
    assert right.shape == (7, shape[1])
    assert torch.allclose(left * sizes @ right, matrix)
