"""The table, the sentence and the page of runs on records of tables."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from core.domain import Domain
from evaluation.records import MOST, TOLERANCE
from evaluation.verdict import outcome
from report.tables import (
    ENTRIES,
    VIEWS,
    Entry,
    Summary,
    View,
    counted,
    identified_in_words,
    interval,
    mean_std,
    number,
    plural,
    share,
    table,
)
from utils.files import write_bytes

_SHARED = (
    *("labels right", "identified", "missed", "status"),
    *("test accuracy", "training loss", "seconds", "granted (oracle)"),
)
_shared = {entry.label: entry for entry in ENTRIES if entry.label in _SHARED}

RECORD_ENTRIES = (
    counted("records"),
    Entry(
        "cells right",
        "cells_right",
        lambda s: mean_std(s["cells_right"], 3),
        f"share of cells that are right: the true category, or a number within {TOLERANCE} standard deviations",
        always=True,
    ),
    Entry(
        "surest quarter",
        "surest",
        lambda s: f"{number(s['surest']['right'], 3)} (claimed {number(s['surest']['claimed'], 3)})",
        "share of right cells among the quarter that the attack itself is surest of, and what it claims of them",
    ),
    Entry(
        f"records {MOST:.0%} right",
        "records",
        lambda s: share(s["records"]),
        f"share of records with at least {MOST:.0%} of their cells right",
        always=True,
    ),
    Entry("records all right", "exact", lambda s: share(s["exact"]), "share of records with all cells right"),
    *(_shared[label] for label in _SHARED[:2]),
    Entry(
        "null (cells right)",
        "null",
        lambda s: f"{number(s['null']['cells_right'], 3)}, records {number(s['null']['recovered'])}",
        "cells right of the same reconstructions for other records of the same labels, paired by the same rule",
        compared=False,
    ),
    Entry(
        "above null", "over_null", lambda s: interval(s["over_null"]), "cells right minus the null, record by record"
    ),
    Entry(
        "mean and mode",
        "baseline_cells_right",
        lambda s: number(s["baseline_cells_right"], 3),
        "baseline: cells right of the public mean of each number and the most frequent category",
        always=True,
    ),
    Entry(
        "of the class",
        "class_baseline_cells_right",
        lambda s: number(s["class_baseline_cells_right"], 3),
        "baseline: the same within the true classes, paired as reconstructions are",
        always=True,
    ),
    *(_shared[label] for label in _SHARED[2:]),
)


def verdict(summary: Summary) -> str:
    """One sentence: whether the update leaks, and the numbers that say so."""
    count = summary["images"]
    if not count:
        return "Nothing was scored, because the true records are unknown."
    parts = [
        f"{number(summary['cells_right']['mean'])} of all cells right, "
        f"{number(summary['baseline_cells_right'])} by mean and mode",
        f"{round(summary['success_rate'] * count)} of {plural(count, 'record')} with {MOST:.0%} of the cells right",
    ]
    if summary.get("identified") is not None:
        parts.append(identified_in_words(summary))
    if summary.get("over_null") is not None:
        parts.append(f"{interval(summary['over_null'])} cells over the null")
    known = outcome(summary)
    start = "Nothing to compare with: there are no public records" if known is None else known[0].upper() + known[1:]
    return f"{start}: {'; '.join(parts)}."


def write_page(
    path: Path,
    truth: Tensor,
    rebuilt: Tensor,
    rows: Sequence[Mapping[str, Any]],
    domain: Domain,
    names: Sequence[str] | None = None,
    most: int = 40,
) -> None:
    """A table of columns for each of the first records (N, d): true value, rebuilt value, and how often it is right."""
    columns = [column.name for column in domain.columns]  # type: ignore[attr-defined]
    right, guess = ([sum(row[key][c] for row in rows) / len(rows) for c in range(len(columns))] for key in KEYS)
    body = [[name, f"{r:.2f}", f"{g:.2f}"] for name, r, g in zip(columns, right, guess, strict=True)]
    lines = ["# Columns", "", table(["column", "right", "mean or mode right"], body), "", "# Records", ""]
    for x, r, row in zip(truth[:most], rebuilt[:most], rows, strict=False):
        note = "missed: mean and mode" if row["match"] is None else f"{row['cells_right']:.0%} of cells right"
        lines += [f"**Update {row['trial']}, record {row['image']}**, {note}", ""]
        cells = zip(columns, domain.render(x), domain.render(r), row["cells"], strict=True)
        lines += [table(["column", "truth", "rebuilt", "right"], [[*c[:3], "yes" if c[3] else ""] for c in cells]), ""]
    if len(truth) > most:
        lines.append(f"The first {most} of {len(truth)} records.")
    write_bytes(path, ("\n".join(lines) + "\n").encode())


KEYS = ("cells", "baseline_cells")

VIEWS["table"] = View(
    RECORD_ENTRIES,
    verdict,
    "rebuilt.md",
    write_page,
    score="cells_right",
    score_label="cells right, mean ± std over records",
    baseline_label="public mean and mode",
)
