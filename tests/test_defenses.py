"""What a client with a defence sends, what an attacker who knows it scores, and how mistakes are refused."""

import dataclasses
import statistics
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from attacks import ATTACKS
from core.errors import UsageError
from core.protocol import Batch, Observation, Recipe, image_task
from defenses.base import DEFENSES, parse
from evaluation.metrics import psnr
from federated.client import gradient, train
from models import build
from tests.commands import in_process
from tests.test_attacks import smooth_pictures

TASK = image_task((3, 16, 16), 4, (0.5,) * 3, (0.5,) * 3)


def norm(tensors: tuple[torch.Tensor, ...]) -> float:
    return torch.cat([t.flatten() for t in tensors]).norm().item()


def test_every_defense_can_be_imported_and_describes_itself() -> None:
    assert len(DEFENSES) >= 2
    assert not DEFENSES.broken
    for name, cls in DEFENSES.items():
        assert cls.__doc__
        assert cls.citation
        assert isinstance(parse(f"{name}()").steps[0], cls)
        for field in dataclasses.fields(cls):  # type: ignore[arg-type]
            assert field.metadata["help"], f"{name}.{field.name} has no help text"


@given(st.floats(1e-3, 1e3), st.integers(0, 5))
@settings(max_examples=30, deadline=None)
def test_clipping_bounds_the_norm_and_keeps_the_direction(bound: float, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    tensors = tuple(torch.randn(shape, generator=rng) for shape in ((3, 4), (5,)))
    sent = parse(f"clip(bound={bound})").on_update(tensors, rng)
    assert norm(sent) == pytest.approx(min(bound, norm(tensors)), rel=1e-5)
    plain, clipped = (torch.cat([t.flatten() for t in part]) for part in (tensors, sent))
    assert torch.nn.functional.cosine_similarity(plain, clipped, dim=0) > 1 - 1e-5


def test_noise_has_its_standard_deviation_and_is_no_part_of_the_counters_forward() -> None:
    tensors = (torch.zeros(100, 100), torch.ones(50))
    noise = parse("gauss(sigma=0.3)")
    rng = torch.Generator().manual_seed(0)
    assert noise.on_update(tensors, rng)[0].std().item() == pytest.approx(0.3, rel=0.05)
    counter = noise.counter()
    assert counter.noise == 0.3
    assert all(torch.equal(a, b) for a, b in zip(counter.forward(tensors), tensors, strict=True))


@pytest.mark.parametrize("kind", ["gradient", "delta"])
def test_a_client_sends_the_defended_update(kind: str) -> None:
    """In order: clipped to a norm, and noise on top."""
    net = build("cnn", TASK.domain.shape, TASK.num_classes, rng=torch.Generator().manual_seed(0))
    batch = Batch(torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 1]))

    def sent(defense: str) -> tuple[torch.Tensor, ...]:
        recipe, rng = Recipe(2, 2, lr=0.1, defense=defense), torch.Generator().manual_seed(2)
        update = (
            gradient(net, batch, TASK, recipe, rng) if kind == "gradient" else train(net, batch, TASK, recipe, rng)[0]
        )
        assert all(not t.requires_grad for t in update.tensors.values())
        return update.ordered(net)

    bound = norm(sent("none")) / 2
    assert norm(sent(f"clip(bound={bound})")) == pytest.approx(bound, rel=1e-4)
    entries = sum(t.numel() for t in sent("none"))
    noisy = sent(f"clip(bound={bound})+gauss(sigma=0.1)")
    assert norm(noisy) == pytest.approx((bound**2 + 0.01 * entries) ** 0.5, rel=0.05)


@pytest.mark.parametrize(("name", "model"), [("dlg", "lenet"), ("ggl", "lenet")])
def test_an_attacker_who_knows_of_clipping_is_not_hindered_by_it(name: str, model: str) -> None:
    """The squared distance at the truth is as small as without clipping, since the guess is clipped as well."""
    small = {
        "dlg": {"iterations": 150, "restarts": 1},
        "ggl": {"distance": "l2", "comparison_iterations": 0, "iterations": 300},
    }
    attack, losses, losses_unaware = ATTACKS[name](**small[name]), [], []
    for seed in range(3):
        pictures = smooth_pictures(65, 16, seed)
        truth, public = Batch(pictures[:1], torch.tensor([2])), Batch(pictures[1:], torch.arange(64) % 4)
        net = build(model, TASK.domain.shape, 4, rng=torch.Generator().manual_seed(seed))

        def score(
            defense: str, believed: str, net: nn.Module = net, truth: Batch = truth, public: Batch = public
        ) -> float:
            update = gradient(net, truth, TASK, Recipe(1, defense=defense), torch.Generator().manual_seed(0))
            observation = Observation(TASK, Recipe(1, defense=believed), net, update, public)
            rec = attack.reconstruct(observation, torch.Generator().manual_seed(0))
            return psnr(truth.examples[0], rec.examples[0])

        undefended, clip = score("none", "none"), "clip(bound=0.1)"
        losses.append(undefended - score(clip, clip))
        if name == "dlg":  # GGL's images stay in the generator's range, whatever the size of the gradient
            losses_unaware.append(undefended - score(clip, "none"))
    assert statistics.median(losses) < 3
    assert not losses_unaware or statistics.median(losses_unaware) > 10


REFUSED = ["blur(sigma=1)", "clip", "clip=x", "gauss=-1", "clip=inf", "clip=1+", "gauss=nan"]


@pytest.mark.parametrize("defense", [*REFUSED, "clip(bound=0)", "clip(sigma=1)", "clip(1.0)", "clip(bound=1", "", "+"])
def test_what_is_no_defense_is_refused_in_one_line(defense: str) -> None:
    with pytest.raises(UsageError) as refusal:
        parse(defense)
    assert str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("defense", REFUSED)
def test_a_command_refuses_it_and_writes_nothing(
    defense: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["dlg", "--defense", defense, "--out", str(tmp_path)]
    assert in_process("main_grad.py", flags, monkeypatch) == 2
    message = capsys.readouterr().err.strip()
    assert message.startswith("error: ")
    assert "\n" not in message
    assert not list(tmp_path.iterdir())
