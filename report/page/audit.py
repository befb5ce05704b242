"""The page of an audit: the verdict, the pictures, what was tried, what is proven, and the setting that passes."""

import re
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from evaluation.summary import RECOVERED_PSNR
from report.audit import Points, Result, Section, Table, exit_line, sections
from report.page.charts import Chart, Point, Series, exact
from report.page.images import Pair
from report.page.load import strengths
from report.page.render import document, lightbox, pair_figure

LIGHTS = {"red": "leaks", "amber": "undecided", "no leak found": "quiet", "none": "unscored"}  # CSS classes
MARKS = (("`", "code"), (r"\*\*", "strong"), (r"\*", "em"))
SHOTS = 16  # pictures of an attack on an update without truth
RECORDS = 60  # records of a drawing

Row = Mapping[str, Any]


def audit_page(
    result: Result, rows: Sequence[Row], pairs: Sequence[Pair] | None, shots: Mapping[str, Sequence[str]]
) -> str:
    """One HTML document, which loads nothing.

    result: audit.json. rows: of each record the row of the attack that came nearest to it; empty without truth. pairs:
    the pictures of these rows, None if they are private. shots: by attack, the pictures (`data:` URIs) that it returned
    for an update without truth.
    """
    return document(headline(result), _body(result, rows, pairs, shots))


def headline(result: Result) -> str:
    """The verdict in a few words."""
    verdict, worst, agreement = result["verdict"], result["worst_case"], result["agreement"]
    if verdict["light"] == "none":
        return "Nothing was tested"
    if worst is not None:
        if worst["recovered"]:
            return f"{worst['recovered']} of {worst['records']} records recovered"
        return "Updates reveal more than labels" if verdict["light"] == "amber" else "No leak found"
    agreed = agreement["agreed_records"] if agreement else 0
    if agreed:
        return f"{agreed} of {result['harm']['records_per_update']} records exposed"
    return "No leak found, and nothing scored"


def _body(
    result: Result, rows: Sequence[Row], pairs: Sequence[Pair] | None, shots: Mapping[str, Sequence[str]]
) -> Iterator[str]:
    found = {section.name: section for section in sections(result)}
    yield '<a class="skip" href="#worst">Skip to the worst case</a>'
    yield from _hero(result, pairs)
    yield "<main>"
    yield from _pictures(rows, pairs)
    yield from _shots(result, shots)
    for name in ("worst", "agreement", "attacks", "proof", "advice"):
        if name in found:
            charts = {"worst": _records_chart(rows), "advice": _advice_chart(result)}.get(name)
            yield from _section(found[name], charts)
    yield from _repeat(result)
    for name in ("scope", "lights", "meaning"):
        yield from _section(found[name], None)
    yield "</main>"
    yield lightbox()


def _hero(result: Result, pairs: Sequence[Pair] | None) -> Iterator[str]:
    verdict, entries = result["verdict"], result["attacks"]
    yield '<header class="hero"><div class="words"><p class="brand">Federated Privacy Attack: audit</p>'
    yield f'<h1 class="{LIGHTS[verdict["light"]]}">{escape(headline(result))}</h1>'
    yield f'<p class="lead">{escape(verdict["sentence"])}</p><p class="lead">{escape(exit_line(verdict))}</p>'
    advice = result["recommendation"]
    if advice is not None and advice["setting"] is not None:
        setting = escape(advice["setting"])
        yield f'<p class="lead">With <code>--defense "{setting}"</code> every attack that leaked passes.</p>'
    ran = [e for e in entries if e["status"] == "ran"]
    leaking = sum(bool(e.get("recovered")) for e in ran)
    tiles = (
        ("leaks", leaking, "attack(s) recovered records"),
        ("quiet", len(ran) - leaking, "attack(s) recovered none" if result["worst_case"] else "attack(s) ran"),
        ("unscored", len(entries) - len(ran), "attack(s) not run"),
    )
    yield '<ul class="tiles">'
    for kind, count, label in tiles:
        if count:
            yield f'<li class="{kind}"><strong>{count}</strong> <span>{label}</span></li>'
    yield "</ul></div>"
    if pairs and pairs[0].size is not None:
        yield f'<div class="showcase">{pair_figure(str(pairs[0].row["attack"]), pairs[0], big=True)}</div>'
    yield "</header>"


def _pictures(rows: Sequence[Row], pairs: Sequence[Pair] | None) -> Iterator[str]:
    if not rows:
        return
    yield '<section id="pictures" aria-labelledby="pictures-title"><h2 id="pictures-title">Reconstructions</h2>'
    if pairs is None:
        yield (
            '<p class="private">The records are private, and so are pictures that an attack recovered. '
            "<code>--show-victims</code> puts them on the page.</p></section>"
        )
        return
    yield "<p>Of each record, the attack that came nearest to it. The upright mark on a bar is the null: the score of "
    yield 'somebody who learns nothing from the update.</p><article class="run"><div class="gallery">'
    yield from (pair_figure(str(pair.row["attack"]), pair, f" · {pair.row['attack']}") for pair in pairs)
    yield "</div>"
    if len(pairs) < len(rows):
        yield f'<p class="note">{len(pairs)} of {len(rows)} records: most exposed, median and least exposed, then '
        yield "the next.</p>"
    yield "</article></section>"


def _shots(result: Result, shots: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """What attacks returned for an update without truth, the best explanation of the update first."""
    if not shots:
        return
    entries = {e["attack"]: e for e in result["attacks"]}

    def mismatch(name: str) -> float:
        found = entries[name]["mismatch"]
        return float("inf") if found is None else float(found)

    yield '<section id="pictures" aria-labelledby="pictures-title"><h2 id="pictures-title">Reconstructions</h2>'
    yield "<p>Nobody has compared these pictures with private ones. The lower the mismatch, the better a picture "
    yield "explains the update; 0 is an exact explanation. What independent attacks agree on is in the update.</p>"
    for name in sorted(shots, key=mismatch):
        found, uris = entries[name]["mismatch"], shots[name]
        explained = "" if found is None else f", mismatch {found:.4f}"
        more = f", {SHOTS} of {len(uris)}" if len(uris) > SHOTS else ""
        yield f"<h4>{escape(name)}{explained}{more}</h4>"
        yield '<div class="shots">'
        for k, uri in enumerate(uris[:SHOTS]):
            yield f'<span class="rebuilt"><img src="{uri}" alt="{escape(name)}, record {k}"></span>'
        yield "</div>"
    yield "</section>"


def _section(section: Section, chart: Chart | None) -> Iterator[str]:
    name = section.name
    yield f'<section id="{name}" aria-labelledby="{name}-title"><h2 id="{name}-title">{escape(section.title)}</h2>'
    for block in section.blocks:
        if isinstance(block, Points):
            yield f'<ul class="points">{"".join(f"<li>{_inline(line)}</li>" for line in block.lines)}</ul>'
        elif isinstance(block, Table):
            yield from _table(block, section.title)
        else:
            yield f"<p>{_inline(block)}</p>"
    if chart is not None:
        yield f'<div class="charts">{chart.html()}</div>'
    yield "</section>"


def _table(table: Table, title: str) -> Iterator[str]:
    label = escape(f"Table: {title}")
    yield f'<div class="scroll" tabindex="0" role="region" aria-label="{label}"><table>'
    if any(table.head):
        yield f"<thead><tr>{''.join(f'<th scope=col>{escape(cell)}</th>' for cell in table.head)}</tr></thead>"
    yield "<tbody>"
    for first, *others in table.rows:
        cells = "".join(f"<td>{_inline(cell)}</td>" for cell in others)
        yield f"<tr><th scope=row>{_inline(first)}</th>{cells}</tr>"
    yield "</tbody></table></div>"


def _repeat(result: Result) -> Iterator[str]:
    yield '<section id="repeat" aria-labelledby="repeat-title"><h2 id="repeat-title">Repeat this audit</h2>'
    yield '<div class="command"><pre tabindex="0"><code>'
    yield f"{escape(result['reproduce']['command'])}</code></pre>"
    yield '<button type="button" data-copy aria-label="Copy the command">Copy</button></div>'
    yield f'<p class="origin">{result["minutes"]:g} minutes · audit.json and rows.json hold all numbers · '
    yield "reconstructions.safetensors holds what the attacks returned</p></section>"


def _records_chart(rows: Sequence[Row]) -> Chart | None:
    """PSNR of every record under the attack that came nearest to it, beside the mean images."""
    if not rows:
        return None
    ranked = sorted(rows, key=lambda row: -row["psnr"])
    step = (len(ranked) - 1) / max(min(len(ranked), RECORDS) - 1, 1)
    places = sorted({round(k * step) for k in range(min(len(ranked), RECORDS))})
    own, null = [], []
    for place in places:
        row = ranked[place]
        where = f"update {row['trial']}, record {row['image']}"
        own.append(Point(place + 1, row["psnr"], f"{where}: {exact(row['psnr'])} dB, {row['attack']}"))
        if row.get("null_psnr") is not None:
            null.append(Point(place + 1, row["null_psnr"], f"{where}: {exact(row['null_psnr'])} dB"))
    series = [Series("null of the same record", null, None, "dots"), Series("reconstruction", own, 1, "dots")]
    line = [(RECOVERED_PSNR, f"recovered: {RECOVERED_PSNR:g} dB")]
    return Chart("PSNR of every record, strongest attack", "records, most exposed first", "PSNR (dB)", series, line)


def _advice_chart(result: Result) -> Chart | None:
    """The share of records that each attack recovers over the noise that was tried."""
    advice = result["recommendation"]
    if advice is None or not advice["tried"]:
        return None
    undefended = {e["attack"]: e["recovered"] for e in result["attacks"] if e.get("recovered") is not None}
    ticks = [(0.0, "as it is")]
    points: dict[str, list[Point]] = {}
    for x, entry in enumerate(advice["tried"], 1):
        strength = strengths(entry["defense"])
        ticks.append((float(x), f"{strength[-1][1]:g}" if strength else entry["defense"]))
        for name, share in entry["recovered"].items():
            points.setdefault(name, []).append(Point(x, share, f"{entry['defense']}: {share:.0%}"))
    series = [
        Series(name, [Point(0, undefended[name], f"as it is: {undefended[name]:.0%}"), *found], k + 1)
        for k, (name, found) in enumerate(points.items())
    ]
    return Chart("Recovered records over the noise", "standard deviation", "share", series, ticks=ticks, y_range=(0, 1))


def _inline(text: str) -> str:
    """Escaped text in which the marks of Markdown are elements."""
    found = escape(text)
    for mark, element in MARKS:
        found = re.sub(f"{mark}([^`*]+){mark}", rf"<{element}>\1</{element}>", found)
    return found
