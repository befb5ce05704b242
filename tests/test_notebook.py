"""Attacks as a notebook uses them: any module, gradients as torch returns them, one call."""

import contextlib
import io
import re
import statistics
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import attacks
from attacks import ATTACKS, DLG, GGL, Analytic, IGSingle, IGWeight
from core.errors import UsageError
from core.protocol import Batch, Recipe, by_name, image_task
from evaluation.metrics import psnr
from federated.client import train
from tests.conftest import ROOT
from tests.test_attacks import smooth_pictures

SHAPE, CLASSES = (3, 16, 16), 6


class OwnNet(nn.Module):
    """No model of the zoo: two branches, a functional activation, a parameter of its own and a buffer."""

    def __init__(self, classes: int = CLASSES) -> None:
        super().__init__()
        self.left = nn.Conv2d(3, 8, 5, stride=2, padding=2)
        self.right = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.gain = nn.Parameter(torch.ones(1, 16, 1, 1))
        self.register_buffer("shift", torch.full((1,), 0.1))
        self.head = nn.Linear(16 * 64, classes)

    def forward(self, x: Tensor) -> Tensor:
        both = torch.cat([self.left(x), self.right(x)], 1)
        return self.head((torch.sigmoid(self.gain * both) + self.shift).flatten(1))


def own_model(seed: int = 0, classes: int = CLASSES) -> OwnNet:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return OwnNet(classes)


def client(n: int, seed: int = 0) -> tuple[OwnNet, Batch, tuple[Tensor, ...]]:
    """A model, private pictures with labels drawn at random, and their gradients."""
    model, rng = own_model(seed), torch.Generator().manual_seed(seed)
    truth = Batch(smooth_pictures(n, 16, seed + 10), torch.randint(CLASSES, (n,), generator=rng))
    loss = nn.functional.cross_entropy(model(truth.examples), truth.labels)
    return model, truth, torch.autograd.grad(loss, list(model.parameters()))


def test_three_lines_reconstruct_an_image() -> None:
    model, truth, gradients = client(1)
    state, mode = {k: v.clone() for k, v in model.state_dict().items()}, model.training
    result = IGSingle(iterations=30)(model, gradients, input_shape=SHAPE)
    assert result.images.shape == truth.examples.shape
    assert result.images is result.examples
    assert 0 <= result.images.min() <= result.images.max() <= 1
    assert result.labels is not None
    assert result.labels.tolist() == truth.labels.tolist()
    assert psnr(truth.examples[0], result.images[0]) > 20
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
    assert model.training == mode
    assert all(p.grad is None for p in model.parameters())


def test_gradients_by_name_in_order_or_attached_to_a_graph_are_the_same() -> None:
    model, truth, gradients = client(1)
    loss = nn.functional.cross_entropy(model(truth.examples), truth.labels)
    attached = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
    attack = IGSingle(iterations=3)
    forms = [gradients, iter(gradients), by_name(model, gradients), dict(reversed(by_name(model, gradients).items()))]
    first, *others = (attack(model, form, input_shape=SHAPE).images for form in [*forms, attached])
    assert all(torch.equal(first, other) for other in others)
    assert not torch.equal(first, attack(model, gradients, input_shape=SHAPE, seed=1).images)


def test_dlg_reconstructs_an_image() -> None:
    model, truth, gradients = client(1)
    result = DLG(iterations=200)(model, gradients, input_shape=SHAPE)
    assert result.labels is not None
    assert result.labels.tolist() == truth.labels.tolist()
    assert psnr(truth.examples[0], result.images[0]) > 25
    assert result.status == "ok"


def test_granted_labels_are_used_as_they_are() -> None:
    model, truth, gradients = client(3)
    result = IGSingle(iterations=3)(model, gradients, input_shape=SHAPE, labels=truth.labels)
    assert result.labels is not None
    assert torch.equal(result.labels, truth.labels)
    assert len(result.images) == 3


def inferred_share(n: int, seed: int, public: Batch | None) -> float:
    """The share of a batch's labels that is inferred, as multisets."""
    model, truth, gradients = client(n, seed)
    result = IGSingle(iterations=1)(model, gradients, input_shape=SHAPE, num_examples=n, public=public)
    assert result.labels is not None
    counts = (torch.bincount(y, minlength=CLASSES) for y in (result.labels, truth.labels))
    return torch.minimum(*counts).sum().item() / n


@pytest.mark.parametrize("n", [4, 16])
def test_labels_of_a_batch_are_inferred_with_and_without_public_data(n: int) -> None:
    """A random guess gets 43% of 4 labels and 69% of 16; over five networks all are inferred, public data or not."""
    public = Batch(smooth_pictures(64, 16, seed=999), torch.zeros(64, dtype=torch.int64))
    shares = {
        name: statistics.fmean(inferred_share(n, seed, data) for seed in range(5))
        for name, data in (("without", None), ("with", public))
    }
    assert shares["with"] >= 0.95
    assert shares["without"] >= 0.9


def test_a_weight_delta_is_attacked_with_its_recipe() -> None:
    model, truth, _ = client(1)
    task, recipe = image_task(SHAPE, CLASSES), Recipe(1, 3, lr=0.05)
    update, _ = train(model, truth, task, recipe, torch.Generator().manual_seed(0))
    result = IGWeight(iterations=60)(model, update.tensors, input_shape=SHAPE, recipe=recipe, kind="delta")
    assert psnr(truth.examples[0], result.images[0]) > 18


def test_a_task_says_how_inputs_are_normalised() -> None:
    model, rng = own_model(), torch.Generator().manual_seed(0)
    task = image_task(SHAPE, CLASSES, (0.5,) * 3, (0.25,) * 3)
    truth = Batch(smooth_pictures(1, 16, 3), torch.randint(CLASSES, (1,), generator=rng))
    loss = nn.functional.cross_entropy(model(task.domain.to_model(truth.examples)), truth.labels)
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    result = IGSingle(iterations=100)(model, gradients, task=task)
    assert psnr(truth.examples[0], result.images[0]) > 20


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_shape": None}, "`input_shape="),
        ({"input_shape": (1, 16, 16)}, r"`input_shape=\(1, 16, 16\)` does not fit the model"),
        ({"input_shape": (3, 15, 40)}, "`input_shape="),
        ({"labels": torch.tensor([1, 2]), "num_examples": 3}, "`labels` holds 2 labels for `num_examples=3`"),
        ({"gradients": [torch.zeros(2)]}, "`gradients` holds 1 tensors, and the model has 7 parameters"),
        ({"gradients": [None] * 7}, "`gradients` has None at position 0"),
        ({"gradients": [torch.zeros(2)] * 7}, "the update does not fit the model"),
        ({"gradients": {"head.weight": torch.zeros(2)}}, "the update does not fit the model"),
    ],
)
def test_a_wrong_argument_is_named_in_one_line(change: dict[str, object], message: str) -> None:
    model, _, gradients = client(1)
    arguments = {"gradients": gradients, "input_shape": SHAPE} | change
    with pytest.raises(UsageError, match=message) as refusal:
        IGSingle(iterations=1)(model, **arguments)  # type: ignore[arg-type]
    assert "\n" not in str(refusal.value)


def test_an_attack_with_a_generator_asks_for_public_examples() -> None:
    model, _, gradients = client(1)
    attack = GGL(iterations=2, comparison_iterations=0)
    with pytest.raises(UsageError, match=r"`public=\(examples, labels\)`"):
        attack(model, gradients, input_shape=SHAPE)
    public = smooth_pictures(40, 16, seed=1), torch.arange(40) % CLASSES
    assert attack(model, gradients, input_shape=SHAPE, public=public).images.shape == (1, *SHAPE)


def test_an_attack_that_does_not_apply_says_why() -> None:
    model, _, gradients = client(1)
    with pytest.raises(UsageError, match="fully connected first layer"):
        Analytic()(model, gradients, input_shape=SHAPE)


def test_every_attack_is_an_attribute_of_the_package() -> None:
    for cls in ATTACKS.values():
        assert getattr(attacks, cls.__name__) is cls
        assert cls.__name__ in dir(attacks)
    with pytest.raises(AttributeError, match="NoSuchAttack"):
        attacks.NoSuchAttack  # noqa: B018


def test_the_example_runs_and_writes_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = ROOT / "examples" / "notebook.py"
    source = path.read_text()
    assert len(source.splitlines()) < 60
    assert source.count("# %%") >= 4
    short = source.replace("ITERATIONS = 300", "ITERATIONS = 5")
    assert short != source
    monkeypatch.chdir(tmp_path)
    with contextlib.redirect_stdout(io.StringIO()) as output:
        exec(compile(short, str(path), "exec"), {"__name__": "__main__"})
    lines = output.getvalue().splitlines()
    assert len(lines) == 5
    assert all(re.search(r"\d+\.\d dB", line) for line in lines)
    assert not list(tmp_path.iterdir())
