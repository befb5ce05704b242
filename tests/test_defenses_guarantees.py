"""What differential privacy guarantees, against published numbers, and against an attack that comes close to it."""

import json
import math
from pathlib import Path

import pytest
import torch

from core.protocol import Batch, Observation, Recipe, image_task
from evaluation.guarantees import (
    gaussian_delta,
    gaussian_epsilon,
    guarantee,
    identification_rate,
    identified_bound,
    psnr_bound,
    rdp_epsilon,
    subsampled_success_bound,
    success_bound,
)
from evaluation.likelihood import Identification
from experiments.defenses.identify import Flags, canaries, measure
from federated.client import gradient
from tests.commands import in_process, only_run


@pytest.mark.parametrize(("sigma", "steps"), [(0.3, 1), (1.0, 1), (2.0, 10)])
def test_epsilon_of_the_gaussian_mechanism_is_exact(sigma: float, steps: int) -> None:
    mu = math.sqrt(steps) / sigma
    epsilon = gaussian_epsilon(mu, 1e-5)
    assert gaussian_delta(epsilon, mu) == pytest.approx(1e-5, rel=1e-4)
    x = torch.linspace(-40, 60, 2_000_001, dtype=torch.float64)  # delta = integral of (p - e^eps q)+
    p, q = ((-((x - center) ** 2) / 2).exp() / math.sqrt(2 * math.pi) for center in (mu, 0.0))
    assert (p - math.exp(epsilon) * q).relu().sum().item() * 5e-5 == pytest.approx(1e-5, rel=1e-3)
    assert epsilon < rdp_epsilon(sigma, steps)


@pytest.mark.parametrize(
    ("rate", "sigma", "steps", "epsilon"),
    [
        (1.0, 1.0, 1, 4.728507067217623),
        (1.0, 0.5, 1, 10.725509696418232),
        (0.01, 1.0, 1000, 2.1013652716430564),
        (0.1, 1.0, 10, 3.4413244589250014),
        (0.004, 1.3, 5000, 1.0672803504742254),
        (0.02, 0.7, 200, 5.6194275706652),
    ],
)
def test_renyi_accounting_equals_that_of_opacus(rate: float, sigma: float, steps: int, epsilon: float) -> None:
    """Values of Opacus 1.6.0's RDPAccountant at delta = 1e-5; several of its best orders are fractional.

    accountant = RDPAccountant(); accountant.history = [(sigma, rate, steps)]; accountant.get_epsilon(1e-5)
    """
    assert rdp_epsilon(sigma, steps, rate) == pytest.approx(epsilon, rel=1e-9)


def test_poisson_sampling_is_accounted_as_in_opacus() -> None:
    """Steps of clients with 20 records, two of them expected in each: the constants above, and Opacus where it is."""
    recipe = Recipe(2, defense="dpsgd(sigma=1.0, sampling=poisson)")
    found = guarantee(recipe, "delta", rounds=3, num_examples=20)
    assert found is not None
    assert (found["rate"], found["releases"], found["mu"]) == (0.1, 10, None)
    assert found["epsilon"] == pytest.approx(3.4413244589250014, rel=1e-9)
    assert found["total_epsilon"] == rdp_epsilon(1.0, 30, 0.1)
    share = {"share": 0.1, "low": 0.1, "candidates": 10}
    bound = identified_bound(found, share)["identified_bound"]
    assert bound == pytest.approx(subsampled_success_bound(0.1, 1.0, 0.1, 10), abs=0.01)
    with pytest.raises(AssertionError, match="accounting"):
        identified_bound(found, share | {"low": bound + 0.05})
    for whole in (guarantee(recipe, "gradient"), guarantee(recipe, "delta", num_examples=2)):
        assert whole is not None and whole["epsilon"] == gaussian_epsilon(1.0)
    accounting = pytest.importorskip("opacus.accountants")
    accountant = accounting.RDPAccountant()
    accountant.history = [(1.0, 0.1, 10)]
    assert found["epsilon"] == pytest.approx(accountant.get_epsilon(1e-5), rel=1e-9)


def test_bounds_on_success() -> None:
    assert success_bound(0.1, 1.0) == pytest.approx(0.3891, abs=1e-4)
    assert success_bound(0.01, 2.0) == pytest.approx(0.3721, abs=1e-4)
    assert subsampled_success_bound(0.1, 1.0, 1.0, 1) == pytest.approx(success_bound(0.1, 1.0), abs=0.01)
    assert 0.1 < subsampled_success_bound(0.1, 1.0, 0.1, 10) < success_bound(0.1, math.sqrt(10))
    for count in (2, 10, 100):
        assert 1 / count < identification_rate(count, 1.0) <= success_bound(1 / count, 1.0) + 1e-9
    assert identification_rate(10, 1e-6) == pytest.approx(0.1, rel=1e-3)
    assert psnr_bound(20, 0.28, 3072, 1 / 0.0030) > 0.9 > 0.1 > psnr_bound(20, 0.28, 3072, 1 / 0.0040)


@pytest.mark.parametrize(
    ("defense", "unit", "multiplier"),
    [
        ("dpsgd(bound=2.0, sigma=0.5)", "record", 0.5),
        ("dpsgd(sigma=0.5)+topk()+sign()", "record", 0.5),
        ("dpfedavg(bound=3.0, sigma=0.7)", "client", 0.7),
        ("clip(bound=2.0)+gauss(sigma=1.0)", "client", 0.5),
        ("mixup()+clip(bound=2.0)+gauss(sigma=1.0)", "client", 0.5),
        ("gauss(sigma=1.0)", None, 0),
        ("gauss(sigma=1.0)+clip(bound=1.0)", None, 0),
        ("clip(bound=1.0)+qsgd()+gauss(sigma=1.0)", None, 0),
        ("laplace()", None, 0),
        ("mixup()+dpsgd()", None, 0),
        ("oasis()+dpsgd()", None, 0),
        ("dpsgd()+soteria()", None, 0),
        ("dpsgd(sigma=0.0)", None, 0),
        ("soteria()", None, 0),
    ],
)
def test_only_noise_on_something_bounded_has_a_guarantee(defense: str, unit: str | None, multiplier: float) -> None:
    found = guarantee(Recipe(2, local_epochs=4, defense=defense), "delta", rounds=9)
    assert found is not None
    assert found["unit"] == unit
    if unit is None:
        assert found["reason"].startswith("no formal guarantee")
        return
    assert found["multiplier"] == pytest.approx(multiplier)
    assert found["releases"] == (4 if unit == "record" else 1)
    assert found["epsilon"] == gaussian_epsilon(math.sqrt(found["releases"]) / multiplier)
    assert found["total_epsilon"] > found["epsilon"]
    assert guarantee(Recipe(1), "gradient") is None


@pytest.mark.parametrize(("count", "sigma"), [(10, 0.5), (10, 1.0), (60, 0.5)])
def test_identification_reaches_its_closed_form_and_not_more_than_the_bound(count: int, sigma: float) -> None:
    row = measure(*canaries(count, Flags()), sigma, Flags(trials=250))
    assert 0.8 * row["orthogonal"] - 3 * row["deviation"] <= row["share"] <= row["bound"] + 3 * row["deviation"]
    assert row["mean_reciprocal_rank"] >= row["share"]


@pytest.mark.parametrize("defense", ["none", "sign()", "topk(share=0.01)", "qsgd()"])
def test_the_sender_of_an_update_without_noise_is_identified(defense: str) -> None:
    task = image_task((3, 8, 8), 4)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 4))
    rng = torch.Generator().manual_seed(0)
    pool = Batch(torch.rand(12, 3, 8, 8, generator=rng), torch.arange(12) % 4)
    rest = Batch(torch.rand(2, 3, 8, 8, generator=rng), torch.tensor([0, 1]))
    recipe = Recipe(3, defense=defense)
    for victim in range(12):
        own = Batch(*(torch.cat([a[victim : victim + 1], b]) for a, b in zip(pool, rest, strict=True)))
        update = gradient(model, own, task, recipe, rng)
        assert Identification(Observation(task, recipe, model, update), pool, rest).rank(update, victim) == 1


def test_a_share_above_its_bound_fails_the_run() -> None:
    found = guarantee(Recipe(1, defense="dpfedavg(sigma=2.0)"), "gradient")
    unbounded = guarantee(Recipe(1, defense="gauss(sigma=2.0)"), "gradient")
    assert found is not None
    assert unbounded is not None
    fine = {"share": 0.2, "low": 0.1, "candidates": 10}
    assert identified_bound(found, fine)["identified_bound"] == pytest.approx(0.2172, abs=1e-4)
    with pytest.raises(AssertionError, match="accounting"):
        identified_bound(found, fine | {"low": 0.3})
    assert identified_bound(unbounded, fine | {"low": 0.3}) == {}


def test_a_run_stores_its_guarantee(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ["baseline", "--trials", "2", "--image-size", "16", "--jobs", "1", "--out", str(tmp_path)]
    assert in_process("main_grad.py", [*flags, "--defense", "dpsgd(bound=1.0, sigma=0.5)"], monkeypatch) == 0
    summary = json.loads((only_run(tmp_path) / "summary.json").read_text())
    assert summary["guarantee"]["unit"] == "record"
    assert summary["guarantee"]["epsilon"] == pytest.approx(9.997, abs=1e-3)
    assert summary["identified_bound"] < 1
