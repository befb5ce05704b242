"""Scores records of tables: cell by cell, beside what public records alone would score.

A number is right within 0.319 standard deviations (Vero et al., ICML 2023): guessing the mean of a Gaussian column is
right for a quarter of its cells. A category is right if it is the true one. Reconstructions are paired with true
records one to one, for the most cells right (Hungarian algorithm). docs/tables.md has the equations.
"""

import functools
import itertools
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from core.domain import TabularDomain
from core.protocol import Batch, Reconstruction
from evaluation.candidates import Candidates
from evaluation.evaluator import ScoringContext, TrialScore, record_of
from evaluation.identification import ranks
from evaluation.intervals import share_interval
from evaluation.pairing import assign, labels_right
from evaluation.scoring import SCORINGS, Scoring
from evaluation.summary import QUANTILES, gain, identified_share, mean_of, null_of, quantiles, unit_kind, unit_of

TOLERANCE = 0.319  # standard deviations
GROUPS = 10  # of cells by certainty, for its calibration
MOST = 0.9  # share of cells from which on a record counts as recovered

Row = Mapping[str, Any]


def cells_right(domain: TabularDomain, truth: Tensor, guesses: Tensor) -> Tensor:
    """Whether each cell of every pair of records (N, d) and (M, d) agrees: (N, M, columns) bool."""
    a, b = domain.cells(truth)[:, None], domain.cells(guesses)[None]
    is_category = torch.tensor([bool(column.categories) for column in domain.columns])
    return torch.where(is_category, a == b, (a - b).abs() <= TOLERANCE)


def distances(domain: TabularDomain, truth: Tensor, guesses: Tensor) -> Tensor:
    """The share of wrong cells of every pair (N, M); the mean squared error decides between equal numbers of them."""
    errors = (truth.double()[:, None] - guesses.double()[None]).square().mean(-1)
    return 1 - cells_right(domain, truth, guesses).double().mean(-1) + 1e-3 * errors / (1 + errors)


def score_records(
    truth: Batch, rec: Reconstruction, context: ScoringContext, *, trial: int = 0, **oracles: Any
) -> TrialScore:
    """Score reconstructed records against the true ones: as `evaluator.score_trial`; oracles are not used."""
    domain, baselines = context.task.domain, context.baselines
    assert isinstance(domain, TabularDomain), domain
    truth, x = truth.to("cpu"), truth.examples.cpu()
    finite = torch.isfinite(rec.examples.cpu()).all(1)
    guesses = domain.project(rec.examples.cpu()[finite])
    certainty = None if rec.certainty is None else rec.certainty.cpu()[finite]
    pairs = _pair(domain, x, guesses)
    typical = baselines.mean_example
    missing = domain.middle(x) if typical is None else typical
    rebuilt = torch.stack([missing if j is None else guesses[j] for j in pairs])
    labels = None if rec.labels is None else rec.labels.cpu()
    right_labels = labels_right(truth.labels, labels, pairs)
    means = [baselines.class_mean(label) for label in truth.labels.tolist()]
    known = [mean for mean in means if mean is not None]
    class_pairs = _pair(domain, x, torch.stack(known)) if len(known) == len(x) else None
    rows: list[dict[str, Any]] = []
    for i, (label, j) in enumerate(zip(truth.labels.tolist(), pairs, strict=True)):
        right = cells_right(domain, x[i : i + 1], rebuilt[i : i + 1])[0, 0]
        guess = cells_right(domain, x[i : i + 1], missing[None])[0, 0]
        class_guess = None
        if class_pairs is not None:
            class_guess = _share(domain, x[i], known[class_pairs[i]])  # type: ignore[index]
        rows.append(
            {
                "image": i,
                "match": j,
                "cells_right": right.double().mean().item(),
                "cells": right.int().tolist(),
                "baseline_cells": guess.int().tolist(),
                "mse": (x[i].double() - rebuilt[i].double()).square().mean().item(),
                "label_true": label,
                "label_pred": None if labels is None or j is None else int(labels[j]),
                "label_ok": right_labels[i],
                "baseline_cells_right": guess.double().mean().item(),
                "class_baseline_cells_right": class_guess,
            }
        )
        if certainty is not None and pairs[i] is not None:
            rows[-1]["certainty"] = [round(p, 4) for p in certainty[pairs[i]].tolist()]
    record = record_of(rec, None, all(row["match"] is not None and row["cells_right"] == 1 for row in rows))
    if context.candidates is not None:

        def between(a: Tensor, b: Tensor) -> Tensor:
            return distances(domain, a, b)

        found = ranks(x, truth.labels, guesses, pairs, context.candidates, between)
        null = _null(domain, truth.labels, guesses, missing, context.candidates, trial)
        for i, (row, place) in enumerate(zip(rows, found, strict=True)):
            row |= place
            row["null_cells_right"] = None if null is None else null["cells_right"][i]
        if null is not None:
            record["null"] = null
    return TrialScore(rows, rebuilt, record)


def _pair(domain: TabularDomain, truth: Tensor, guesses: Tensor) -> list[int | None]:
    return assign(distances(domain, truth, guesses)) if len(guesses) else [None] * len(truth)


def _share(domain: TabularDomain, truth: Tensor, guess: Tensor) -> float:
    """The share of right cells of one record (d,)."""
    return cells_right(domain, truth[None], guess[None]).double().mean().item()


def _null(
    domain: TabularDomain, labels: Tensor, guesses: Tensor, missing: Tensor, candidates: Candidates, trial: int
) -> dict[str, Any] | None:
    """The reconstructions (M, d) scored against sets of other records with the true labels; None without any."""
    sets, same_labels = candidates.draws(labels, trial)
    if not sets:
        return None
    scores = []
    for others in sets:
        pairs = _pair(domain, others, guesses)
        shown = [missing if j is None else guesses[j] for j in pairs]
        scores.append([_share(domain, z, guess) for z, guess in zip(others, shown, strict=True)])
    return {
        "cells_right": [statistics.fmean(column) for column in zip(*scores, strict=True)],
        "recovered": statistics.fmean(score >= MOST for draw in scores for score in draw),
        "labels": same_labels,
    }


def summarize_records(rows: Sequence[Row], trials: Sequence[Row], thresholds: Sequence[float] = ()) -> dict[str, Any]:
    """The numbers of summary.json: as `summary.summarize`. PSNR and the like are None; `thresholds` are unused."""
    units = [unit_of(r, number) for number, r in enumerate(rows)]

    mean = functools.partial(mean_of, rows, units)

    def columns(key: str) -> list[float]:
        return [statistics.fmean(cells) for cells in zip(*(r[key] for r in rows), strict=True)]

    def recovered(share: float) -> dict[str, Any] | None:
        hits = [r["match"] is not None and r["cells_right"] >= share for r in rows]
        return share_interval(hits, units) if hits else None

    labelled = [(bool(r["label_ok"]), unit) for r, unit in zip(rows, units, strict=True) if r["label_ok"] is not None]
    found = recovered(MOST)
    return {
        "domain": "table",
        "images": len(rows),
        "units": len(set(units)),
        "unit": unit_kind(rows),
        "psnr": None,
        "ssim": None,
        "lpips": None,
        "cells_right": mean("cells_right"),
        "cells_right_quantiles": quantiles([r["cells_right"] for r in rows], QUANTILES) if rows else None,
        "columns_right": columns("cells") if rows else None,
        "baseline_columns_right": columns("baseline_cells") if rows else None,
        "surest": _surest(rows),
        "records": found,
        "exact": recovered(1.0),
        "success_rate": None if found is None else found["share"],
        "label_accuracy": statistics.fmean(float(ok) for ok, _ in labelled) if labelled else None,
        "labels": share_interval([ok for ok, _ in labelled], [unit for _, unit in labelled]) if labelled else None,
        "identified": identified_share(rows, units),
        "null": null_of(trials, "cells_right"),
        "over_null": gain(rows, units, "cells_right", "null_cells_right"),
        "baseline_psnr": None,
        "class_baseline_psnr": None,
        "baseline_cells_right": (mean("baseline_cells_right") or {}).get("mean"),
        "class_baseline_cells_right": (mean("class_baseline_cells_right") or {}).get("mean"),
        "over_class_mean": gain(rows, units, "cells_right", "class_baseline_cells_right"),
        "seconds": sum(t["seconds"] for t in trials),
        "missed": sum(r["match"] is None for r in rows),
        "status": dict(sorted(Counter(t["status"] for t in trials).items())),
    }


def _surest(rows: Sequence[Row]) -> dict[str, Any] | None:
    """How well the attack's own certainty tells which cells are right; None if it has none.

    right: the share of right cells among the surest quarter, least: among the least sure one. claimed: what the attack
    expects of the surest quarter. error: mean difference between claimed and right over ten groups of equal size.
    """
    pairs = [
        (p, hit) for r in rows if "certainty" in r for p, hit in zip(r["certainty"], r["cells"], strict=True)
    ]  # of all cells
    if len(pairs) < GROUPS:
        return None
    pairs.sort(key=lambda pair: -pair[0])
    quarter = len(pairs) // 4

    def means(part: Sequence[tuple[float, int]]) -> tuple[float, float]:
        return statistics.fmean(p for p, _ in part), statistics.fmean(hit for _, hit in part)

    ends = [round(len(pairs) * g / GROUPS) for g in range(GROUPS + 1)]
    errors = [abs(a - b) for a, b in (means(pairs[i:j]) for i, j in itertools.pairwise(ends))]
    claimed, right = means(pairs[:quarter])
    least = means(pairs[-quarter:])[1]
    return {"right": right, "claimed": claimed, "least": least, "error": statistics.fmean(errors)}


SCORINGS.add("table", Scoring(score_records, summarize_records, "cells_right", "cells right"))
