"""Metrics with known answers, and the rules of pairing."""

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from attacks import ATTACKS
from core.protocol import Batch, Recipe, Reconstruction, image_task
from evaluation.baselines import Baselines
from evaluation.bounds import oracle_projection, recoverable_mask, search_space_bound
from evaluation.candidates import CANDIDATES, Candidates, Pool
from evaluation.evaluator import ScoringContext, TrialScore, false_positive_rate, score_trial
from evaluation.intervals import chance_p_value, mean_interval, share_interval
from evaluation.metrics import METRICS, Lpips, compare, metrics_of, mse, psnr, ssim
from evaluation.pairing import correlations, pair
from evaluation.summary import is_recovered, summarize, thin, unit_of
from evaluation.verdict import outcome
from utils.network import check_reachable, is_reachable

TASK = image_task((3, 16, 16), 5)


def pictures(n: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(n, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


# classes 0 to 3 have public images, class 4 has none
CONTEXT = ScoringContext(TASK, Baselines(Batch(pictures(4, seed=9), torch.arange(4))))


def score(truth: Batch, rec: Reconstruction) -> TrialScore:
    return score_trial(truth, rec, CONTEXT)


def test_a_copy_scores_the_cap() -> None:
    x = pictures(1)[0]
    assert psnr(x, x) == 100
    assert ssim(x, x) == pytest.approx(1)
    assert mse(x, x) == 0


@given(st.floats(1e-3, 0.5))
@settings(max_examples=20, deadline=None)
def test_psnr_of_a_known_error(shift: float) -> None:
    x = torch.full((3, 16, 16), 0.25, dtype=torch.float64)
    assert psnr(x, x + shift) == pytest.approx(-20 * math.log10(shift))


def test_ssim_is_none_below_its_window() -> None:
    assert ssim(torch.rand(3, 8, 8), torch.rand(3, 8, 8)) is None


@given(st.permutations(range(6)))
@settings(max_examples=20, deadline=None)
def test_pairing_undoes_any_shuffle(order: list[int]) -> None:
    truth = pictures(6)
    assert [order[j] for j in pair(truth, truth[list(order)])] == list(range(6))


def test_pairing_is_one_to_one_and_the_rest_is_missed() -> None:
    """Two truths, one reconstruction near both: it answers for one of them, the other scores the mean image."""
    truth = pictures(2)
    labels = torch.tensor([0, 1])
    rows, shown, _ = score(Batch(truth, labels), Reconstruction(truth[:1], labels[:1]))
    assert [r["match"] for r in rows] == [0, None]
    assert rows[1]["psnr"] == rows[1]["baseline_psnr"]
    assert [is_recovered(r) for r in rows] == [True, False]
    assert torch.equal(shown[0], truth[0])
    assert summarize(rows, [{"seconds": 1.0, "status": "solved"}])["missed"] == 1


def test_more_reconstructions_than_truths() -> None:
    truth = pictures(2)
    junk = torch.zeros(4, 3, 16, 16)
    rows, _, _ = score(Batch(truth, torch.tensor([0, 1])), Reconstruction(torch.cat([junk, truth])))
    assert [r["match"] for r in rows] == [4, 5]
    assert all(r["label_pred"] is None and r["label_ok"] is None for r in rows)


def test_an_image_that_is_not_finite_is_a_miss_not_a_number() -> None:
    truth = pictures(2)
    broken = truth.clone()
    broken[0, 0, 0, 0] = torch.nan
    rows, shown, _ = score(Batch(truth, torch.tensor([0, 1])), Reconstruction(broken))
    assert [r["match"] for r in rows] == [None, 1]
    assert shown.isfinite().all()


@pytest.mark.parametrize(
    ("true", "predicted", "right"),
    [
        ([0, 1, 2], [2, 0, 1], 3),  # order does not matter
        ([0, 0, 1], [0, 1, 1], 2),  # a label named once answers for one image
        ([0, 0, 0], [1, 2, 3], 0),
        ([3, 3], [3, 3], 2),
    ],
)
def test_labels_count_as_a_multiset(true: list[int], predicted: list[int], right: int) -> None:
    truth = Batch(pictures(len(true)), torch.tensor(true))
    rows, _, _ = score(truth, Reconstruction(pictures(len(true), seed=3), torch.tensor(predicted)))
    assert sum(r["label_ok"] for r in rows) == right


def test_class_baseline_falls_back_to_the_mean_image() -> None:
    """A class without a public image is worth no more than no label."""
    for label, same in ((4, True), (0, False)):
        truth = Batch(pictures(1), torch.tensor([label]))
        ((row,), _, _) = score(truth, Reconstruction(truth.examples))
        assert (row["class_baseline_psnr"] == row["baseline_psnr"]) == same


def test_diverged_trials_are_counted() -> None:
    rows, _, _ = score(Batch(pictures(1), torch.tensor([0])), Reconstruction(pictures(1, seed=4)))
    trials = [{"seconds": 1.0, "status": "diverged"}, {"seconds": 2.0, "status": "solved"}]
    summary = summarize(rows, trials)
    assert summary["status"] == {"diverged": 1, "solved": 1}
    assert summary["seconds"] == 3.0
    assert summary["psnr"]["mean"] == rows[0]["psnr"]


def test_lpips_is_computed_with_the_backbone_at_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The backbone comes from torch's hub cache; this one is drawn at random, to see that it is the one in use."""
    import torchvision

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        backbone = torchvision.models.alexnet(weights=None).state_dict()
    torch.save(backbone, tmp_path / "hub" / "checkpoints" / Lpips.BACKBONE)
    said: list[str] = []
    distance = Lpips(said.append)
    x, y = torch.rand(2, 3, 32, 32)
    assert distance(x, x) == 0
    assert distance(x, y) > 0
    assert distance(x[:1], y[:1]) > 0  # one channel
    assert said == []
    assert distance(x[:, :16], y[:, :16]) is distance(x[:, :16], y[:, :16]) is None
    assert len(said) == 1


@pytest.mark.parametrize("content", [None, b"broken"])
def test_lpips_is_null_without_its_backbone_and_says_why_once(
    content: bytes | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(Lpips, "URL", "http://127.0.0.1:9/alexnet.pth")
    if content is not None:
        (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
        (tmp_path / "hub" / "checkpoints" / Lpips.BACKBONE).write_bytes(content)
    said: list[str] = []
    distance = Lpips(said.append)
    x, y = pictures(2)
    assert distance(x, y) is distance(x, y) is None
    assert len(said) == 1
    assert "\n" not in said[0]


def test_sources_are_scored_up_to_sign_scale_and_offset_and_named_oracle() -> None:
    truth = pictures(3)
    rec = Reconstruction(torch.zeros(3, 3, 16, 16), sources=torch.stack([3 - 2 * truth[1], truth[0], truth[2] / 9]))
    rows, _, _ = score(Batch(truth, torch.tensor([0, 1, 2])), rec)
    assert [r["oracle_corr"] for r in rows] == pytest.approx([1, 1, 1])
    assert min(r["oracle_affine_psnr"] for r in rows) > 60
    assert max(r["psnr"] for r in rows) < 10
    noise = pictures(1, seed=7)
    (corr,), fitted, _ = correlations(truth[:1], (truth[:1] - truth[:1].mean()) + (noise - noise.mean()))
    assert corr == pytest.approx(0.5**0.5, abs=0.1)
    flat = psnr(truth[0], truth[0].mean().expand(3, 16, 16))
    assert psnr(truth[0], fitted[0]) == pytest.approx(flat + 3, abs=0.7)
    corr, fitted, pairs = correlations(truth[:2], truth[:1])
    assert corr == pytest.approx([1, 0])
    assert pairs == [0, None]
    assert psnr(truth[1], fitted[1]) == pytest.approx(psnr(truth[1], truth[1].mean().expand(3, 16, 16)))


def test_a_sign_is_right_if_the_image_made_of_a_source_is_no_negative() -> None:
    """Whatever sign the source had; black, a negative that was clipped, is not right."""
    truth = pictures(3)
    images = torch.stack([truth[1] * 0.5, 1 - truth[0], torch.zeros(3, 16, 16)])
    rec = Reconstruction(images, sources=torch.stack([3 - 2 * truth[1], truth[0], truth[2] / 9]))
    rows, _, _ = score(Batch(truth, torch.tensor([0, 1, 2])), rec)
    assert [r["sign_ok"] for r in rows] == [False, True, False]
    assert summarize(rows, [{"seconds": 1.0, "status": "solved"}])["sign_ok"] == pytest.approx(1 / 3)


def test_control_counts_what_the_same_candidates_would_pass_for() -> None:
    mine, others = pictures(3), pictures(3, seed=1)
    assert false_positive_rate(mine, Reconstruction(mine), CONTEXT) == 1
    assert false_positive_rate(others, Reconstruction(mine), CONTEXT) == 0
    assert false_positive_rate(others, Reconstruction(mine[:0]), CONTEXT) == 0


def test_a_trial_without_public_examples_has_no_baselines_and_is_scored_all_the_same() -> None:
    truth = Batch(pictures(2), torch.tensor([0, 1]))
    score = score_trial(truth, Reconstruction(truth.examples[:1]), ScoringContext(TASK, Baselines(None)))
    assert [r["match"] for r in score.rows] == [0, None]
    assert score.rows[0]["psnr"] == 100
    assert torch.equal(score.rebuilt[1], torch.full((3, 16, 16), 0.5))
    assert {r["baseline_psnr"] for r in score.rows} == {r["class_baseline_psnr"] for r in score.rows} == {None}
    summary = summarize([{"trial": 0, **r} for r in score.rows], [{"seconds": 1.0, **score.record}])
    assert summary["baseline_psnr"] is summary["class_baseline_psnr"] is summary["over_class_mean"] is None


def test_a_run_without_truth_has_a_summary() -> None:
    summary = summarize([], [{"seconds": 1.0, "status": "solved"}])
    assert summary["images"] == 0
    assert summary["psnr"] is summary["success_rate"] is summary["baseline_psnr"] is None


def test_the_keys_of_rows_and_records_on_disk() -> None:
    """People's scripts read these."""
    truth = Batch(pictures(2), torch.tensor([0, 1]))
    rec = Reconstruction(truth.examples, truth.labels, (2.0, 1.0), 2, sources=truth.examples)
    score = score_trial(
        truth,
        rec,
        CONTEXT,
        comparison=Reconstruction(pictures(2, seed=5)),
        projection=truth.examples,
        recoverable=torch.tensor([True, False]),
        unrelated=pictures(2, seed=6),
    )
    row = "image match psnr ssim lpips mse label_true label_pred label_ok baseline_psnr class_baseline_psnr"
    row += " oracle_corr oracle_affine_psnr sign_ok companion_psnr oracle_floor_psnr ceiling"
    assert list(score.rows[0]) == row.split()
    assert list(score.record) == [
        "iterations",
        "loss",
        "objective",
        "status",
        "restarts",
        "trace",
        "candidates",
        "control",
    ]
    assert [r["oracle_floor_psnr"] for r in score.rows] == [100, 100]
    assert [r["ceiling"] for r in score.rows] == [True, False]
    assert score.record["trace"] == [[0, 2.0], [1, 1.0]]
    assert (score.record["candidates"], score.record["control"]) == (2, 0)
    json.dumps([score.rows, score.record], allow_nan=False)
    plain = score_trial(truth, Reconstruction(truth.examples, trace=(math.nan,), status="diverged"), CONTEXT)
    assert not {"ceiling", "oracle_corr", "companion_psnr", "oracle_floor_psnr"} & set(plain.rows[0])
    assert plain.record["loss"] is None
    assert not {"candidates", "control"} & set(plain.record)


def test_only_psnr_is_computed_for_a_comparison() -> None:
    calls: list[int] = []
    context = ScoringContext(TASK, Baselines(None), {"lpips": lambda truth, guess: calls.append(1) or 0.25})
    truth = Batch(pictures(2), torch.tensor([0, 1]))
    comparison = Reconstruction(pictures(2))
    rows = score_trial(truth, Reconstruction(truth.examples), context, comparison=comparison).rows
    assert [r["lpips"] for r in rows] == [0.25, 0.25]
    assert len(calls) == 2


def test_a_metric_is_a_column_of_its_domain() -> None:
    truth, guess = pictures(2)
    scores = compare(TASK.domain, truth, guess)
    assert list(scores) == ["psnr", "ssim", "lpips", "mse"] == [m.name for m in metrics_of(TASK.domain)]
    assert scores["lpips"] is None
    assert scores["mse"] == pytest.approx(10 ** (-scores["psnr"] / 10))
    assert all(METRICS[f"image.{name}"].domain == "image" for name in scores)


def test_a_thinned_trace_keeps_its_ends_and_is_even() -> None:
    assert thin(()) == []
    assert thin((3.0, math.inf, 1.0)) == [[0, 3.0], [1, None], [2, 1.0]]
    trace = [float(-i) for i in range(12345)]
    kept = thin(trace)
    assert len(kept) == 200
    assert kept[0] == [0, 0.0]
    assert kept[-1] == [12344, -12344.0]
    steps = {b[0] - a[0] for a, b in itertools.pairwise(kept)}
    assert steps == {62, 63}
    assert all(value == -i for i, value in kept)
    assert len(thin(trace[:200])) == 200


def test_an_unreachable_server_is_no_network() -> None:
    assert not is_reachable("http://127.0.0.1:9/", patience=5)
    with pytest.raises(OSError, match="refused"):
        check_reachable("http://127.0.0.1:9/", patience=5)


class Linear(nn.Module):
    """A generator whose range is known: a class mean plus a combination of directions."""

    latent_dim = 4

    def __init__(self) -> None:
        super().__init__()
        rng = torch.Generator().manual_seed(0)
        self.means = nn.Parameter(0.5 + 0.05 * torch.randn(2, 48, generator=rng))
        self.directions = nn.Parameter(0.02 * torch.randn(4, 48, generator=rng))

    def decode(self, z: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return (self.means[labels] + z @ self.directions).view(-1, 3, 4, 4).clamp(0, 1)


def test_the_oracle_projection_finds_what_a_generator_can_make() -> None:
    generator, labels = Linear(), torch.tensor([0, 1, 1])
    with torch.no_grad():
        inside = generator.decode(torch.randn(3, 4, generator=torch.Generator().manual_seed(1)), labels)
    found = oracle_projection(generator, inside, labels)
    assert not found.requires_grad
    assert min(psnr(x, y) for x, y in zip(inside, found, strict=True)) > 60
    outside = torch.rand(3, 3, 4, 4, generator=torch.Generator().manual_seed(2))
    found = oracle_projection(generator, outside, labels)
    with torch.no_grad():
        start = generator.decode(torch.zeros(3, 4), labels)
    for x, best, first in zip(outside, found, start, strict=True):
        assert psnr(x, first) < psnr(x, best) < 30


@pytest.mark.parametrize("name", ["dlg", "spear"])
def test_attacks_without_an_oracle_have_no_bound(name: str) -> None:
    attack = SimpleNamespace(name=name)
    truth = Batch(pictures(2), torch.tensor([0, 1]))
    assert recoverable_mask(attack, nn.Identity(), TASK, truth.examples) is None
    assert search_space_bound(attack, TASK, truth, truth) is None
    assert search_space_bound(SimpleNamespace(name="ggl"), TASK, None, truth) is None


@pytest.mark.parametrize("name", ["analytic", "trap"])
def test_an_image_alone_on_a_neuron_is_recoverable(name: str) -> None:
    task = image_task((1, 1, 2), 2)
    layer = nn.Linear(2, 3)
    with torch.no_grad():  # neurons pass images with a bright left, a bright right, and any pixel
        layer.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]))
        layer.bias.copy_(torch.tensor([-0.5, -0.5, 0.0]))
    images = torch.tensor([[0.9, 0.1], [0.1, 0.9], [0.2, 0.9]]).view(3, 1, 1, 2)
    model = nn.Sequential(nn.Flatten(), layer, nn.ReLU(), nn.Linear(3, 2))
    mask = recoverable_mask(SimpleNamespace(name=name), model, task, images)
    assert mask.tolist() == [True, False, False]


@pytest.mark.parametrize("one_shot", [False, True])
def test_an_image_alone_in_its_bin_is_recoverable(one_shot: bool) -> None:
    """Of brightness 0.1 to 0.9, between thresholds at every tenth or, one-shot, in the middle."""
    task = image_task((1, 8, 8), 2)
    attack = ATTACKS.find("rtf")(bins=10, one_shot=one_shot)
    public = Batch(torch.linspace(0.005, 0.995, 200).view(-1, 1, 1, 1).expand(-1, 1, 8, 8), torch.zeros(200).long())
    model = attack.implant(nn.Sequential(nn.Flatten(), nn.Linear(64, 2)), task, public, Recipe(batch_size=4))
    images = torch.tensor([0.15, 0.54, 0.77, 0.78]).view(-1, 1, 1, 1).expand(-1, 1, 8, 8)
    expected = [False, True, False, False] if one_shot else [True, True, False, False]
    assert recoverable_mask(attack, model, task, images).tolist() == expected


class SmallVAE(nn.Module):
    """A variational autoencoder of 16x16 images, for a test."""

    latent_dim = 8

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.classes = classes
        self.encoder = nn.Sequential(nn.Linear(768, 64), nn.ReLU(), nn.Linear(64, 16))
        self.decoder = nn.Sequential(nn.Linear(8 + classes, 64), nn.ReLU(), nn.Linear(64, 768), nn.Sigmoid())

    def decode(self, z: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return self.decoder(torch.cat([z, F.one_hot(labels, self.classes).to(z)], 1)).view(-1, 3, 16, 16)

    def negative_log_prior(self, z: torch.Tensor) -> torch.Tensor:
        return z.square().sum(1) / 2

    def fit(self, public: Batch, steps: int = 300) -> "SmallVAE":
        optimizer = torch.optim.Adam(self.parameters(), lr=3e-3)
        for _ in range(steps):
            mean, log_std = self.encoder(public.examples.flatten(1)).chunk(2, 1)
            images = self.decode(mean + log_std.exp() * torch.randn_like(mean), public.labels)
            divergence = (mean.square() + (2 * log_std).exp() - 2 * log_std - 1).sum(1) / 2
            loss = (images - public.examples).square().flatten(1).sum(1).mean() + 0.05 * divergence.mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return self.requires_grad_(False)


def blobs(n: int, seed: int) -> Batch:
    """Bright spots (n, 3, 16, 16) on a dark ground, coloured by class."""
    rng = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 3
    centres = 3 + 10 * torch.rand(n, 2, 1, generator=rng)
    y, x = (-((torch.arange(16) - c) ** 2) / 18 for c in centres.unbind(1))  # (n, 16) each
    spot = (y[:, :, None] + x[:, None]).exp()
    tint = 0.3 + 0.6 * F.one_hot(labels, 3)
    noise = 0.05 * torch.rand(n, 3, 16, 16, generator=rng)
    return Batch((tint[:, :, None, None] * spot[:, None] + noise).clamp(0, 1), labels)


def test_gias_stays_below_its_own_bound_which_lies_above_the_projection() -> None:
    from attacks.gias import GIAS

    task = image_task((3, 16, 16), 3)
    public, victims = blobs(90, seed=0), blobs(4, seed=1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        generator = SmallVAE(3).fit(public)
        model = nn.Sequential(nn.Conv2d(3, 8, 5, 2), nn.Sigmoid(), nn.Flatten(), nn.Linear(288, 3))

    class SmallGIAS(GIAS):
        def build_generator(self, public: Batch, classes: int, metadata: object = None) -> SmallVAE:
            return generator

    attack = SmallGIAS(iterations=100, weight_iterations=100, comparison_iterations=0)
    weights = [p.clone() for p in generator.parameters()]
    scores = []
    for k in range(4):
        truth = Batch(victims.examples[k : k + 1], victims.labels[k : k + 1])
        loss = F.cross_entropy(model(truth.examples), truth.labels)
        grads = torch.autograd.grad(loss, list(model.parameters()))
        rec = attack(model, grads, task=task, labels=truth.labels, public=public)
        bound = search_space_bound(attack, task, public, truth)
        projection = oracle_projection(generator, truth.examples, truth.labels)
        scores.append([psnr(truth.examples[0], images[0]) for images in (rec.examples, bound, projection)])
    for reached, bound, projection in scores:
        assert bound >= reached
        assert bound >= projection
    assert all(torch.equal(a, b) for a, b in zip(generator.parameters(), weights, strict=True)), "G itself was moved"


# --- nulls, identification, intervals ---


def pool(examples: torch.Tensor, labels: torch.Tensor) -> Pool:
    return Pool(labels, lambda indices: examples[indices])


def world(n: int, seed: int) -> Batch:
    """Examples of four classes; those of a class share a picture, as crops of a photograph share colours."""
    rng = torch.Generator().manual_seed(seed)
    labels = torch.randint(4, (n,), generator=rng)
    return Batch(0.6 * pictures(4, seed=99)[labels] + 0.4 * torch.rand(n, 3, 16, 16, generator=rng), labels)


PUBLIC, SPARE = world(200, seed=1), world(1200, seed=2)


def attacked(toy: Callable[[Batch, int], Reconstruction], n: int, trials: int, spare: Batch = SPARE) -> dict[str, Any]:
    """The summary of a toy attack, a function of the true batch and the number of the trial."""
    candidates = Candidates([pool(spare.examples, spare.labels)], seed=0)
    context = ScoringContext(image_task((3, 16, 16), 4), Baselines(PUBLIC), {}, candidates)
    rows: list[dict[str, Any]] = []
    records = []
    for trial in range(trials):
        truth = world(n, seed=100 + trial)
        score = score_trial(truth, toy(truth, trial), context, trial=trial)
        rows += [{"trial": trial, **row} for row in score.rows]
        records.append({"seconds": 0.0, **score.record})
    return {"attack": "toy", **summarize(rows, records)}


def class_means(truth: Batch, trial: int) -> Reconstruction:
    """The mean of each granted class."""
    means = [PUBLIC.examples[PUBLIC.labels == label].mean(0) for label in truth.labels]
    return Reconstruction(torch.stack(means), truth.labels)


def mean_images(truth: Batch, trial: int) -> Reconstruction:
    return Reconstruction(PUBLIC.examples.mean(0).expand_as(truth.examples))


def random_examples(truth: Batch, trial: int) -> Reconstruction:
    """Public examples that have nothing to do with the update."""
    return Reconstruction(PUBLIC.examples[torch.randperm(200, generator=torch.Generator().manual_seed(trial))])


@pytest.mark.parametrize("n", [1, 4, 16, 64])
@pytest.mark.parametrize("toy", [class_means, mean_images, random_examples])
def test_an_attack_that_never_looks_at_the_update_comes_out_at_zero(
    toy: Callable[[Batch, int], Reconstruction], n: int
) -> None:
    """A 95% interval misses zero once in twenty times, one twice as wide hardly ever."""
    summary = attacked(toy, n, trials=6)
    gain, found = summary["over_null"], summary["identified"]
    assert abs(gain["mean"]) <= gain["high"] - gain["low"] + 1e-6, gain
    assert abs(gain["mean"]) < 0.3
    assert found["low"] <= found["chance"] <= found["high"], found
    assert outcome(summary) == "no leak found by this attack"
    if toy is class_means:
        assert summary["over_class_mean"]["mean"] == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize("toy", [class_means, mean_images])
def test_means_come_out_at_zero_where_classes_have_too_few_candidates(
    toy: Callable[[Batch, int], Reconstruction], n: int
) -> None:
    few = Batch(SPARE.examples[:120], SPARE.labels[:120])
    summary = attacked(toy, n, 6, few)
    assert not summary["null"]["same_labels"]
    assert summary["over_null"]["mean"] == pytest.approx(0, abs=1e-6)
    assert outcome(summary) == "no leak found by this attack"


@pytest.mark.parametrize("trials", [1, 2, 5])
def test_a_perfect_reconstruction_leaks_however_few_the_updates(trials: int) -> None:
    summary = attacked(lambda truth, trial: Reconstruction(truth.examples.flip(0)), 4, trials)
    assert summary["identified"]["share"] == summary["recovered"]["60"]["share"] == 1
    assert summary["psnr"]["high"] in (None, 100)
    assert outcome(summary) == "leaks"


def test_a_weak_reconstruction_leaks_though_it_is_worse_than_the_class_mean() -> None:
    def weak(truth: Batch, trial: int) -> Reconstruction:
        noise = torch.rand(truth.examples.shape, generator=torch.Generator().manual_seed(trial))
        return Reconstruction(0.5 * truth.examples + 0.5 * noise)

    summary = attacked(weak, 4, trials=6)
    assert summary["over_class_mean"]["mean"] < 0
    assert outcome(summary) == "leaks"


def test_class_means_are_paired_as_reconstructions_are() -> None:
    truth = Batch(torch.stack([torch.full((3, 16, 16), v) for v in (0.1, 0.9)]), torch.tensor([0, 1]))
    public = Batch(torch.stack([torch.full((3, 16, 16), v) for v in (0.8, 0.2)]), torch.tensor([0, 1]))
    rows = score_trial(truth, Reconstruction(public.examples), ScoringContext(TASK, Baselines(public))).rows
    assert [r["class_baseline_psnr"] for r in rows] == pytest.approx([20, 20], abs=1e-4)
    assert [r["class_baseline_psnr"] for r in rows] == [r["psnr"] for r in rows]


def test_a_missed_victim_is_not_identified_and_has_no_rank() -> None:
    summary = attacked(lambda truth, trial: Reconstruction(truth.examples[:1]), 2, trials=2)
    assert summary["identified"]["share"] == 0.5
    assert summary["missed"] == 2


def test_the_rank_counts_candidates_that_are_at_least_as_near() -> None:
    truth = Batch(torch.full((1, 3, 16, 16), 0.5), torch.tensor([0]))
    near, far = torch.full((3, 3, 16, 16), 0.41), torch.ones(117, 3, 16, 16)
    candidates = Candidates([pool(torch.cat([near, far]), torch.zeros(120).long())], seed=0)
    context = ScoringContext(TASK, Baselines(None), {}, candidates)
    (row,) = score_trial(truth, Reconstruction(torch.full((1, 3, 16, 16), 0.4)), context).rows
    assert (row["identified"], row["rank"], row["candidates_n"], row["candidates_class"]) == (False, 4, 121, True)
    (row,) = score_trial(truth, Reconstruction(truth.examples), context).rows
    assert (row["identified"], row["rank"]) == (True, 1)


def test_candidates_of_many_classes_are_loaded_once() -> None:
    loaded: list[int] = []

    def take(indices: torch.Tensor) -> torch.Tensor:
        loaded.append(len(indices))
        return torch.zeros(len(indices), 3, 4, 4)

    candidates = Candidates([Pool(torch.arange(20 * 120) % 20, take)], seed=0)
    for label in 3 * list(range(20)):
        candidates.of(label)
    assert sum(loaded) == 20 * (120 + 1)  # and one each for its shape


def test_candidates_prefer_the_first_pool_and_their_own_class() -> None:
    private, held_out = (torch.full((k, 3, 4, 4), v) for k, v in ((1500, 0.2), (300, 0.7)))
    labels = torch.cat([torch.zeros(1400), torch.ones(60), torch.full((40,), 2.0)]).long()
    pools = [pool(private, labels), pool(held_out, torch.arange(300) % 3 // 2)]  # class 0: 200, class 1: 100
    candidates = Candidates(pools, seed=0)
    examples, same = candidates.of(0)
    assert (len(examples), same) == (CANDIDATES - 1, True)
    assert (examples < 0.5).all(), "the first pool is enough"
    examples, same = candidates.of(1)
    assert (len(examples), same) == (160, True)
    examples, same = candidates.of(2)
    assert (len(examples), same) == (CANDIDATES - 1, False)
    assert Candidates([], seed=0).of(0)[0].numel() == 0
    sets, own = Candidates(pools, seed=0).draws(torch.tensor([0, 1, 1]), trial=3)
    again, _ = Candidates(pools, seed=0).draws(torch.tensor([0, 1, 1]), trial=3)
    assert own
    assert all(torch.equal(a, b) for a, b in zip(sets, again, strict=True))


def test_a_run_without_any_candidate_has_no_null() -> None:
    context = ScoringContext(TASK, Baselines(None), {}, Candidates([], seed=0))
    score = score_trial(Batch(pictures(1), torch.tensor([0])), Reconstruction(pictures(1)), context)
    assert score.rows[0]["identified"] is score.rows[0]["null_psnr"] is None
    summary = summarize(score.rows, [{"seconds": 1.0, **score.record}])
    assert summary["identified"] is summary["null"] is summary["over_null"] is None


def test_the_interval_of_a_mean_is_that_of_its_units() -> None:
    found = mean_interval([1.0, 2.0, 3.0], "abc")
    # Student's t at 97.5%, two degrees of freedom, from printed tables: 4.303
    assert found["high"] - 2 == pytest.approx(4.303 / 3**0.5, rel=1e-3)
    assert mean_interval([1.0, 1.0, 2.0, 2.0, 3.0, 3.0], "aabbcc") == pytest.approx(found)
    assert mean_interval([1.0, 3.0], "aa") == {"mean": 2, "low": None, "high": None, "n": 1}


def test_the_interval_of_a_share_is_exact_or_that_of_its_units() -> None:
    """Clopper and Pearson, from printed tables: 8 of 10 -> [0.444, 0.975], 0 of 10 -> [0, 0.308]."""
    alone = share_interval([True] * 8 + [False] * 2, range(10))
    assert (alone["low"], alone["high"]) == pytest.approx((0.444, 0.975), abs=1e-3)
    none = share_interval([False] * 10, range(10))
    assert (none["low"], none["high"]) == pytest.approx((0, 0.308), abs=1e-3)
    clustered = share_interval([True] * 8 + [False] * 2, [k // 2 for k in range(10)])
    assert clustered["low"] < alone["low"]
    assert share_interval([False] * 100, [k // 10 for k in range(100)])["high"] == pytest.approx(0.308, abs=1e-3)
    balanced = share_interval([True, False] * 50, [k // 10 for k in range(100)])
    assert balanced["high"] - balanced["low"] == pytest.approx(0.203, abs=2e-3)  # 50 of 100


def test_the_p_value_of_chance_is_exact_or_holds_for_any_dependence() -> None:
    assert chance_p_value([True], "a", 1e-3) == pytest.approx(1e-3)
    assert chance_p_value([True, False], "ab", 0.1) == pytest.approx(0.19)
    assert chance_p_value([False], "a", 1e-3) == 1
    assert chance_p_value([True] * 64, [0] * 64, 1e-3) == pytest.approx(1e-3)  # 64 images of one update are one
    assert chance_p_value([True, False], "aa", 0.5) == 1


def test_the_unit_of_a_row() -> None:
    assert unit_of({"trial": 1, "client": 2, "unit": "photograph x"}) == "photograph x"
    assert unit_of({"trial": 1, "client": 2}) == 2
    assert unit_of({"trial": 1}) == 1
    assert unit_of({}, 5) != unit_of({}, 6)
    row = {"match": 0, "ssim": None, "lpips": None, "label_ok": None, "baseline_psnr": 1, "class_baseline_psnr": 1}
    rows = [row | {"trial": k, "psnr": 30.0 - k, "unit": f"photograph {k // 2}"} for k in range(4)]
    summary = summarize(rows, [{"seconds": 1.0, "status": "solved"}], thresholds=(28.5, 60))
    assert (summary["units"], summary["unit"]) == (2, "photograph")
    assert summary["recovered"]["28.5"]["share"] == 0.5
    assert summary["most_exposed"] == {"psnr": 30, "trial": 0, "image": 0}
    assert summary["psnr_quantiles"]["50"] == 28.5
