"""A run on the page: its pictures, drawings, numbers, attacker and command."""

from collections.abc import Iterator, Sequence
from html import escape

from evaluation.summary import RECOVERED_PSNR
from report import tables
from report.page import curves
from report.page.charts import Chart, bar
from report.page.images import Pair
from report.page.load import Run
from report.page.words import badge, command, setting, title

BEST_PSNR = 50.0  # dB, the end of the scale of a bar: higher values look the same

THREATS = {
    "honest-but-curious": "The server follows the protocol and looks at what it receives.",
    "malicious-parameters": "The server sends weights of its own choice and looks at what it receives.",
    "malicious-architecture": "The server adds layers to the model and looks at what it receives.",
}


def article_start(run: Run, pairs: Sequence[Pair] | None, varied: Sequence[str]) -> Iterator[str]:
    """The beginning of a run's article, which its details end."""
    s = run.summary
    number = run.number
    yield f'<article class="run" id="run-{number}" data-run="{number}" aria-labelledby="title-{number}">'
    settings = ", ".join(f"{name} {value}" for name in varied if (value := setting(run, name)) != "-")
    yield f'<header><h3 id="title-{number}">{escape(title(run))}</h3>{badge(run.verdict)}</header>'
    if settings:
        yield f'<p class="settings">{escape(settings)}</p>'
    yield f'<p class="sentence">{escape(tables.verdict(s))}</p>'
    yield from _gallery(run, pairs)


def details_of(run: Run) -> Iterator[str]:
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
    yield from (run_pair(run, pair) for pair in pairs)
    yield "</div>"
    notes = []
    if len(pairs) < len(run.rows):
        notes.append(f"{len(pairs)} of {len(run.rows)} images: most exposed, median and least exposed, then the next.")
    if max(pair.shrunk for pair in pairs) > 1:
        notes.append("Pictures are averaged over blocks of pixels, to keep the page small.")
    if notes:
        yield f'<p class="note">{" ".join(notes)}</p>'


def run_pair(run: Run, pair: Pair, big: bool = False) -> str:
    """A pair of a run, with its title and, unless the run is an audit, the name of its file."""
    name = "" if run.is_audit or "file" not in pair.row else f" · {pair.row['file']}"
    return pair_figure(title(run), pair, name, big)


def pair_figure(heading: str, pair: Pair, name: str = "", big: bool = False) -> str:
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
    label = escape(f"Enlarge {pair.rank or 'pair'}: {heading}, {where}, {score}")
    tag = '<span class="tag" aria-hidden="true">'
    words = " · ".join(part for part in (heading, where, f"{score}, {quality}", beside) if part)
    return (
        f'<figure class="pair{" big" if big else ""}"><button type="button" class="enlarge" '
        f'data-caption="{escape(words)}"><span class="aside">{label}</span>'
        f'<span class="truth"><img src="{pair.left}" alt="truth" {size}>{tag}truth</span></span>'
        f'<span class="rebuilt">{right}{tag}reconstruction</span></span></button>{caption}</figure>'
    )


def thumbnails(run: Run, pairs: Sequence[Pair] | None) -> str:
    """The most exposed pair; a shared picture, so that it is stored once: the script copies it from the gallery."""
    if not pairs or pairs[0].size is None:
        return '<span class="note">private</span>' if pairs is None else "-"
    score = "missed" if pairs[0].right is None else f"{pairs[0].row['psnr']:.1f} dB"
    alt = escape(f"most exposed image of {title(run)}: {score}")
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
