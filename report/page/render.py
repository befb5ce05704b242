"""The page as text: HTML from runs. Everything that comes from a file is escaped."""

import base64
import hashlib
import json
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from evaluation.summary import RECOVERED_PSNR
from report import style, tables
from report.page import curves
from report.page.charts import Chart, bar
from report.page.images import Pair, pairs_of
from report.page.load import Run, differing, strengths

PICTURES = 6_500_000  # bytes of all pictures of a page
BEST_PSNR = 50.0  # dB, the end of the scale of a bar: higher cannot be told apart by eye
COLUMNS = 5  # of settings in which runs differ

THREATS = {
    "honest-but-curious": "The server follows the protocol and looks at what it receives.",
    "malicious-parameters": "The server sends weights of its own choice and looks at what it receives.",
    "malicious-architecture": "The server adds layers to the model and looks at what it receives.",
}
VERDICTS = {
    "leaks": ("leaks", "●", "leaks"),
    "too few updates to tell": ("undecided", "◐", "too few updates to tell"),
    "no leak found by this attack": ("quiet", "○", "no leak found"),
    "not scored": ("unscored", "–", "not scored"),
}
HERE = Path(__file__).parent

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


def details(run: Run) -> str | None:
    """What an article says below the pictures; None if the records lack something: earlier versions wrote less."""
    try:
        "".join(_cells(run, None, _columns([run], ()), ()))
        found = "".join(_details(run))
        return found if run.leakage and run.settings and tables.verdict(run.summary) else None
    except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError):
        return None


def page(runs: Mapping[Run, str], left_out: Sequence[Path], show_victims: bool) -> str:
    """One HTML document, which loads nothing from anywhere.

    runs: at least one, with its details. left_out: folders without a run that can be shown.
    """
    pictures = gather_pictures([*runs], show_victims)
    return document(headline([*runs]), _body(runs, left_out, pictures))


def document(title: str, body: Iterable[str]) -> str:
    """A whole HTML document, with style and script inside, which may load nothing."""
    script = (HERE / "script.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(title)} · Federated Privacy Attack</title>\n"
        f"<style>{_colors()}{(HERE / 'style.css').read_text(encoding='utf-8')}</style>\n</head>\n"
        f"<body>\n{''.join(body)}\n<script>{script}</script>\n</body>\n</html>\n"
    )


def gather_pictures(runs: Sequence[Run], show_victims: bool) -> dict[int, list[Pair]]:
    """The pairs of each run by its number. Pictures of an audit are private and left out without `show_victims`."""
    shown = [run for run in runs if show_victims or not run.is_audit]
    budget = PICTURES // max(len(shown), 1)
    return {run.number: pairs_of(run.folder, run.rows, budget) for run in shown}


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


def _body(found: Mapping[Run, str], left_out: Sequence[Path], pictures: Mapping[int, list[Pair]]) -> Iterator[str]:
    runs = [*found]
    ranked = sorted(runs, key=lambda run: run.leakage, reverse=True)
    varied = _varied(runs)
    yield '<a class="skip" href="#runs">Skip to the table of runs</a>'
    yield from _hero(ranked, pictures)
    yield "<main>"
    if len(runs) > 1:
        yield from _table(ranked, pictures, varied)
        yield from _defenses(runs)
        yield from _comparison(runs)
    yield '<section id="each" aria-labelledby="each-title">'
    if len(runs) > 1:
        yield '<h2 id="each-title">Every run</h2>'
    else:
        yield '<h2 id="each-title">The run</h2>'
    for run in ranked:
        yield from _article(run, pictures.get(run.number), varied)
        yield f"{found[run]}</article>"
    yield "</section>"
    yield from _glossary()
    yield from _left_out(left_out)
    yield "</main>"
    yield lightbox()


def _hero(ranked: Sequence[Run], pictures: Mapping[int, list[Pair]]) -> Iterator[str]:
    first = ranked[0]
    yield '<header class="hero"><div class="words"><p class="brand">Federated Privacy Attack</p>'
    yield f'<h1 class="{VERDICTS.get(first.verdict, VERDICTS["not scored"])[0]}">{escape(headline(ranked))}</h1>'
    if len(ranked) > 1:
        yield f'<p class="lead">The most exposing run is <a href="#run-{first.number}">{escape(_title(first))}</a>.</p>'
    yield f'<p class="lead">{escape(tables.verdict(first.summary))}</p>'
    if len(ranked) > 1:
        yield '<ul class="tiles">'
        for verdict, (kind, sign, label) in VERDICTS.items():
            count = sum(run.verdict == verdict for run in ranked)
            if count:
                yield f'<li class="{kind}"><strong>{count}</strong> <span>{sign} {label}</span></li>'
        yield "</ul>"
    yield "</div>"
    pairs = pictures.get(first.number)
    if pairs and pairs[0].size is not None:
        yield f'<div class="showcase">{_pair(first, pairs[0], big=True)}</div>'
    yield "</header>"


def _table(ranked: Sequence[Run], pictures: Mapping[int, list[Pair]], varied: Sequence[str]) -> Iterator[str]:
    yield '<section id="runs" aria-labelledby="runs-title"><h2 id="runs-title">All runs</h2>'
    filters = {name: {value(run) for run in ranked} for name, value in KEYS.items()}
    filters |= {name: {_setting(run, name) for run in ranked} for name in varied}
    yield '<form class="filters" role="search" aria-label="Filter the runs">'
    for name, values in filters.items():
        if len(values) > 1 or name in ("attack", "mode", "defence", "data"):
            options = "".join(f"<option>{escape(v)}</option>" for v in sorted(values, key=tables.sort_key))
            yield (
                f'<label>{escape(name)}<select data-filter="{escape(name)}"><option value="">all</option>{options}'
                "</select></label>"
            )
    yield '<label>any word<input type="search" data-filter-text placeholder="search"></label>'
    columns = _columns(ranked, varied)
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
        keys = {name: value(run) for name, value in KEYS.items()} | {name: _setting(run, name) for name in varied}
        yield f'<tr role="row" data-run="{run.number}" data-keys="{escape(json.dumps(keys))}">'
        yield from _cells(run, pictures.get(run.number), columns, varied)
        yield "</tr>"
    yield "</tbody></table></div></section>"


def _columns(runs: Sequence[Run], varied: Sequence[str]) -> list[tuple[str, str]]:
    """(name, help) of the columns."""
    helps = {entry.key: entry.help for entry in tables.ENTRIES}
    columns = [("verdict", ""), ("pictures", ""), ("attack", "")]
    columns += [("recovered", helps["success_rate"]), ("PSNR (dB)", helps["psnr"])]
    columns += [(name, "") for name, value in PLACES.items() if len({value(run) for run in runs}) > 1]
    columns += [(name, "setting in which the runs differ") for name in varied]
    columns.append(("above null (dB)", helps["over_null"]))
    if any(run.summary.get("identified") for run in runs):
        columns.append(("identified", helps["identified"]))
    if any(run.summary.get("identified_bound") is not None for run in runs):
        columns.append(("identified at most", helps["identified_bound"]))
    if any(run.summary.get("accuracy") is not None for run in runs):
        columns.append(("test accuracy", helps["accuracy"]))
    return columns


def _cells(
    run: Run, pairs: Sequence[Pair] | None, columns: Sequence[tuple[str, str]], varied: Sequence[str]
) -> Iterator[str]:
    s = run.summary
    psnr, null, gain, identified = s.get("psnr"), s.get("null"), s.get("over_null"), s.get("identified")
    recovered = (s.get("recovered") or {}).get(f"{RECOVERED_PSNR:g}")
    null_recovered, null_psnr = (null["recovered"], null["psnr"]["mean"]) if null else (None, None)
    share = s.get("success_rate")
    values: dict[str, tuple[Any, str]] = {
        "verdict": (-run.leakage[0], f'<a href="#run-{run.number}">{_badge(run.verdict)}</a>'),
        "pictures": (None, _thumbnails(run, pairs)),
        "attack": (run.attack, f'<a href="#run-{run.number}">{escape(run.attack)}</a>'),
        **{name: (value(run), escape(value(run))) for name, value in PLACES.items()},
        **{name: (_setting(run, name).replace("-", "", 1), escape(_setting(run, name))) for name in varied},
        "recovered": (
            share,
            "-"
            if share is None
            else bar(share, *_limits(recovered), null_recovered, 1.0)
            + f"<span>{escape(tables.share(recovered) if recovered else tables.number(share))}</span>",
        ),
        "PSNR (dB)": (
            psnr and psnr["mean"],
            "-"
            if not psnr
            else bar(psnr["mean"], *_limits(psnr), null_psnr, BEST_PSNR)
            + f"<span>{_psnr(psnr)}{f', null {null_psnr:.1f}' if null_psnr is not None else ''}</span>",
        ),
        "above null (dB)": (gain and gain["mean"], tables.interval(gain)),
        "identified": (
            identified and identified["share"],
            "-"
            if not identified
            else bar(identified["share"], *_limits(identified), identified["chance"], 1.0)
            + f"<span>{escape(tables.share(identified))}, chance {identified['chance']:.3f}</span>",
        ),
        "identified at most": (s.get("identified_bound"), tables.number(s.get("identified_bound"), 3)),
        "test accuracy": (s.get("accuracy"), tables.number(s.get("accuracy"), 3)),
    }
    for name, _ in columns:
        value, content = values[name]
        key = "" if value is None else str(value)
        yield f'<td role="cell" data-label="{escape(name)}" data-value="{escape(key)}">{content}</td>'


def _defenses(runs: Sequence[Run]) -> Iterator[str]:
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
        extra = ", ".join(f"{name} {first.settings[name]}" for name in labels if name not in ("attack", "mode"))
        yield f"<h3>{escape(_short_title(first))}{f' · {escape(extra)}' if extra else ''}</h3>"
        yield f"<p>{escape(_advice(group))}</p>"
        yield '<div class="scroll" tabindex="0" role="region" aria-label="Table of defences"><table>'
        head = ("defence", "verdict", "recovered", "PSNR (dB)", "above null (dB)", "identified", "bound", "accuracy")
        yield f"<thead><tr>{''.join(f'<th scope=col>{h}</th>' for h in head)}</tr></thead><tbody>"
        for run in sorted(group, key=lambda r: r.leakage, reverse=True):
            s = run.summary
            cells = (
                f'<a href="#run-{run.number}">{escape(run.defense)}</a>',
                _badge(run.verdict),
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


def _comparison(runs: Sequence[Run]) -> Iterator[str]:
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


def _article(run: Run, pairs: Sequence[Pair] | None, varied: Sequence[str]) -> Iterator[str]:
    """The beginning of a run's article, which its details end."""
    s = run.summary
    number = run.number
    yield f'<article class="run" id="run-{number}" data-run="{number}" aria-labelledby="title-{number}">'
    settings = ", ".join(f"{name} {value}" for name in varied if (value := _setting(run, name)) != "-")
    yield f'<header><h3 id="title-{number}">{escape(_title(run))}</h3>{_badge(run.verdict)}</header>'
    if settings:
        yield f'<p class="settings">{escape(settings)}</p>'
    yield f'<p class="sentence">{escape(tables.verdict(s))}</p>'
    yield from _gallery(run, pairs)


def _details(run: Run) -> Iterator[str]:
    """Drawings, numbers, the attacker and the command."""
    s = run.summary
    charts: list[Chart | None] = [
        curves.images_chart(run),
        curves.shares_chart(run),
        curves.objective_chart(run),
        curves.rounds_chart(run),
        curves.accuracy_chart(run),
    ]
    yield f'<div class="charts">{"".join(chart.html() for chart in charts if chart)}</div>'
    yield '<div class="facts"><div>'
    yield '<h4>Numbers</h4><table class="numbers"><tbody>'
    for entry in tables.entries_of([s]):
        name, value = escape(entry.label), escape(tables.cell(s, entry))
        yield f'<tr><th scope="row" title="{escape(entry.help)}">{name}</th><td>{value}</td></tr>'
    yield "</tbody></table></div><div>"
    yield from _attacker(run)
    yield "</div></div>"
    yield from _repeat(run)


def _gallery(run: Run, pairs: Sequence[Pair] | None) -> Iterator[str]:
    if pairs is None:
        yield (
            '<p class="private">This run is an audit, and its pictures are private. <code>--show-victims</code> puts '
            "them on the page.</p>"
        )
        return
    if not pairs:
        if run.rows:
            yield '<p class="private">The file of reconstructions is missing or damaged, so there are no pictures.</p>'
        return
    yield '<div class="gallery">'
    yield from (_pair(run, pair) for pair in pairs)
    yield "</div>"
    notes = []
    if len(pairs) < len(run.rows):
        notes.append(f"{len(pairs)} of {len(run.rows)} images: most exposed, median and least exposed, then the next.")
    if max(pair.shrunk for pair in pairs) > 1:
        notes.append("Pictures are averaged over blocks of pixels, to keep the page small.")
    if notes:
        yield f'<p class="note">{" ".join(notes)}</p>'


def _pair(run: Run, pair: Pair, big: bool = False) -> str:
    name = "" if run.is_audit or "file" not in pair.row else f" · {pair.row['file']}"
    return pair_figure(_title(run), pair, name, big)


def pair_figure(title: str, pair: Pair, name: str = "", big: bool = False) -> str:
    """Truth and reconstruction side by side, and how near they are."""
    row = pair.row
    missed = row.get("match") is None
    where = f"trial {row.get('trial', 0)}, image {row.get('image', 0)}"
    null = row.get("null_psnr")
    score = "missed" if missed else f"{row['psnr']:.1f} dB"
    recovered = not missed and row["psnr"] >= RECOVERED_PSNR
    quality = "missed" if missed else "recovered" if recovered else "not recovered"
    beside = "" if null is None else f"null {null:.1f} dB"
    rank = f'<span class="rank">{pair.rank}</span>' if pair.rank else ""
    caption = (
        f'<figcaption>{rank}<span class="score {"yes" if recovered else "no"}"><strong>{score}</strong> '
        f"{quality}</span>"
        f"{bar(row['psnr'], None, None, null, BEST_PSNR)}"
        f'<span class="where">{beside}{" · " if beside else ""}{escape(where + name)}</span></figcaption>'
    )
    if pair.size is None:
        return (
            f'<figure class="pair words"><dl><dt>truth</dt><dd>{escape(pair.left)}</dd><dt>reconstruction</dt>'
            f"<dd>{escape(pair.right or 'none')}</dd></dl>{caption}</figure>"
        )
    width, height = pair.size
    size = f'width="{width}" height="{height}" decoding="async"'
    right = (
        f'<img src="{pair.right}" alt="reconstruction" {size}>'
        if pair.right
        else '<span class="nothing">no reconstruction</span>'
    )
    label = escape(f"Enlarge {pair.rank or 'pair'}: {title}, {where}, {score}")
    tag = '<span class="tag" aria-hidden="true">'
    words = " · ".join(part for part in (title, where, f"{score}, {quality}", beside) if part)
    return (
        f'<figure class="pair{" big" if big else ""}"><button type="button" class="enlarge" '
        f'data-caption="{escape(words)}"><span class="aside">{label}</span>'
        f'<span class="truth"><img src="{pair.left}" alt="truth" {size}>{tag}truth</span></span>'
        f'<span class="rebuilt">{right}{tag}reconstruction</span></span></button>{caption}</figure>'
    )


def _thumbnails(run: Run, pairs: Sequence[Pair] | None) -> str:
    """The most exposed pair; a shared picture, so that it is stored once: the script copies it from the gallery."""
    if not pairs or pairs[0].size is None:
        return '<span class="note">private</span>' if pairs is None else "-"
    score = "missed" if pairs[0].right is None else f"{pairs[0].row['psnr']:.1f} dB"
    alt = escape(f"most exposed image of {_title(run)}: {score}")
    return (
        f'<span class="thumbs" data-thumbs="{run.number}" role="img" aria-label="{alt}"><span class="truth"></span>'
        '<span class="rebuilt"></span></span>'
    )


def _attacker(run: Run) -> Iterator[str]:
    s, config = run.summary, run.config
    threat = str(s.get("threat") or config.get("threat") or "")
    yield "<h4>Threat model</h4>"
    yield f"<p><strong>{escape(threat or 'not recorded')}</strong>. {escape(THREATS.get(threat, ''))}</p>"
    yield "<h4>What the attacker knew</h4><ul>"
    for fact in ("the task, the model and the update", *s.get("knows", config.get("knows") or ())):
        yield f"<li>{escape(str(fact))}</li>"
    yield "</ul>"
    granted = s.get("oracle") or []
    if granted:
        yield f"<p>Granted facts about the victims (oracle): {escape(', '.join(map(str, granted)))}.</p>"
    yield "<h4>Bound</h4>"
    found, bound = s.get("guarantee"), s.get("identified_bound")
    if not found:
        yield "<p>The clients use no defence with a formal guarantee.</p>"
    elif not found.get("unit"):
        reason = str(found.get("reason", "no formal guarantee"))
        yield f"<p>{escape(reason[0].upper() + reason[1:])}.</p>"
    else:
        what = f"ε = {found['epsilon']:.3g} at δ = {found['delta']:g} for one update, per {escape(str(found['unit']))}"
        most = "" if bound is None else f" No attack identifies more than {bound:.3f} of the victims."
        yield f"<p>Differential privacy, {what}.{most}</p>"
    notes = s.get("notes") or []
    if notes:
        yield f"<h4>Remarks on the data</h4><p>{escape(' '.join(map(str, notes)))}</p>"


def _repeat(run: Run) -> Iterator[str]:
    words = command(run)
    yield '<h4>Repeat this run</h4><div class="command"><pre tabindex="0"><code>'
    yield f"{escape(words)}</code></pre>"
    yield '<button type="button" data-copy aria-label="Copy the command">Copy</button></div>'
    config = run.config
    origin = {
        "paper": config.get("paper"),
        "commit": config.get("commit"),
        "torch": config.get("torch"),
        "device": config.get("device"),
        "parameters": config.get("parameters"),
        "folder": run.folder,
    }
    known = [f"{escape(k)} <span>{escape(str(v))}</span>" for k, v in origin.items() if v is not None]
    yield f'<p class="origin">{" · ".join(known)}</p>'


def _glossary() -> Iterator[str]:
    yield '<section id="reading" aria-labelledby="reading-title"><h2 id="reading-title">How to read the numbers</h2>'
    yield (
        "<p><strong>leaks</strong>: the reconstructions are nearer to their victims than to other examples of the same "
        "labels, or identify more victims than chance allows. <strong>No leak found</strong> is a sentence about the "
        "attack that ran, not about the update: another attack may find one. The <strong>null</strong> is the score of "
        "somebody who learns nothing from the update and has the same freedom.</p>"
        "<details><summary>All metrics</summary><dl>"
    )
    for label, text in tables.METRIC_HELP.items():
        yield f"<dt>{escape(label)}</dt><dd>{escape(text)}</dd>"
    yield "</dl></details></section>"


def _left_out(folders: Sequence[Path]) -> Iterator[str]:
    if folders:
        yield '<section aria-labelledby="left-out"><h2 id="left-out">Left out</h2>'
        yield "<p>These folders hold an unfinished or damaged run, or one of an earlier version:</p><ul>"
        yield from (f"<li><code>{escape(str(folder))}</code></li>" for folder in folders)
        yield "</ul></section>"


def lightbox() -> str:
    """The dialog of an enlarged pair, and the place of a drawing's exact values."""
    return (
        '<dialog id="lightbox" aria-labelledby="lightbox-caption"><div class="pictures"></div>'
        '<p id="lightbox-caption"></p><div class="buttons"><button type="button" data-step="-1">← Previous</button>'
        '<button type="button" data-step="1">Next →</button><button type="button" data-close>Close</button></div>'
        '</dialog><div id="tip" role="status" aria-live="polite" hidden></div>'
    )


def _badge(verdict: str) -> str:
    kind, sign, label = VERDICTS.get(verdict, ("unscored", "–", verdict))
    return f'<span class="badge {kind}"><span aria-hidden="true">{sign}</span> {escape(label)}</span>'


def _title(run: Run) -> str:
    defense = "" if run.defense == "none" else f", {run.defense}"
    return f"{run.attack} · {run.mode} · {run.dataset} · {run.model}{defense}"


def _short_title(run: Run) -> str:
    return f"{run.attack} · {run.mode} · {run.dataset} · {run.model}"


def _varied(runs: Sequence[Run]) -> list[str]:
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


def _psnr(found: Mapping[str, Any]) -> str:
    """mean [low, high] over units, or the mean alone."""
    known = found.get("low") is not None and found.get("high") is not None
    return f"{found['mean']:.2f}" + (f" [{found['low']:.2f}, {found['high']:.2f}]" if known else "")


def _setting(run: Run, name: str) -> str:
    """A setting as the table shows it; a dash where the run does not have it, or leaves it to the default."""
    value = run.settings.get(name)
    return "-" if value is None or value == "" else str(value)


def _limits(found: Mapping[str, Any] | None) -> tuple[float | None, float | None]:
    return (None, None) if not found else (found.get("low"), found.get("high"))


def _colors() -> str:
    """CSS variables of the series, from the one style of all figures."""
    light = "".join(f"--c{i}:{color};" for i, color in enumerate(style.COLORS))
    dark = "".join(f"--c{i}:{color};" for i, color in enumerate(style.DARK_COLORS))
    own = f"--truth:{style.TRUTH[0]};--rebuilt:{style.REBUILT[0]};"
    dark_own = f"--truth:{style.TRUTH[1]};--rebuilt:{style.REBUILT[1]};"
    rules = "".join(f".c{i}{{--own:var(--c{i})}}" for i in range(len(style.COLORS)))
    dark_rule = f"@media screen and (prefers-color-scheme:dark){{:root{{{dark}{dark_own}}}}}"
    return f":root{{{light}{own}}}{dark_rule}{rules}"
