"""What leaves a defended client, and what a bad flag says."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from defenses.base import parse
from federated.client import gradient, train
from federated.wire import Batch, Recipe, Task
from models import build
from tests.commands import in_process, only_run, rows

TASK = Task((3, 16, 16), 4, (0.5,) * 3, (0.5,) * 3)


def norm(tensors: tuple[torch.Tensor, ...]) -> float:
    return torch.cat([t.flatten() for t in tensors]).norm().item()


@given(st.floats(1e-3, 1e3), st.integers(0, 5))
@settings(max_examples=30, deadline=None)
def test_clipping_bounds_the_norm_and_keeps_the_direction(bound: float, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    tensors = tuple(torch.randn(shape, generator=rng) for shape in ((3, 4), (5,)))
    sent = parse(f"clip={bound}")(tensors, rng)
    assert norm(sent) == pytest.approx(min(bound, norm(tensors)), rel=1e-5)
    whole, clipped = (torch.cat([t.flatten() for t in part]) for part in (tensors, sent))
    assert torch.nn.functional.cosine_similarity(whole, clipped, dim=0) > 1 - 1e-5


def test_noise_has_its_deviation_and_none_without_a_stream() -> None:
    tensors = (torch.zeros(100, 100), torch.ones(50))
    noise = parse("gauss=0.3")
    assert noise(tensors, torch.Generator().manual_seed(0))[0].std().item() == pytest.approx(0.3, rel=0.05)
    assert all(torch.equal(a, b) for a, b in zip(noise(tensors), tensors, strict=True))


@pytest.mark.parametrize("kind", ["gradient", "delta"])
def test_it_is_what_the_client_sends(kind: str) -> None:
    """In order: clipped to one, and noise on top."""
    net = build("cnn", TASK.image_shape, TASK.num_classes, rng=torch.Generator().manual_seed(0))
    batch = Batch(torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 1]))

    def sent(defense: str) -> tuple[torch.Tensor, ...]:
        recipe, rng = Recipe(2, 2, lr=0.1, defense=parse(defense)), torch.Generator().manual_seed(2)
        update = (
            gradient(net, batch, TASK, recipe, rng) if kind == "gradient" else train(net, batch, TASK, recipe, rng)[0]
        )
        assert all(not t.requires_grad for t in update.tensors)
        return update.tensors

    bound = norm(sent("none")) / 2
    assert norm(sent(f"clip={bound}")) == pytest.approx(bound, rel=1e-4)
    entries = sum(t.numel() for t in sent("none"))
    noisy = sent(f"clip={bound}+gauss=0.1")
    assert norm(noisy) == pytest.approx((bound**2 + 0.01 * entries) ** 0.5, rel=0.05)


@pytest.mark.parametrize(("attack", "flags"), [("dlg", ["--activation", "tanh"]), ("ggl", ["--matching", "l2"])])
def test_who_knows_of_clipping_is_not_hindered_by_it(
    attack: str, flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The squared distance is as small at the truth as without it, since the guess is clipped as well."""
    common = [attack, "--model", "cnn", "--image-size", "16", "--trials", "1", "--jobs", "1", *flags]
    scores = []
    for defense in ("none", "clip=0.1"):
        out = tmp_path / defense
        assert in_process("main_grad.py", [*common, "--defense", defense, "--out", str(out)], monkeypatch) == 0
        scores.append(rows(only_run(out))[0]["psnr"])
    assert scores[1] > scores[0] - 3


@pytest.mark.parametrize("defense", ["blur=1", "clip", "clip=x", "gauss=-1", "clip=inf", "clip=1+", "gauss=nan"])
def test_a_defence_that_is_none_is_refused_in_one_line(
    defense: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["dlg", "--defense", defense, "--out", str(tmp_path)]
    assert in_process("main_grad.py", flags, monkeypatch) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("error: ")
    assert "\n" not in said
    assert not list(tmp_path.iterdir())
