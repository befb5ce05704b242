"""Van Trees' inequality is an equality where the update is linear in a Gaussian example."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from core.protocol import Batch, Observation, Recipe, Task, Update, image_task
from evaluation.van_trees import van_trees
from models import build
from tests.commands import in_process, only_run

LINEAR = image_task((1, 2, 3), 4)


def linear(task: Task = LINEAR) -> nn.Module:
    """With weights of zero the gradient of the weights is (1/C - y) x^T: linear in the example x."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(6, task.num_classes))
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    return model


def gaussian(count: int) -> Batch:
    rng = torch.Generator().manual_seed(0)
    mixing = torch.randn(6, 6, generator=rng) * torch.tensor([1.0, 0.5, 0.3, 0.1, 0.05, 0.02])
    return Batch((torch.randn(count, 6, generator=rng) @ mixing).view(-1, 1, 2, 3), torch.arange(count) % 4)


def observe(model: nn.Module, task: Task, public: Batch, recipe: Recipe, count: int = 1, kind: str = "gradient"):
    zeros = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    return Observation(task, recipe, model, Update(kind, zeros, count), public)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("sigma", [0.05, 0.5])
def test_it_is_the_error_of_the_posterior_mean_of_a_linear_model(sigma: float, count: int) -> None:
    """||1/C - y||^2 = 1 - 1/C. The update of two examples is a sum, of which their labels tell the parts apart."""
    public = gaussian(4000)
    found = van_trees(observe(linear(), LINEAR, public, Recipe(count, defense=f"gauss(sigma={sigma})"), count))
    assert found is not None
    rows = public.examples.flatten(1).double()
    prior = (rows - rows.mean(0)).T @ (rows - rows.mean(0)) / len(rows)
    if count == 1:
        posterior = torch.linalg.inv(0.75 / sigma**2 * torch.eye(6).double() + torch.linalg.inv(prior))
        assert found["mse"] == pytest.approx(posterior.trace().item() / 6, rel=1e-5)
        weights = posterior @ (0.75 / sigma**2 * torch.eye(6).double())  # of the observed example
        noise = torch.randn(rows.shape, generator=torch.Generator().manual_seed(1)).double() * sigma / math.sqrt(0.75)
        guesses = rows.mean(0) + (rows + noise - rows.mean(0)) @ weights.T
        assert (guesses - rows).square().mean().item() == pytest.approx(found["mse"], rel=0.05)
    assert found["psnr"] == pytest.approx(-10 * math.log10(found["mse"]))
    assert found["mse"] < prior.trace().item() / 6


def test_it_grows_with_the_noise_and_a_second_example_and_ends_at_the_prior() -> None:
    task, rng = image_task((3, 5, 5), 4), torch.Generator().manual_seed(0)
    model = build("lenet", task.domain.shape, 4, rng=rng)
    public = Batch(torch.rand(20, 3, 5, 5, generator=rng), torch.arange(20) % 4)

    def error(defense: str, count: int = 1, recipe: Recipe | None = None, kind: str = "gradient") -> float:
        found = van_trees(observe(model, task, public, recipe or Recipe(count, defense=defense), count, kind))
        assert found is not None
        return found["mse"]

    errors = [error(f"gauss(sigma={sigma})") for sigma in (1e-4, 1e-2, 1e4)]
    assert errors == sorted(errors)
    assert errors[-1] == pytest.approx(public.examples.var(0, unbiased=False).mean().item(), rel=1e-3)
    assert error("gauss(sigma=0.01)", 2) > errors[1]
    delta = error("", recipe=Recipe(1, lr=0.1, defense="gauss(sigma=0.001)"), kind="delta")
    assert delta == pytest.approx(errors[1], rel=1e-3)
    clipped = error("clip(bound=1e9)+gauss(sigma=0.01)")
    assert clipped == pytest.approx(errors[1], rel=1e-3)
    assert error("dpsgd(bound=1e9, sigma=1e-11)") == pytest.approx(errors[1], rel=1e-3)


@pytest.mark.parametrize(
    ("recipe", "kind"),
    [
        (Recipe(1), "gradient"),
        (Recipe(1, defense="laplace()"), "gradient"),
        (Recipe(1, defense="gauss()+clip()"), "gradient"),
        (Recipe(1, defense="gauss()+topk()"), "gradient"),
        (Recipe(1, defense="dropout()+gauss()"), "gradient"),
        (Recipe(1, 2, lr=0.1, defense="gauss()"), "delta"),
    ],
)
def test_there_is_no_bound_where_its_assumptions_fail(recipe: Recipe, kind: str) -> None:
    assert van_trees(observe(linear(), LINEAR, gaussian(50), recipe, 1, kind)) is None


def test_a_run_with_noise_stores_and_prints_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["baseline", "--trials", "1", "--image-size", "8", "--model", "mlp", "--jobs", "1", "--out", str(tmp_path)]
    assert in_process("main_grad.py", [*flags, "--defense", "gauss=0.1"], monkeypatch) == 0
    summary = json.loads((only_run(tmp_path) / "summary.json").read_text())
    assert summary["van_trees"].keys() == {"mse", "psnr", "directions", "draws", "exceeded"}
    assert "PSNR at most (dB)" in capsys.readouterr().out
