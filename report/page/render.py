"""The page as text: HTML from runs. Everything that comes from a file is escaped."""

import base64
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from pathlib import Path

from report import style, tables
from report.page.article import article_start, details_of, pair_figure, run_pair
from report.page.cases import cases
from report.page.images import Pair, pairs_of
from report.page.load import Run
from report.page.overview import cells_of, columns_of, comparison_charts, defense_tables, runs_table
from report.page.words import VERDICTS, headline, title, varied_settings

__all__ = ["details", "document", "headline", "lightbox", "page", "pair_figure"]

PICTURES = 6_500_000  # bytes of all pictures of a page
HERE = Path(__file__).parent


def details(run: Run) -> str | None:
    """What an article says below the pictures; None if the records lack something: earlier versions wrote less."""
    try:
        "".join(cells_of(run, None, columns_of([run], ()), ()))
        found = "".join(details_of(run))
        return found if run.leakage and run.settings and tables.verdict(run.summary) else None
    except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError):
        return None


def page(runs: Mapping[Run, str], left_out: Sequence[Path], show_victims: bool) -> str:
    """One HTML document, which loads nothing from anywhere.

    runs: at least one, with its details. left_out: folders without a run that can be shown.
    """
    pictures = gather_pictures([*runs], show_victims)
    return document(headline([*runs]), _body(runs, left_out, pictures))


def document(heading: str, body: Iterable[str]) -> str:
    """A whole HTML document, with style and script inside, which may load nothing."""
    script = (HERE / "script.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(heading)} · Federated Privacy Attack</title>\n"
        f"<style>{style.css_variables()}{(HERE / 'style.css').read_text(encoding='utf-8')}</style>\n</head>\n"
        f"<body>\n{''.join(body)}\n<script>{script}</script>\n</body>\n</html>\n"
    )


def gather_pictures(runs: Sequence[Run], show_victims: bool) -> dict[int, list[Pair]]:
    """The pairs of each run by its number. Pictures of an audit are private and left out without `show_victims`."""
    shown = [run for run in runs if show_victims or not run.is_audit]
    budget = PICTURES // max(len(shown), 1)
    return {run.number: pairs_of(run.folder, run.rows, budget) for run in shown}


def _body(found: Mapping[Run, str], left_out: Sequence[Path], pictures: Mapping[int, list[Pair]]) -> Iterator[str]:
    runs = [*found]
    ranked = sorted(runs, key=lambda run: run.leakage, reverse=True)
    varied = varied_settings(runs)
    yield '<a class="skip" href="#runs">Skip to the table of runs</a>'
    yield from _hero(ranked, pictures)
    yield "<main>"
    if len(runs) > 1:
        yield from cases(ranked, pictures)
        yield from runs_table(ranked, pictures, varied)
        yield from defense_tables(runs)
        yield from comparison_charts(runs)
    yield '<section id="each" aria-labelledby="each-title">'
    if len(runs) > 1:
        yield '<h2 id="each-title">Every run</h2>'
    else:
        yield '<h2 id="each-title">The run</h2>'
    for run in ranked:
        yield from article_start(run, pictures.get(run.number), varied)
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
        yield f'<p class="lead">The most exposing run is <a href="#run-{first.number}">{escape(title(first))}</a>.</p>'
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
        yield f'<div class="showcase">{run_pair(first, pairs[0], big=True)}</div>'
    yield "</header>"


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
