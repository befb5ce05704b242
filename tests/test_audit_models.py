"""Models that users bring: they load, are validated before any attack, and every attack runs or says why not."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from attacks import ATTACKS
from core.errors import UsageError
from core.protocol import LOSSES, Batch, Observation, Recipe, image_task
from core.references import absolute
from evaluation.applicability import applicability
from evaluation.inspect import inspect_model
from federated.client import gradient
from models import external
from models.validation import validate
from tests.conftest import ROOT
from tests.test_contract import small

SHAPE = (3, 8, 8)
TASK = image_task(SHAPE, 4)
FILE = Path(__file__).with_name("strangers.py")
RNG = torch.Generator().manual_seed(0)
PUBLIC = Batch(torch.rand(40, *SHAPE, generator=RNG), torch.arange(40) % 4)
VICTIM = Batch(torch.rand(1, *SHAPE, generator=RNG), torch.tensor([2]))


def stranger(name: str) -> nn.Module:
    return external.load(f"{FILE}:{name}", SHAPE, 4, rng=torch.Generator().manual_seed(1))


def refused(*words: str):
    """A UsageError of one line with these words."""
    return pytest.raises(UsageError, match=r"\A(?=.*" + r")(?=.*".join(words) + r").*\Z")


def test_a_model_comes_from_a_file_or_a_module_or_torchvision() -> None:
    from_file, from_module = stranger("Plain"), external.load("tests.strangers:Plain", SHAPE, 4)
    assert type(from_file).__name__ == type(from_module).__name__ == "Plain"
    net, task = external.load("torchvision:mobilenet_v3_small", (3, 32, 32), 4).eval(), image_task((3, 32, 32), 4)
    x = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    before = net(x)
    found = validate(net, task)
    assert torch.allclose(net(x), before, atol=1e-5)
    assert any("hard sigmoids" in f.text for f in found.findings)
    entries = applicability(net, task, Recipe(1), "gradient", 1, found, public=True)
    assert {e.attack: e.verdict for e in entries}["ig_single"] == "works"


def test_the_weights_of_a_factory_follow_the_seed() -> None:
    one, same = stranger("Plain"), stranger("Plain")
    other = external.load(f"{FILE}:Plain", SHAPE, 4, rng=torch.Generator().manual_seed(2))
    assert torch.equal(one.head.weight, same.head.weight)
    assert not torch.equal(one.head.weight, other.head.weight)


@pytest.mark.parametrize(
    ("reference", "words"),
    [
        (f"{FILE}:Nothing", ["has no Nothing", "Plain"]),
        ("nowhere.py:net", ["no file", "nowhere.py"]),
        ("no.such.module:net", ["cannot be imported", "ModuleNotFoundError"]),
        (f"{FILE}:fails", ["KeyError", "no such layer", r"strangers.py, line \d+"]),
        (f"{FILE}:a_number", ["int", "not a torch.nn.Module"]),
        (f"{FILE}:", ["file.py:name"]),
        (f"{ROOT / 'evaluation' / 'metrics.py'}:nothing", ["has no nothing"]),
        ("torchvision:resnet5", ["unknown torchvision model", "resnet50"]),
    ],
)
def test_what_cannot_be_loaded_is_refused_in_one_line(reference: str, words: list[str]) -> None:
    with refused(*words):
        external.load(reference, SHAPE, 4)


def test_a_file_named_like_another_module_is_refused(tmp_path: Path) -> None:
    (tmp_path / "models.py").write_text("def net(): ...")
    with refused("another module is called models"):
        external.load(f"{tmp_path / 'models.py'}:net", SHAPE, 4)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("Complex", ["phase", "complex"]),
        ("Integers", ["table", "integers", "buffer"]),
        ("Frozen", ["every parameter", "frozen"]),
        ("Dictionary", ["dict", "logits alone"]),
        ("Constant", ["does not depend on any trained parameter"]),
        ("NotFinite", ["not finite"]),
        ("Untrainable", ["cannot be trained", "inplace"]),
    ],
)
def test_a_model_no_attack_can_use_is_refused_in_one_line(name: str, words: list[str]) -> None:
    with refused(*words):
        validate(stranger(name), TASK)


def test_images_and_classes_must_fit_the_model() -> None:
    with refused("does not take inputs of 3x9x9", "`image_size`"):
        validate(stranger("Plain"), image_task((3, 9, 9), 4))
    with refused(r"\(1, 4\)", r"\(1, 5\)", "each class"):
        validate(stranger("Plain"), image_task(SHAPE, 5))
    with refused("fails in train mode"):  # BatchNorm over one number
        validate(nn.Sequential(nn.Flatten(), nn.Unflatten(1, (1, 192)), Unbatched()), TASK, mode="train")


class Unbatched(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(192, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert not self.training
        return self.head(x.squeeze(1))


def test_validation_leaves_the_model_as_it_was() -> None:
    model = stranger("InPlace").train()
    state = copy.deepcopy(model.state_dict())
    found = validate(model, TASK)
    assert model.training
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert any("overwrites its inputs" in f.text for f in found.findings)
    x = torch.rand(1, *SHAPE)
    before = x.clone()
    model(x)
    assert torch.equal(x, before)


def test_a_head_that_is_not_last_is_moved_there() -> None:
    model = stranger("HeadFirst")
    names = {name for name, _ in model.named_parameters()}
    assert not validate(model, TASK).limits("labels")
    *_, weight, bias = (name for name, _ in model.named_parameters())
    assert (weight, bias) == ("head.weight", "head.bias")
    assert {name for name, _ in model.named_parameters()} == names


def test_findings_name_frozen_shared_and_tied_weights_and_missing_heads() -> None:
    text = " ".join(f.text for f in validate(stranger("SharedAndFrozen"), TASK).findings)
    assert "2 of 6 parameters are frozen" in text
    assert "again.weight, mix.weight" in text or "mix.weight, again.weight" in text
    assert "tied to mix.weight" in validate(stranger("Tied"), TASK).limits("labels")[0]
    assert "no nn.Linear" in validate(stranger("NoHead"), TASK).limits("labels")[0]


def test_a_zero_head_has_silent_layers_behind_it() -> None:
    model = stranger("Plain")
    nn.init.zeros_(model.head.weight)
    found = validate(model, TASK)
    assert set(found.silent) == {"conv.weight", "conv.bias"}
    assert found.limits("gradients")


@pytest.mark.parametrize(
    "name", ["InPlace", "HeadFirst", "Attention", "SharedAndFrozen", "Tied", "NoHead", "TokenMixer"]
)
def test_every_attack_runs_on_a_strange_model_or_says_why_not(name: str) -> None:
    """With the labels granted, what works in part works."""
    model, recipe = stranger(name), Recipe(1)
    found = validate(model, TASK)
    entries = applicability(model, TASK, recipe, "gradient", 1, found, public=True, granted=True)
    assert {entry.attack for entry in entries} == set(ATTACKS)
    ran = 0
    for entry in entries:
        if entry.verdict == "refused":
            assert entry.reason
            continue
        if entry.attack in ("ggl", "gias"):  # their generators take seconds to train, and see nothing of the model
            continue
        attack = small(entry.attack)
        broadcast = attack.implant(copy.deepcopy(model), TASK, PUBLIC, recipe)
        update = gradient(broadcast, VICTIM, TASK, recipe, torch.Generator().manual_seed(2))
        observation = Observation(TASK, recipe, broadcast, update, PUBLIC, {"labels": VICTIM.labels})
        attack.reconstruct(observation, torch.Generator().manual_seed(3))
        ran += 1
    assert ran >= 5


def test_attacks_without_public_examples_are_refused() -> None:
    model = stranger("Plain")
    entries = applicability(model, TASK, Recipe(1), "gradient", 1, validate(model, TASK), public=False)
    by_name = {entry.attack: entry for entry in entries}
    assert by_name["rtf"].reason == "needs public examples"
    assert by_name["ig_single"].verdict == "works"


def test_a_loss_by_name_or_from_a_file() -> None:
    model, own = stranger("Plain"), absolute(f"{FILE}:squared")
    logits, labels = torch.randn(3, 4), torch.tensor([0, 1, 3])
    assert torch.allclose(LOSSES[own](logits, labels), LOSSES["mse"](logits, labels))
    assert torch.allclose(LOSSES["nll"](logits.log_softmax(1), labels), LOSSES["cross_entropy"](logits, labels))
    for name in sorted(set(LOSSES) - {"next_token"}):  # whose outputs are sentences
        soft = torch.nn.functional.one_hot(labels, 4).float()
        assert torch.allclose(LOSSES[name](logits, labels), LOSSES[name](logits, soft)), name
    found = validate(model, TASK, loss=own)
    assert found.limits("soft labels")
    with refused("unknown loss"):
        validate(model, TASK, loss="crossentropy")
    with refused("must return a scalar"):
        validate(model, TASK, loss=f"{FILE}:per_example")
    update = gradient(model, VICTIM, TASK, Recipe(1, loss=own), torch.Generator())
    assert any(t.any() for t in update.tensors.values())


def test_the_expected_analytic_leak_is_the_measured_one() -> None:
    """The share of examples that the attack rebuilds, on a layer whose ReLU neurons few examples activate."""
    from data import load
    from evaluation.metrics import psnr
    from evaluation.pairing import pair
    from models import build

    dataset = load("photos", base_datadir=ROOT / "datasets", image_size=16)
    task, n = dataset.task, 8
    model = build("fc2", task.domain.shape, task.num_classes, rng=torch.Generator().manual_seed(0))
    public = dataset.public.take(torch.arange(256))
    (leak,) = inspect_model(model, task, Recipe(n), "gradient", n, public).leaks
    recovered = []
    for indices in torch.randperm(len(dataset.private), generator=torch.Generator().manual_seed(1))[: 10 * n].split(n):
        batch = dataset.private.take(indices)
        update = gradient(model, batch, task, Recipe(n), torch.Generator())
        found = ATTACKS["analytic"]().reconstruct(Observation(task, Recipe(n), model, update), torch.Generator())
        pairs = pair(batch.examples, found.examples)
        recovered += [
            j is not None and psnr(x, found.examples[j]) >= 20 for x, j in zip(batch.examples, pairs, strict=True)
        ]
    assert 0.2 < leak.share < 0.95
    assert abs(leak.share - sum(recovered) / len(recovered)) < 0.05
