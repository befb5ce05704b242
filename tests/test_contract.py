"""What every attack promises, whoever wrote it; defences and flags are held to the same words."""

import copy
import dataclasses
import inspect
import pickle
import re
import typing
from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

import pytest
import torch
from torch import nn

from attacks import ATTACKS, Attack
from core.domain import Column, TabularDomain, TextDomain
from core.errors import UsageError
from core.hyperparameters import paper_values
from core.protocol import Batch, Observation, Recipe, Reconstruction, Task, image_task
from defenses.base import DEFENSES
from federated.client import gradient, train
from models import MODELS, build
from models.inspection import REQUIREMENTS
from runner import flags
from tests.conftest import ROOT

IMAGES = image_task((3, 16, 16), 6, (0.5,) * 3, (0.5,) * 3)
SENTENCES = Task(TextDomain((6,), tuple(f"word{i}" for i in range(40))), 6)
COLUMNS = (*(Column(f"number {i}", (), 0.5, 0.3, 0.0, 1.0) for i in range(5)), Column("kind", ("a", "b", "c")))
RECORDS = Task(TabularDomain((8,), COLUMNS), 6)
KINDS = ("gradient", "delta")
NAMES = sorted(ATTACKS)


def test_every_attack_can_be_imported() -> None:
    assert not ATTACKS.broken
    assert len(NAMES) >= 15


def small(name: str) -> Attack:
    """The attack with small budgets (`hp(smoke=...)`), which show that it runs and not that it succeeds."""
    cls = ATTACKS[name]
    budgets = {f.name: f.metadata["smoke"] for f in dataclasses.fields(cls)}
    if getattr(cls, "generator", None) == "class_pca":  # nothing to train
        del budgets["generator_steps"]
    return cls(**{field: value for field, value in budgets.items() if value is not None})


def task_of(attack: Attack) -> Task:
    """A task whose examples the attack reconstructs."""
    return IMAGES if "continuous" in attack.kinds else RECORDS if "tabular" in attack.kinds else SENTENCES


def batch(n: int, seed: int, task: Task = IMAGES) -> Batch:
    rng = torch.Generator().manual_seed(seed)
    draw = torch.rand(n, *task.domain.shape, generator=rng) if task is IMAGES else task.domain.init(n, rng)
    return Batch(draw, torch.randint(task.num_classes, (n,), generator=rng))


def example_model(attack: Attack) -> nn.Module:
    rng, task = torch.Generator().manual_seed(0), task_of(attack)
    words = len(task.domain.words) if isinstance(task.domain, TextDomain) else None
    return build(attack.example_model, task.domain.shape, task.num_classes, rng=rng, vocabulary=words)


def recipe_of(attack: Attack, *args: Any, **kwargs: Any) -> Recipe:
    return Recipe(*args, **kwargs, loss=MODELS[attack.example_model].loss)


def observe(
    attack: Attack, kind: str, n: int = 2, granted: bool = False, local: Recipe | None = None, public: bool = True
) -> Observation:
    task = task_of(attack)
    auxiliary, model = batch(40, 5, task), example_model(attack)
    truth, rng = batch(n, 1, task), torch.Generator().manual_seed(2)
    recipe = recipe_of(attack, n) if kind == "gradient" else local or recipe_of(attack, n, 2, lr=0.01)
    attack.check(model, task, recipe, kind, n)
    model = attack.implant(model, task, auxiliary, recipe)
    if kind == "gradient":
        update = gradient(model, truth, task, recipe, rng)
    else:
        update, _ = train(model, truth, task, recipe, rng)
    facts = {"labels": truth.labels} if granted else {}
    return Observation(task, recipe, model, update, auxiliary if public else None, facts)


def reconstruct(attack: Attack, observation: Observation) -> Reconstruction:
    return attack.reconstruct(observation, torch.Generator().manual_seed(7))


def assert_valid(rec: Reconstruction, task: Task) -> None:
    assert rec.examples.ndim == 1 + len(task.domain.shape)
    assert rec.examples.shape[1:] == task.domain.shape
    assert rec.examples.isfinite().all()
    assert torch.equal(task.domain.project(rec.examples), rec.examples)
    assert rec.status in ("ok", "diverged")
    if rec.labels is not None:
        assert rec.labels.shape == rec.examples.shape[:1]
        assert rec.labels.dtype == torch.int64
        assert set(rec.labels.tolist()) <= set(range(task.num_classes))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("name", NAMES)
def test_what_an_attack_does_not_list_changes_nothing(name: str, n: int, kind: str) -> None:
    """`knowledge` is what tables print: withhold the rest, and the reconstruction is the same."""
    attack = small(name)
    observation = observe(attack, kind, n=n)
    listed = attack.knowledge(n)
    withheld = observation
    if "public" not in listed:
        withheld = dataclasses.replace(withheld, public=None)
    if "defense" not in listed:
        withheld = dataclasses.replace(
            withheld, recipe=dataclasses.replace(withheld.recipe, defense="clip(bound=1e-3)")
        )
    if "recipe" not in listed:
        other = dataclasses.replace(withheld.recipe, lr=0.5, local_epochs=3, momentum=0.5, lr_schedule="step")
        withheld = dataclasses.replace(withheld, recipe=other)
    before, after = reconstruct(attack, observation), reconstruct(attack, withheld)
    assert before.examples.equal(after.examples)
    assert (before.labels is None) == (after.labels is None)
    assert before.labels is None or before.labels.equal(after.labels)


@pytest.mark.parametrize("epochs", [1, 2])
@pytest.mark.parametrize("name", NAMES)
def test_an_adam_client_is_attacked_or_refused(name: str, epochs: int) -> None:
    attack = small(name)
    local = Recipe(2, epochs, lr=0.01, optimizer="adam", lr_schedule="cosine")
    if attack.supports_adam:
        assert_valid(reconstruct(attack, observe(attack, "delta", local=local)), task_of(attack))
    else:
        with pytest.raises(UsageError, match="`client_optimizer=sgd`"):
            observe(attack, "delta", local=local)


@pytest.mark.parametrize("name", ["ig_single", "sme"])
def test_a_note_says_that_adam_hides_sizes(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    for optimizer, kind in (("sgd", "delta"), ("adam", "gradient"), ("adam", "delta")):
        ATTACKS[name]().check(nn.Identity(), IMAGES, Recipe(1, optimizer=optimizer), kind, 1)  # type: ignore[arg-type]
    note = capsys.readouterr().err
    assert note.startswith("note: Adam")
    assert note.count("\n") == 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_examples_and_labels_have_their_shapes_and_ranges(name: str, kind: str) -> None:
    attack = small(name)
    assert_valid(reconstruct(attack, observe(attack, kind)), task_of(attack))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [name for name in NAMES if "public" not in ATTACKS[name].requires])
def test_no_public_data_is_needed_unless_required(name: str, kind: str) -> None:
    attack = small(name)
    if "public" in attack.requirements():
        pytest.skip("its defaults require public data")
    assert_valid(reconstruct(attack, observe(attack, kind, public=False)), task_of(attack))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_a_reconstruction_is_a_pure_function_of_the_observation(name: str, kind: str) -> None:
    attack = small(name)
    observation = observe(attack, kind)

    def contents() -> bytes:
        state = list(observation.model.state_dict().items())
        return pickle.dumps([observation.update, observation.public, observation.recipe, state])

    before = contents()  # before the first run: autograd leaves caches that are no part of the observation
    mode, stream = observation.model.training, torch.random.get_rng_state()
    first = reconstruct(attack, observation)
    torch.rand(3)
    second = reconstruct(attack, copy.deepcopy(observation))
    assert torch.equal(first.examples, second.examples)
    assert (first.labels is None) == (second.labels is None)
    assert first.labels is None or torch.equal(first.labels, second.labels)
    assert before == contents()
    assert observation.model.training == mode
    assert all(p.grad is None for p in observation.model.parameters())
    torch.random.set_rng_state(stream)
    reconstruct(attack, observation)
    assert torch.equal(torch.random.get_rng_state(), stream), f"{name} draws from torch's global stream"


@pytest.mark.parametrize("name", NAMES)
def test_other_granted_facts_change_nothing(name: str) -> None:
    attack = small(name)
    observation = observe(attack, "gradient")
    assert observation.granted == {}
    rec = reconstruct(attack, dataclasses.replace(observation, granted={"something else": torch.ones(1)}))
    assert torch.equal(rec.examples, reconstruct(attack, observation).examples)


@pytest.mark.parametrize("name", NAMES)
def test_granted_labels_are_returned_as_they_are(name: str) -> None:
    attack = small(name)
    observation = observe(attack, "gradient", granted=True)
    granted, rec = observation.granted["labels"], reconstruct(attack, observation)
    if not attack.returns_labels:
        assert rec.labels is None
        return
    assert rec.labels is not None
    assert sorted(rec.labels.tolist()) == sorted(granted.tolist())
    if "double_backward" in attack.requires:  # matching attacks hold row i at label i; others assign labels to rows
        assert torch.equal(rec.labels, granted)


@pytest.mark.parametrize("name", NAMES)
def test_attack_and_observation_survive_pickling(name: str) -> None:
    attack = small(name)
    observation = observe(attack, "delta")
    unpickled = pickle.loads(pickle.dumps((attack, observation)))
    assert torch.equal(reconstruct(*unpickled).examples, reconstruct(attack, observation).examples)


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_too_large_is_refused_in_one_line(name: str) -> None:
    attack = small(name)
    model, huge = example_model(attack), 10**6
    attack.check(model, task_of(attack), recipe_of(attack, 1), "gradient", 1)
    message = ""
    try:
        attack.check(model, task_of(attack), recipe_of(attack, huge), "gradient", huge)
    except UsageError as refusal:
        message = str(refusal)
    assert not message or "`batch_size`" in message
    assert "\n" not in message


@pytest.mark.parametrize("name", NAMES)
def test_a_prepared_model_can_be_prepared_again(name: str) -> None:
    """Every round broadcasts: implanting twice is implanting once, and leaves the layers as they were."""
    attack = small(name)
    task, recipe = task_of(attack), recipe_of(attack, 2, lr=0.01)
    public = batch(40, 5, task)
    once = attack.implant(example_model(attack), task, public, recipe)
    twice = attack.implant(copy.deepcopy(once), task, public, recipe)
    assert once.state_dict().keys() == twice.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(once.state_dict().values(), twice.state_dict().values(), strict=True))


class _Derivative(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("derivative for toy_backward is not implemented")


class _Toy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return _Derivative.apply(grad)


class OnceDifferentiable(nn.Module):
    """The identity without a second derivative, as some of torch's kernels are."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _Toy.apply(x)


def without(requirement: str) -> nn.Module | None:
    """A model that lacks one thing that attacks require."""
    flat, side = nn.Flatten(), 3 * 16 * 16
    return {
        "pixel_layer": nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.ReLU(), flat, nn.Linear(784, 16), nn.ReLU(), nn.Linear(16, 6)
        ),
        "pixel_layer_bias": nn.Sequential(flat, nn.Linear(side, 32, bias=False), nn.ReLU(), nn.Linear(32, 6)),
        "hidden_layer": nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), flat, nn.Linear(784, 6)),
        "linear_head": nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), flat, nn.Linear(784, 6, bias=False)),
        "attention": nn.Sequential(nn.Embedding(40, 8), nn.Linear(8, 24), flat, nn.Linear(144, 6)),
        "relu": nn.Sequential(flat, nn.Linear(side, 32), nn.Sigmoid(), nn.Linear(32, 6)),
        "double_backward": nn.Sequential(nn.Conv2d(3, 4, 3), OnceDifferentiable(), flat, nn.Linear(784, 6)),
        "vit": nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), flat, nn.Linear(784, 6)),
    }.get(requirement)


@pytest.mark.parametrize("name", NAMES)
def test_requirements_are_declared_and_checked(name: str) -> None:
    attack = small(name)
    assert attack.requires <= set(REQUIREMENTS)
    assert attack.requirements() <= set(REQUIREMENTS)
    for requirement in attack.requirements():
        model = without(requirement)
        if model is None:
            assert requirement == "public", f"no model here lacks {requirement}: add one to `without`"
            continue
        with pytest.raises(UsageError, match=name) as refusal:
            attack.check(model, task_of(attack), Recipe(1), "gradient", 1)
        assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("name", NAMES)
def test_an_attack_documents_itself_and_has_its_shell_files(name: str) -> None:
    cls = ATTACKS[name]
    assert cls.name == name
    assert inspect.getdoc(cls)
    assert inspect.getdoc(inspect.getmodule(cls))
    assert cls.citation
    assert cls.link.startswith("https://") or name == "baseline"
    assert cls.threat in ("honest-but-curious", "malicious-parameters", "malicious-architecture")
    for mode in ("grad", "fed"):
        assert list((ROOT / "experiments" / mode).glob(f"{name}*.sh")), f"no experiments/{mode}/{name}.sh"


@pytest.mark.parametrize("name", NAMES)
def test_published_values_are_values_of_fields_with_a_source(name: str) -> None:
    cls = ATTACKS[name]
    assert isinstance(paper_values(cls), cls)  # within its limits
    types = typing.get_type_hints(cls)
    for base in cls.__mro__:
        own = {f.name for f in dataclasses.fields(base)} if dataclasses.is_dataclass(base) else None
        for field, (value, source) in vars(base).get("paper", {}).items():
            assert field in (own or types), f"{base.__name__}.paper names no field: {field}"
            assert source, f"{base.__name__}.paper[{field!r}] has no source"
            if get_origin(types[field]) is Literal:
                assert value in get_args(types[field]), f"{base.__name__}.paper[{field!r}] = {value!r}"


@pytest.mark.parametrize("name", NAMES)
def test_no_field_repeats_that_of_a_base_class(name: str) -> None:
    for cls in ATTACKS[name].__mro__:
        for base in cls.__mro__[1:]:
            if not (dataclasses.is_dataclass(cls) and dataclasses.is_dataclass(base)):
                continue
            inherited = {f.name: f for f in dataclasses.fields(base)}
            for field in dataclasses.fields(cls):
                if field.name in vars(cls).get("__annotations__", {}) and field.name in inherited:
                    other = inherited[field.name]
                    same = (field.default, field.metadata["help"]) == (other.default, other.metadata["help"])
                    assert not same, f"{cls.__name__}.{field.name} repeats {base.__name__}.{field.name}"


def helps() -> Iterator[tuple[str, str]]:
    """(where, help text) of every hyperparameter of an attack or a defence, and of every flag."""
    for kind, classes in (
        ("attacks", ATTACKS),
        ("defenses", DEFENSES),
        ("flags", {"Grad": flags.Grad, "Fed": flags.Fed}),
    ):
        for name, cls in classes.items():
            for field in dataclasses.fields(cls):  # type: ignore[arg-type]
                yield f"{kind}.{name}.{field.name}", field.metadata["help"]


HELPS = dict(helps())
PREPOSITIONS = "of from for with without by in on at as if whether how when where after before while than"
PRONOUNS = "it its they their them this that these those what which who whose whom he she we our you your each"
VERBS = (
    "train start_from start_with hand run use apply add take draw do compute set keep let make give choose pick go "
    "resume write read save load search sample divide multiply look tell is are has have be"
)
NO_NOUN_FIRST = {word for words in (PREPOSITIONS, PRONOUNS, VERBS) for word in words.split()}


@pytest.mark.parametrize("where", sorted(HELPS))
def test_a_help_text_is_a_noun_phrase(where: str) -> None:
    """It must be understood without the name of its flag, as in "learning rate of the clients"."""
    text = HELPS[where]
    assert text, f"{where} has no help text"
    assert text == text.strip()
    assert not text.endswith("."), f"{where}: {text!r} ends with a period"
    words = re.findall(r"[\w'-]+", text.lower())
    assert words, f"{where}: {text!r}"
    assert words[0] not in NO_NOUN_FIRST, f"{where}: {text!r} does not begin with a noun"
    assert "_".join(words[:2]) not in NO_NOUN_FIRST, f"{where}: {text!r} does not begin with a noun"
    assert not words[0].endswith("'s"), f"{where}: {text!r} begins with a possessive"


@pytest.mark.parametrize(
    "text", ["of an image", "Adam's, of feature inversion", "whose images", "train for long", "its rate"]
)
def test_the_rule_for_help_texts_finds_what_it_is_for(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(HELPS, "toy", text)
    with pytest.raises(AssertionError, match="begin"):
        test_a_help_text_is_a_noun_phrase("toy")
