"""Registries, hyperparameters, the types of the protocol, random streams, and what a defence asks of its attacker."""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from attacks import ATTACKS
from attacks.matching.matcher import GradientMatcher
from core.errors import UsageError
from core.hyperparameters import hp, hyperparameters, paper_values, published
from core.protocol import Batch, Observation, Recipe, Update, by_name, image_task
from core.registry import Registry
from core.rng import seeded_global_rng, stream
from defenses.base import DEFENSES, Counter, Defense, Tensors, Variable, canonical, parse
from evaluation.metrics import psnr
from federated.client import gradient, train
from models import build
from tests.test_attacks import smooth_pictures

# --- registries ---


def test_an_unknown_name_is_answered_with_close_ones() -> None:
    fruits: Registry[int] = Registry("fruit")
    fruits.add("apple", 1)
    fruits.register("pear")(2)
    assert fruits.find("apple") == fruits["apple"] == 1
    assert list(fruits) == ["apple", "pear"]
    with pytest.raises(UsageError, match=r"unknown fruit 'aple' \(did you mean apple\?\); choose from apple, pear"):
        fruits.find("aple")
    with pytest.raises(UsageError) as refusal:
        fruits.find("xylophone")
    assert "did you mean" not in str(refusal.value)
    with pytest.raises(KeyError):
        fruits["aple"]
    with pytest.raises(AssertionError, match="apple"):
        fruits.add("apple", 3)


def test_a_broken_module_hides_no_other_and_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "toy_registry_package"
    package.mkdir()
    (package / "__init__.py").write_text(
        "from core.registry import Registry\nTOYS = Registry('toy', package=__name__)\n"
    )
    (package / "ball.py").write_text("from toy_registry_package import TOYS\nTOYS.add('ball', 1)\n")
    (package / "kite.py").write_text("import nothing_of_this_name\n")
    (package / "yoyo.py").write_text("def broken(:\n")
    (package / "zebra.py").write_text("from toy_registry_package import TOYS\nTOYS.add('zebra', 2)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    from toy_registry_package import TOYS  # type: ignore[import-not-found]

    assert dict(TOYS) == {"ball": 1, "zebra": 2}
    assert sorted(TOYS.broken) == ["kite", "yoyo"]
    with pytest.raises(UsageError, match=r"toy_registry_package/kite\.py cannot be imported: ModuleNotFoundError"):
        TOYS.find("kite")
    with pytest.raises(UsageError, match="SyntaxError") as refusal:
        TOYS.find("yoyo")
    assert "\n" not in str(refusal.value)
    assert TOYS.find("zebra") == 2


# --- hyperparameters ---


@hyperparameters
class Base:
    paper: ClassVar[Mapping[str, tuple[Any, str]]] = {"rate": (0.5, "eq. 1"), "steps": (100, "table 1")}

    rate: float = hp(0.1, "learning rate", gt=0, le=1)
    steps: int = hp(3, "number of steps", ge=1, lt=10_000)
    start: float | None = hp(None, "start value; default: drawn at random", ge=0)


@hyperparameters
class Derived(Base):
    paper: ClassVar[Mapping[str, tuple[Any, str]]] = {
        "steps": (200, "table 2"),
        "elsewhere": (1, "no field of this class"),
    }

    width: int = hp(8, "width of the layers")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rate": 0.0}, "`rate` must be above 0, not 0"),
        ({"rate": 1.5}, "`rate` must be at most 1, not 1.5"),
        ({"rate": math.nan}, "`rate` must be a finite number, not nan"),
        ({"rate": math.inf}, "`rate` must be a finite number, not inf"),
        ({"steps": 0}, "`steps` must be at least 1, not 0"),
        ({"steps": 10_000}, "`steps` must be below 10000, not 10000"),
        ({"start": -1.0}, "`start` must be at least 0, not -1"),
    ],
)
@pytest.mark.parametrize("cls", [Base, Derived])
def test_a_value_outside_its_limits_is_refused_by_name(cls: type, values: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as refusal:
        cls(**values)
    assert str(refusal.value) == message


def test_hyperparameters_are_frozen_keyword_only_and_checked_when_replaced() -> None:
    assert Base() == Base(rate=0.1, steps=3, start=None)
    with pytest.raises(TypeError):
        Base(0.1)  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        Base().rate = 1.0  # type: ignore[misc]
    with pytest.raises(UsageError, match="`rate`"):
        dataclasses.replace(Base(), rate=-1.0)


def test_published_values_are_inherited_and_overridden() -> None:
    assert published(Base) == {"rate": (0.5, "eq. 1"), "steps": (100, "table 1")}
    assert published(Derived) == {"rate": (0.5, "eq. 1"), "steps": (200, "table 2")}
    assert paper_values(Derived) == Derived(rate=0.5, steps=200)
    assert paper_values(Base) == Base(rate=0.5, steps=100)


# --- updates ---


def test_updates_are_ordered_as_the_models_parameters() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 4))
    tensors = by_name(model, [p.detach() for p in model.parameters()])
    shuffled = {name: tensors[name] for name in reversed(tensors)}
    ordered = Update("gradient", shuffled, 1).ordered(model)
    assert all(torch.equal(t, p) for t, p in zip(ordered, model.parameters(), strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"0.bias": None}, "no tensor 0.bias"),
        ({"1.weight": torch.zeros(2, 4)}, r"1\.weight has shape \(2, 4\), not \(4, 2\)"),
        ({"2.weight": torch.zeros(1)}, "no parameter 2.weight"),
    ],
)
def test_an_update_of_another_model_is_refused(change: dict[str, Tensor | None], message: str) -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 4))
    tensors: dict[str, Any] = by_name(model, [p.detach() for p in model.parameters()]) | change
    update = Update("gradient", {name: t for name, t in tensors.items() if t is not None}, 1)
    with pytest.raises(UsageError, match=message):
        update.ordered(model)


# --- recipes ---


@pytest.mark.parametrize("schedule", ["constant", "cosine", "step"])
def test_learning_rates_are_those_of_torchs_schedulers(schedule: str) -> None:
    for steps in (1, 4, 10):
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
        scheduler = {
            "constant": lambda o: torch.optim.lr_scheduler.ConstantLR(o, 1.0),
            "cosine": lambda o, t=steps: torch.optim.lr_scheduler.CosineAnnealingLR(o, t),
            "step": lambda o, t=steps: torch.optim.lr_scheduler.MultiStepLR(o, [-(-t // 2), -(-3 * t // 4)]),
        }[schedule](optimizer)
        theirs = []
        for _ in range(steps):
            theirs.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
        assert Recipe(1, lr=0.1, lr_schedule=schedule).learning_rates(steps) == pytest.approx(theirs)  # type: ignore[arg-type]


@given(st.integers(1, 40), st.integers(1, 12), st.integers(1, 4), st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_an_epoch_visits_every_example_once(n: int, batch: int, epochs: int, seed: int) -> None:
    recipe = Recipe(batch, epochs)
    for rng in (None, torch.Generator().manual_seed(seed)):
        schedule = recipe.batches(n, rng)
        assert len(schedule) == recipe.steps(n)
        visited = torch.cat(schedule).view(epochs, n)
        assert all(sorted(epoch.tolist()) == list(range(n)) for epoch in visited)


@given(st.integers(1, 12), st.floats(0, 0.95), st.sampled_from(["constant", "cosine", "step"]))
@settings(max_examples=30, deadline=None)
def test_the_total_step_weight_is_the_delta_of_a_constant_gradient(steps: int, momentum: float, schedule: str) -> None:
    recipe = Recipe(1, steps, lr=0.1, momentum=momentum, lr_schedule=schedule)  # type: ignore[arg-type]
    weight = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=0.1, momentum=momentum)
    for rate in recipe.learning_rates(steps):
        optimizer.param_groups[0]["lr"] = rate
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    assert -weight.item() == pytest.approx(recipe.total_step_weight(1))


@given(st.integers(1, 8), st.floats(0, 0.95), st.sampled_from(["constant", "cosine", "step"]))
@settings(max_examples=30, deadline=None)
def test_step_weights_are_what_each_gradient_moves(steps: int, momentum: float, schedule: str) -> None:
    recipe = Recipe(1, steps, lr=0.1, momentum=momentum, lr_schedule=schedule)  # type: ignore[arg-type]
    weights = torch.zeros(steps, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([weights], lr=0.1, momentum=momentum)
    for step, rate in enumerate(recipe.learning_rates(steps)):  # entry s has a gradient at step s alone
        optimizer.param_groups[0]["lr"] = rate
        weights.grad = torch.eye(steps, dtype=torch.float64)[step]
        optimizer.step()
    assert (-weights).tolist() == pytest.approx(recipe.step_weights(steps))


# --- random streams ---


def test_streams_are_functions_of_their_path() -> None:
    def draw(*path: int | str) -> float:
        return torch.rand((), generator=stream(*path)).item()

    paths: list[tuple[int | str, ...]] = [(0, "model"), (1, "model"), (0, "data"), (0, "client", 1), (0, "client", "1")]
    assert len({draw(*path) for path in paths}) == len(paths)
    assert all(draw(*path) == draw(*path) for path in paths)
    assert stream(0, "model").initial_seed() == 9150861228936790778  # every published number depends on it


def test_a_seeded_global_stream_is_restored() -> None:
    state = torch.random.get_rng_state()
    draws = []
    for _ in range(2):
        with seeded_global_rng(torch.Generator().manual_seed(1)):
            draws.append(torch.rand(3))
        assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(*draws)


# --- defences and what their attackers do ---


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("none", "none"),
        ("clip=1", "clip(bound=1.0)"),
        ("clip(bound=1)", "clip(bound=1.0)"),
        ("clip()", "clip(bound=1.0)"),
        (" clip( bound = 0.5 ) + gauss=0.01", "clip(bound=0.5)+gauss(sigma=0.01)"),
        ("gauss(sigma=1e-3)+clip(bound=1e+22)", "gauss(sigma=0.001)+clip(bound=1e+22)"),
    ],
)
def test_both_spellings_of_a_defense_have_one_canonical_form(text: str, expected: str) -> None:
    assert canonical(text) == expected
    assert canonical(expected) == expected
    assert parse(text) == parse(expected)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("clip(bound=0)", "`defense`: clip: bound must be above 0, not 0"),
        ("clip(sigma=1)", "`defense`: clip has no parameter 'sigma'; write clip(bound=1.0)"),
        ("gauss(sigma=much)", "`defense`: gauss cannot take 'much'; write gauss(sigma=0.01)"),
        ("clip", "`defense`: clip needs its parameters; write clip(bound=1.0)"),
        ("clop=1", "unknown defence 'clop' (did you mean clip?); choose from "),
    ],
)
def test_a_mistake_in_a_defense_is_one_line_that_says_what_to_write(text: str, message: str) -> None:
    with pytest.raises(UsageError) as refusal:
        parse(text)
    assert str(refusal.value).startswith(message)
    assert "\n" not in str(refusal.value)


@hyperparameters
class SecretScale(Defense):
    """Every tensor times a factor that the server does not know; convolutions' gradients are replaced by noise."""

    name = "secret"

    factor: float = hp(2.0, "factor on every tensor")

    def on_update(self, tensors: Tensors, rng: torch.Generator) -> Tensors:
        return tuple(torch.randn(t.shape, generator=rng).to(t) if t.ndim == 4 else self.factor * t for t in tensors)

    def counter(self) -> Counter:
        """The factor is optimised with the examples; entries that are noise do not count."""
        unknown = Variable(torch.tensor(1.0), 0.01, lambda value: value.clamp(min=0.1))
        return Counter(
            forward=lambda tensors, factor: tuple(factor * t for t in tensors),
            weights=lambda tensors: tuple(torch.full_like(t, float(t.ndim != 4)) for t in tensors),
            variables=(unknown,),
        )


@pytest.fixture
def secret_scale(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The toy defence, registered for the length of a test."""
    defenses: Registry[type[Defense]] = Registry("defence")
    for name, cls in {**DEFENSES, "secret": SecretScale}.items():
        defenses.add(name, cls)
    monkeypatch.setattr("defenses.base.DEFENSES", defenses)
    parse.cache_clear()
    yield
    parse.cache_clear()


def observe(defense: str, dtype: torch.dtype, model: str = "mlp") -> tuple[Batch, Observation]:
    task = image_task((3, 16, 16), 6)
    net = build(model, (3, 16, 16), 6, activation="sigmoid", rng=torch.Generator().manual_seed(0)).to(dtype)
    pictures = smooth_pictures(33, 16, seed=1).to(dtype)
    truth, public = Batch(pictures[:1], torch.tensor([3])), Batch(pictures[1:], torch.arange(32) % 6)
    recipe = Recipe(1, defense=defense)
    update = gradient(net, truth, task, recipe, torch.Generator().manual_seed(2))
    return truth, Observation(task, recipe, net, update, public)


@pytest.mark.usefixtures("secret_scale")
def test_a_matcher_applies_forward_weights_and_variables() -> None:
    truth, observation = observe("secret(factor=3.0)", torch.float64, "lenet")
    matcher = GradientMatcher(observation)
    factor = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    loss = matcher.squared_distance(*truth, factor)
    (grad,) = torch.autograd.grad(loss, factor)
    assert loss < 1e-20
    assert grad.abs() < 1e-8
    assert matcher.cosine_distance(*truth, factor).abs() < 1e-12  # convolutions, all noise, do not count
    assert matcher.squared_distance(*truth, torch.tensor(1.0).double()) > 1e-3
    assert GradientMatcher(dataclasses.replace(observation, recipe=Recipe(1))).cosine_distance(*truth) > 1e-3


@pytest.mark.usefixtures("secret_scale")
@pytest.mark.parametrize("name", ["dlg", "idlg"])
def test_an_attack_optimises_a_defenses_variable_with_the_example(name: str) -> None:
    truth, observation = observe("secret(factor=1.5)", torch.float32)
    estimates: list[Tensor] = []
    forward = GradientMatcher.simulate

    def simulate(self: GradientMatcher, examples: Tensor, labels: Tensor, *unknowns: Tensor) -> tuple[Tensor, ...]:
        estimates.append(unknowns[0].detach().clone())
        return forward(self, examples, labels, *unknowns)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GradientMatcher, "simulate", simulate)
        rec = ATTACKS[name](iterations=400, restarts=2).reconstruct(observation, torch.Generator().manual_seed(0))
    assert rec.labels is not None
    assert rec.labels.tolist() == truth.labels.tolist()
    assert estimates[0] == 1.0
    assert estimates[-1].item() == pytest.approx(1.5, rel=0.05)
    assert psnr(truth.examples[0], rec.examples[0]) > 25


@pytest.mark.usefixtures("secret_scale")
@pytest.mark.parametrize(("kind", "epochs"), [("gradient", 1), ("delta", 1), ("delta", 2)])
@pytest.mark.parametrize("name", ["dlg", "idlg", "ig_single", "ig_weight", "ig_multi", "sme", "dlf", "ggl"])
def test_every_matching_attack_accepts_a_defense_with_an_unknown(name: str, kind: str, epochs: int) -> None:
    truth, observation = observe("none", torch.float32)
    recipe = Recipe(1, epochs, lr=0.01, defense="secret(factor=1.5)")
    rng, model = torch.Generator().manual_seed(0), observation.model
    if kind == "gradient":
        update = gradient(model, truth, observation.task, recipe, rng)
    else:
        update, _ = train(model, truth, observation.task, recipe, rng)
    budget = {"iterations": 3} | ({"comparison_iterations": 0} if name == "ggl" else {})
    observation = dataclasses.replace(observation, recipe=recipe, update=update)
    rec = ATTACKS[name](**budget).reconstruct(observation, rng)
    assert rec.examples.isfinite().all()
