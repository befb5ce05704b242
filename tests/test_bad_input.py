"""A mistake is answered with one line and exit code 2, and leaves nothing behind."""

import json
import os
from pathlib import Path

import pytest
import torch
from PIL import Image

from models import build
from tests.commands import in_process, only_run


def folder_of_images(root: Path, classes: int = 2, each: int = 8, size: int = 16) -> Path:
    for c in range(classes):
        (root / f"class{c}").mkdir(parents=True)
        for i in range(each):
            Image.new("RGB", (size, size), (40 * c, 20 * i, 90)).save(root / f"class{c}" / f"{i}.png")
    return root


def truncated(tmp: Path) -> list[str]:
    root = folder_of_images(tmp / "images")
    Image.effect_noise((64, 64), 50).save(root / "class0" / "7.png")
    whole = (root / "class0" / "7.png").read_bytes()
    (root / "class0" / "7.png").write_bytes(whole[: len(whole) // 2])
    return ["dlg", "--dataset", "folder", "--base-datadir", str(root)]


def empty_folder(tmp: Path) -> list[str]:
    (tmp / "nothing").mkdir()
    return ["dlg", "--dataset", "folder", "--base-datadir", str(tmp / "nothing")]


def folder_without_images(tmp: Path) -> list[str]:
    (tmp / "texts" / "a").mkdir(parents=True)
    (tmp / "texts" / "a" / "note.txt").write_text("no image")
    return ["dlg", "--dataset", "folder", "--base-datadir", str(tmp / "texts")]


def weights_of_another_model(tmp: Path) -> list[str]:
    torch.save(build("lenet5", (3, 32, 32), 8).state_dict(), tmp / "w.pt")
    return ["dlg", "--weights", str(tmp / "w.pt")]


def weights_that_are_none(tmp: Path) -> list[str]:
    (tmp / "w.safetensors").write_bytes(b"not weights at all")
    return ["dlg", "--weights", str(tmp / "w.safetensors")]


def weights_of_another_shape(tmp: Path) -> list[str]:
    torch.save(build("lenet", (1, 32, 32), 8).state_dict(), tmp / "w.pt")
    return ["dlg", "--weights", str(tmp / "w.pt")]


def weights_from_a_pipe(tmp: Path) -> list[str]:
    os.mkfifo(tmp / "w.pt")
    return ["dlg", "--weights", str(tmp / "w.pt")]


def image_from_a_pipe(tmp: Path) -> list[str]:
    root = folder_of_images(tmp / "images")
    (root / "class0" / "0.png").unlink()
    os.mkfifo(root / "class0" / "0.png")
    return ["dlg", "--dataset", "folder", "--base-datadir", str(root)]


def text_from_a_pipe(tmp: Path) -> list[str]:
    os.mkfifo(tmp / "a.txt")
    return ["baseline", "--model", "gpt", "--dataset", "textfile", "--base-datadir", str(tmp / "a.txt")]


def table(tmp: Path, largest: str, schema: object) -> list[str]:
    rows = [f"{i},{largest},{'yn'[i % 2]}" for i in range(40)]
    (tmp / "t.csv").write_text("\n".join(["age,size,label", *rows]))
    (tmp / "schema.json").write_text(json.dumps(schema))
    flags = ["baseline", "--model", "mlp", "--dataset", "csv", "--base-datadir", str(tmp / "t.csv")]
    return [*flags, "--schema", str(tmp / "schema.json")]


def a_number_without_variance(tmp: Path) -> list[str]:
    return table(tmp, "1e308", {"label": "label", "numbers": ["size"]})


def a_schema_without_lists(tmp: Path) -> list[str]:
    return table(tmp, "1", {"label": "label", "numbers": None})


def unwritable(tmp: Path) -> list[str]:
    (tmp / "file").write_text("in the way")
    return ["baseline", "--out", str(tmp / "file" / "results")]


GRAD = {
    "unknown attack": (["dgl"], "dlg"),
    "no attack": ([], ""),
    "public images that an attack needs": (["ggl", "--public", "none"], "--public none"),
    "a renamed flag": (["dlg", "--reading", "average"], "--update-model"),
    "a sweep over an attack that does not exist": (["dlg", "--sweep", "attack=dlg,dgl"], "dlg"),
    "a hyperparameter that one attack of a sweep does not have": (
        ["dlg", "--tv", "1", "--sweep", "attack=dlg,baseline"],
        "--tv",
    ),
    "channels of another model's weights": (weights_of_another_shape, "w.pt"),
    "a share over one": (["sme", "--alpha", "1.5"], "at most 1"),
    "unknown model": (["dlg", "--model", "lennet"], "lenet"),
    "unknown dataset": (["dlg", "--dataset", "photoz"], "photos"),
    "unknown flag": (["dlg", "--iteration", "3"], "--iteration"),
    "unknown activation": (["dlg", "--activation", "relo"], "relu"),
    "option of another model": (["dlg", "--model", "resnet18", "--dropout", "0.5"], "dropout"),
    "flag of the other mode": (["dlg", "--local-lr", "0.1"], "--local-lr"),
    "unknown choice": (["dlg", "--model-mode", "test"], "model-mode"),
    "not a number": (["dlg", "--trials", "many"], "--trials"),
    "missing datadir": (["dlg", "--dataset", "folder", "--base-datadir", "/no/such/folder"], "/no/such/folder"),
    "missing cifar": (["dlg", "--dataset", "cifar10", "--base-datadir", "/no/such/folder"], "/no/such/folder"),
    "empty folder": (empty_folder, "nothing"),
    "no images": (folder_without_images, "texts"),
    "truncated image": (truncated, "7.png"),
    "batch size 0": (["dlg", "--batch-size", "0"], "--batch-size"),
    "batch larger than the data": (["dlg", "--batch-size", "100000"], "--batch-size"),
    "negative step": (["dlg", "--lr", "-1"], "--lr"),
    "not finite": (["dlg", "--tv", "nan"], "--tv"),
    "no cuda": (["dlg", "--device", "cuda:7"], "cuda"),
    "unknown device": (["dlg", "--device", "gpu"], "--device"),
    "another model's weights": (weights_of_another_model, "w.pt"),
    "no weights": (weights_that_are_none, "w.safetensors"),
    "missing weights": (["dlg", "--weights", "/no/such/file"], "/no/such/file"),
    "unrolled gradient": (["dlg", "--update-model", "unrolled"], "gradient"),
    "bad sweep": (["dlg", "--sweep", "iterations"], "--sweep"),
    "sweep with a bad point": (["dlg", "--sweep", "trials=1,0"], "--trials"),
    "sweep twice": (["dlg", "--sweep", "seed=0,1", "seed=2,3"], "twice"),
    "two sweeps": (["dlg", "--sweep", "seed=0,1", "--sweep", "trials=1,2"], "once"),
    "sweep of nothing": (["dlg", "--sweep"], "--sweep"),
    "sweep of jobs": (["dlg", "--sweep", "jobs=1,2"], "jobs"),
    "infinite": (["dlg", "--lr", "inf"], "--lr"),
    "an update model of a gradient": (["dlg", "--update-model", "single_step"], "gradient"),
    "a rule for one image": (["idlg", "--label-rule", "row_sum", "--batch-size", "2"], "row_sum"),
    "a network no memory holds": (["baseline", "--model", "mlp", "--width", "1000000000000"], "--width"),
    "an integer of more than 64 bits": (["dlg", "--history", "99999999999999999999"], "--history"),
    "a pipe for weights": (weights_from_a_pipe, "w.pt"),
    "a pipe for a text": (text_from_a_pipe, "a.txt"),
    "a number too large for a variance": (a_number_without_variance, "1e308"),
    "a schema without lists": (a_schema_without_lists, "--schema"),
    "a pipe for an image": (image_from_a_pipe, "0.png"),
    "colours in a name": (["dlg", "--model", "\x1b[31mred"], "\\x1b"),
    "image too small": (["dlg", "--image-size", "2"], "image-size"),
}


def public_images_of_one_brightness(tmp: Path) -> list[str]:
    """Files that differ, and pixels that do not."""
    root = folder_of_images(tmp / "images")
    for number, path in enumerate(sorted(root.rglob("*.png"))):
        Image.new("RGB", (16, 16)).save(path, dpi=(number + 1, 1))
    return [
        "rtf",
        "--model",
        "cnn",
        "--dataset",
        "folder",
        "--base-datadir",
        str(root),
        "--clients",
        "2",
        "--trials",
        "2",
    ]


def nothing_held_out(tmp: Path) -> list[str]:
    return ["dlg", "--dataset", "folder", "--base-datadir", str(folder_of_images(tmp / "few", classes=4, each=2))]


FED = {
    "nothing held out": (nothing_held_out, "three"),
    "negative learning rate": (["dlg", "--local-lr", "-0.1"], "--local-lr"),
    "batch larger than a client": (["dlg", "--batch-size", "3", "--client-images", "2"], "--batch-size"),
    "more trials than updates": (["dlg", "--rounds", "1", "--clients", "2"], "--rounds"),
    "more clients a round than there are": (["dlg", "--clients", "2", "--clients-per-round", "3"], "--clients"),
    "idle beta": (["dlg", "--beta", "0.1"], "--partition dirichlet"),
    "idle classes": (["dlg", "--classes-per-client", "1"], "--partition classes"),
    "too many images": (["baseline", "--client-images", "10000"], "image"),
    "momentum of Adam": (["dlg", "--client-optimizer", "adam", "--momentum", "0.9"], "--client-optimizer sgd"),
    "a schedule of one step": (["dlg", "--lr-schedule", "cosine"], "raise --local-epochs"),
    "quotients of Adam's steps": (["rtf", "--client-optimizer", "adam"], "--client-optimizer sgd"),
    "a rate beyond float32": (["baseline", "--local-lr", "1e300"], "--local-lr"),
    "a rate no float32 divides by": (["baseline", "--local-lr", "1e-300"], "--local-lr"),
    "a decay beyond float32": (["baseline", "--lr-decay", "1e20", "--rounds", "4", "--trials", "2"], "--lr-decay"),
    "epochs without end": (["baseline", "--local-epochs", "1000000000000000000"], "--local-epochs"),
    "public images of one brightness": (public_images_of_one_brightness, "--quantiles official"),
    "zero epochs": (["dlg", "--local-epochs", "0"], "--local-epochs"),
}


@pytest.mark.parametrize(
    ("page", "case"),
    [("main_grad.py", case) for case in GRAD] + [("main_fed.py", case) for case in FED],
    ids=lambda value: value.replace(" ", "-"),
)
def test_one_line_and_nothing_left(
    page: str, case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags, word = (GRAD if page == "main_grad.py" else FED)[case]
    words = flags(tmp_path) if callable(flags) else flags
    out = tmp_path / "results"
    if words and "--out" not in words:
        words = [*words, "--out", str(out)]
    assert in_process(page, words, monkeypatch) == 2
    captured = capsys.readouterr()
    if words:
        assert len(captured.err.strip().splitlines()) == 1, captured.err
        assert captured.err.startswith("error: ")
        assert word in captured.err
        assert "Traceback" not in captured.err
    assert not out.exists()


def test_an_unwritable_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert in_process("main_grad.py", unwritable(tmp_path), monkeypatch) == 2
    error = capsys.readouterr().err
    assert len(error.strip().splitlines()) == 1, error
    assert "--out" in error
    assert (tmp_path / "file").read_text() == "in the way"


def test_what_blows_up_is_counted_not_raised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A learning rate that moves nothing, and one that ends in NaN: both are results. The first tells nothing."""
    for rate, status in (("1e-30", "ambiguous"), ("1e30", "diverged")):
        out = tmp_path / rate
        flags = ["idlg", "--local-lr", rate, "--trials", "2", "--clients", "2", "--client-images", "2", "--jobs", "1"]
        tiny = ["--local-epochs", "2", "--image-size", "16", "--iterations", "20", "--restarts", "1"]
        assert in_process("main_fed.py", [*flags, *tiny, "--out", str(out)], monkeypatch) == 0
        summary = json.loads((only_run(out) / "summary.json").read_text())
        assert summary["status"].get(status, 0) >= 1
        assert summary["images"] == 4
