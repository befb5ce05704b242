"""Captured updates: what a client sends is what is attacked, and a hostile file costs one line."""

import contextlib
import copy
import json
import os
import sys
import types
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from core.errors import UsageError
from core.protocol import Batch, Recipe, image_task
from federated.capture import (
    MANIFEST,
    MODEL,
    UPDATE,
    export,
    from_fedml,
    from_flower,
    from_nvflare,
    load_capture,
    read_update,
    save_update,
)
from federated.client import gradient, train
from models import build

SHAPE = (1, 4, 4)
TASK = image_task(SHAPE, 3, (0.5,), (0.25,))
RNG = torch.Generator().manual_seed(0)
BATCH = Batch(torch.rand(4, *SHAPE, generator=RNG), torch.tensor([0, 1, 2, 1]))
RECIPE = Recipe(2, local_epochs=2, lr=0.05, momentum=0.5)


class Net(nn.Module):
    """With the buffers of BatchNorm and a frozen layer."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first = nn.Linear(16, 6)
            self.norm = nn.BatchNorm1d(6)
            self.fixed = nn.Linear(6, 6).requires_grad_(False)
            self.head = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.fixed(self.norm(self.first(x.flatten(1))))))


def refused(*words: str):
    return pytest.raises(UsageError, match=r"\A(?=.*" + r")(?=.*".join(words) + r").*\Z")


def client_after() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """The model as broadcast, and the state dict that a client with it returns after a plain loop."""
    before = Net()
    model = copy.deepcopy(before).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    loss = nn.functional.cross_entropy(model(TASK.domain.to_model(BATCH.examples)), BATCH.labels)
    loss.backward()
    optimizer.step()
    return before, model.state_dict()


@pytest.mark.parametrize("kind", ["gradient", "delta"])
def test_our_own_update_comes_back_bit_by_bit(kind: str, tmp_path: Path) -> None:
    model, recipe = Net(), RECIPE if kind == "delta" else Recipe(4)
    rng = torch.Generator().manual_seed(1)
    update = train(model, BATCH, TASK, recipe, rng)[0] if kind == "delta" else gradient(model, BATCH, TASK, recipe, rng)
    capture = load_capture(export(tmp_path / "c", model, update, TASK, recipe, {"round": 3, "client": 7}))
    blank = Net()
    for p in blank.parameters():
        p.data.zero_()
    found = read_update(capture, blank)
    assert (found.kind, found.num_examples) == (update.kind, 4)
    assert all(torch.equal(found.tensors[name], t) for name, t in update.tensors.items())
    assert all(torch.equal(found.buffers[name], b) for name, b in update.buffers.items())
    assert all(torch.equal(a, b) for a, b in zip(blank.parameters(), model.parameters(), strict=True))
    assert (capture.task, capture.recipe, capture.unknown) == (TASK, recipe, ())
    assert capture.origin == {"round": 3, "client": 7}


def test_ten_lines_capture_a_plain_loop(tmp_path: Path) -> None:
    before, after = client_after()
    saved = save_update(tmp_path, before, after=after, input_shape=SHAPE, num_examples=4, mean=[0.5], std=[0.25])
    capture = load_capture(saved)
    update = read_update(capture, Net())
    assert torch.equal(update.tensors["head.bias"], before.head.bias - after["head.bias"])
    assert not update.tensors["fixed.weight"].any()
    assert torch.equal(update.buffers["norm.running_mean"], after["norm.running_mean"])
    assert {"lr", "local_epochs", "batch_size"} <= set(capture.unknown)
    assert capture.task == TASK


def test_a_capture_that_cannot_be_written_is_an_error_of_the_system(tmp_path: Path) -> None:
    (tmp_path / f"{UPDATE}.tmp").mkdir()
    before, after = client_after()
    with pytest.raises(IsADirectoryError):
        save_update(tmp_path, before, after=after, input_shape=SHAPE)


def test_gradients_of_a_plain_loop(tmp_path: Path) -> None:
    model = Net().eval()
    loss = nn.functional.cross_entropy(model(TASK.domain.to_model(BATCH.examples)), BATCH.labels)
    loss.backward()
    gradients = [p.grad for p in model.parameters()]
    capture = load_capture(save_update(tmp_path, model, gradients=gradients, input_shape=SHAPE, num_examples=4))
    update = read_update(capture, Net())
    sent = gradient(model, BATCH, TASK, Recipe(4), torch.Generator())
    assert all(torch.equal(update.tensors[name], t) for name, t in sent.tensors.items())
    with refused("pass one of"):
        save_update(tmp_path, model, input_shape=SHAPE)
    with refused("`gradients` holds 1"):
        save_update(tmp_path, model, gradients=[None], input_shape=SHAPE)


def test_messages_of_other_systems_give_the_same_update(tmp_path: Path) -> None:
    """FLARE's FLModel and FedML's pair, by their documented structure; Flower's own records where it is installed."""
    before, after = client_after()
    arrays = {name: tensor.numpy() for name, tensor in after.items()}
    start = before.state_dict()
    change = {name: arrays[name] - start[name].numpy() for name in arrays}
    enum = types.SimpleNamespace(value="DIFF")  # ParamsType.DIFF is an Enum of strings
    messages: dict[str, dict[str, Any]] = {
        "fedml": from_fedml((4, OrderedDict(after))),
        "nvflare_full": from_nvflare({"params_type": "FULL", "params": arrays}),
        "nvflare_diff": from_nvflare(types.SimpleNamespace(params_type=enum, params=change)),
    }
    with contextlib.suppress(ImportError):
        from flwr.app import ArrayRecord, MetricRecord, RecordDict

        metrics = MetricRecord({"num-examples": 4, "loss": 1.0})
        messages["flower"] = from_flower(RecordDict({"arrays": ArrayRecord(after), "metrics": metrics}))
    for name, arguments in messages.items():
        capture = load_capture(save_update(tmp_path / name, before, input_shape=SHAPE, **arguments))
        update = read_update(capture, Net())
        for key, p in before.named_parameters():
            assert torch.allclose(update.tensors[key], p - after[key], atol=1e-7), name
        assert torch.allclose(update.buffers["norm.running_var"], after["norm.running_var"], atol=1e-6), name
        assert int(update.buffers["norm.num_batches_tracked"]) == 1, name
        assert (capture.num_examples == 4) == ("num_examples" not in capture.unknown), name
    with refused("neither FULL nor DIFF"):
        from_nvflare({"params_type": "OTHER", "params": {}})


# --- files that do not fit, and hostile ones ---


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    before, after = client_after()
    folder = tmp_path_factory.mktemp("good")
    return save_update(folder, before, after=after, input_shape=SHAPE, num_examples=4, recipe=RECIPE)


def copied(good: Path, to: Path, **changes: Any) -> Path:
    """A copy of a capture whose manifest has other values; ... leaves a key out."""
    to.mkdir(exist_ok=True)
    for name in (UPDATE, MODEL):
        (to / name).write_bytes((good / name).read_bytes())
    manifest = json.loads((good / MANIFEST).read_text()) | changes
    (to / MANIFEST).write_text(json.dumps({key: value for key, value in manifest.items() if value is not ...}))
    return to


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"schema": 2}, ["schema is 2", "reads 1"]),
        ({"kind": "weights"}, ["kind", "gradient or delta"]),
        ({"num_examples": 10**12}, ["num_examples", "65536"]),
        ({"num_examples": -1}, ["num_examples"]),
        ({"input_shape": [3, 10**9, 10**9]}, ["input_shape"]),
        ({"input_shape": "16"}, ["input_shape"]),
        ({"num_classes": True}, ["num_classes"]),
        ({"mean": [0.5, 0.5]}, ["mean", "1 channels"]),
        ({"mean": [10**400]}, ["mean", "1 channels"]),
        ({"std": [0]}, ["std must be positive"]),
        ({"recipe": None}, ["no recipe"]),
        ({"recipe": {"batch_size": 0}}, ["batch_size"]),
        ({"recipe": {"lr": -1}}, ["lr"]),
        ({"recipe": {"local_epochs": 9999, "batch_size": 1}}, ["10000 local steps"]),
        ({"recipe": {"optimizer": "lbfgs"}}, ["optimizer"]),
        ({"recipe": {"loss": "os:system"}}, ["loss", "os:system"]),
        ({"recipe": {"defense": "rm(-rf)"}}, ["defence"]),
        ({"recipe": {"__class__": 1}}, ["unknown field"]),
        ({"parameters": {}}, ["only in one of"]),
        ({"parameters": ...}, ["no parameters"]),
        ({"class_names": ["a"]}, ["class_names"]),
        ({"origin": {"path": "../../etc"}}, ["origin"]),
    ],
)
def test_a_manifest_with_impossible_values_is_refused(
    changes: dict[str, Any], words: list[str], good: Path, tmp_path: Path
) -> None:
    with refused(*words):
        load_capture(copied(good, tmp_path, **changes))


def test_a_file_that_does_not_fit_the_model_is_refused(good: Path, tmp_path: Path) -> None:
    with refused("does not fit the model", "body.1.weight"):
        read_update(load_capture(good), build("fc2", SHAPE, 3))
    folder = copied(good, tmp_path)
    tensors = load_file(folder / UPDATE)
    tensors["parameter:head.bias"][0] = torch.nan
    save_file(tensors, folder / UPDATE)
    with refused("head.bias", "not finite"):
        read_update(load_capture(folder), Net())
    tensors["parameter:head.bias"] = torch.zeros(3, dtype=torch.int64)
    save_file(tensors, folder / UPDATE)
    with refused("head.bias", "I64", "floating-point"):
        load_capture(folder)


def test_links_devices_and_missing_files_are_refused(good: Path, tmp_path: Path) -> None:
    with refused("No such file"):
        load_capture(tmp_path / "nowhere")
    folder = copied(good, tmp_path / "c")
    (folder / UPDATE).unlink()
    with refused("No such file"):
        load_capture(folder)
    (folder / UPDATE).symlink_to("/dev/zero")
    with refused("not a regular file"):
        load_capture(folder)
    (folder / UPDATE).unlink()
    os.mkfifo(folder / UPDATE)
    with refused("not a regular file"):
        load_capture(folder)


def header(content: Any, data: bytes = b"") -> bytes:
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    return len(text).to_bytes(8, "little") + text + data


ENTRY = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ["0 bytes"]),
        (b"\x80\x04cposix\nsystem\n", ["truncated"]),
        ((2**60).to_bytes(8, "little") + b"{}", ["truncated"]),
        (header(b"[" * 100_000), ["JSON"]),
        (header(b'{"a": NaN}'), ["NaN"]),
        (header(b"\xff\xfe"), ["JSON"]),
        (header([]), ["no JSON object"]),
        (header({"a": 3}), ["damaged"]),
        (header({"a": {**ENTRY, "shape": [2**39, 2**39]}}, b"0000"), ["contradicts its shape"]),
        (header({"a": {**ENTRY, "shape": [-1]}}, b"0000"), ["damaged"]),
        (header({"a": {**ENTRY, "dtype": "C64"}}, b"0000"), ["dtype C64"]),
        (header({"a": ENTRY, "b": ENTRY}, b"0000"), ["overlap"]),
        (header({"a": ENTRY}, b"00000000"), ["need 4 bytes"]),
        (header({"../../etc/passwd": ENTRY}, b"0000"), ["only in one of"]),
    ],
)
def test_hostile_headers_are_refused(content: bytes, words: list[str], good: Path, tmp_path: Path) -> None:
    folder = copied(good, tmp_path)
    (folder / UPDATE).write_bytes(content)
    with refused(*words):
        load_capture(folder)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), database=None)
@given(draw=st.data())
def test_fuzzed_files_cost_one_line_and_execute_nothing(good: Path, tmp_path: Path, draw: st.DataObject) -> None:
    """Truncated, flipped, spliced and rewritten files: a capture is read whole, or refused in one line."""
    folder = copied(good, tmp_path / "fuzzed")
    name = draw.draw(st.sampled_from([UPDATE, MANIFEST, MODEL]))
    content = bytearray((folder / name).read_bytes())
    how = draw.draw(st.sampled_from(["cut", "flip", "splice", "value"]))
    if how == "cut":
        content = content[: draw.draw(st.integers(0, len(content) - 1))]
    elif how == "flip":
        for _ in range(draw.draw(st.integers(1, 8))):
            # half of the flips hit the header
            place = draw.draw(st.integers(0, 400) | st.integers(0, len(content) - 1)) % len(content)
            content[place] ^= 1 << draw.draw(st.integers(0, 7))
    elif how == "splice":
        place = draw.draw(st.integers(0, len(content)))
        content[place:place] = draw.draw(st.binary(min_size=1, max_size=40))
    else:
        manifest = json.loads((folder / MANIFEST).read_text())
        key = draw.draw(st.sampled_from(sorted(manifest)))
        inner = (
            manifest[key] if isinstance(manifest[key], dict) and manifest[key] and draw.draw(st.booleans()) else None
        )
        if inner is None:
            manifest[key] = draw.draw(JSON)
        else:
            inner[draw.draw(st.sampled_from(sorted(inner)))] = draw.draw(JSON)
        name, content = MANIFEST, bytearray(json.dumps(manifest).encode())
    (folder / name).write_bytes(bytes(content))
    modules = set(sys.modules)
    refusal = ""
    try:
        read_update(load_capture(folder), Net())
    except UsageError as error:
        refusal = str(error)
    assert "\n" not in refusal
    assert len(refusal) < 2000
    assert set(sys.modules) == modules
