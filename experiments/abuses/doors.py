"""Groups i and j: audits, captures and pages; texts, tables, sums of clients, and networks of the user's own."""

import dataclasses
import functools
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import models
from core.paths import ROOT
from core.protocol import Recipe, image_task
from experiments.abuses import damage, inputs
from experiments.abuses.harness import Case
from experiments.abuses.runs import Prepared, limited
from federated.capture import MANIFEST, MODEL, UPDATE, export
from federated.client import train

SIDE = 16
AUDITED = (0, 1, 2)  # exit codes of an audit: no leak, a leak, a mistake of the user
OUT = ("--device", "cpu", "--out", "@/out")
SIMULATED = ("--model", "fc2", "--image-size", "16", "--trials", "1", "--clients", "2", "--client-images", "2", *OUT)
CAPTURED = ("--update", "@/capture", "--model", "cnn", "--dataset", "photos", "--image-size", str(SIDE), *OUT)
FAST = ("--attacks", "analytic", "--verdict-only")
SMALL = ("--trials", "2", "--jobs", "1", "--out", "@/out")
ENORMOUS = 10**400
WORDS = ("the", "a", "of", "and", "or", "wire", "tensor", "leaks", "private", ".", ",", "sum", "mean", "row")

Edit = Callable[[Path], object]


# --- audits, captures, inspection, pages ----------------------------------------------------------------------------


def audits() -> Iterator[Case]:
    """Group i."""
    for line in AUDIT_LINES:
        yield _audit(" ".join(line)[:60] or "no flags", (*SIMULATED, *FAST, *line))
    for line in BARE_LINES:
        yield _audit(f"alone: {' '.join(line)[:50]!r}", line)
    for file in (MANIFEST, UPDATE, MODEL):
        for name, how in damage.FILES.items():
            yield _captured(f"{file} {name}", functools.partial(_in, file=file, how=how))
    for key, values in MANIFESTS.items():
        for value in values:
            yield _captured(f"{key} {str(value)[:20]}", functools.partial(_manifest, changes={key: value}))
    for key, values in RECIPES.items():
        for value in values:
            yield _captured(f"recipe {key} {str(value)[:20]}", functools.partial(_recipe, changes={key: value}))
    for file in (UPDATE, MODEL):
        for name, change in TENSORS.items():
            yield _captured(f"{file}: {name}", functools.partial(_tensors, file=file, change=change))
    for name, edit in CAPTURES.items():
        yield _captured(name, edit)
    for size in (1000, 2000, 3000, 5000, 20_000):
        words = (*SIMULATED, *FAST, "--show-victims")
        yield Case(
            "i", f"no file beyond {size} bytes", words, "audit", codes=AUDITED, resumes=True, inside=limited(size)
        )
    yield Case("i", "nothing may be written", (*SIMULATED, *FAST), "audit", codes=AUDITED, inside=as_another_user)
    for name, edit in TRUTHS.items():
        words = (*CAPTURED, *FAST, "--truth", "@/truth")
        yield Case("i", f"truth: {name}", words, "audit", _truth(edit), AUDITED)
    for line in INSPECTIONS:
        yield Case("i", f"inspect {' '.join(line)[:50]!r}", line, "inspect")
    for line in DETECTIONS:
        yield Case("i", f"detect {' '.join(line)[:50]!r}", line, "detect", codes=AUDITED)


def pages(prepared: Prepared) -> Iterator[Case]:
    """More of group g: the HTML page."""
    whole = prepared.damaged("grad", "finished", lambda run: None)
    lines: dict[str, tuple[str, ...]] = {
        "whole": ("-o", "@/page.html", "@/out"),
        "twice": ("-o", "@/page.html", "@/out", "@/out"),
        "into a folder": ("-o", "@/tmp", "@/out"),
        "into a device": ("-o", "/dev/full", "@/out"),
        "into a pipe": ("-o", "@/pipe", "@/out"),
        "below a file": ("-o", "/etc/hosts/page.html", "@/out"),
        "nowhere": ("-o", "@/nowhere/page.html", "@/out"),
        "no name": ("-o", "", "@/out"),
        "a long name": ("-o", "x" * 5000, "@/out"),
        "over the run": ("-o", "@/out", "@/out"),
        "without a name": ("@/out", "-o"),
        "of nothing": ("-o", "@/page.html", "@/tmp"),
        "of a file": ("-o", "@/page.html", "@/pipe"),
        "page and table": ("-o", "@/page.html", "--to", "@/table", "@/out"),
        "victims": ("--show-victims", "-o", "@/page.html", "@/out"),
        "victims without a page": ("--show-victims", "@/out"),
    }
    for name, words in lines.items():

        def prepare(folder: Path) -> None:
            whole(folder)
            damage.pipe(folder / "pipe")

        codes = (2,) if name in ("into a device", "into a pipe") else (0, 2)
        yield Case("g", f"page {name}", words, "report", prepare=prepare, codes=codes)
    for file in (
        "config.json",
        "rows.jsonl",
        "trials.jsonl",
        "summary.json",
        "reconstructions.safetensors",
        "grid.png",
    ):
        for name, change in PAGE_EDITS.items():
            edit = functools.partial(_sealed_anew, file=file, change=change)
            prepare = prepared.damaged("grad", "finished", edit)
            yield Case("g", f"page of {file} {name}", ("-o", "@/page.html", "@/out"), "report", prepare=prepare)


def _audit(name: str, words: tuple[str, ...]) -> Case:
    return Case("i", f"audit {name}", words, "audit", codes=AUDITED)


def _captured(name: str, edit: Edit) -> Case:
    def prepare(folder: Path) -> None:
        shutil.copytree(_capture(str(folder.parent / "capture")), folder / "capture")
        edit(folder / "capture")

    return Case("i", f"capture {name}", (*CAPTURED, *FAST), "audit", prepare, AUDITED)


@functools.cache
def _capture(folder: str) -> Path:
    """One client's update of the network `cnn`."""
    task = image_task((3, SIDE, SIDE), 8)
    model = models.build("cnn", task.domain.shape, 8, rng=torch.Generator().manual_seed(0))
    rng = torch.Generator().manual_seed(1)
    batch = inputs.Batch(torch.rand(2, 3, SIDE, SIDE, generator=rng), torch.tensor([1, 5]))
    recipe = Recipe(2, 1, 0.1)
    return export(folder, model, train(model, batch, task, recipe, rng)[0], task, recipe, {"round": 0, "client": 1})


def _in(folder: Path, file: str, how: damage.Damage) -> None:
    how(folder / file)


def _manifest(folder: Path, changes: dict[str, object]) -> None:
    path = folder / MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _recipe(folder: Path, changes: dict[str, object]) -> None:
    recipe = json.loads((folder / MANIFEST).read_text())["recipe"]
    _manifest(folder, {"recipe": recipe | changes})


def _tensors(folder: Path, file: str, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    save_file(change(load_file(folder / file)), folder / file)


def _first(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict], dict]:
    def edit(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        name = min(tensors)
        return tensors | {name: change(tensors[name]).contiguous()}

    return edit


def _truth(edit: Edit) -> Edit:
    def prepare(folder: Path) -> None:
        shutil.copytree(_capture(str(folder.parent / "capture")), folder / "capture")
        inputs.tree(folder, 2, 1)
        (folder / "images").rename(folder / "truth")
        edit(folder / "truth")

    return prepare


def _sealed_anew(run: Path, file: str, change: Edit) -> None:
    """Change a file of a finished run, and its seal with it, as a stranger can."""
    from runner.store import SEAL, SEALED
    from utils.files import seal

    change(run / file)
    seal(run, SEALED, SEAL)


AUDIT_LINES: tuple[tuple[str, ...], ...] = (
    ("--minutes", "0"),
    ("--minutes", "nan"),
    ("--minutes", "inf"),
    ("--minutes", "-1"),
    ("--minutes", "1e-9"),
    ("--minutes", "1e300"),
    ("--threshold", "nan"),
    ("--threshold", "1.1"),
    ("--threshold", "-0.1"),
    ("--threshold", "x"),
    ("--kind", "x"),
    ("--kind", "gradient"),
    ("--kind", "gradient", "--batch-size", "100000"),
    ("--threat", "x"),
    ("--threat", "malicious-architecture"),
    ("--attacks", "nope"),
    ("--attacks", ""),
    ("--attacks", "\x1b[31mred"),
    ("--attacks", "baseline"),
    ("--attacks", "analytic", "analytic"),
    ("--attacks",),
    ("--truth", "@/nowhere"),
    ("--update", "@/nowhere"),
    ("--update", ""),
    ("--update", "/dev/zero"),
    ("--update", "x" * 5000),
    ("--sweep", "lr=1,2"),
    ("--paper",),
    ("--force",),
    ("--jobs", "2"),
    ("--backend", "ray"),
    ("--trials", "0"),
    ("--trials", "99999999"),
    ("--trials", "1e3"),
    ("--client-images", "100000"),
    ("--believe", "local-lr=nan"),
    ("--believe", "x"),
    ("--defense", "gauss(sigma=1e30)"),
    ("--defense", "x"),
    ("--local-lr", "1e30"),
    ("--local-lr", "1e-30"),
    ("--weights", "@/nowhere"),
    ("--weights", "/dev/zero"),
    ("--dataset", "x"),
    ("--dataset", "text"),
    ("--dataset", "text", "--model", "gpt"),
    ("--out", "/dev/null"),
    ("--out", "/proc/out"),
    ("--out", ""),
    ("--aggregate", "3"),
    ("--public", "none"),
    ("--thresholds", "nan"),
    ("--show-victims",),
    ("--grant", "labels"),
    ("--rounds", "0"),
    ("--rounds", "1", "--trials", "5"),
)
BARE_LINES: tuple[tuple[str, ...], ...] = (
    ("--help",),
    ("-h",),
    ("dlg",),
    ("--no-such",),
    ("--verdict-only=true",),
    ("--model", "nope.py:Net", "--out", "@/out"),
    ("--model", "fc2", "--model-mode", "x", "--out", "@/out"),
)
NUMBERS: tuple[object, ...] = (0, -1, 1.5, 10**12, ENORMOUS, None, "x", [], {}, True)
MANIFESTS: dict[str, tuple[object, ...]] = {
    "schema": (0, 2, "1", None, [1], True),
    "kind": ("", "Delta", None, ["delta"], 1, {}),
    "num_examples": NUMBERS,
    "num_classes": NUMBERS,
    "input_shape": ([], [3, 16], [0, 16, 16], [3, -1, 16], [3, 16, 16.0], [3, 10**6, 10**6], "3", None, [3, 8, 8]),
    "mean": ([], [0.5], [0.5] * 4, ["x"] * 3, [1e300] * 3, [ENORMOUS] * 3, 0.5, [True] * 3, [None] * 3),
    "std": ([0] * 3, [-1] * 3, [1e-300] * 3, [1e-30] * 3, [ENORMOUS] * 3, "x", [float("inf")] * 3),
    "class_names": ([], ["x"], "x", [3] * 8, ["\x1b[31m"] * 8, ["x"] * 8),
    "recipe": (None, [], "x", {}, {"unknown": 1}, {"\x1b[31m": 1}),
    "parameters": (None, [], {}, {"x": [1]}, {"first.weight": None}),
    "buffers": (None, [], {"x": [1]}),
    "origin": ([], "x", {"round": -1}, {"round": 2**64}, {"round": True}, {"place": 1}, {"round": "\x1b"}),
    "model": (None, 5, [], "\x1b[31m" * 100, "x" * 10**6),
}
RECIPES: dict[str, tuple[object, ...]] = {
    "batch_size": NUMBERS,
    "local_epochs": NUMBERS,
    "lr": (*NUMBERS, 1e-300, float("nan")),
    "momentum": (1, 2, -1, "x", 0.999),
    "weight_decay": (-1, 1e300, ENORMOUS, "x"),
    "optimizer": ("rmsprop", None, ["sgd"], 3),
    "lr_schedule": ("x", None, {}),
    "model_mode": ("x", "train", 1),
    "loss": ("x", "net.py:loss", "os:system", 5, None, "mse"),
    "defense": ("x", "gauss(sigma=1e300)", "clip(" * 100, 5, "gauss(sigma=0.1)"),
}
TENSORS: dict[str, Callable[[dict], dict]] = {
    "NaN": _first(lambda t: t * torch.nan),
    "infinite": _first(lambda t: t + torch.inf),
    "beyond float32": _first(lambda t: t.double() + 1e299),
    "near float32's end": _first(lambda t: t + 3e38),
    "double": _first(lambda t: t.double()),
    "half": _first(lambda t: t.half()),
    "integers": _first(lambda t: t.int()),
    "bool": _first(lambda t: t > 0),
    "flat": _first(lambda t: t.flatten()),
    "empty": _first(lambda t: t[:0]),
    "zero": lambda tensors: {name: t * 0 for name, t in tensors.items()},
    "one less": lambda tensors: dict(list(tensors.items())[1:]),
    "one more": lambda tensors: tensors | {"parameter:more": torch.ones(1)},
    "none": lambda tensors: {},
    "other names": lambda tensors: {f"\x1b[31m{name}": t for name, t in tensors.items()},
}
CAPTURES: dict[str, Edit] = {
    "whole": lambda folder: None,
    "a folder that is a file": lambda folder: (shutil.rmtree(folder), folder.touch()),
    "a folder that is a pipe": lambda folder: (shutil.rmtree(folder), damage.pipe(folder)),
    "empty": lambda folder: [path.unlink() for path in folder.iterdir()],
    "tensors swapped": lambda folder: [
        (folder / UPDATE).rename(folder / "x"),
        (folder / MODEL).rename(folder / UPDATE),
        (folder / "x").rename(folder / MODEL),
    ],
    "a manifest with a key twice": lambda folder: (folder / MANIFEST).write_text(
        '{"kind": "gradient", ' + (folder / MANIFEST).read_text().lstrip()[1:]
    ),
}
TRUTHS: dict[str, Edit] = {
    "whole": lambda folder: None,
    "nothing": shutil.rmtree,
    "a file": lambda folder: (shutil.rmtree(folder), folder.touch()),
    "no classes": lambda folder: [shutil.rmtree(path) for path in folder.iterdir()],
    "too few": lambda folder: shutil.rmtree(folder / "c0"),
    "too many": lambda folder: shutil.copy(folder / "c0" / "0.png", folder / "c0" / "1.png"),
    "a class beyond all": lambda folder: (folder / "c0").rename(folder / "9999999999999999999999"),
    "a class of other digits": lambda folder: (folder / "c0").rename(folder / "\u0663"),
    "a class of superscripts": lambda folder: (folder / "c0").rename(folder / "\u00b2"),
    "a damaged image": lambda folder: damage.cut(0.5)(folder / "c0" / "0.png"),
    "a pipe": lambda folder: damage.pipe(folder / "c0" / "0.png"),
    "endless": lambda folder: damage.endless(folder / "c0" / "0.png"),
}
INSPECTIONS: tuple[tuple[str, ...], ...] = (
    ("--model", "cnn", "--image-size", "16"),
    ("--model", "nope"),
    ("--model", "nope.py:Net"),
    ("--model", str(ROOT / "examples" / "net.py:nope")),
    ("--model", "cnn", "--image-size", "0"),
    ("--model", "cnn", "--batch-size", "0"),
    ("--model", "cnn", "--batch-size", "99999999999999999999"),
    ("--model", "cnn", "--weights", "/dev/zero"),
    ("--model", "cnn", "--weights", "@/nowhere"),
    ("--model", "cnn", "--dataset", "folder", "--base-datadir", "@/nowhere"),
    ("--model", "cnn", "--dataset", "x"),
    ("--model", "cnn", "--local-epochs", "-1"),
    ("--model", "cnn", "--image-size", "16", "--local-epochs", "1000000000000"),
    ("--model", "cnn", "--loss", "x"),
    ("--dataset", "text", "--model", "gpt"),
    ("--help",),
    ("x",),
    ("--model",),
    ("--model", "\x1b[31mred"),
)
DETECTIONS: tuple[tuple[str, ...], ...] = (
    ("cnn",),
    ("nope",),
    ("nope.py:Net",),
    ("--help",),
    ("cnn", "--classes", "1"),
    ("cnn", "--classes", "10000000000000"),
    ("cnn", "--image-shape", "3"),
    ("cnn", "--image-shape", "3", "0", "0"),
    ("cnn", "--image-shape", "3", "1000000", "1000000"),
    ("cnn", "--weights", "/dev/zero"),
    ("cnn", "--weights", "@"),
    ("cnn", "\x1b[31mred"),
    ("gpt",),
)
PAGE_EDITS: dict[str, Edit] = {
    **{
        name: damage.FILES[name]
        for name in ("cut at 0.5", "an object", "null", "deep", "infinite", "no text", "deleted")
    },
    "numbers for words": lambda path: path.write_bytes(path.read_bytes().replace(b'"', b"").replace(b":", b"")),
    "words for numbers": lambda path: path.write_text(
        "".join("x" if c.isdigit() else c for c in path.read_bytes().decode("latin1"))
    ),
    "a script": lambda path: path.write_bytes(path.read_bytes().replace(b"idlg", b"<script>alert(1)</script>")),
}


# --- texts, tables, sums, own networks ------------------------------------------------------------------------------


def others() -> Iterator[Case]:
    """Group j."""
    yield from _texts()
    yield from _tables()
    for mode, name in (("grad", "analytic"), ("fed", "baseline"), ("grad", "suppress"), ("fed", "suppress")):
        own = ("--image-size", "16", "--model", "fc2", *SMALL)
        own += ("--clients", "4") if mode == "fed" else ()
        own += ("--inner", "analytic", "--inner-iterations", "3") if name == "suppress" else ()
        for count in ("0", "-1", "1e3", "1", "2", "3", "4", "5", "100000", "99999999999999999999"):
            yield Case("j", f"{mode} {name} of sums of {count}", (name, *own, "--aggregate", count), mode)
        for extra in (("--defense", "gauss=1e30"), ("--believe", "batch-size=0"), ("--grant", "labels")):
            yield Case("j", f"{mode} {name} of sums {extra}", (name, *own, "--aggregate", "2", *extra), mode)
    for inner in ("", "nope", "suppress", "rtf", "\x1b[31mred"):
        words = ("suppress", "--image-size", "16", "--model", "fc2", "--aggregate", "2", "--inner", inner, *SMALL)
        yield Case("j", f"suppress with {inner!r}", words)
    for name, source in SOURCES.items():
        for flag in ("--model", "--loss"):
            words = ("baseline", "--image-size", "16", *SMALL, flag, "@/own.py:make")
            yield Case("j", f"{flag} {name}", words, prepare=functools.partial(_written, name="own.py", text=source))
    for reference in REFERENCES:
        words = ("baseline", "--image-size", "16", *SMALL, "--model", reference)
        yield Case("j", f"model {reference[:30]!r}", words)
    net = str(ROOT / "examples" / "net.py")
    for size in ("1", "2", "3", "16"):
        words = ("baseline", *SMALL, "--image-size", size, "--model", f"{net}:Net", "--loss", f"{net}:loss")
        yield Case("j", f"the example at {size} pixels", words)


def _texts() -> Iterator[Case]:
    words = ("baseline", "--model", "gpt", "--dataset", "textfile", *SMALL)
    for name, how in damage.FILES.items():
        prepare = functools.partial(_text, how=how)
        yield Case("j", f"text {name}", (*words, "--base-datadir", "@/text/a.txt"), prepare=prepare)
        if name in ("a pipe", "endless", "a socket", "a folder", "a link to itself", "no text", "deleted"):
            prepare = functools.partial(_text, how=how, more=True)
            yield Case("j", f"folder of texts {name}", (*words, "--base-datadir", "@/text"), prepare=prepare)
    for name, content in TEXTS.items():
        prepare = functools.partial(_written, name="text/a.txt", text=content)
        yield Case("j", f"text of {name}", (*words, "--base-datadir", "@/text/a.txt"), prepare=prepare)
    own = ("baseline", "--model", "gpt", "--dataset", "text", *SMALL)
    for tokens in ("0", "1", "2", "100000", "99999999999999999999", "x", "-5"):
        yield Case("j", f"tokens {tokens}", (*own, "--tokens", tokens))
    for extra in (
        ("--image-size", "16"),
        ("--model", "lenet"),
        ("--model", "fc2"),
        ("--normalize", "half"),
        ("--schema", "auto"),
        ("--public", "other"),
        ("--public", "noise"),
        ("--loss", "mse"),
        ("--thresholds", "20"),
        ("--batch-size", "100000"),
        ("--weights", "/dev/null"),
    ):
        yield Case("j", f"text with {' '.join(extra)}", (*own, *extra))
    for attack in ("dlg", "rtf", "analytic", "dager"):
        yield Case("j", f"{attack} on text", (attack, *own[1:]))
        yield Case("j", f"{attack} on text after training", (attack, *own[1:], "--clients", "2"), "fed")


def _tables() -> Iterator[Case]:
    words = ("baseline", "--model", "mlp", "--dataset", "csv", "--base-datadir", "@/table.csv", *SMALL)
    for name, how in damage.FILES.items():
        yield Case("j", f"table {name}", words, prepare=functools.partial(_table, how=how))
        prepare = functools.partial(_table, schema=SCHEMA, how=how, damaged="schema.json")
        yield Case("j", f"schema {name}", (*words, "--schema", "@/schema.json"), prepare=prepare)
    for name, content in TABLES.items():
        yield Case("j", f"table with {name}", words, prepare=functools.partial(_table, text=content))
    for name, schema in SCHEMAS.items():
        prepare = functools.partial(_table, schema=json.dumps(schema))
        yield Case("j", f"schema with {name}", (*words, "--schema", "@/schema.json"), prepare=prepare)
    for extra in (
        ("--schema", ""),
        ("--schema", "auto"),
        ("--schema", "nowhere"),
        ("--schema", "/dev/zero"),
        ("--schema", "x" * 5000),
        ("--image-size", "16"),
        ("--tokens", "5"),
        ("--model", "cnn"),
        ("--model", "gpt"),
        ("--normalize", "half"),
        ("--public", "other"),
        ("--public", "noise"),
        ("--batch-size", "1000"),
        ("--base-datadir", "@/nowhere"),
        ("--base-datadir", "/dev/zero"),
        ("--base-datadir", "@"),
    ):
        yield Case("j", f"table and {' '.join(extra)[:40]}", (*words, *extra), prepare=_table)
    for attack in ("dlg", "analytic", "ggl", "dager"):
        yield Case("j", f"{attack} on a table", (attack, *words[1:]), prepare=_table, codes=(0, 2))


def _written(folder: Path, name: str, text: str | bytes) -> None:
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(text.encode("utf-8", "surrogateescape") if isinstance(text, str) else text)


def _text(folder: Path, how: damage.Damage = lambda path: None, more: bool = False) -> None:
    _written(folder, "text/a.txt", _sentences(2000))
    if more:
        _written(folder, "text/b.txt", _sentences(2000, 1))
    how(folder / "text" / "a.txt")


def _sentences(count: int, seed: int = 0) -> str:
    rng = random.Random(seed)
    return " ".join(rng.choice(WORDS) for _ in range(count))


def _rows(header: str, row: Callable[[int], str], count: int = 200) -> str:
    return "\n".join([header, *(row(i) for i in range(count))]) + "\n"


def _table(
    folder: Path,
    text: str | bytes | None = None,
    schema: str | None = None,
    how: damage.Damage = lambda path: None,
    damaged: str = "table.csv",
) -> None:
    _written(folder, "table.csv", WHOLE if text is None else text)
    if schema is not None:
        _written(folder, "schema.json", schema)
    how(folder / damaged)


WHOLE = _rows("age,work,income", lambda i: f"{i / 3:.3f},{'abc'[i % 3]},{'yn'[i % 2]}")
SCHEMA = '{"label": "income", "numbers": ["age"], "categories": ["work"]}'
TEXTS: dict[str, str | bytes] = {
    "no letters": "1 2 3 4 5 " * 500,
    "one word": "word " * 5000,
    "few words": "a few words only",
    "a long word": "a" * 10**6,
    "other alphabets": "\u00fc\u4e2d\u0444 " * 3000,
    "two megabytes of words": " ".join(
        map("".join, zip(*[iter("abcdefghijklmnopqrstuvwx" * 30_000)] * 6, strict=True))
    ),
    "zero bytes": b"\0" * 10_000,
    "utf-16": _sentences(500).encode("utf-16"),
    "escape sequences": "\x1b[31mred \x07 " * 2000,
}
TABLES: dict[str, str | bytes] = {
    "no rows": "a,b,c\n",
    "one row": "a,b,c\n1,2,3\n",
    "three rows": "a,b,c\n1,2,x\n2,3,y\n3,4,x\n",
    "one column": _rows("a", lambda i: str(i % 2)),
    "one label": _rows("a,b", lambda i: f"{i},x"),
    "a label for each row": _rows("a,b", lambda i: f"{i},{i}"),
    "equal rows": _rows("a,b", lambda i: "1,x"),
    "a constant column": _rows("a,b,c", lambda i: f"1,{i},{'xy'[i % 2]}"),
    "empty cells": _rows("a,b", lambda i: f",{'xy'[i % 2]}"),
    "one empty cell in each row": _rows("a,b,c", lambda i: f"{i},,{'xy'[i % 2]}"),
    "names twice": _rows("a,a,b", lambda i: f"{i},{i},{'xy'[i % 2]}"),
    "no names": _rows(",,", lambda i: f"{i},{i},{'xy'[i % 2]}"),
    "a name that colours": _rows("\x1b[31ma,b", lambda i: f"{i},{'xy'[i % 2]}"),
    "a long name": _rows("a" * 200_000 + ",b", lambda i: f"{i},{'xy'[i % 2]}"),
    "a long cell": "a,b\n" + "x" * 200_000 + ",y\n",
    "ragged rows": _rows("a,b", lambda i: "1,2,3" if i == 100 else f"{i},{'xy'[i % 2]}"),
    "numbers without bounds": _rows("a,b", lambda i: f"{['nan', 'inf', '1e308', '-1e308'][i % 4]},{'xy'[i % 2]}"),
    "numbers beyond float32": _rows("a,b", lambda i: f"{i}e300,{'xy'[i % 2]}"),
    "numbers beyond float64's range": _rows("a,b", lambda i: f"{(-1) ** i * (1 + i / 500)}e308,{'xy'[i % 2]}"),
    "tiny numbers": _rows("a,b", lambda i: f"{i}e-320,{'xy'[i % 2]}"),
    "digits of other scripts": _rows("a,b", lambda i: "".join(chr(0x660 + int(d)) for d in str(i)) + f",{'xy'[i % 2]}"),
    "quotes that do not end": 'a,b\n"1,x\n' + "2,y\n" * 100,
    "zero bytes": b"a,b\n" + b"1\0,x\n2,y\n" * 100,
    "semicolons": _rows("a;b", lambda i: f"{i};{'xy'[i % 2]}"),
    "carriage returns": _rows("a,b", lambda i: f"{i},{'xy'[i % 2]}").replace("\n", "\r"),
    "utf-16": WHOLE.encode("utf-16"),
    "latin-1": _rows("a,b", lambda i: f"{i},{'xy'[i % 2]}\u00fc").encode("latin1"),
    "a formula": _rows("a,b", lambda i: f"=1+{i},{'xy'[i % 2]}"),
    "2000 columns": _rows(
        ",".join(f"c{i}" for i in range(2000)), lambda i: ",".join([str(i)] * 1999 + ["xy"[i % 2]]), 40
    ),
    "40 rows": _rows("a,b", lambda i: f"{i},{'xy'[i % 2]}", 40),
    "8 rows": _rows("a,b", lambda i: f"{i},{'xy'[i % 2]}", 8),
}
SCHEMAS: dict[str, object] = {
    "no label": {"numbers": ["age"]},
    "an unknown label": {"label": "x", "numbers": ["age"]},
    "a label of numbers": {"label": "age", "categories": ["work"]},
    "the label as a column": {"label": "income", "categories": ["income"]},
    "a column twice": {"label": "income", "numbers": ["age", "age"]},
    "a word for columns": {"label": "income", "numbers": "age"},
    "a number for columns": {"label": "income", "numbers": 5},
    "null for columns": {"label": "income", "numbers": None},
    "an object for columns": {"label": "income", "numbers": {"age": 1}},
    "lists for names": {"label": "income", "numbers": [["age"]]},
    "a list for the label": {"label": ["income"], "numbers": ["age"]},
    "null for the label": {"label": None, "numbers": ["age"]},
    "words as numbers": {"label": "income", "numbers": ["work"]},
    "numbers as categories": {"label": "income", "categories": ["age"]},
    "no columns": {"label": "income"},
    "a name that colours": {"label": "\x1b[31mincome", "numbers": ["age"]},
    "more": {"label": "income", "numbers": ["age"], "weights": 3},
}
SOURCES: dict[str, str] = {
    "that is empty": "",
    "that has no function": "maker = 3",
    "that is no Python": "def make(:",
    "of zero bytes": "\0\0\0",
    "that raises": "def make(*args, **kwargs): raise ValueError('\\x1b[31mred\\nand more')",
    "that raises at import": "1 / 0",
    "that raises what is no text": "class E(Exception):\n    def __str__(self): return 3\ndef make(*a, **k): raise E",
    "that recurs": "def make(*args, **kwargs): return make()",
    "that returns nothing": "def make(*args, **kwargs): return None",
    "that returns itself": "def make(*args, **kwargs): return make",
    "that asserts": "def make(*args, **kwargs): assert False",
    "that is a number": "make = 5",
    "that needs more": "def make(a, b, c, d): return a",
    "without parameters": "import torch\ndef make(*a): return torch.nn.Flatten() if not a else a[0].sum() * 0",
    "of NaN": "import torch\nN = torch.nan\ndef make(*a): return torch.nn.Sequential(torch.nn.Flatten(),"
    " torch.nn.Linear(768, 8).requires_grad_().to(torch.float32)) if not a else a[0].sum() * N",
    "of another size": "import torch\ndef make(*a): return torch.nn.Linear(7, 7) if not a else torch.ones(3)",
    "that counts images": "import torch\ndef make(*a): return torch.nn.Sequential(torch.nn.Flatten(0),"
    " torch.nn.LazyLinear(8)) if not a else a[0][0].sum()",
    "of complex numbers": "import torch\ndef make(*a): return torch.nn.Linear(768, 8, dtype=torch.complex64)"
    " if not a else a[0].sum() + 0j",
    "of too much memory": "import torch\ndef make(*a): return torch.nn.Linear(10**7, 10**6)"
    " if not a else torch.ones(10**13)",
}
REFERENCES = (
    ":",
    "a:",
    ":b",
    "x.py:make",
    "os:system",
    "os.path:nope",
    "torch.nn:Linear",
    "torch:nn",
    "a:b:c",
    "./x:y",
)
REFERENCES += (
    "torchvision:",
    "torchvision:nope",
    "torchvision:resnet18",
    "/dev/zero:x",
    "/dev/zero.py:x",
    "\x1b[31m:x",
)
REFERENCES += ("..:x", "a" * 5000 + ":x", "numpy:array", "json:loads", "builtins:print", "torch.nn:Module")


def unwritable(prepared: Prepared) -> Iterator[Case]:
    """More of group d: folders of results that cannot be written, and some that vanish under a run."""
    for mode in ("grad", "fed"):
        for name, inside in {
            "out is gone after the first trial": lambda: _after_a_trial(lambda run: shutil.rmtree(run.parents[2])),
            "parts cannot be made any more": lambda: _occupied("parts", "/proc/nowhere"),
            "rows cannot be made any more": lambda: _occupied("rows.jsonl", "/proc/nowhere"),
            "rows are on a full disk": lambda: _occupied("rows.jsonl", "/dev/full"),
            "records are on a full disk": lambda: _occupied("trials.jsonl", "/dev/full"),
        }.items():
            yield prepared.command(mode, name, inside)
        for name, edit in {
            "the run is a file": lambda run: (shutil.rmtree(run), run.touch()),
            "the run is a pipe": lambda run: (shutil.rmtree(run), damage.pipe(run)),
            "the run leads nowhere": lambda run: (shutil.rmtree(run), damage.nowhere(run)),
            "the run leads to itself": lambda run: (shutil.rmtree(run), damage.circle(run)),
            "the lock is a folder": lambda run: ((run / ".lock").unlink(missing_ok=True), (run / ".lock").mkdir()),
            "the lock is a pipe": lambda run: damage.pipe(run / ".lock"),
            "the seal is a folder": lambda run: damage.folder(run / "done"),
        }.items():
            yield prepared.case(mode, "half", name, edit)
        for state in ("half", "finished"):
            case = prepared.case(mode, state, "nothing may be written", _read_only)
            yield dataclasses.replace(case, inside=as_another_user)


def _read_only(run: Path) -> None:
    run.parents[4].chmod(0o755)  # of all cases: the other user may read
    for path in [run.parents[2], *run.parents[2].rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)


def as_another_user() -> None:
    """Whoever may write everywhere becomes a user who may not."""
    if os.geteuid() == 0:
        os.setegid(65534)
        os.seteuid(65534)


def _occupied(name: str, target: str) -> None:
    """After the first trial, a link stands in the place of a file."""

    def occupy(run: Path) -> None:
        path = run / name
        if path.is_dir():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)
        path.symlink_to(target)

    _after_a_trial(occupy)


def _after_a_trial(act: Edit) -> None:
    from runner.store import Store

    add, acted = Store.add_trial, False

    def added(store: Store, *args: object) -> None:
        nonlocal acted
        add(store, *args)  # type: ignore[arg-type]
        if not acted:
            acted = True
            act(store.folder)

    Store.add_trial = added  # type: ignore[method-assign]
