"""What every attack in the registry promises, whoever wrote it."""

import copy
import dataclasses
import inspect
import pickle

import pytest
import torch

from attacks.base import REGISTRY, Attack, discover
from federated.client import gradient, train
from federated.wire import Batch, Observation, Recipe, Reconstruction, Task, UsageError
from models import build
from tests.conftest import ROOT
from utils import cli

discover()
TASK = Task((3, 16, 16), 6, (0.5,) * 3, (0.5,) * 3)
KINDS = ("gradient", "delta")


def quick(name: str) -> Attack:
    """The attack with a budget that shows it runs, not that it succeeds."""
    small = {"iterations": 3, "restarts": 1, "weight_iterations": 3, "latents": 4}
    if getattr(REGISTRY[name], "generator", "class_pca") != "class_pca":
        small["generator_steps"] = 3
    fields = {f.name for f in dataclasses.fields(REGISTRY[name])}
    return REGISTRY[name](**{k: v for k, v in small.items() if k in fields})


def batch(n: int, seed: int) -> Batch:
    rng = torch.Generator().manual_seed(seed)
    return Batch(torch.rand(n, *TASK.image_shape, generator=rng), torch.randint(TASK.num_classes, (n,), generator=rng))


def wanted(attack: Attack) -> torch.nn.Module:
    return build(attack.wants_model, TASK.image_shape, TASK.num_classes, rng=torch.Generator().manual_seed(0))


def observation(
    attack: Attack, kind: str, n: int = 2, granted: bool = False, local: Recipe | None = None
) -> Observation:
    n = min(n, attack.max_images or n)
    public = batch(40, seed=5)
    model = wanted(attack)
    truth, rng = batch(n, seed=1), torch.Generator().manual_seed(2)
    recipe = Recipe(n) if kind == "gradient" else local or Recipe(n, 2, lr=0.01)
    attack.check(model, TASK, recipe, kind, n)
    model = attack.implant(model, TASK, public, recipe)
    if kind == "gradient":
        update = gradient(model, truth, TASK, recipe, rng)
    else:
        update, _ = train(model, truth, TASK, recipe, rng)
    return Observation(TASK, recipe, model, update, public, {"labels": truth.labels} if granted else {})


def answer(attack: Attack, seen: Observation) -> Reconstruction:
    return attack.reconstruct(seen, torch.Generator().manual_seed(7))


@pytest.mark.parametrize("epochs", [1, 2])
@pytest.mark.parametrize("name", sorted(REGISTRY))
def test_a_client_of_adam_is_read_or_refused(name: str, epochs: int) -> None:
    attack = quick(name)
    local = Recipe(2, epochs, lr=0.01, optimizer="adam", lr_schedule="cosine")
    if not attack.reads_adam:
        with pytest.raises(UsageError, match="--client-optimizer sgd"):
            observation(attack, "delta", local=local)
        return
    rec = answer(attack, observation(attack, "delta", local=local))
    assert rec.images.isfinite().all()
    assert rec.images.min() >= 0
    assert rec.images.max() <= 1


@pytest.mark.parametrize("name", ["ig_single", "sme"])
def test_reading_adam_as_a_gradient_is_said_in_one_line(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    for optimizer, kind in (("sgd", "delta"), ("adam", "gradient"), ("adam", "delta")):
        REGISTRY[name]().check(torch.nn.Identity(), TASK, Recipe(1, optimizer=optimizer), kind, 1)  # type: ignore[arg-type]
    said = capsys.readouterr().err
    assert said.startswith("note: Adam")
    assert said.count("\n") == 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", sorted(REGISTRY))
def test_answers_in_range_and_shape(name: str, kind: str) -> None:
    attack = quick(name)
    seen = observation(attack, kind)
    rec = answer(attack, seen)
    assert rec.images.ndim == 4
    assert rec.images.shape[1:] == TASK.image_shape
    assert rec.images.min() >= 0
    assert rec.images.max() <= 1
    if rec.labels is not None:
        assert rec.labels.shape == rec.images.shape[:1]
        assert rec.labels.dtype == torch.int64
        assert set(rec.labels.tolist()) <= set(range(TASK.num_classes))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", sorted(REGISTRY))
def test_is_a_pure_function_of_what_it_sees(name: str, kind: str) -> None:
    attack = quick(name)
    seen = observation(attack, kind)
    # one walk first: autograd leaves caches behind that are no part of the observation
    before = pickle.dumps([seen.update, seen.public, seen.recipe, list(seen.model.state_dict().items())])
    mode, stream = seen.model.training, torch.random.get_rng_state()
    first = answer(attack, seen)
    torch.rand(3)
    second = answer(attack, copy.deepcopy(seen))
    assert torch.equal(first.images, second.images)
    assert (first.labels is None) == (second.labels is None)
    assert first.labels is None or torch.equal(first.labels, second.labels)
    assert before == pickle.dumps([seen.update, seen.public, seen.recipe, list(seen.model.state_dict().items())])
    assert seen.model.training == mode
    assert all(p.grad is None for p in seen.model.parameters())
    torch.random.set_rng_state(stream)
    answer(attack, seen)
    assert torch.equal(torch.random.get_rng_state(), stream), f"{name} draws from torch's global stream"


@pytest.mark.parametrize("name", sorted(REGISTRY))
def test_does_not_look_at_labels_it_was_not_granted(name: str) -> None:
    """Two clients whose updates are equal are equal to the server: the granted facts alone may tell them apart."""
    attack = quick(name)
    seen = observation(attack, "gradient")
    assert seen.granted == {}
    rec = answer(attack, dataclasses.replace(seen, granted={"something else": torch.ones(1)}))
    assert torch.equal(rec.images, answer(attack, seen).images)


@pytest.mark.parametrize("name", sorted(REGISTRY))
def test_takes_granted_labels_as_they_are(name: str) -> None:
    attack = quick(name)
    seen = observation(attack, "gradient", granted=True)
    rec = answer(attack, seen)
    if not attack.names_labels:
        assert rec.labels is None
        return
    assert rec.labels is not None
    assert sorted(rec.labels.tolist()) == sorted(seen.granted["labels"].tolist())


@pytest.mark.parametrize("name", sorted(REGISTRY))
def test_survives_the_trip_to_a_worker(name: str) -> None:
    attack = quick(name)
    seen = observation(attack, "delta")
    there = pickle.loads(pickle.dumps((attack, seen)))
    assert torch.equal(answer(*there).images, answer(attack, seen).images)


@pytest.mark.parametrize("name", sorted(REGISTRY))
def test_refuses_more_images_than_it_can_rebuild(name: str) -> None:
    attack = quick(name)
    if attack.max_images is None:
        attack.check(wanted(attack), TASK, Recipe(1), "gradient", 1)
        return
    with pytest.raises(UsageError, match=str(attack.max_images)) as refusal:
        attack.check(torch.nn.Identity(), TASK, Recipe(1), "gradient", attack.max_images + 1)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("name", sorted(REGISTRY))
def test_prepares_a_model_it_has_prepared_before(name: str) -> None:
    """Every round broadcasts: implanting twice is implanting once, and leaves the number of layers as it was."""
    attack, public, recipe = quick(name), batch(40, seed=5), Recipe(2, lr=0.01)
    once = attack.implant(wanted(attack), TASK, public, recipe)
    twice = attack.implant(copy.deepcopy(once), TASK, public, recipe)
    assert once.state_dict().keys() == twice.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(once.state_dict().values(), twice.state_dict().values(), strict=True))


@pytest.mark.parametrize("name", sorted(REGISTRY))
def test_documents_itself_and_has_its_shell_files(name: str) -> None:
    cls = REGISTRY[name]
    assert inspect.getdoc(cls)
    assert cls.threat in ("honest-but-curious", "malicious-parameters", "malicious-architecture")
    for f in dataclasses.fields(cls):
        assert f.metadata.get("help"), f"{name}.{f.name} says nothing about itself"
    assert isinstance(cli.paper_values(cls), cls)
    for mode in ("grad", "fed"):
        assert list((ROOT / "experiments" / mode).glob(f"{name}*.sh")), f"no experiments/{mode}/{name}.sh"
