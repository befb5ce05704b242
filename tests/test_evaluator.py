"""Metrics with known answers, and the rules of pairing."""

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from federated.wire import Batch, Reconstruction
from utils.evaluator import Evaluator, Lpips, correlations, match, mse, psnr, ssim, succeeded, summarise


def pictures(n: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(n, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def evaluator() -> Evaluator:
    """Classes 0 to 3 have public images, class 4 has none."""
    public = pictures(4, seed=9)
    means = {c: public[c] for c in range(4)}
    return Evaluator(public.mean(0), means.get, lambda truth, other: None)


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
def test_matching_undoes_any_shuffle(order: list[int]) -> None:
    truth = pictures(6)
    assert [order[j] for j in match(truth, truth[list(order)])] == list(range(6))


def test_matching_is_one_to_one_and_the_rest_is_missed() -> None:
    """Two truths, one reconstruction near both: it answers for one of them, the other scores the mean image."""
    truth = pictures(2)
    labels = torch.tensor([0, 1])
    rows, shown = evaluator().score(Batch(truth, labels), Reconstruction(truth[:1], labels[:1]))
    assert [r["match"] for r in rows] == [0, None]
    assert rows[1]["psnr"] == rows[1]["baseline_psnr"]
    assert [succeeded(r) for r in rows] == [True, False]
    assert torch.equal(shown[0], truth[0])
    assert summarise(rows, [{"seconds": 1.0, "status": "ok"}])["missed"] == 1


def test_more_reconstructions_than_truths() -> None:
    truth = pictures(2)
    junk = torch.zeros(4, 3, 16, 16)
    rows, _ = evaluator().score(Batch(truth, torch.tensor([0, 1])), Reconstruction(torch.cat([junk, truth])))
    assert [r["match"] for r in rows] == [4, 5]
    assert all(r["label_pred"] is None and r["label_ok"] is None for r in rows)


def test_an_image_that_is_not_finite_is_a_miss_not_a_number() -> None:
    truth = pictures(2)
    broken = truth.clone()
    broken[0, 0, 0, 0] = torch.nan
    rows, shown = evaluator().score(Batch(truth, torch.tensor([0, 1])), Reconstruction(broken))
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
    rows, _ = evaluator().score(truth, Reconstruction(pictures(len(true), seed=3), torch.tensor(predicted)))
    assert sum(r["label_ok"] for r in rows) == right


def test_class_baseline_falls_back_to_the_mean_image() -> None:
    """A class without a public image is worth no more than no label."""
    truth = Batch(pictures(2), torch.tensor([4, 0]))
    rows, _ = evaluator().score(truth, Reconstruction(truth.images))
    assert rows[0]["class_baseline_psnr"] == rows[0]["baseline_psnr"]
    assert rows[1]["class_baseline_psnr"] != rows[1]["baseline_psnr"]


def test_diverged_trials_are_counted() -> None:
    rows, _ = evaluator().score(Batch(pictures(1), torch.tensor([0])), Reconstruction(pictures(1, seed=4)))
    trials = [{"seconds": 1.0, "status": "diverged"}, {"seconds": 2.0, "status": "ok"}]
    summary = summarise(rows, trials)
    assert summary["status"] == {"diverged": 1, "ok": 1}
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
    rows, _ = evaluator().score(Batch(truth, torch.tensor([0, 1, 2])), rec)
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
    rows, _ = evaluator().score(Batch(truth, torch.tensor([0, 1, 2])), rec)
    assert [r["sign_ok"] for r in rows] == [False, True, False]
    assert summarise(rows, [{"seconds": 1.0, "status": "ok"}])["sign_ok"] == pytest.approx(1 / 3)


def test_control_counts_what_the_same_candidates_would_pass_for() -> None:
    mine, others = pictures(3), pictures(3, seed=1)
    assert evaluator().control(mine, Reconstruction(mine)) == 1
    assert evaluator().control(others, Reconstruction(mine)) == 0
    assert evaluator().control(others, Reconstruction(mine[:0])) == 0
