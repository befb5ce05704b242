"""What a person looks at when a run has ended: a table, a grid of pictures, and the table and plot of a sweep.

`python -m utils.report [--to FOLDER] RUN_FOLDER ...` prints one table over finished runs, the flags they differ in
first, and with --to writes it there with a plot.
"""

import csv
import io
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

Summary = Mapping[str, Any]


def number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def spread(values: Mapping[str, float] | None, digits: int = 2) -> str:
    """mean ± std of an entry of summary.json."""
    return "-" if values is None else f"{values['mean']:.{digits}f} ± {values['std']:.{digits}f}"


def interval(gain: Mapping[str, float] | None) -> str:
    """mean [low, high] of a paired difference."""
    return "-" if gain is None else f"{gain['mean']:+.2f} [{gain['low']:+.2f}, {gain['high']:+.2f}]"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns also line up in a terminal."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.ljust(w) for cell, w in zip(cells, widths, strict=True)) + " |"

    return "\n".join([line(header), "|" + "|".join("-" * (w + 2) for w in widths) + "|", *map(line, rows)])


COLUMNS: dict[str, Any] = {
    "images": lambda s: str(s["images"]),
    "PSNR dB": lambda s: spread(s["psnr"]),
    "SSIM": lambda s: spread(s["ssim"], 3),
    "LPIPS": lambda s: spread(s["lpips"], 3),
    "labels": lambda s: number(s["label_accuracy"]),
    "success": lambda s: number(s["success_rate"]),
    "mean image dB": lambda s: number(s["baseline_psnr"]),
    "class mean dB": lambda s: number(s["class_baseline_psnr"]),
    "diverged": lambda s: str(s["status"].get("diverged", 0)),
    "seconds": lambda s: number(s["seconds"], 1),
    "oracle": lambda s: ",".join(s["oracle"]) or "none",
}


# of some attacks only: the entry of summary.json without which a column is left out, and what it shows
OWN_COLUMNS: dict[str, tuple[str, Any]] = {
    "ceiling": ("ceiling", lambda s: number(s.get("ceiling"), 3)),
    "recovered, median dB": ("ceiling", lambda s: number(s.get("recovered_psnr"), 1)),
    "candidates": ("candidates", lambda s: number(s.get("candidates"), 1)),
    "control": ("control", lambda s: number(s.get("control"), 3)),
    "oracle corr": ("oracle_corr", lambda s: number(s.get("oracle_corr"), 3)),
    "oracle affine dB": ("oracle_affine_psnr", lambda s: number(s.get("oracle_affine_psnr"), 1)),
    "sign right": ("sign_ok", lambda s: number(s.get("sign_ok"), 3)),
    "over class mean dB": ("oracle_floor_psnr", lambda s: interval(s.get("over_class_mean"))),
    "oracle floor dB": ("oracle_floor_psnr", lambda s: number(s.get("oracle_floor_psnr"))),
    "companion dB": ("companion", lambda s: number(s.get("companion_psnr"))),
}


def columns_of(summaries: Sequence[Summary]) -> dict[str, Any]:
    """What to show of runs: what every attack has, and what some of these have on top."""
    own = {name: show for name, (key, show) in OWN_COLUMNS.items() if any(key in s for s in summaries)}
    return COLUMNS | own


def one_run(summary: Summary) -> str:
    """The table at the end of a run."""
    title = f"{summary['attack']} | {summary['mode']} | {summary['dataset']} | {summary['model']}"
    if "accuracy" in summary:
        title += f" | test accuracy {summary['accuracy']:.3f}"
    columns = columns_of([summary])
    text = title + "\n" + table(list(columns), [[show(summary) for show in columns.values()]])
    gain = summary.get("over_class_mean")
    return text if gain is None else f"{text}\n{verdict(gain)}{companion(summary)}"


def companion(summary: Summary) -> str:
    """In words: the attack that ran beside, on the same updates; empty without one."""
    gain = summary.get("over_companion")
    if gain is None:
        return ""
    low, high = gain["low"], gain["high"]
    better = "better than" if low > 0 else "worse than" if high < 0 else "not shown to differ from"
    of = f"{summary['companion']} on the same updates ({summary['companion_psnr']:.2f} dB)"
    return f"\n{better} {of}: {interval(gain)} dB"


def verdict(gain: Mapping[str, float]) -> str:
    """In words: whether more came out than the label alone is worth."""
    figures = f"{gain['mean']:+.2f} dB over the mean image of its class, 95% [{gain['low']:+.2f}, {gain['high']:+.2f}]"
    if gain["low"] > 0:
        return f"pixels leaked: {figures}"
    return f"not shown to leak more than a label would: {figures}"


def many_runs(points: Sequence[Mapping[str, str]], summaries: Sequence[Summary]) -> tuple[list[str], list[list[str]]]:
    """Header and cells of a comparison: what was varied, then the metrics."""
    varied = list(dict.fromkeys(key for point in points for key in point))
    columns = columns_of(summaries)
    columns = {name: show for name, show in columns.items() if name != "oracle" or any(s["oracle"] for s in summaries)}
    if any("accuracy" in s for s in summaries):
        columns = columns | {
            "accuracy": lambda s: number(s.get("accuracy"), 3),
            "training loss": lambda s: number(s.get("training_loss"), 3),
        }
    cells = [
        [point.get(key, "-") for key in varied] + [show(s) for show in columns.values()]
        for point, s in zip(points, summaries, strict=True)
    ]
    return [*varied, *columns], cells


def write_comparison(folder: Path, points: Sequence[Mapping[str, str]], summaries: Sequence[Summary]) -> str:
    """table.md, table.csv and plot.png of a sweep; returns the table."""
    folder.mkdir(parents=True, exist_ok=True)
    header, cells = many_runs(points, summaries)
    text = table(header, cells)
    (folder / "table.md").write_text(text + "\n")
    out = io.StringIO()
    csv.writer(out).writerows([header, *cells])
    (folder / "table.csv").write_text(out.getvalue())
    _plot(folder / "plot.png", points, summaries)
    return text


def _plot(path: Path, points: Sequence[Mapping[str, str]], summaries: Sequence[Summary]) -> None:
    """The score over the first swept flag, one line for each combination of the others; below it the training loss.

    The score is PSNR, with the mean image dashed, or, of an attack that knows its ceiling, the share of images it
    recovers, with that ceiling dashed.
    """
    plt = _pyplot()
    axis, *others = list(points[0])
    if len(others) > 1 and not any("ceiling" in s for s in summaries):
        _plot_panels(path, points, summaries)
        return
    all_or_nothing = all("ceiling" in s for s in summaries)
    trained = any(s.get("training_loss") is not None for s in summaries) and len({p[axis] for p in points}) > 1
    panels = 2 if all_or_nothing and trained else 1
    fig, axes = plt.subplots(
        panels, 1, figsize=(6 if panels == 1 else 9, 4 * panels), squeeze=False, sharex=True, layout="constrained"
    )
    lines: dict[str, list[tuple[str, Summary]]] = {}
    for point, s in zip(points, summaries, strict=True):
        name = ", ".join(f"{key} {point[key]}" for key in others) or s["attack"]
        lines.setdefault(name, []).append((point[axis], s))
    ax = axes[0, 0]
    for name, values in lines.items():
        x = [value for value, _ in values]
        if all_or_nothing:
            ax.plot(x, [s["success_rate"] for _, s in values], marker="o", label=name)
        else:
            y, error = ([s["psnr"][key] for _, s in values] for key in ("mean", "std"))
            ax.errorbar(x, y, yerr=error, marker="o", capsize=3, label=name)
        if panels == 2:  # a loss that is not finite leaves a gap
            losses = [math.nan if s["training_loss"] is None else s["training_loss"] for _, s in values]
            axes[1, 0].plot(x, losses, marker="o", label=name)
    key, what = ("ceiling", "images told apart") if all_or_nothing else ("baseline_psnr", "mean public image")
    ax.axhline(sum(s[key] for s in summaries) / len(summaries), color="grey", linestyle="--", label=what)
    score = "share of images recovered" if all_or_nothing else "PSNR (dB)"
    ax.set(ylabel=score, title=f"{summaries[0]['attack']} on {summaries[0]['dataset']}")
    if panels == 2:
        axes[1, 0].set(ylabel="training loss (no point: not finite)")
    axes[-1, 0].set(xlabel=axis)
    ax.legend(**({"loc": "center left", "bbox_to_anchor": (1, 0.5), "fontsize": 7} if panels == 2 else {}))
    _save(fig, path)


def _plot_panels(path: Path, points: Sequence[Mapping[str, str]], summaries: Sequence[Summary]) -> None:
    """PSNR where three or more things vary: one across a panel, attacks (or what varies most) as its lines, the rest
    a panel for each of its values, with the mean image dashed."""
    plt = _pyplot()
    values = {key: sorted({p[key] for p in points}, key=_rank) for key in points[0]}
    by_size = sorted(values, key=lambda key: -len(values[key]))
    lines = "attack" if "attack" in values else by_size[1]
    axis = next(key for key in by_size if key != lines)
    *more, across = (key for key in values if key not in (axis, lines))
    down = sorted({tuple(p[k] for k in more) for p in points}, key=lambda cell: [*map(_rank, cell)])
    rows, columns = len(down), len(values[across])
    fig, axes = plt.subplots(
        rows,
        columns,
        figsize=(2.6 * columns + 1.6, 2.3 * rows + 0.5),
        squeeze=False,
        sharex=True,
        sharey=True,
        layout="constrained",
    )
    found = {tuple(p[k] for k in (lines, axis, across, *more)): s for p, s in zip(points, summaries, strict=True)}
    for cell, row_axes in zip(down, axes, strict=True):
        for column, ax in zip(values[across], row_axes, strict=True):
            shown: list[Summary] = []
            for line in values[lines]:
                here = [(x, found[key]) for x in values[axis] if (key := (line, x, column, *cell)) in found]
                y, error = ([s["psnr"][k] for _, s in here] for k in ("mean", "std"))
                spots = [values[axis].index(x) for x, _ in here]
                ax.errorbar(spots, y, yerr=error, marker="o", markersize=4, capsize=2, label=line)
                shown += [s for _, s in here]
            if shown:
                mean = sum(s["baseline_psnr"] for s in shown) / len(shown)
                ax.axhline(mean, color="grey", linestyle="--", label="mean public image")
            where = ", ".join(f"{k} {v}" for k, v in zip((*more, across), (*cell, column), strict=True))
            ax.set_title(where, fontsize=8)
            ax.set_xticks(range(len(values[axis])), values[axis])
    for ax in axes[-1]:
        ax.set_xlabel(axis)
    for ax in axes[:, 0]:
        ax.set_ylabel("PSNR (dB)")
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right upper", fontsize=8, title=lines)
    _save(fig, path)


def grid(path: Path, truth: Tensor, rebuilt: Tensor, rows: Sequence[Mapping[str, Any]], most: int = 40) -> None:
    """Truth over reconstruction, ten pairs abreast, each with its PSNR. Past `most` images the rest is left out."""
    plt = _pyplot()
    count = min(len(truth), most)
    abreast = min(count, 10)
    bands = -(-count // abreast)
    fig, axes = plt.subplots(
        2 * bands, abreast, figsize=(1.15 * abreast + 0.6, 2.55 * bands), squeeze=False, layout="constrained"
    )
    for ax in axes.flat:
        ax.axis("off")
    for i in range(count):
        band, column = divmod(i, abreast)
        for line, image in enumerate((truth[i], rebuilt[i])):
            ax = axes[2 * band + line, column]
            picture = image.permute(1, 2, 0).numpy()  # (H, W, C)
            ax.imshow(picture.squeeze(-1) if picture.shape[-1] == 1 else picture, vmin=0, vmax=1, cmap="gray")
        missed = rows[i]["match"] is None
        axes[2 * band + 1, column].set_title("missed" if missed else f"{rows[i]['psnr']:.1f} dB", fontsize=8)
    for band in range(bands):
        for line, name in enumerate(("truth", "rebuilt")):
            axes[2 * band + line, 0].text(
                -0.08, 0.5, name, rotation=90, va="center", ha="right", transform=axes[2 * band + line, 0].transAxes
            )
    _save(fig, path)


def learning_curve(path: Path, rounds: Sequence[Mapping[str, Any]]) -> None:
    """Test accuracy and training loss over the rounds of a federated run."""
    plt = _pyplot()
    fig, ax = plt.subplots(figsize=(6, 3.5), layout="constrained")
    numbers = [r["round"] for r in rounds]
    ax.plot(numbers, [r["accuracy"] for r in rounds], marker=".", label="test accuracy")
    ax.set(xlabel="round", ylabel="test accuracy", ylim=(0, 1))
    other = ax.twinx()
    other.plot(numbers, [math.nan if r["loss"] is None else r["loss"] for r in rounds], color="grey", linestyle="--")
    other.set_ylabel("training loss (dashed)")
    _save(fig, path)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _save(fig: Any, path: Path) -> None:
    fig.savefig(path, dpi=130)
    _pyplot().close(fig)


def _rank(value: str) -> tuple[float, str]:
    """Numbers by size, and before words."""
    try:
        return float(value), ""
    except ValueError:
        return float("inf"), value


def main(folders: Sequence[str], to: Path | None = None) -> None:
    """One table over run folders: the flags and hyperparameters in which they differ, then the metrics.

    Hyperparameters count as different only between runs of one attack: another attack has others anyway.
    """
    loaded = []
    for folder in (Path(f) for f in folders if not Path(f).name.startswith("sweep-")):
        if not (folder / "done").exists():
            print(f"{folder} is not a finished run: left out", file=sys.stderr)
            continue
        config, summary = (json.loads((folder / name).read_text()) for name in ("config.json", "summary.json"))
        loaded.append((config["flags"] | {"weights": config["weights"]}, config["hyperparameters"], summary))
    if not loaded:
        print("error: none of these is a finished run", file=sys.stderr)
        raise SystemExit(2)

    def differ(values: Sequence[Any]) -> bool:
        return len({str(v) for v in values}) > 1

    names = list(dict.fromkeys(s["attack"] for *_, s in loaded))
    flags = [k for k in dict.fromkeys(k for f, *_ in loaded for k in f) if differ([f.get(k) for f, *_ in loaded])]
    own = dict.fromkeys(
        k
        for name in names
        for k in next(h for _, h, s in loaded if s["attack"] == name)
        if differ([h.get(k) for _, h, s in loaded if s["attack"] == name])
    )
    points = [
        {k: str(f.get(k, "-")) for k in flags}
        | {k: str(h.get(k, "-")) for k in own}
        | ({"attack": s["attack"]} if len(names) > 1 else {})
        for f, h, s in loaded
    ]
    ordered = sorted(zip(points, (s for *_, s in loaded), strict=True), key=lambda run: [*map(_rank, run[0].values())])
    points, summaries = [point for point, _ in ordered], [summary for _, summary in ordered]
    if to is None:
        print(table(*many_runs(points, summaries)))
    else:
        print(write_comparison(to, points, summaries))


if __name__ == "__main__":
    into, given = (sys.argv[2:3], sys.argv[3:]) if sys.argv[1:2] == ["--to"] else ([], sys.argv[1:])
    if not given:
        print("usage: python -m utils.report [--to FOLDER] RUN_FOLDER ...", file=sys.stderr)
        raise SystemExit(2)
    main(given, Path(into[0]) if into else None)
