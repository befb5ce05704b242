"""The one look of all figures: colours, fonts, sizes."""

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#6A3D9A", "#000000")  # Okabe and Ito
DARK_COLORS = ("#5DB3EA", "#F39C5A", "#3CC9A0", "#E39CC4", "#F0BC4E", "#8FD0F5", "#B493E0", "#D5D8DC")  # on dark
TRUTH, REBUILT = ("#0069A6", "#6CB8E8"), ("#B84E00", "#F39C5A")  # frames of examples, on light and on dark
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")  # lines differ without colour
REFERENCE = {"color": "#7F7F7F", "linestyle": "--", "linewidth": 1.2}  # baselines and oracles
# of the page: CSS variable -> on light, on dark; the text on each background has a contrast of 4.5 at least
PAGE = {
    "page": ("#f7f7f5", "#121418"),
    "surface": ("#ffffff", "#1a1d22"),
    "ink": ("#191c20", "#e7e9ec"),
    "muted": ("#59616d", "#a4acb8"),
    "line": ("#dfe2e6", "#31363e"),
    "soft": ("#eef0f2", "#23272e"),
    "accent": ("#005a8d", "#7cc4f2"),
    "grey": ("#7a828c", "#8d96a2"),
    "on-tag": ("#ffffff", "#10141a"),
    "leaks": ("#a8201a", "#ffb0a8"),
    "leaks-soft": ("#fcebea", "#47201e"),
    "undecided": ("#6f5200", "#f2cd72"),
    "undecided-soft": ("#fdf3d7", "#3b3117"),
    "quiet": ("#34495e", "#b3cbe2"),
    "quiet-soft": ("#e7edf3", "#233140"),
    "unscored": ("#555c66", "#b4bac3"),
    "unscored-soft": ("#eceef0", "#2a2e35"),
}
FONTS = {
    "sans": 'system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, "DejaVu Sans", sans-serif',
    "mono": 'ui-monospace, "SF Mono", "Cascadia Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace',
}
WIDTH, HEIGHT = 6.4, 4.0  # inches, of one panel
SMALL = 8  # points: titles of small panels, captions of images
DPI = 130

_SETTINGS = {
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": "#E5E5E5",
    "grid.linewidth": 0.8,
    "lines.linewidth": 1.6,
    "lines.markersize": 5,
    "errorbar.capsize": 3,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "figure.dpi": DPI,
    "savefig.dpi": DPI,
}


@contextlib.contextmanager
def pyplot() -> Iterator[Any]:
    """matplotlib.pyplot in this style, drawing to files only; settings of the caller come back afterwards."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from cycler import cycler

    settings: Any = {**_SETTINGS, "axes.prop_cycle": cycler(color=COLORS) + cycler(marker=MARKERS)}
    with plt.rc_context(settings):
        yield plt


def css_variables() -> str:
    """The colours and fonts of the page as CSS variables, with those on dark for screens that prefer it.

    --c0, --c1, ... are the colours of series; the class cK sets --own to --cK.
    """
    pairs = {**PAGE, "truth": TRUTH, "rebuilt": REBUILT}
    pairs |= {f"c{i}": pair for i, pair in enumerate(zip(COLORS, DARK_COLORS, strict=True))}
    light, dark = ("".join(f"--{name}:{pair[side]};" for name, pair in pairs.items()) for side in (0, 1))
    fonts = "".join(f"--{name}:{stack};" for name, stack in FONTS.items())
    series = "".join(f".c{i}{{--own:var(--c{i})}}" for i in range(len(COLORS)))
    return f":root{{{light}{fonts}}}@media screen and (prefers-color-scheme:dark){{:root{{{dark}}}}}{series}"


def save(figure: Any, path: Path) -> None:
    """Write a figure to `path` and close it."""
    import matplotlib.pyplot as plt

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # of a name in a script that the font lacks
        figure.savefig(path, dpi=DPI)
    plt.close(figure)
