"""Writes what the code and the stored measurements say of every attack: docs/attacks/NAME.md and docs/attacks.md.

    python -m experiments.attack_pages

What it writes stands between comments, as the tables of experiments/results.py do; what is written by hand, such as
when an attack fails, stands outside of them. An attack without a page gets one. docs/attacks.md is the table "which
attack for my case", from what the attacks declare.
"""

import ast
import dataclasses
import inspect
import json
import re
import shlex
import textwrap
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from attacks.base import ATTACKS, Attack
from core.hyperparameters import published
from core.paths import ROOT
from experiments import results
from experiments.results import between_marks, marks, replace_marked
from experiments.study import study
from models.inspection import REQUIREMENTS
from report.tables import table
from utils.files import write_bytes

FOLDER, CASES = ROOT / "docs" / "attacks", ROOT / "docs" / "attacks.md"
THREATS = {
    "honest-but-curious": "follows the protocol and looks at what it receives",
    "malicious-parameters": "sends weights of its own choice",
    "malicious-architecture": "adds layers to the model",
}
READS = {
    "num_examples": "the number of examples behind the update",
    "recipe": "the training recipe",
    "defense": "the defence, if there is one",
    "public": "public examples",
}
KINDS = {"continuous": "images", "tabular": "records of a table", "discrete": "sentences"}
BLOCKS = ("about", "measured", "hyperparameters")
# columns of a page's measured table; all but the first are columns of experiments/results.py
COLUMNS = ("command", "network", "data", "images", "psnr", "over_null", "recovered", "identified", "status")

# title -> whether an attack is of use in this case
CASES_OF: dict[str, Callable[[type[Attack]], bool]] = {
    "The server is honest, and the model is any network that can be differentiated twice": lambda cls: (
        _honest(cls) and cls.requires == {"double_backward"}
    ),
    "The server is honest, and the first layer is fully connected": lambda cls: (
        _honest(cls) and "pixel_layer" in cls.requires
    ),
    "The server is honest, and some layer before the head is fully connected": lambda cls: (
        _honest(cls) and "hidden_layer" in cls.requires
    ),
    "The model is a vision transformer": lambda cls: _vit(cls),
    "The data are sentences": lambda cls: "discrete" in cls.kinds,
    "The data are records of a table": lambda cls: "tabular" in cls.kinds and not _vit(cls),
    "The model cannot be differentiated twice": lambda cls: _honest(cls) and "double_backward" not in cls.requires,
    "The attacker has no public examples": lambda cls: "public" not in cls.requires,
    "A generative prior replaces what noise or clipping hides": lambda cls: (
        "public" in cls.requires and "double_backward" in cls.requires
    ),
    "Clients train with Adam": lambda cls: cls.supports_adam,
    "The server sees only the sum of several clients, and wants one of them": lambda cls: cls.isolates,
    "The server may send weights of its own choice": lambda cls: cls.threat == "malicious-parameters",
    "The server may add layers to the model": lambda cls: cls.threat == "malicious-architecture",
}
NO_ATTACK = frozenset({"baseline"})


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for name in ATTACKS:
        write_page(name)
    replace_marked(CASES, "cases", cases())
    replace_marked(CASES, "attacks", overview())


def write_page(name: str) -> None:
    """Write the page of an attack anew, but for what stands outside of its comments."""
    path = page_of(name)
    if not path.exists():
        blocks = "\n\n".join(between_marks(f"{block} {name}", "") for block in BLOCKS)
        write_bytes(path, f"# `{name}`\n\n{blocks}\n".encode())
    for block, content in blocks_of(name).items():
        replace_marked(path, f"{block} {name}", content)


def page_of(name: str) -> Path:
    return FOLDER / f"{name}.md"


def blocks_of(name: str) -> dict[str, str]:
    """The generated parts of an attack's page, by name."""
    cls = ATTACKS[name]
    return {
        "about": "\n\n".join(_about(cls)),
        "measured": "\n\n".join(_measured(cls)),
        "hyperparameters": "\n\n".join(_hyperparameters(cls)),
    }


# --- what an attack declares ----------------------------------------------------------------------------------------


def _about(cls: type[Attack]) -> Iterator[str]:
    yield (inspect.getdoc(cls) or "").strip()
    paper = f"[{cls.citation}]({cls.link})" if cls.link else cls.citation
    lines = [
        ["paper", paper],
        ["threat model", f"{cls.threat}: the server {THREATS[cls.threat]}"],
        ["requires", _requires(cls)],
        ["reconstructs", _kinds(cls)],
        ["reads, besides model and update", _reads(cls)],
        ["labels", _labels(cls)],
        ["clients that train with Adam", "yes" if cls.supports_adam else "no"],
        ["a sum of clients", "the first client's examples" if cls.isolates else "as one large batch"],
    ]
    yield table(["", ""], lines)
    yield from _equation(cls)
    found = [f"experiments/{mode}/{cls.name}.sh" for mode in ("grad", "fed")]
    scripts = [script for script in found if (ROOT / script).exists()]
    notes = {"grad": "the gradient of one batch", "fed": "updates of FedAvg clients"}
    commands = [f"sh {script:<36} # {notes[script.split('/')[1]]}" for script in scripts]
    yield "\n".join(["```sh", *commands, "```"])
    yield (
        f"In Python: `from attacks import {cls.__name__}`. Code: [{_module(cls)}](../../{_module(cls)}), "
        f"[which attack for my case](../attacks.md)."
    )


def _kinds(cls: type[Attack]) -> str:
    return ", ".join(
        text for kind, text in KINDS.items() if kind in cls.kinds and not (kind == "tabular" and _vit(cls))
    )


def _vit(cls: type[Attack]) -> bool:
    """Whether the attack needs a vision transformer, which takes images alone."""
    return "vit" in cls.requires


def _requires(cls: type[Attack]) -> str:
    return ", ".join(r.summary for key, r in REQUIREMENTS.items() if key in cls.requires) or "any model"


def _reads(cls: type[Attack]) -> str:
    facts = set(cls.uses) | ({"public"} if "public" in cls.requires else set())
    return "; ".join(text for fact, text in READS.items() if fact in facts) or "nothing"


def _labels(cls: type[Attack]) -> str:
    if not cls.returns_labels:
        return "not reconstructed"
    public = " of several examples with the help of public ones, if there are any" if cls.infers_labels else ""
    return f"inferred from the update{public and ';' + public}, or granted"


def _equation(cls: type[Attack]) -> Iterator[str]:
    """The docstring of the attack's file, without the citation: indented lines are equations."""
    text = ast.get_docstring(ast.parse((ROOT / _module(cls)).read_text(encoding="utf-8"))) or ""
    for paragraph in text.split("\n\n")[1:]:
        indented = all(line.startswith("    ") for line in paragraph.splitlines())
        plain = textwrap.dedent(paragraph)
        yield f"```text\n{plain}\n```" if indented or plain.startswith("https://") else plain


def _module(cls: type[Attack]) -> str:
    return cls.__module__.replace(".", "/") + ".py"


def _hyperparameters(cls: type[Attack]) -> Iterator[str]:
    yield "## Hyperparameters"
    fields = dataclasses.fields(cls)  # type: ignore[arg-type]
    if not fields:
        yield "None."
        return
    papers = published(cls)
    lines = []
    for field in fields:
        value, source = papers.get(field.name, (None, ""))
        authors = f"{_value(value)}, {source}" if field.name in papers and source else _value(value)
        text = field.metadata["help"] + (f" [{field.metadata['source']}]" if field.metadata["source"] else "")
        flag = f"`--{field.name.replace('_', '-')}`"
        lines.append([flag, _value(field.default), authors if field.name in papers else "", _cell(text)])
    yield table(["flag", "default", "`--paper`", "what it is"], lines)


def _value(value: Any) -> str:
    return "none" if value is None else _cell(str(value))


def _cell(text: str) -> str:
    return re.sub(r"\s+", " ", text).replace("|", r"\|")


# --- what was measured ----------------------------------------------------------------------------------------------


def _measured(cls: type[Attack]) -> Iterator[str]:
    yield "## Measured"
    tables = list(_tables(cls.name))
    if tables:
        yield (
            "Reporting victims, images of 32x32 pixels, inferred labels, seed 0; columns as in "
            "[metrics.md](../metrics.md)."
        )
        yield from tables
    shares = list(_study(cls.name))
    yield from shares
    if not tables and not shares:
        yield "Not measured yet."


def _tables(name: str) -> Iterator[str]:
    """The rows of docs/results.json whose command runs the attack."""
    stored: Mapping[str, Any] = json.loads(results.STORED.read_text(encoding="utf-8"))
    for title, measured in sorted(stored.items()):
        rows = []
        for row in measured["rows"]:
            if Path(row["run"]).stem != name or row["summary"].get("psnr") is None:
                continue
            words = shlex.split(row["flags"])
            own = {**row, "own": _without(words, ("--trials", "--victims"))}
            rows.append([results.COLUMNS[column][1](own) for column in COLUMNS])
        if rows:
            extent = " --quick" if measured["quick"] else ""
            heads = [results.COLUMNS[column][0] for column in COLUMNS]
            yield f"{table(heads, rows)}\n\n(`sh experiments/results.sh{extent} --tables {title}`; commit " + (
                f"`{measured['commit']}`)"
            )


def _without(words: list[str], flags: tuple[str, ...]) -> str:
    """The words without these flags and their values."""
    kept = [word for i, word in enumerate(words) if word not in flags and (i == 0 or words[i - 1] not in flags)]
    return shlex.join(kept)


def _study(name: str) -> Iterator[str]:
    """The attack's lines of docs/study.md."""
    if not study.STORED.exists():
        return
    stored = json.loads(study.STORED.read_text(encoding="utf-8"))
    rows = [row for row in stored["rows"] if row["attack"] == name and row["table"] == "grid"]
    if any("units" in row for row in rows):
        yield "Share of images rebuilt in [the study](../study.md), at 16x16 pixels:"
        yield study.block("observations", {**stored, "rows": rows})


# --- which attack for my case ---------------------------------------------------------------------------------------


def _honest(cls: type[Attack]) -> bool:
    return cls.threat == "honest-but-curious"


def cases() -> str:
    lines = []
    for case, fits in CASES_OF.items():
        names = [name for name, cls in ATTACKS.items() if name not in NO_ATTACK and fits(cls)]
        lines.append([case, ", ".join(f"[`{name}`](attacks/{name}.md)" for name in names) or "none"])
    return table(["case", "attacks"], lines)


def overview() -> str:
    lines = []
    for name, cls in ATTACKS.items():
        lines.append([f"[`{name}`](attacks/{name}.md)", cls.threat, _requires(cls), _kinds(cls), _reads(cls)])
    return table(["attack", "threat model", "requires", "reconstructs", "reads"], lines)


def is_current(text: str, name: str, content: str) -> bool:
    """Whether a page holds this content, once, between the comments of `name`."""
    return between_marks(name, content) in text and len(re.findall(marks(name), text, re.S)) == 1


if __name__ == "__main__":
    main()
