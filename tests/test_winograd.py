"""Winograd convolutions equal the convolutions they replace, up to the second derivative."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from attacks.matching.distances import cosine_distance
from models import build
from models.meta import MetaModel
from models.winograd import WinogradConv, bilinear


@given(
    points=st.lists(st.sampled_from([-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0]), min_size=2, max_size=6, unique=True),
    taps=st.integers(1, 3),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=50)
def test_any_points_make_a_filter(points: list[float], taps: int, seed: int) -> None:
    a, g, b = bilinear(points, taps)
    rng = torch.Generator().manual_seed(seed)
    w, d = (torch.randn(n, generator=rng, dtype=torch.float64) for n in (taps, len(points) + 1))
    y = a @ ((g @ w) * (b @ d))
    torch.testing.assert_close(y, F.conv1d(d.view(1, 1, -1), w.view(1, 1, -1)).flatten())


@pytest.mark.parametrize("shape", [(1, 3, 32, 32), (2, 5, 9, 14), (3, 4, 4, 1)])
@pytest.mark.parametrize("bias", [True, False])
def test_it_equals_the_convolution_up_to_the_second_derivative(shape: tuple[int, int, int, int], bias: bool) -> None:
    torch.manual_seed(0)
    plain = nn.Conv2d(shape[1], 6, 3, padding=1, bias=bias).double()
    fast = copy.deepcopy(plain)
    WinogradConv.convert_(fast)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    results = []
    for layer in (plain, fast):
        y = layer(x)
        first = torch.autograd.grad(y.square().sum(), [x, *layer.parameters()], create_graph=True)
        second = torch.autograd.grad(sum(t.sin().sum() for t in first), [x, *layer.parameters()])
        results.append((y, *first, *second))
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize(("name", "converted"), [("convnet64", 7), ("resnet20", 11), ("lenet", 0)])
def test_a_model_with_fast_convolutions_has_the_same_second_derivatives(
    name: str, converted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("models.winograd.FEWEST", 4)
    net = build(name, (3, 16, 16), 4, rng=torch.Generator().manual_seed(0)).double()
    x, y = torch.rand(2, 3, 16, 16, dtype=torch.float64), torch.tensor([0, 3])
    plain, fast = MetaModel(net), MetaModel(net, fast_convs=x)
    assert sum(isinstance(m, WinogradConv) for m in fast._module.modules()) == converted
    x.requires_grad_()
    for weights in (None, tuple(0.9 * w for w in plain.weights)):
        target = [t.detach() for t in plain.gradient(x.flip(0), y, weights)]
        grads = []
        for meta, goal in ((plain, target), (fast, fast.to_memory_format(target))):
            pairs = zip(meta.gradient(x, y, weights), goal, strict=True)
            grads += torch.autograd.grad(sum((a - b).square().sum() for a, b in pairs), x)
        torch.testing.assert_close(grads[1], grads[0], rtol=1e-7, atol=1e-12)


def test_it_is_applicable_only_to_large_plain_3x3_convolutions() -> None:
    for layer in (
        nn.Conv2d(64, 64, 3, padding=1, stride=2),
        nn.Conv2d(64, 64, 5, padding=2),
        nn.Conv2d(64, 64, 3),
        nn.Conv2d(64, 64, 3, padding=1, groups=2),
        nn.Conv2d(64, 64, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(3, 64, 3, padding=1),
        nn.Linear(64, 64),
    ):
        assert not WinogradConv.is_applicable(layer, (8, 64, 32, 32))
    assert WinogradConv.is_applicable(nn.Conv2d(64, 64, 3, padding=1), (8, 64, 32, 32))
    assert not WinogradConv.is_applicable(nn.Conv2d(64, 64, 3, padding=1), (1, 64, 8, 8))


def test_bfloat16_is_close_and_full_precision_is_float32s() -> None:
    net = build("convnet64", (3, 32, 32), 4, rng=torch.Generator().manual_seed(0))
    x = torch.rand(1, 3, 32, 32)
    full, half = MetaModel(net, fast_convs=x), MetaModel(net, fast_convs=x, conv_dtype=torch.bfloat16)
    with torch.no_grad():
        expected, approximate = full(x), half(x)
        assert torch.equal(half.full_precision()(x), expected)
        assert torch.equal(half(x), approximate), "full_precision changed the model it was called on"
    assert full.full_precision() is full
    assert not torch.equal(approximate, expected)
    torch.testing.assert_close(approximate, expected, rtol=0, atol=0.1 * expected.std().item())


def test_bfloat16_keeps_the_signs_of_most_gradients() -> None:
    rng = torch.Generator().manual_seed(0)
    net = build("convnet64", (3, 32, 32), 4, rng=rng).eval()
    x, y = torch.rand(1, 3, 32, 32, generator=rng), torch.tensor([1])
    signs = []
    for dtype in (None, torch.bfloat16):
        meta = MetaModel(net, fast_convs=x, conv_dtype=dtype)
        target = meta.to_memory_format(meta.gradient(1 - x, y, create_graph=False))
        guess = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(cosine_distance(meta.gradient(guess, y), target), guess)
        signs.append(grad.sign())
    assert 0.8 < (signs[0] == signs[1]).float().mean() < 1
