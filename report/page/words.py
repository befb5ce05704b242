"""The words that the parts of the page share: verdicts, titles, settings."""

import shlex
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

from report.page.load import Run, differing

COLUMNS = 5  # of settings in which runs differ

VERDICTS = {
    "leaks": ("leaks", "●", "leaks"),
    "too few updates to tell": ("undecided", "◐", "too few updates to tell"),
    "no leak found by this attack": ("quiet", "○", "no leak found"),
    "not scored": ("unscored", "–", "not scored"),
}

# what a run is sorted and filtered by
PLACES: dict[str, Callable[[Run], str]] = {
    "mode": lambda run: run.mode,
    "defence": lambda run: run.defense,
    "data": lambda run: run.dataset,
    "model": lambda run: run.model,
}
KEYS: dict[str, Callable[[Run], str]] = {
    "attack": lambda run: run.attack,
    **PLACES,
    "verdict": lambda run: run.verdict,
}


def headline(runs: Sequence[Run]) -> str:
    """The verdict over all runs, in a few words."""
    scored = [run for run in runs if run.verdict != "not scored"]
    leaking = [run for run in scored if run.verdict == "leaks"]
    if not scored:
        return "Nothing was scored"
    if len(runs) == 1:
        return {"leaks": "The update leaks", "too few updates to tell": "Too few updates to tell"}.get(
            runs[0].verdict, "No leak found by this attack"
        )
    if leaking:
        return f"{len(leaking)} of {len(runs)} runs leak"
    attacks = len({run.attack for run in scored})
    if any(run.verdict == "too few updates to tell" for run in scored):
        return f"No leak shown in {len(runs)} runs"
    return f"No leak found by {attacks} attack{'s' if attacks > 1 else ''}"


def command(run: Run) -> str:
    """The command that repeats a run. Runs that do not name it get one with every flag written out."""
    recorded = run.config.get("command")
    if isinstance(recorded, str):
        return recorded
    words = ["python", f"main_{run.mode}.py", run.attack]
    for settings, switches in ((run.config["hyperparameters"], False), (run.config["flags"], True)):
        for name, value in settings.items():
            flag = f"--{name.replace('_', '-')}"
            if value is None or value == [] or (switches and value is False):
                continue
            if isinstance(value, bool):
                words.append(flag if value else f"--no-{flag[2:]}")
            else:
                words += [flag, *map(str, value if isinstance(value, list) else [value])]
    return shlex.join(words)


def badge(verdict: str) -> str:
    kind, sign, label = VERDICTS.get(verdict, ("unscored", "–", verdict))
    return f'<span class="badge {kind}"><span aria-hidden="true">{sign}</span> {escape(label)}</span>'


def title(run: Run) -> str:
    defense = "" if run.defense == "none" else f", {run.defense}"
    return f"{run.attack} · {run.mode} · {run.dataset} · {run.model}{defense}"


def short_title(run: Run) -> str:
    return f"{run.attack} · {run.mode} · {run.dataset} · {run.model}"


def varied_settings(runs: Sequence[Run]) -> list[str]:
    """Settings that get a column: those in which runs of one mode or one attack differ, the most telling ones first."""
    groups: dict[tuple[str, ...], list[Run]] = {}
    for run in runs:
        groups.setdefault((run.attack, run.mode), []).append(run)
    names = [name for group in groups.values() for name in differing(group)]
    for mode in dict.fromkeys(run.mode for run in runs):
        flags = {name.replace("_", "-") for run in runs for name in run.config["flags"]} | {"local steps"}
        names += differing([run for run in runs if run.mode == mode], sorted(flags))
    own = {"attack", "mode", "dataset", "model", "defense"}
    if "local steps" in names:
        own.add("local-epochs")
    first = ("local steps", "batch-size", "client-images", "pretrain-epochs", "model-mode", "norm", "dropout")
    chosen = dict.fromkeys([*(name for name in first if name in names), *names])
    return [name for name in chosen if name not in own][:COLUMNS]


def psnr_text(found: Mapping[str, Any]) -> str:
    """mean [low, high] over units, or the mean alone."""
    known = found.get("low") is not None and found.get("high") is not None
    return f"{found['mean']:.2f}" + (f" [{found['low']:.2f}, {found['high']:.2f}]" if known else "")


def setting(run: Run, name: str) -> str:
    """A setting as the table shows it; a dash where the run does not have it, or leaves it to the default."""
    value = run.settings.get(name)
    return "-" if value is None or value == "" else str(value)


def limits(found: Mapping[str, Any] | None) -> tuple[float | None, float | None]:
    return (None, None) if not found else (found.get("low"), found.get("high"))
