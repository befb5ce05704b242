"""Drawings as inline SVG: drawn once, read exactly on hover and by keyboard, printed as they are.

Every point carries the text that states its exact values. Colours are the CSS variables --c0 .. --c7 of the page.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from report.style import COLORS

WIDTH, HEIGHT = 420, 240
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 12, 42


@dataclass(frozen=True)
class Point:
    """low, high: ends of an interval, None for no interval. text: what a reader is shown at this point."""

    x: float
    y: float
    text: str
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Series:
    """Points under one name. color: index of a colour; None for the grey of references. look: "line", "dots" (no line),
    or "dashed" (a reference: dashed line with hollow marks). each: what stands before the text of each point."""

    name: str
    points: Sequence[Point]
    color: int | None = 0
    look: str = "line"
    each: str = ""


@dataclass(frozen=True)
class Chart:
    """One drawing. references: (y, name) of dashed lines. ticks: (x, name) below the axis in the place of numbers."""

    title: str
    x_label: str
    y_label: str
    series: Sequence[Series]
    references: Sequence[tuple[float, str]] = ()
    ticks: Sequence[tuple[float, str]] = ()
    logarithmic: bool = False
    y_range: tuple[float, float] | None = None
    note: str = ""

    def html(self) -> str:
        """A figure with a caption and a legend."""
        drawn = [s for s in self.series if s.points]
        legend = _legend(drawn, self.references)
        note = f'<p class="note">{escape(self.note)}</p>' if self.note else ""
        title = escape(self.title)
        return (
            f'<figure class="chart"><figcaption>{title}</figcaption>{self._svg(drawn)}{legend}{note}</figure>'
            if drawn
            else ""
        )

    def _svg(self, series: Sequence[Series]) -> str:
        to_x, to_y, x_ticks, y_ticks = self._scales(series)
        parts = []
        for value, name in y_ticks:
            y = to_y(value)
            parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
            parts.append(f'<text class="tick" x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{escape(name)}</text>')
        for value, name in x_ticks:
            at = f'x="{to_x(value):.1f}" y="{HEIGHT - BOTTOM + 16}"'
            parts.append(f'<text class="tick" {at} text-anchor="middle">{escape(name)}</text>')
        parts.append(f'<path class="axis" d="M{LEFT} {TOP}V{HEIGHT - BOTTOM}H{WIDTH - RIGHT}"/>')
        middle = (TOP + HEIGHT - BOTTOM) / 2
        parts.append(
            f'<text class="label" x="{(LEFT + WIDTH - RIGHT) / 2:.0f}" y="{HEIGHT - 6}" text-anchor="middle">'
            f"{escape(self.x_label)}</text>"
            f'<text class="label" transform="translate(12 {middle:.0f}) rotate(-90)" text-anchor="middle">'
            f"{escape(self.y_label)}</text>"
        )
        for value, _ in self.references:
            parts.append(f'<path class="reference" d="M{LEFT} {to_y(value):.1f}H{WIDTH - RIGHT}"/>')
        parts += [_drawn(s, to_x, to_y) for s in series]
        label = escape(f"{self.title}. {self.y_label} over {self.x_label}. Arrow keys read the points.")
        return (
            f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="application" tabindex="0" aria-label="{label}">'
            f"{''.join(parts)}</svg>"
        )

    def _scales(
        self, series: Sequence[Series]
    ) -> tuple[Callable[[float], float], Callable[[float], float], list[tuple[float, str]], list[tuple[float, str]]]:
        xs = [p.x for s in series for p in s.points] + [x for x, _ in self.ticks]
        ys = [v for s in series for p in s.points for v in (p.y, p.low, p.high) if v is not None]
        ys += [y for y, _ in self.references]
        warp: Callable[[float], float] = _log if self.logarithmic else float
        low, high = self.y_range or (min(ys), max(ys))
        y_ticks = _log_ticks(low, high) if self.logarithmic else _ticks(low, high)
        bottom, top = warp(min(low, y_ticks[0][0])), warp(max(high, y_ticks[-1][0]))
        left, right = min(xs), max(xs)
        margin = 0.35 if self.ticks else 0.5 if all(s.look == "dots" for s in series) else 0.0
        left, right = (left - margin, right + margin) if right + margin > left - margin else (left - 1, right + 1)

        def to_x(value: float) -> float:
            return LEFT + (value - left) / (right - left) * (WIDTH - RIGHT - LEFT)

        def to_y(value: float) -> float:
            part = (warp(value) - bottom) / ((top - bottom) or 1)
            return HEIGHT - BOTTOM - min(max(part, -0.02), 1.02) * (HEIGHT - BOTTOM - TOP)

        return to_x, to_y, list(self.ticks) or [t for t in _ticks(left, right) if left <= t[0] <= right], y_ticks


def bar(value: float, low: float | None, high: float | None, null: float | None, most: float) -> str:
    """A bar for a cell of a table, on a scale from 0 to `most`: the value, its interval, and a tick at the null."""
    width, height = 120, 14

    def x(v: float) -> float:
        return 1 + min(max(v / most, 0), 1) * (width - 2) if most else 1.0

    parts = [f'<rect class="bar" x="1" y="3" width="{max(x(value) - 1, 1):.1f}" height="8" rx="2"/>']
    if low is not None and high is not None:
        parts.append(f'<path class="whisker" d="M{x(low):.1f} 7H{x(high):.1f}"/>')
    if null is not None:
        parts.append(f'<path class="null" d="M{x(null):.1f} 0V14"/>')
    return f'<svg class="spark" viewBox="0 0 {width} {height}" aria-hidden="true">{"".join(parts)}</svg>'


def exact(value: float) -> str:
    """Six significant digits."""
    return f"{value:.6g}"


def _drawn(series: Series, to_x: Callable[[float], float], to_y: Callable[[float], float]) -> str:
    """A series: its line, intervals and marks; texts of the points are separated by line feeds.

    Marks are strokes of no length with round ends, two on top of each other for hollow ones: one path holds them all.
    """
    placed = [(to_x(p.x), to_y(p.y), p) for p in series.points]
    parts = []
    if series.look != "dots" and len(placed) > 1:
        parts.append(f'<polyline points="{" ".join(f"{x:.1f},{y:.1f}" for x, y, _ in placed)}"/>')
    limits = [(x, to_y(p.low), to_y(p.high)) for x, _, p in placed if p.low is not None and p.high is not None]
    if limits:
        parts.append(
            f'<path class="whisker" d="{"".join(f"M{x:.1f} {low:.1f}V{high:.1f}" for x, low, high in limits)}"/>'
        )
    if series.look != "line" or len(placed) <= 12:
        marks = "".join(f"M{x:.1f},{y:.1f}h0" for x, y, _ in placed)
        parts.append(f'<path class="marks" d="{marks}"/>')
        if series.look == "dashed" or (series.look == "dots" and series.color is None):
            parts.append(f'<path class="marks hollow" d="{marks}"/>')
    texts = escape("\n".join(p.text for p in series.points)).replace("\n", "&#10;")
    name = escape(f"{series.name}{series.each}")
    return (
        f'<g class="series {series.look} {_color(series)}" data-name="{name}" data-texts="{texts}">{"".join(parts)}</g>'
    )


def _color(series: Series) -> str:
    return "ref" if series.color is None else f"c{series.color % len(COLORS)}"


def _legend(series: Sequence[Series], references: Sequence[tuple[float, str]]) -> str:
    entries = [f'<li class="{_color(s)} {s.look}"><i></i>{escape(s.name)}</li>' for s in series if s.name]
    entries += [f'<li class="ref dashed"><i></i>{escape(name)}</li>' for _, name in references]
    return f'<ul class="legend">{"".join(entries)}</ul>' if entries else ""


def _log(value: float) -> float:
    return math.log10(max(value, 1e-30))


def _ticks(low: float, high: float) -> list[tuple[float, str]]:
    """About five round numbers that cover [low, high]."""
    span = (high - low) or abs(high) or 1.0
    step = 10 ** math.floor(math.log10(span / 4))
    step *= next((m for m in (1, 2, 5) if span / (step * m) <= 5), 10)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [(k * step, f"{k * step:.10g}") for k in range(first, max(last, first + 1) + 1)]


def _log_ticks(low: float, high: float) -> list[tuple[float, str]]:
    first, last = math.floor(_log(low) + 1e-9), math.ceil(_log(high) - 1e-9)
    step = max(1, round((last - first) / 5))
    return [(10.0**k, f"1e{k}") for k in range(first, max(last, first + 1) + step, step)]
