"""Whatever a kill, a full disk or a loss of power leaves of a results folder, the same command ends in equal rows."""

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from attacks import ATTACKS
from federated.server import pretrain
from runner import cli
from runner.checkpoint import TrialCheckpoint
from runner.experiment import Experiment
from runner.flags import Grad
from runner.sources import gradient_source
from runner.store import Store
from tests.commands import in_process, lines, only_run, rows
from tests.test_bad_input import folder_of_images

FLAGS = ["baseline", "--dataset", "folder", "--model", "cnn", "--trials", "3", "--jobs", "1"]
Damage = Callable[[Path], object]


def flags(root: Path, out: Path) -> list[str]:
    return [*FLAGS, "--base-datadir", str(root / "images"), "--out", str(out)]


def stopped_after(trials: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk fails after so many trials."""
    add = Store.add_trial

    def fail(store: Store, own: list, record: dict, *tensors: torch.Tensor) -> None:
        if record["trial"] >= trials:
            raise OSError(28, "No space left on device")
        add(store, own, record, *tensors)

    monkeypatch.setattr(Store, "add_trial", fail)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run twice: in finished/, and in half/ after two of its three trials."""
    root = tmp_path_factory.mktemp("prepared")
    folder_of_images(root / "images")
    with pytest.MonkeyPatch.context() as patch:
        assert in_process("main_grad.py", flags(root, root / "finished"), patch) == 0
        stopped_after(2, patch)
        assert in_process("main_grad.py", flags(root, root / "half"), patch) == 2
    return root


def write(name: str, content: bytes) -> Damage:
    return lambda run: (run / name).write_bytes(content)


def change(name: str, edit: Callable[[bytes], bytes]) -> Damage:
    return lambda run: (run / name).write_bytes(edit((run / name).read_bytes()))


def half(content: bytes) -> bytes:
    return content[: len(content) // 2]


def flip(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def other_score(content: bytes) -> bytes:
    """The rows with another score in the first: whole JSON with a wrong number."""
    first, *others = content.decode().splitlines()
    return "\n".join([json.dumps({**json.loads(first), "psnr": 99.0}), *others, ""]).encode()


def linked(run: Path) -> None:
    (run.parent / "elsewhere").write_text("not ours")
    (run / "rows.jsonl").unlink()
    (run / "rows.jsonl").symlink_to(run.parent / "elsewhere")


PART, GATHERED = "parts/00000.safetensors", "reconstructions.safetensors"
HALF: dict[str, Damage] = {
    "rows cut": change("rows.jsonl", half),
    "rows empty": write("rows.jsonl", b""),
    "rows doubled": change("rows.jsonl", lambda content: content * 2),
    "rows deleted": lambda run: (run / "rows.jsonl").unlink(),
    "rows elsewhere": linked,
    "rows of numbers": write("rows.jsonl", b'3\nnull\n{}\n[1]\n{"trial": "0", "image": 0}\n{"trial": [0]}\n'),
    "rows in another encoding": write("rows.jsonl", b'\xff\xfe{"trial": 0}\n'),
    "rows nested too deeply": write("rows.jsonl", b"[" * 200_000),
    "a wrong score": change("rows.jsonl", other_score),
    "records doubled": change("trials.jsonl", lambda content: content * 2),
    "an unknown trial": change("trials.jsonl", lambda content: content.replace(b'"trial": 1', b'"trial": 7')),
    "a negative trial": change("trials.jsonl", lambda content: content.replace(b'"trial": 1', b'"trial": -1')),
    "records nested too deeply": write("trials.jsonl", b'{"trial": 0, "checksum": ' + b"[" * 900 + b"]" * 900 + b"}\n"),
    "part cut": change(PART, half),
    "part empty": write(PART, b""),
    "a flipped pixel": change(PART, flip),
    "part of another trial": lambda run: shutil.copy(run / "parts" / "00001.safetensors", run / PART),
    "part deleted": lambda run: (run / PART).unlink(),
    "parts a file": lambda run: (shutil.rmtree(run / "parts"), (run / "parts").write_text("")),
    "a state of numbers": lambda run: torch.save({"a": 1}, run / "parts" / "00002.state"),
    "a state of nothing": write("parts/00002.state", b""),
    "strangers": lambda run: [(run / "parts" / name).mkdir() for name in ("00002.state", "x", "00009.safetensors")],
    "a config nobody can read": write("config.json", b"\xff"),
    "done too early": write("done", b""),
    "done for another folder": write("done", b'{"config.json": "0"}'),
}
FINISHED: dict[str, Damage] = {
    "summary cut": change("summary.json", half),
    "summary empty": write("summary.json", b"{}"),
    "summary deleted": lambda run: (run / "summary.json").unlink(),
    "rows doubled": change("rows.jsonl", lambda content: content * 2),
    "a wrong score": change("rows.jsonl", other_score),
    "records cut": change("trials.jsonl", half),
    "reconstructions cut": change(GATHERED, half),
    "a flipped pixel": change(GATHERED, flip),
    "reconstructions deleted": lambda run: (run / GATHERED).unlink(),
    "grid cut": change("grid.png", half),
    "done empty": write("done", b""),
    "done damaged": write("done", b"[" * 100_000),
    "done deleted": lambda run: (run / "done").unlink(),
}


@pytest.mark.parametrize(
    ("state", "damage"),
    [("half", name) for name in HALF] + [("finished", name) for name in FINISHED],
    ids=lambda value: value.replace(" ", "-"),
)
def test_a_damaged_folder_ends_in_equal_rows(
    state: str, damage: str, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(prepared / state, tmp_path / "out")
    run, whole = only_run(tmp_path / "out"), only_run(prepared / "finished")
    (HALF if state == "half" else FINISHED)[damage](run)
    assert in_process("main_grad.py", flags(prepared, tmp_path / "out"), monkeypatch) == 0
    assert rows(run) == rows(whole)
    assert (run / GATHERED).read_bytes() == (whole / GATHERED).read_bytes()
    assert Store(run).done
    assert {path.name for path in run.iterdir()} == {path.name for path in whole.iterdir()}
    assert [t["trial"] for t in lines(run / "trials.jsonl")] == [0, 1, 2]


def test_only_what_is_damaged_is_done_again(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(prepared / "finished", tmp_path / "out")
    run = only_run(tmp_path / "out")
    before = {trial["trial"]: trial["checksum"] for trial in lines(run / "trials.jsonl")}
    (run / "rows.jsonl").write_bytes(other_score((run / "rows.jsonl").read_bytes()))
    again: list[int] = []
    add = Store.add_trial

    def counted(store: Store, own: list, record: dict, *tensors: torch.Tensor) -> None:
        again.append(record["trial"])
        add(store, own, record, *tensors)

    monkeypatch.setattr(Store, "add_trial", counted)
    assert in_process("main_grad.py", flags(prepared, tmp_path / "out"), monkeypatch) == 0
    assert again == [0]
    after = {trial["trial"]: trial["checksum"] for trial in lines(run / "trials.jsonl")}
    assert {k: v for k, v in after.items() if k} == {k: v for k, v in before.items() if k}


def test_a_link_in_place_of_a_file_is_replaced_and_not_written_through(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(prepared / "half", tmp_path / "out")
    run = only_run(tmp_path / "out")
    linked(run)
    assert in_process("main_grad.py", flags(prepared, tmp_path / "out"), monkeypatch) == 0
    assert (run.parent / "elsewhere").read_text() == "not ours"


def test_a_state_belongs_to_one_trial_and_is_whole_or_nothing(tmp_path: Path) -> None:
    path, cpu = tmp_path / "0.state", torch.device("cpu")
    checkpoint = TrialCheckpoint(path, "a run/0", 0.0)
    checkpoint.save({"seconds": 1.5, "x": torch.arange(3)})
    state = checkpoint.load(cpu)
    assert state is not None and state["seconds"] == 1.5 and state["x"].tolist() == [0, 1, 2]
    assert TrialCheckpoint(path, "a run/1", 0.0).load(cpu) is None
    content = path.read_bytes()
    torch.save({"seconds": 1.5}, buffer := io.BytesIO())
    for damaged in (content[:-1], flip(content), b"", buffer.getvalue()):
        path.write_bytes(damaged)
        assert checkpoint.load(cpu) is None
    path.unlink()
    assert checkpoint.load(cpu) is None


def test_a_network_is_pretrained_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second run of the same settings loads it, a damaged file is not used, and other settings train their own."""
    monkeypatch.setenv("CHECKPOINTS", str(tmp_path))
    trained: list[int] = []

    def counted(*args: Any) -> None:
        trained.append(args[3])
        pretrain(*args)

    monkeypatch.setattr("runner.experiment.pretrain", counted)

    def weights(*words: str) -> torch.Tensor:
        line = ["baseline", "--image-size", "8", "--pretrain-epochs", "1", *words]
        (command,) = cli.parse(line, Grad, ATTACKS, "page")
        experiment = Experiment("grad", command, gradient_source)
        experiment.pretrain(lambda step, total, loss: None)
        return torch.cat([p.detach().flatten() for p in experiment.model.parameters()])

    first = weights()
    assert torch.equal(weights(), first)
    assert trained == [1]
    (file,) = tmp_path.glob("pretrained-*/network.safetensors")
    damaged = bytearray(file.read_bytes())
    damaged[-5] ^= 1
    file.write_bytes(damaged)
    assert torch.equal(weights(), first)
    assert trained == [1, 1]
    assert not torch.equal(weights("--seed", "1"), first)
    assert not torch.equal(weights("--pretrain-epochs", "2"), first)
    assert trained == [1, 1, 1, 2]
