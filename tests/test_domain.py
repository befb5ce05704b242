"""Domains: images, and a toy domain of vectors that the matching attacks reconstruct without a line of their own."""

import ast
import math
import re
import statistics
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from attacks import ATTACKS
from core.domain import Domain, ImageDomain
from core.protocol import Batch, Recipe, Task
from federated.client import gradient, train
from tests.conftest import ROOT


@dataclass(frozen=True)
class VectorDomain(Domain):
    """Measurements (d,) between -limit and limit; the model takes them in units of `limit`."""

    shape: tuple[int, ...]
    limit: float = 3.0

    name: ClassVar[str] = "vector"

    def init(self, n: int, rng: torch.Generator) -> Tensor:
        return 0.01 * torch.randn(n, *self.shape, generator=rng)

    def to_model(self, examples: Tensor) -> Tensor:
        return examples / self.limit

    def from_model(self, inputs: Tensor) -> Tensor:
        return inputs * self.limit

    def project(self, examples: Tensor) -> Tensor:
        return examples.clamp(-self.limit, self.limit)

    @torch.no_grad()
    def project_(self, inputs: Tensor) -> None:
        inputs.clamp_(-1, 1)

    def from_unbounded(self, u: Tensor) -> Tensor:
        return self.limit * torch.tanh(u)

    def to_unbounded(self, examples: Tensor) -> Tensor:
        return torch.atanh((examples / self.limit).clamp(-0.999, 0.999))

    def regularizer(self, inputs: Tensor) -> Tensor:
        return inputs.square().mean()

    def smooth_regularizer(self, examples: Tensor) -> Tensor:
        return (examples / self.limit).square().mean()

    def render(self, example: Tensor) -> list[float]:
        return example.tolist()


TASK = Task(VectorDomain((12,)), num_classes=5)
IMAGES = ImageDomain((2, 4, 5), (0.5, 0.3), (0.25, 2.0))


def client(n: int, recipe: Recipe | None, seed: int) -> tuple[Batch, nn.Module, dict[str, Tensor]]:
    """Private vectors, a small network, and what a client with them sends: a gradient unless there is a recipe."""
    rng = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(12, 40), nn.Sigmoid(), nn.Linear(40, 30), nn.Sigmoid(), nn.Linear(30, 5))
        for parameter in model.parameters():
            nn.init.uniform_(parameter, -0.5, 0.5)
    truth = Batch(4 * torch.rand(n, 12, generator=rng) - 2, torch.arange(n) + 1)
    update = train(model, truth, TASK, recipe, rng)[0] if recipe else gradient(model, truth, TASK, Recipe(n), rng)
    return truth, model, dict(update.tensors)


@pytest.mark.parametrize(
    ("name", "hyperparameters", "steps", "largest"),
    [
        ("dlg", {}, 0, 0.01),
        ("idlg", {}, 0, 0.01),
        ("ig_single", {}, 0, 0.05),
        ("sme", {}, 4, 0.05),
    ],
)
def test_matching_attacks_reconstruct_vectors(
    name: str, hyperparameters: dict[str, float], steps: int, largest: float
) -> None:
    """Root mean squared error in the domain's units; a guess of zeros is off by 1.2."""
    errors = []
    for seed in range(3):
        recipe = Recipe(1, steps, lr=0.05) if steps else None
        truth, model, tensors = client(1, recipe, seed)
        rec = ATTACKS[name](**hyperparameters)(
            model, tensors, task=TASK, recipe=recipe, kind="delta" if steps else "gradient", num_examples=1
        )
        assert rec.examples.shape == truth.examples.shape
        assert rec.labels is not None
        assert rec.labels.tolist() == truth.labels.tolist()
        errors.append((rec.examples - truth.examples).square().mean().sqrt().item())
    assert statistics.median(errors) < largest


def test_a_batch_of_vectors_is_reconstructed() -> None:
    """Three vectors from 1,905 equations; the quadratic regulariser fades, and labels are granted."""
    errors = []
    for seed in range(3):
        truth, model, tensors = client(3, None, seed)
        rec = ATTACKS["dlg"](tv=1e-3)(model, tensors, task=TASK, labels=truth.labels)
        errors.append((rec.examples - truth.examples).square().mean().sqrt().item())
    assert statistics.median(errors) < 0.05


@pytest.mark.parametrize("folder", ["attacks/matching", "attacks/optim"])
def test_matching_code_never_says_pixel(folder: str) -> None:
    """Neither in code nor in docstrings and help texts: an example may be anything."""
    for path in sorted((ROOT / folder).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            words = [getattr(node, "id", ""), getattr(node, "attr", ""), getattr(node, "arg", "") or ""]
            assert not any("pixel" in str(word) for word in words), f"{path.name}: {words}"
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found = re.search(r".*pixel.*", node.value)
                assert not found, f"{path.name}: {found and found[0]}"


examples_of = {
    "image": st.integers(0, 10_000).map(lambda s: _draw(IMAGES, s, 0.0, 1.0)),
    "vector": st.integers(0, 10_000).map(lambda s: _draw(TASK.domain, s, -3.0, 3.0)),
}
domains: dict[str, Domain] = {"image": IMAGES, "vector": TASK.domain}


def _draw(domain: Domain, seed: int, low: float, high: float) -> Tensor:
    """Examples of which a tenth lie at the domain's limits."""
    rng = torch.Generator().manual_seed(seed)
    values = low + (high - low) * torch.rand(3, *domain.shape, generator=rng, dtype=torch.float64)
    chosen = torch.rand(values.shape, generator=rng)
    return torch.where(chosen < 0.05, low, torch.where(chosen > 0.95, high, values))


@pytest.mark.parametrize("name", sorted(domains))
@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_what_every_domain_promises(name: str, data: st.DataObject) -> None:
    domain, examples = domains[name], data.draw(examples_of[name])
    noise = torch.randn(examples.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    # to_model and from_model are inverse, inside the domain and outside
    for x in (examples, examples + 5 * noise):
        torch.testing.assert_close(domain.from_model(domain.to_model(x)), x)
        torch.testing.assert_close(domain.to_model(domain.from_model(x)), x)

    # a projection changes nothing that is valid, and is idempotent
    assert torch.equal(domain.project(examples), examples)
    projected = domain.project(examples + 5 * noise)
    assert torch.equal(domain.project(projected), projected)
    inputs = domain.to_model(examples + 5 * noise)
    domain.project_(inputs)
    torch.testing.assert_close(domain.from_model(inputs), projected)
    torch.testing.assert_close(domain.decode(domain.to_model(examples + 5 * noise)), projected)

    # every real tensor maps to valid examples, and inside the domain the map has an inverse
    for size in (1.0, 1e3):
        mapped = domain.from_unbounded(size * noise)
        torch.testing.assert_close(domain.project(mapped), mapped)
    inside = domain.project(examples) * 0.9 + 0.1 * domain.from_unbounded(torch.zeros_like(examples))
    torch.testing.assert_close(domain.from_unbounded(domain.to_unbounded(inside)), inside)
    assert domain.to_unbounded(examples).isfinite().all()

    # regularisers are finite numbers with gradients, the smooth one everywhere
    for x, regularizer in ((examples, domain.smooth_regularizer), (domain.to_model(examples), domain.regularizer)):
        x = torch.zeros_like(x) if data.draw(st.booleans()) else x.clone()
        value = regularizer(x.requires_grad_())
        (grad,) = torch.autograd.grad(value, x)
        assert value.ndim == 0
        assert math.isfinite(value.item())
        assert grad.isfinite().all()


@given(st.integers(1, 5), st.integers(0, 100))
@settings(max_examples=10, deadline=None)
def test_start_values_are_valid_and_near_the_middle(n: int, seed: int) -> None:
    for domain in domains.values():
        start = domain.init(n, torch.Generator().manual_seed(seed))
        assert start.shape == (n, *domain.shape)
        assert torch.equal(domain.project(start), start)
        middle = domain.from_unbounded(torch.zeros_like(start))
        assert (start - middle).abs().max() < 0.1
        assert torch.equal(start, domain.init(n, torch.Generator().manual_seed(seed)))


def test_images_of_one_pixel_width_cannot_be_regularised_in_a_batch() -> None:
    thin = ImageDomain((1, 8, 1), (0.0,), (1.0,))
    assert thin.fits(1) is None
    assert "2x2" in str(thin.fits(2))
    assert TASK.domain.fits(7) is None


@pytest.mark.parametrize(("channels", "shape"), [(1, (4, 5)), (3, (4, 5, 3)), (2, (4, 5)), (7, (4, 5))])
def test_images_of_any_number_of_channels_can_be_drawn(channels: int, shape: tuple[int, ...]) -> None:
    domain = ImageDomain((channels, 4, 5), (0.0,) * channels, (1.0,) * channels)
    assert domain.render(torch.rand(channels, 4, 5)).shape == shape


@pytest.mark.parametrize(("mean", "std"), [((0.5,), (1.0, 1.0)), ((0.5, 0.5), (1.0, 0.0))])
def test_a_normalisation_that_does_not_fit_is_refused(mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    with pytest.raises(AssertionError):
        ImageDomain((2, 4, 5), mean, std)
