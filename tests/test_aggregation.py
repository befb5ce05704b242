"""Sums of clients, and gradient suppression, which undoes them."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

import data
from attacks import ATTACKS
from attacks.suppress import kept, silenced, with_constants
from core.protocol import Batch, Observation, Recipe, Update, by_name
from core.rng import stream
from federated.client import gradient
from federated.simulation import FedAvgSource, GradientSource, Session, Trial, summed
from models import MODELS, build
from tests.commands import in_process, only_run

PHOTOS = data.load("photos", base_datadir=Path("unused"), image_size=8, victims="tuning")
TEXT = data.load("text", base_datadir=Path("unused"), tokens=8, victims="tuning")


def dataset_of(name: str) -> data.Dataset:
    return TEXT if MODELS[name].takes == "tokens" else PHOTOS


def trial(
    name: str, clients: int, n: int = 2, suppress: bool = True, local: dict[str, object] | None = None
) -> tuple[Trial, Session]:
    """The first trial of a source whose updates are sums."""
    dataset, attack = dataset_of(name), ATTACKS["suppress"]()
    words = len(TEXT.task.domain.words) if dataset is TEXT else None
    options = {"width": 64} if name in ("gpt", "fc2") else {}
    shape, classes = dataset.task.domain.shape, dataset.task.num_classes
    model = build(name, shape, classes, rng=stream(0, "model"), vocabulary=words, **options)
    recipe = Recipe(n, loss=MODELS[name].loss, **(local or {}))
    if local is None:
        source = GradientSource(dataset.private, recipe, 1, clients)
    else:
        source = FedAvgSource.deal(
            dataset, recipe, trials=1, seed=0, clients=clients, client_images=n, aggregate=clients
        )
    hooks = (attack.personalize, True) if suppress else ()
    session = Session(model, dataset.task, torch.device("cpu"), 0, lambda model, recipe: model, *hooks)
    return next(iter(source.trials(session))), session


def test_a_sum_is_the_mean_weighted_by_examples() -> None:
    parts = ((1.0, 1), (5.0, 3))
    updates = [Update("delta", {"w": torch.full((2,), v)}, n, {"b": torch.tensor(n)}) for v, n in parts]
    both = summed(updates)
    assert torch.equal(both.tensors["w"], torch.full((2,), 4.0))
    assert both.buffers["b"] == 2  # (1 * 1 + 3 * 3) / 4 = 2.5, cut to an integer
    assert both.num_examples == 4
    assert summed(updates[:1]) is updates[0]


@pytest.mark.parametrize("clients", [1, 4])
def test_a_plain_sum_of_gradients_is_that_of_one_large_batch(clients: int) -> None:
    found, session = trial("lenet", clients, suppress=False)
    assert found.truth is not None
    assert (len(found.truth.labels), found.update.num_examples, found.aggregate) == (2 * clients, 2 * clients, clients)
    assert found.recipe.batch_size == 2 * clients
    rng = torch.Generator()
    whole = gradient(session.model, found.truth, session.task, Recipe(2 * clients), rng)
    for name, tensor in whole.tensors.items():
        torch.testing.assert_close(found.update.tensors[name], tensor, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("local", [None, {"local_epochs": 2, "lr": 0.01}])
@pytest.mark.parametrize("name", ["lenet", "fc2", "cnn", "gpt", "gpt_tied"])
def test_the_kept_layers_of_a_sum_are_the_victims_update(name: str, local: dict[str, object] | None) -> None:
    together, session = trial(name, 4, local=local)
    alone, _ = trial(name, 1, local=local) if local is None else (None, None)
    names = kept(together.model, session.task, together.recipe, together.update.kind)
    lost = {key for key, is_kept in names.items() if not is_kept}
    assert lost <= {"head.bias", "fc.bias", "classifier.bias"}
    assert together.truth is not None
    assert len(together.truth.labels) == 2  # the victim's alone
    if alone is None:
        return
    for key, is_kept in names.items():
        own = alone.update.tensors[key]
        if is_kept:
            assert (4 * together.update.tensors[key] - own).norm() <= 1e-6 * max(1e-6, own.norm())
        else:
            assert (4 * together.update.tensors[key] - own).norm() > 0.1 * own.norm()


def test_local_steps_leave_the_silent_clients_silent() -> None:
    """The sum with three silent clients is a quarter of the victim's delta, from the same minibatches."""
    found, session = trial("fc2", 4, local={"local_epochs": 3, "lr": 0.05})
    from federated.client import train

    assert found.truth is not None
    rng = stream(0, "client", 0, found.origin["client"])
    recipe = dataclasses.replace(found.recipe, batch_size=2)
    own, _ = train(session.model, found.truth, session.task, recipe, rng)
    for key in ("body.1.weight", "body.1.bias", "head.weight"):
        torch.testing.assert_close(4 * found.update.tensors[key], own.tensors[key], rtol=1e-5, atol=1e-8)


def observed(found: Trial, session: Session, public: Batch | None = None) -> Observation:
    return Observation(session.task, found.recipe, found.model, found.update, public, aggregate=found.aggregate)


@pytest.mark.parametrize(
    ("name", "inner", "n"),
    [("fc2", "analytic", 1), ("fc2", "cpa", 2), ("lenet", "ig_single", 1), ("lenet", "dlg", 1), ("gpt", "dager", 2)],
)
def test_an_attack_on_the_sum_is_the_attack_on_the_victim(name: str, inner: str, n: int) -> None:
    """The inner attack returns what it returns for the victim's own update, without the parameters that are mixed."""
    together, session = trial(name, 4, n)
    alone, _ = trial(name, 1, n)
    iterations = {} if inner in ("analytic", "cpa", "dager") else {"inner_iterations": 5}
    attack = ATTACKS["suppress"](inner=inner, **iterations)
    public = dataset_of(name).public.take(range(50))
    rec = attack.reconstruct(observed(together, session, public), torch.Generator().manual_seed(1))
    lost = {k for k, v in kept(together.model, session.task, together.recipe, "gradient").items() if not v}
    tensors = {k: t for k, t in alone.update.tensors.items() if k not in lost}
    own = dataclasses.replace(
        observed(alone, session, public),
        model=with_constants(alone.model, lost),
        update=Update("gradient", tensors, n),
    )
    expected = attack.attack.reconstruct(own, torch.Generator().manual_seed(1))
    torch.testing.assert_close(rec.examples, expected.examples, rtol=1e-3, atol=1e-3)
    if inner in ("analytic", "cpa", "dager"):
        assert alone.truth is not None
        seen = 7 if inner == "dager" else None
        truth, guesses = (x[:, :seen].flatten(1).double() for x in (alone.truth.examples, rec.examples))
        assert torch.cdist(truth, guesses).min(1).values.max() < 0.05


def test_a_silent_model_is_silent_and_the_victims_is_honest() -> None:
    found, _ = trial("lenet", 1)
    before = {k: v.clone() for k, v in found.model.state_dict().items()}
    silent = silenced(found.model)
    assert all(torch.equal(v, before[k]) for k, v in found.model.state_dict().items())
    logits = silent(torch.rand(5, *PHOTOS.task.domain.shape))
    assert torch.equal(logits, silent.head.bias.expand(5, -1))
    attack = ATTACKS["suppress"]()
    assert attack.personalize(found.model, 0) is found.model


def test_constants_are_no_parameters_and_change_no_output() -> None:
    found, _ = trial("lenet", 1)
    other, x = with_constants(found.model, {"head.bias"}), torch.rand(2, *PHOTOS.task.domain.shape)
    assert "head.bias" not in dict(other.named_parameters())
    assert torch.equal(other(x), found.model(x))
    lost = set(dict(found.model.named_parameters())) - set(by_name(other, list(other.parameters())))
    assert lost == {"head.bias"}


@pytest.mark.parametrize(
    ("page", "flags", "message"),
    [
        ("main_grad.py", "suppress --inner rtf", "--inner rtf: choose an honest-but-curious attack"),
        ("main_grad.py", "suppress --inner nothing", "unknown attack 'nothing'"),
        ("main_grad.py", "suppress --model lenet5", "mixed with that of other clients: choose --model lenet"),
        (
            "main_grad.py",
            "suppress --inner analytic --inner-iterations 3 --model fc2",
            "does not apply to --inner analytic",
        ),
        ("main_fed.py", "suppress --weight-decay 0.1 --model fc2", "all weights move"),
        ("main_fed.py", "dlg --aggregate 3 --clients-per-round 2", "leave out --clients-per-round"),
        ("main_fed.py", "dlg --aggregate 3 --trials 4 --rounds 2", "raise --rounds"),
        ("main_fed.py", "dlg --aggregate 11", "of --clients 10"),
        ("main_grad.py", "dlg --aggregate 300", "private images"),
    ],
)
def test_what_cannot_be_summed_or_silenced_is_one_line(
    page: str, flags: str, message: str, tmp_path: Path, monkeypatch, capsys
) -> None:
    assert in_process(page, [*flags.split(), "--out", str(tmp_path)], monkeypatch) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("page", ["main_grad.py", "main_fed.py"])
def test_a_run_on_sums(page: str, tmp_path: Path, monkeypatch) -> None:
    flags = "--inner analytic --model fc2 --aggregate 3 --trials 2 --image-size 8 --jobs 1"
    assert in_process(page, ["suppress", *flags.split(), "--out", str(tmp_path)], monkeypatch) == 0
    summary = json.loads((only_run(tmp_path) / "summary.json").read_text())
    assert summary["images"] == 2
    assert summary["success_rate"] == 1
