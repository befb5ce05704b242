"""The figures: true images over reconstructions, accuracy over the rounds, and scores over what was varied."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from core.domain import Domain
from report import style
from report.tables import ENTRIES, RECOVERED, VIEWS, Summary, View, image_verdict, sort_key
from utils.terminal import printable

ABREAST = 10  # images in a line of a grid
SIDE, GAP, TITLE, CAPTION, LABELS = 1.1, 0.08, 0.24, 0.24, 0.34  # of a grid, in inches

Point = Mapping[str, str]


def grid(
    path: Path,
    truth: Tensor,
    rebuilt: Tensor,
    rows: Sequence[Mapping[str, Any]],
    domain: Domain,
    names: Sequence[str] | None = None,
    most: int = 40,
) -> None:
    """True examples (N, *shape) over their reconstructions, ten pairs in a line, each with its PSNR.

    rows: as in rows.jsonl; an example without a reconstruction is left empty. domain: renders examples. names: file
    names, shown above the true examples. most: the number of pairs shown; the figure says how many were left out.
    """
    count = min(len(truth), most)
    columns = min(count, ABREAST)
    lines = -(-count // columns)
    width = LABELS + columns * (SIDE + GAP)
    pair = (TITLE if names is not None else GAP) + 2 * SIDE + GAP + CAPTION  # height of a line
    height = lines * pair + (CAPTION if count < len(truth) else 0)
    with style.pyplot() as plt:
        figure = plt.figure(figsize=(width, height))
        ax = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0))  # in inches, from above
        ax.set_axis_off()
        for i in range(count):
            line, column = divmod(i, columns)
            left, top = LABELS + column * (SIDE + GAP), line * pair + (TITLE if names is not None else GAP)
            middle, below = left + SIDE / 2, top + SIDE + GAP
            _show(ax, truth[i], domain, left, top)
            if names is not None:
                ax.text(middle, top - 0.04, _shortened(names[i]), ha="center", va="bottom", fontsize=style.SMALL - 2)
            found = rows[i]["match"] is not None
            if found:
                _show(ax, rebuilt[i], domain, left, below)
            text = f"{rows[i]['psnr']:.1f} dB" if found else "missed"
            ax.text(middle, below + (SIDE if found else 0) + 0.04, text, ha="center", va="top", fontsize=style.SMALL)
            if column == 0:
                for place, name, color in ((top, "truth", style.TRUTH), (below, "rebuilt", style.REBUILT)):
                    at = LABELS - 0.08, place + SIDE / 2
                    ax.text(*at, name, color=color[0], rotation=90, va="center", ha="right")
        if count < len(truth):
            left_out = f"the first {count} of {len(truth)} images"
            ax.text(width / 2, height - 0.06, left_out, ha="center", va="bottom", fontsize=style.SMALL)
        style.save(figure, path)


def learning_curve(path: Path, rounds: Sequence[Mapping[str, Any]]) -> None:
    """Test accuracy and training loss over the rounds of a federated run, as in rounds.jsonl."""
    numbers = [r["round"] + 1 for r in rounds]
    losses = [math.nan if r["loss"] is None else r["loss"] for r in rounds]
    with style.pyplot() as plt:
        from matplotlib.ticker import MaxNLocator

        figure, axes = plt.subplots(2, 1, figsize=(style.WIDTH, 1.3 * style.HEIGHT), sharex=True, layout="constrained")
        measured = [(r["round"] + 1, r["accuracy"]) for r in rounds if "accuracy" in r]
        axes[0].plot(*zip(*measured, strict=True), color=style.COLORS[0], marker="o")
        axes[0].set(ylabel="test accuracy", ylim=(0, 1), title="training")
        axes[1].plot(numbers, losses, color=style.COLORS[1], marker="s")
        axes[1].set(xlabel="round", ylabel="training loss")
        axes[1].xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        style.save(figure, path)


def leakage_over_rounds(path: Path, rounds: Sequence[Mapping[str, Any]]) -> None:
    """PSNR and the recovered share of the clients that are attacked in several rounds, as in summary.json."""
    numbers = [r["round"] for r in rounds]
    with style.pyplot() as plt:
        from matplotlib.ticker import MaxNLocator

        figure, axes = plt.subplots(2, 1, figsize=(style.WIDTH, 1.3 * style.HEIGHT), sharex=True, layout="constrained")
        for ax, key, label in zip(axes, ("psnr", "recovered"), ("mean PSNR (dB)", "recovered share"), strict=True):
            ax.plot(numbers, [r[key] for r in rounds], color=style.COLORS[0], marker="o", label="update of this round")
            if all(r["accumulated"] for r in rounds):
                values = [r["accumulated"][key] for r in rounds]
                ax.plot(numbers, values, color=style.COLORS[1], marker="s", label="best of all updates so far")
            ax.set(ylabel=label)
        if all(r["null_psnr"] is not None for r in rounds):
            nulls = [r["null_psnr"] for r in rounds]
            axes[0].plot(numbers, nulls, color="grey", linestyle="--", label="null")
        axes[0].set(title="leakage over rounds")
        axes[0].legend(fontsize=style.SMALL)
        axes[1].set(xlabel="round", ylim=(-0.03, 1.03))
        axes[1].xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        style.save(figure, path)


def comparison_plot(path: Path, points: Sequence[Point], summaries: Sequence[Summary]) -> None:
    """The score over the first name of the points, one line for each combination of the others.

    The score is PSNR, or that of the runs' domain, with the mean public image dashed. If all attacks have an oracle for
    it, it is the share of images recovered, with the recoverable share dashed; below it then the training loss. Where
    three or more names vary, panels stand side by side.
    """
    view = _view(summaries)
    points = [point or {"attack": s["attack"]} for point, s in zip(points, summaries, strict=True)]
    all_or_nothing = all(s.get("ceiling") is not None for s in summaries)
    if len(points[0]) > 2 and not any("ceiling" in s for s in summaries):
        _panels(path, points, summaries)
        return
    # attacks make good lines and poor positions, if anything else varies
    axis, *others = sorted(points[0], key=lambda name: name == "attack")
    trained = any(s.get("training_loss") is not None for s in summaries) and len({p[axis] for p in points}) > 1
    with_loss = all_or_nothing and trained
    lines: dict[str, list[tuple[str, Summary]]] = {}
    for point, s in zip(points, summaries, strict=True):
        name = ", ".join(point[key] if key == "attack" else f"{key} {point[key]}" for key in others) or s["attack"]
        lines.setdefault("" if axis == "attack" else name, []).append((point[axis], s))
    values = list(dict.fromkeys(p[axis] for p in points))
    with style.pyplot() as plt:
        figure, axes = plt.subplots(
            2 if with_loss else 1,
            1,
            figsize=(1.25 * style.WIDTH, (2 if with_loss else 1) * style.HEIGHT),
            squeeze=False,
            sharex=True,
            layout="constrained",
        )
        ax = axes[0, 0]
        for k, (name, runs) in enumerate(lines.items()):
            shown = [value for value, _ in runs]
            if all_or_nothing:
                x = _positions(shown, values)
                ax.plot(x, [s["success_rate"] for _, s in runs], **_line(values), label=name or None)
            else:
                x = _positions(shown, values, k, len(lines))
                _errorbars(ax, x, [s for _, s in runs], values, name or None)
            if with_loss:  # a loss that is not finite leaves a gap
                losses = [math.nan if s["training_loss"] is None else s["training_loss"] for _, s in runs]
                axes[1, 0].plot(x, losses, **_line(values))
        key, meaning = (
            ("ceiling", "recoverable (oracle)") if all_or_nothing else (f"baseline_{view.score}", view.baseline_label)
        )
        _reference(ax, [s[key] for s in summaries], meaning)
        attacks = list(dict.fromkeys(s["attack"] for s in summaries))
        what = attacks[0] if len(attacks) == 1 else f"{len(attacks)} attacks"
        ax.set(
            ylabel=f"share {RECOVERED}" if all_or_nothing else view.score_label,
            title=f"{what} on {_datasets(summaries)}",
        )
        if with_loss:
            axes[1, 0].set(ylabel="training loss (no point: not finite)")
        axes[-1, 0].set_xlabel(axis)
        axes[-1, 0].set_xticks(range(len(values)), values)
        axes[-1, 0].set_xlim(-0.5, len(values) - 0.5)
        if ax.get_legend_handles_labels()[0]:
            ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
        style.save(figure, path)


def _panels(path: Path, points: Sequence[Point], summaries: Sequence[Summary]) -> None:
    """PSNR where three or more names vary: one across each panel, attacks (or the second longest) as lines, and a
    panel for each combination of the rest, with the mean public image dashed."""
    view = _view(summaries)
    values = {key: sorted({p[key] for p in points}, key=sort_key) for key in points[0]}
    by_size = sorted(values, key=lambda key: -len(values[key]))
    lines = "attack" if "attack" in values else by_size[1]
    axis = next(key for key in by_size if key != lines)
    *more, across = (key for key in values if key not in (axis, lines))
    down = sorted({tuple(p[k] for k in more) for p in points}, key=lambda cell: [*map(sort_key, cell)])
    rows, columns = len(down), len(values[across])
    found = {tuple(p[k] for k in (lines, axis, across, *more)): s for p, s in zip(points, summaries, strict=True)}
    with style.pyplot() as plt:
        figure, axes = plt.subplots(
            rows,
            columns,
            figsize=(2.6 * columns + 1.9, 2.3 * rows + 0.5),
            squeeze=False,
            sharex=True,
            sharey=True,
            layout="constrained",
        )
        handles: dict[str, Any] = {}
        for cell, row_axes in zip(down, axes, strict=True):
            for column, ax in zip(values[across], row_axes, strict=True):
                shown: list[Summary] = []
                for k, line in enumerate(values[lines]):
                    here = [(x, found[key]) for x in values[axis] if (key := (line, x, column, *cell)) in found]
                    color, marker = style.COLORS[k % len(style.COLORS)], style.MARKERS[k % len(style.MARKERS)]
                    x = _positions([value for value, _ in here], values[axis], k, len(values[lines]))
                    _errorbars(
                        ax, x, [s for _, s in here], values[axis], line, color=color, marker=marker, markersize=4
                    )
                    shown += [s for _, s in here]
                _reference(ax, [s[f"baseline_{view.score}"] for s in shown], view.baseline_label)
                where = ", ".join(f"{k} {v}" for k, v in zip((*more, across), (*cell, column), strict=True))
                ax.set_title(where, fontsize=style.SMALL)
                ax.set_xticks(range(len(values[axis])), values[axis])
                ax.set_xlim(-0.5, len(values[axis]) - 0.5)
                handles |= dict(zip(*reversed(ax.get_legend_handles_labels()), strict=True))
        figure.supxlabel(axis, fontsize=10)
        figure.supylabel(view.score_label, fontsize=10)
        figure.legend(handles.values(), handles.keys(), loc="outside right upper", fontsize=style.SMALL, title=lines)
        style.save(figure, path)


def _view(summaries: Sequence[Summary]) -> View:
    """How the first of these runs is shown."""
    return VIEWS[next((s.get("domain", "image") for s in summaries), "image")]


def _errorbars(
    ax: Any, x: Sequence[float], summaries: Sequence[Summary], values: Sequence[str], label: str | None, **look: Any
) -> None:
    """The mean score, with bars of one standard deviation over examples."""
    score = _view(summaries).score
    y, error = ([s[score][key] if s[score] else math.nan for s in summaries] for key in ("mean", "std"))
    ax.errorbar(x, y, yerr=error, elinewidth=1, label=label, **_line(values), **look)


def _line(values: Sequence[str]) -> dict[str, Any]:
    """Numbers are joined by a line; names are not, because nothing lies between them."""
    return {} if all(sort_key(value)[0] < math.inf for value in values) else {"linestyle": "none"}


def _positions(shown: Sequence[str], values: Sequence[str], k: int = 0, count: int = 1) -> list[float]:
    """Where values stand, evenly spaced; line k of `count` is shifted so that error bars do not hide each other."""
    shift = 0.0 if count == 1 else 0.12 * (2 * k / (count - 1) - 1)
    return [values.index(value) + shift for value in shown]


def _reference(ax: Any, levels: Sequence[float | None], label: str) -> None:
    """A dashed line at the mean of what baselines or oracles reach."""
    known = [level for level in levels if level is not None]
    if known:
        ax.axhline(sum(known) / len(known), label=label, marker="", **style.REFERENCE)


def _datasets(summaries: Sequence[Summary]) -> str:
    return ", ".join(dict.fromkeys(s["dataset"] for s in summaries))


def _show(ax: Any, example: Tensor, domain: Domain, left: float, top: float) -> None:
    """An example in the middle of a square of side SIDE."""
    image = domain.render(example.cpu())
    height, width = (SIDE * n / max(image.shape[:2]) for n in image.shape[:2])
    left, top = left + (SIDE - width) / 2, top + (SIDE - height) / 2
    extent = (left, left + width, top + height, top)
    ax.imshow(image, vmin=0, vmax=1, cmap="gray", extent=extent, aspect="auto")


def _shortened(name: str, most: int = 18) -> str:
    """A file name with its beginning cut off, which says less than its end."""
    name = printable(name).replace("$", r"\$")  # otherwise matplotlib reads a formula
    return name if len(name) <= most else "..." + name[-most + 3 :]


VIEWS["image"] = View(ENTRIES, image_verdict, "grid.png", grid)
