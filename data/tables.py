"""Tables: `csv` (your own), `cancer` (in scikit-learn's wheel) and `photostats` (statistics of `photos`; no download).

A column is a number, or a category of at most 50 values. Half of the rows are private (tuning and reporting victims), a
quarter public and a quarter held out, drawn with a fixed seed; copies of a row are left out. Numbers are standardised
by public rows, and clipped to twice the public range.
"""

import csv as csv_format
import itertools
import json
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from core.domain import Column, TabularDomain
from core.errors import UsageError
from data.base import register
from data.photos import photos
from data.splits import Split, Splits, frozen_rng
from utils.files import require_regular

MAX_CATEGORIES = 50
LARGEST = 1e30  # a number's size: their variance must be finite
MIN_NUMBERS = 11  # different values from which on a column of numbers is not a category
CANCER = ("radius", "texture", "perimeter", "area", "smoothness", "compactness", "concavity")
CANCER += ("concave points", "symmetry", "fractal dimension")
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
CHANNELS = ("red", "green", "blue")


@register
def csv(base_datadir: Path, schema: str | None) -> Splits:
    """Your own table: `base_datadir` is a CSV file with a header.

    schema: "auto" (None): the last column is the label, and each other column a number or a category. Or a JSON file
    {"label": name, "numbers": [names], "categories": [names]}; columns that it does not name are not used. Raises
    UsageError for a file or a schema that does not fit.
    """
    header, rows = _read(base_datadir)
    roles = _schema(schema, header, rows)
    columns = {name: [row[i] for row in rows] for i, name in enumerate(header)}
    return _splits("csv", columns, *roles)


@register
def cancer(base_datadir: Path, schema: str | None) -> Splits:
    """569 tumours, 30 measurements each, malignant or benign: Breast Cancer Wisconsin (Street et al. 1993)."""
    package = find_spec("sklearn")
    path = Path(
        package.submodule_search_locations[0] if package else "sklearn", "datasets", "data", "breast_cancer.csv"
    )  # type: ignore[index]
    if not path.exists():
        raise UsageError(
            "`dataset=cancer` is in scikit-learn's wheel: pip install scikit-learn, or choose `dataset=csv`"
        )
    with path.open(newline="") as file:
        rows = list(csv_format.reader(file))[1:]
    names = [f"{kind} {name}" for kind in ("mean", "error of", "worst") for name in CANCER]
    columns = {name: [row[i] for row in rows] for i, name in enumerate(names)}
    columns["tumour"] = [("malignant", "benign")[int(row[-1])] for row in rows]
    return _splits("cancer", columns, "tumour", names, [])


@register
def photostats(base_datadir: Path, schema: str | None) -> Splits:
    """27 statistics of each crop in `photos`, in its splits, and the brightest channel. The class is the photograph."""
    pictures = photos(base_datadir, None)
    victims = (pictures.reporting, pictures.tuning)
    parts = [s.take(range(len(s))) for s in (*victims, pictures.public, pictures.test) if s is not None]
    images, labels = torch.cat([p.examples for p in parts]), torch.cat([p.labels for p in parts])
    columns = {name: [f"{v:.6g}" for v in values] for name, values in _statistics(images).items()}
    columns["brightest channel"] = [CHANNELS[i] for i in images.mean((2, 3)).argmax(1).tolist()]
    columns["photograph"] = [pictures.class_names[i] for i in labels.tolist()]
    numbers = [name for name in columns if name not in ("brightest channel", "photograph")]
    ends = np.cumsum([0, *(len(part.labels) for part in parts)])
    indices = [np.arange(a, b) for a, b in itertools.pairwise(ends)]
    return _splits("photostats", columns, "photograph", numbers, ["brightest channel"], indices)


def _statistics(images: Tensor) -> dict[str, list[float]]:
    """Of each channel mean, standard deviation, five quantiles, and the mean steps to the right and down."""
    found = {}
    for c, name in enumerate(CHANNELS):
        plane = images[:, c]  # (N, H, W)
        found[f"{name} mean"] = plane.mean((1, 2)).tolist()
        found[f"{name} deviation"] = plane.std((1, 2)).tolist()
        for q in QUANTILES:
            found[f"{name} {q:.0%} quantile"] = plane.flatten(1).quantile(q, dim=1).tolist()
        found[f"{name} step right"] = plane.diff(dim=2).abs().mean((1, 2)).tolist()
        found[f"{name} step down"] = plane.diff(dim=1).abs().mean((1, 2)).tolist()
    return found


def _read(path: Path) -> tuple[list[str], list[list[str]]]:
    try:
        require_regular(path)
        with path.open(newline="", encoding="utf-8-sig") as file:
            header, *rows = [[cell.strip() for cell in row] for row in csv_format.reader(file) if row]
    except (OSError, ValueError, csv_format.Error) as error:
        reason = getattr(error, "strerror", None) or "it is not a CSV file with a header"
        raise UsageError(f"cannot read `base_datadir={path}`: {reason}; `dataset=csv` takes a CSV file") from None
    ragged = next((i for i, row in enumerate(rows, 2) if len(row) != len(header)), None)
    if ragged is not None:
        raise UsageError(f"{path}, row {ragged} has not the {len(header)} cells of the header")
    if len(set(header)) < len(header):
        raise UsageError(f"{path}: two columns have one name")
    complete = [row for row in rows if all(row)]
    return header, complete


def _schema(schema: str | None, header: list[str], rows: list[list[str]]) -> tuple[str, list[str], list[str]]:
    """The label, the numbers and the categories."""
    if schema in (None, "auto"):
        numbers, categories = [], []
        for i, name in enumerate(header[:-1]):
            values = {row[i] for row in rows}
            if all(map(_is_number, values)) and len(values) >= MIN_NUMBERS:
                numbers.append(name)
            elif 2 <= len(values) <= MAX_CATEGORIES:
                categories.append(name)
        return header[-1], numbers, categories
    try:
        path = Path(schema).expanduser()
        require_regular(path)
        given = json.loads(path.read_text())
        label, numbers, categories = given["label"], given.get("numbers", []), given.get("categories", [])
        names = [label, *numbers, *categories]
        if isinstance(numbers, str) or isinstance(categories, str) or not all(isinstance(n, str) for n in names):
            raise TypeError("names are strings, in lists")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, RuntimeError):
        example = '{"label": "income", "numbers": ["age"], "categories": ["work"]}'
        raise UsageError(f"`schema={schema}`: write auto, or a JSON file such as {example}") from None
    for name in names:
        if name not in header:
            raise UsageError(f"`schema={schema}` names a column {name!r}, and the table has {', '.join(header)[:200]}")
    return label, list(numbers), list(categories)


def _is_number(text: str) -> bool:
    try:
        return abs(float(text)) <= LARGEST
    except ValueError:
        return False


def _splits(
    name: str,
    columns: dict[str, list[str]],
    label: str,
    numbers: Sequence[str],
    categories: Sequence[str],
    parts: list[np.ndarray] | None = None,
) -> Splits:
    """`parts`: the rows of the reporting victims, the tuning victims, the public and the test data; None: at random."""
    if not (numbers or categories):
        raise UsageError(f"{name}: no column is a number or a category: write a `schema`")
    classes = tuple(sorted(set(columns[label])))
    if not 2 <= len(classes) <= MAX_CATEGORIES:
        raise UsageError(
            f"{name}: the label {label!r} has {len(classes)} different values, not 2 to {MAX_CATEGORIES}: name another "
            "in `schema`"
        )
    for column in numbers:
        wrong = next((cell for cell in columns[column] if not _is_number(cell)), None)
        if wrong is not None:
            raise UsageError(f"{name}: {wrong!r} in column {column!r} is not a number of at most {LARGEST:g}")
    for column in categories:
        if not 2 <= len(set(columns[column])) <= MAX_CATEGORIES:
            raise UsageError(f"{name}: column {column!r} has not 2 to {MAX_CATEGORIES} different categories")
    used = list(zip(*(columns[c] for c in (label, *numbers, *categories)), strict=True))
    if parts is None:
        order = frozen_rng(0).permutation(_first(used))
        ends = [len(order) * quarter // 8 for quarter in (0, 2, 4, 6, 8)]
        parts = [np.sort(order[a:b]) for a, b in itertools.pairwise(ends)]
    if min(map(len, parts)) < 2:
        raise UsageError(f"{name}: too few different rows ({len(used)})")
    reporting, tuning, public, test = parts
    described, encoded = _encode(columns, numbers, categories, public)
    labels = torch.tensor([classes.index(value) for value in columns[label]])
    private = np.concatenate([reporting, tuning])
    splits = {
        key: Split(labels[chosen], encoded[chosen])
        for key, chosen in zip(
            ("private", "public", "test", "tuning", "reporting"),
            (private, public, test, tuning, reporting),
            strict=True,
        )
    }
    return Splits(
        **splits,
        class_names=classes,
        notes=(f"{name}: {len(private)} private and {len(public)} public records of {len(described)} columns",),
        domain=TabularDomain((encoded.shape[1],), described),
    )


def _first(rows: Sequence[tuple[str, ...]]) -> list[int]:
    """The index of the first of each set of equal rows."""
    return list({row: i for i, row in reversed(list(enumerate(rows)))}.values())


def _encode(
    columns: dict[str, list[str]], numbers: Sequence[str], categories: Sequence[str], public: np.ndarray
) -> tuple[tuple[Column, ...], Tensor]:
    """The columns, and all rows (N, d) encoded by the statistics of public ones."""
    described, blocks = [], []
    for name in numbers:
        values = torch.tensor([float(cell) for cell in columns[name]], dtype=torch.float64)
        known = values[public]
        mean, std = known.mean().item(), known.std().item() or 1.0
        margin = (known.max() - known.min()).item() / 2 or 1.0
        low, high = known.min().item() - margin, known.max().item() + margin
        described.append(Column(name, (), mean, std, low, high))
        blocks.append(((values.clamp(low, high) - mean) / std)[:, None])
    for name in categories:
        kinds = tuple(sorted(set(columns[name])))
        described.append(Column(name, kinds))
        blocks.append(torch.eye(len(kinds), dtype=torch.float64)[[kinds.index(cell) for cell in columns[name]]])
    return tuple(described), torch.cat(blocks, 1).float()
