"""What stands above the single runs: the table of all runs, what a defence changes, leakage over settings."""

import json
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from evaluation.summary import RECOVERED_PSNR
from report import tables
from report.page import curves
from report.page.article import BEST_PSNR, thumbnails
from report.page.charts import bar
from report.page.images import Pair
from report.page.load import Run, differing, strengths
from report.page.words import KEYS, PLACES, badge, limits, psnr_text, setting, short_title

SHORT_TITLE = ("attack", "mode", "dataset", "model")  # settings that the title of a group of runs names


def runs_table(ranked: Sequence[Run], pictures: Mapping[int, list[Pair]], varied: Sequence[str]) -> Iterator[str]:
    yield '<section id="runs" aria-labelledby="runs-title"><h2 id="runs-title">All runs</h2>'
    filters = {name: {value(run) for run in ranked} for name, value in KEYS.items()}
    filters |= {name: {setting(run, name) for run in ranked} for name in varied}
    yield '<form class="filters" role="search" aria-label="Filter the runs">'
    for name, values in filters.items():
        if len(values) > 1 or name in ("attack", "mode", "defence", "data"):
            options = "".join(f"<option>{escape(v)}</option>" for v in sorted(values, key=tables.sort_key))
            yield (
                f'<label>{escape(name)}<select data-filter="{escape(name)}"><option value="">all</option>{options}'
                "</select></label>"
            )
    yield '<label>any word<input type="search" data-filter-text placeholder="search"></label>'
    columns = columns_of(ranked, varied)
    sorts = "".join(f'<option value="{i}">{escape(name)}</option>' for i, (name, _) in enumerate(columns))
    yield f'<label class="sorter">sort by<select data-sort-by>{sorts}</select></label>'
    yield '<button type="reset">Show all</button></form>'
    yield f'<p class="count" role="status" aria-live="polite" data-count>{len(ranked)} of {len(ranked)} runs</p>'
    yield '<div class="scroll" tabindex="0" role="region" aria-label="Table of runs"><table class="runs" role="table">'
    same = [f"{name} {value(ranked[0])}" for name, value in PLACES.items() if name not in dict(columns)]
    common = f" All runs: {', '.join(same)}." if same else ""
    yield "<caption>The most exposing run first. Bars: the mean and its 95% interval; the upright mark is the null, or "
    yield f"chance.{escape(common)}</caption>"
    yield '<thead role="rowgroup"><tr role="row">'
    for i, (name, help_text) in enumerate(columns):
        if name == "pictures":
            yield '<th scope="col" role="columnheader">most exposed image</th>'
            continue
        hint = f' title="{escape(help_text)}"' if help_text else ""
        yield (
            f'<th scope="col" role="columnheader"{hint}><button type="button" data-sort="{i}">{escape(name)}'
            '<span aria-hidden="true"></span></button></th>'
        )
    yield '</tr></thead><tbody role="rowgroup">'
    for run in ranked:
        keys = {name: value(run) for name, value in KEYS.items()} | {name: setting(run, name) for name in varied}
        yield f'<tr role="row" data-run="{run.number}" data-keys="{escape(json.dumps(keys))}">'
        yield from cells_of(run, pictures.get(run.number), columns, varied)
        yield "</tr>"
    yield "</tbody></table></div></section>"


def columns_of(runs: Sequence[Run], varied: Sequence[str]) -> list[tuple[str, str]]:
    """(name, help) of the columns."""
    helps = {entry.key: entry.help for entry in tables.ENTRIES}
    columns = [("verdict", ""), ("pictures", ""), ("attack", "")]
    columns += [(name, "") for name in ("mode", "defence") if len({PLACES[name](run) for run in runs}) > 1]
    columns += [(name, "setting in which the runs differ") for name in varied]
    columns += [("recovered", helps["success_rate"]), ("PSNR (dB)", helps["psnr"])]
    columns += [(name, "") for name in ("data", "model") if len({PLACES[name](run) for run in runs}) > 1]
    columns.append(("above null (dB)", helps["over_null"]))
    if any(run.summary.get("identified") for run in runs):
        columns.append(("identified", helps["identified"]))
    if any(run.summary.get("identified_bound") is not None for run in runs):
        columns.append(("identified at most", helps["identified_bound"]))
    if any(run.summary.get("accuracy") is not None for run in runs):
        columns.append(("test accuracy", helps["accuracy"]))
    return columns


def cells_of(
    run: Run, pairs: Sequence[Pair] | None, columns: Sequence[tuple[str, str]], varied: Sequence[str]
) -> Iterator[str]:
    s = run.summary
    psnr, null, gain, identified = s.get("psnr"), s.get("null"), s.get("over_null"), s.get("identified")
    recovered = (s.get("recovered") or {}).get(f"{RECOVERED_PSNR:g}")
    null_recovered, null_psnr = (null["recovered"], null["psnr"]["mean"]) if null else (None, None)
    share = s.get("success_rate")
    values: dict[str, tuple[Any, str]] = {
        "verdict": (-run.leakage[0], f'<a href="#run-{run.number}">{badge(run.verdict)}</a>'),
        "pictures": (None, thumbnails(run, pairs)),
        "attack": (run.attack, f'<a href="#run-{run.number}">{escape(run.attack)}</a>'),
        **{name: (value(run), escape(value(run))) for name, value in PLACES.items()},
        **{name: (setting(run, name).replace("-", "", 1), escape(setting(run, name))) for name in varied},
        "recovered": (
            share,
            "-"
            if share is None
            else bar(share, *limits(recovered), null_recovered, 1.0)
            + f"<span>{escape(tables.share(recovered) if recovered else tables.number(share))}</span>",
        ),
        "PSNR (dB)": (
            psnr and psnr["mean"],
            "-"
            if not psnr
            else bar(psnr["mean"], *limits(psnr), null_psnr, BEST_PSNR)
            + f"<span>{psnr_text(psnr)}{f', null {null_psnr:.1f}' if null_psnr is not None else ''}</span>",
        ),
        "above null (dB)": (gain and gain["mean"], tables.interval(gain)),
        "identified": (
            identified and identified["share"],
            "-"
            if not identified
            else bar(identified["share"], *limits(identified), identified["chance"], 1.0)
            + f"<span>{escape(tables.share(identified))}, chance {identified['chance']:.3f}</span>",
        ),
        "identified at most": (s.get("identified_bound"), tables.number(s.get("identified_bound"), 3)),
        "test accuracy": (s.get("accuracy"), tables.number(s.get("accuracy"), 3)),
    }
    for name, _ in columns:
        value, content = values[name]
        key = "" if value is None else str(value)
        yield f'<td role="cell" data-label="{escape(name)}" data-value="{escape(key)}">{content}</td>'


def defense_tables(runs: Sequence[Run]) -> Iterator[str]:
    """What each defence changes, among runs that are equal otherwise."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(str({k: v for k, v in run.settings.items() if k != "defense"}), []).append(run)
    compared = [group for group in groups.values() if len({run.defense for run in group}) > 1]
    if not compared:
        return
    yield '<section id="defences" aria-labelledby="defences-title"><h2 id="defences-title">What a defence changes</h2>'
    labels = [key for key in differing([group[0] for group in compared]) if key != "defense"]
    for group in compared:
        first = group[0]
        extra = ", ".join(f"{name} {first.settings[name]}" for name in labels if name not in SHORT_TITLE)
        yield f"<h3>{escape(short_title(first))}{f' · {escape(extra)}' if extra else ''}</h3>"
        yield f"<p>{escape(_advice(group))}</p>"
        yield '<div class="scroll" tabindex="0" role="region" aria-label="Table of defences"><table>'
        head = ("defence", "verdict", "recovered", "PSNR (dB)", "above null (dB)", "identified", "bound", "accuracy")
        yield f"<thead><tr>{''.join(f'<th scope=col>{h}</th>' for h in head)}</tr></thead><tbody>"
        for run in sorted(group, key=lambda r: r.leakage, reverse=True):
            s = run.summary
            cells = (
                f'<a href="#run-{run.number}">{escape(run.defense)}</a>',
                badge(run.verdict),
                escape(
                    tables.share(found) if (found := (s.get("recovered") or {}).get(f"{RECOVERED_PSNR:g}")) else "-"
                ),
                tables.mean_std(s["psnr"]),
                tables.interval(s.get("over_null")),
                tables.share(s.get("identified")),
                tables.number(s.get("identified_bound"), 3),
                tables.number(s.get("accuracy"), 3),
            )
            yield f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"
        yield "</tbody></table></div>"
    yield "</section>"


def _advice(group: Sequence[Run]) -> str:
    """Which defences end the leak of this attack, in one or two sentences."""
    undefended = [run for run in group if run.defense == "none"]
    quiet = [run for run in group if run.defense != "none" and run.verdict == "no leak found by this attack"]
    leaking = [run for run in group if run.defense != "none" and run.verdict == "leaks"]
    parts = []
    if undefended:
        verdict, share = undefended[0].verdict, undefended[0].summary.get("success_rate")
        recovered = "" if share is None else f" ({share:.0%} of the images recovered)"
        parts.append(f"Without a defence: {verdict}{recovered}.")
    if quiet:
        names = dict.fromkeys(run.defense for run in sorted(quiet, key=lambda run: strengths(run.defense)))
        parts.append(f"No leak was found by this attack with {', '.join(names)}.")
    if leaking:
        parts.append(f"It still leaks with {', '.join(dict.fromkeys(run.defense for run in leaking))}.")
    return " ".join(parts) + " Another attack, or one that is given more time, may find more."


def comparison_charts(runs: Sequence[Run]) -> Iterator[str]:
    found = curves.comparison_charts(runs)
    if not found:
        return
    yield '<section id="curves" aria-labelledby="curves-title"><h2 id="curves-title">Leakage over settings</h2>'
    yield (
        "<p>A line joins runs that differ in one setting. Solid: the reconstructions, with 95% intervals. Dashed: the "
        "null or chance, without the update. Dots without a line: the bound by differential privacy.</p>"
    )
    for _, drawings in found:
        yield f'<div class="charts">{"".join(chart.html() for chart in drawings)}</div>'
    yield "</section>"
