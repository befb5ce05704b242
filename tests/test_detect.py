"""The client's check of a received model: silent on honest ones, and it names what malicious servers send."""

import copy
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from attacks import ATTACKS
from core.protocol import Batch, Recipe, image_task
from core.rng import stream
from defenses.detect import detect, main, synthetic_images
from experiments.detection import MALICIOUS
from federated.server import pretrain
from models import MODELS, build

SIGN_OF = {"rtf": "imprint block", "trap": "trap weights", "fishing": "fishing head", "loki": "pass-through kernels"}
SHAPE = (3, 16, 16)
TASK = image_task(SHAPE, 4)
PUBLIC = Batch(synthetic_images(TASK, 64), torch.arange(64) % 4)


def network(name: str, seed: int = 0) -> nn.Module:
    shape = tuple(max(side, MODELS[name].smallest) for side in SHAPE[1:])
    return build(name, (3, *shape), 4, rng=stream(seed, "model"))


IMAGE_MODELS = sorted(
    {name for name, entry in MODELS.items() if entry.takes != "tokens"} - {"resnet34", "vgg16", "resnet18", "convnet64"}
)


@pytest.mark.parametrize("name", IMAGE_MODELS)
def test_new_networks_of_the_zoo_raise_no_alarm(name: str) -> None:
    model = network(name).train()
    before = copy.deepcopy(model.state_dict())
    size = max(16, MODELS[name].smallest)
    assert detect(model, image_task((3, size, size), 4)) == []
    assert model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", ["fc2", "lenet"])
def test_trained_networks_raise_no_alarm(name: str) -> None:
    model = network(name)
    pretrain(model, PUBLIC, TASK, 15, stream(0, "train"))
    assert detect(model, TASK) == []


@pytest.mark.parametrize(
    ("attack", "settings"), [(name, settings) for name, variants in MALICIOUS.items() for settings in variants]
)
def test_what_malicious_servers_send_is_found(attack: str, settings: dict[str, object]) -> None:
    features = "position" in settings
    model = build("cnn", SHAPE, 4, rng=stream(0, "model")) if features else network("fc2")
    broadcast = ATTACKS[attack](**settings).implant(model, TASK, PUBLIC, Recipe(8))
    kinds = {sign.kind for sign in detect(broadcast, TASK)}
    assert SIGN_OF[attack] in kinds


def test_an_imprint_is_found_after_training_too() -> None:
    """Local training moves the rows, and a server that sends a trained block is still found."""
    broadcast = ATTACKS["rtf"]().implant(network("lenet"), TASK, PUBLIC, Recipe(8))
    pretrain(broadcast, PUBLIC, TASK, 1, stream(0, "train"))
    assert "imprint block" in {sign.kind for sign in detect(broadcast, TASK)}


@torch.no_grad()
def test_a_convolution_that_passes_pixels_through_is_found() -> None:
    model = network("cnn")
    first = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
    first.weight.zero_()
    for row in range(len(first.weight)):
        first.weight[row, row % 3, 1, 1] = 1.0
    assert {sign.kind for sign in detect(model, TASK)} >= {"pass-through kernels"}


@torch.no_grad()
@pytest.mark.parametrize("how", ["bias", "row", "confident"])
def test_a_head_that_fishes_is_found(how: str) -> None:
    """One class, or one feature, decides whether an example sends a gradient."""
    model = network("lenet")
    if how == "bias":
        model.head.bias[1:] = -1e4
    elif how == "row":
        model.head.weight[0] *= 1e3
    else:
        model.head.weight.mul_(0)
        model.head.bias[:] = torch.tensor([0.0, 60.0, 60.0, 60.0])
    signs = [sign for sign in detect(model, TASK) if sign.kind == "fishing head"]
    assert signs
    assert all(sign.where == "head" and sign.reason for sign in signs)


@torch.no_grad()
def test_dead_layers_are_found() -> None:
    model = network("mlp")
    hidden = [m for m in model.modules() if isinstance(m, nn.Linear)][1]
    hidden.bias.fill_(-1e4)
    assert "no example passes" in " ".join(map(str, detect(model, TASK)))
    hidden.weight.zero_()
    assert "all zero" in " ".join(map(str, detect(model, TASK)))


@torch.no_grad()
def test_a_model_that_silences_most_examples_is_found() -> None:
    """Few examples pass the last hidden layer: the gradient of the others is gone, and theirs stands alone."""
    model = network("mlp")
    hidden = [m for m in model.modules() if isinstance(m, nn.Linear)][1]
    z = {}
    hook = hidden.register_forward_hook(lambda module, args, output: z.update(out=output))
    model.eval()(synthetic_images(TASK, 64))
    hook.remove()
    hidden.bias -= z["out"].quantile(0.99, dim=0)  # one example in a hundred activates each neuron
    hidden.weight[1:], hidden.bias[1:] = hidden.weight[:1].clone(), hidden.bias[:1].clone()
    kinds = {sign.kind: sign.reason for sign in detect(model, TASK)}
    assert "almost no gradient" in kinds["fishing head"]


def test_the_command_says_why_and_ends_with_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    attack = ATTACKS["trap"](weight_init="trap", bias="zero")
    model = attack.implant(build("fc2", SHAPE, 4, rng=stream(0, "model")), TASK, PUBLIC)
    save_file(model.state_dict(), tmp_path / "received.safetensors")
    words = ["fc2", "--image-shape", "3", "16", "16", "--classes", "4"]
    for extra, code in ((["--weights", str(tmp_path / "received.safetensors")], 1), ([], 0), (["--classes", "1"], 2)):
        monkeypatch.setattr(sys, "argv", ["detect", *words, *extra])
        with pytest.raises(SystemExit) as stop:
            main()
        assert int(stop.value.code or 0) == code
        out = capsys.readouterr()
        assert ("trap weights at body.1.weight" in out.out) == (code == 1)
    assert "--classes" in out.err
