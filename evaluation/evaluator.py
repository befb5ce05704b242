"""Scores one trial: every reconstruction beside its true example, and beside what public data alone would score.

Reconstructions are paired with true examples one to one. A true example without one is missed: it is scored with the
mean public example, which is what an attacker without a result would show, and it never counts as recovered.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from core.protocol import Batch, Reconstruction, Task
from evaluation.baselines import Baselines
from evaluation.metrics import Network, compare, psnr
from evaluation.pairing import correlations, has_right_sign, labels_right, pair
from evaluation.summary import RECOVERED_PSNR, thin


@dataclass(frozen=True)
class ScoringContext:
    """What all trials of a run are scored with.

    networks: pretrained networks by the name of their metric, such as {"lpips": Lpips(print)}.
    """

    task: Task
    baselines: Baselines
    networks: Mapping[str, Network] = field(default_factory=dict)

    @property
    def missing_example(self) -> Tensor:  # (*shape)
        """What a missed example is scored with: the mean public example, or without one the middle of the domain."""
        mean = self.baselines.mean_example
        if mean is not None:
            return mean
        return self.task.domain.from_unbounded(torch.zeros(self.task.domain.shape))


class TrialScore(NamedTuple):
    """The scores of one attacked update."""

    rows: list[dict[str, Any]]  # one for each true example, as in rows.jsonl
    rebuilt: Tensor  # (N, *shape), in the order of the true examples
    record: dict[str, Any]  # of the update, as in trials.jsonl


def score_trial(
    truth: Batch,
    rec: Reconstruction,
    context: ScoringContext,
    *,
    comparison: Reconstruction | None = None,
    projection: Tensor | None = None,
    recoverable: Tensor | None = None,
    unrelated: Tensor | None = None,
) -> TrialScore:
    """Score a reconstruction against the truth.

    Args:
        truth: the N private examples and their labels.
        rec: the reconstruction of the attack.
        context: the task, the baselines and the networks.
        comparison: the reconstruction of another attack from the same update. Its PSNR is reported.
        projection: (N, *shape), an oracle from `bounds.search_space_bound`. Its PSNR is reported.
        recoverable: (N,) bool, an oracle from `bounds.recoverable_mask`.
        unrelated: (M, *shape), examples that no client holds, for the false-positive rate.

    Returns:
        Rows, reconstructions and a record, all on the CPU.
    """
    truth, examples = truth.to("cpu"), rec.examples.cpu()
    labels = None if rec.labels is None else rec.labels.cpu()
    domain, baselines = context.task.domain, context.baselines
    pairs, rebuilt = _rebuilt(truth.examples, examples, context)
    right = labels_right(truth.labels, labels, pairs)
    rows: list[dict[str, Any]] = []
    for i, (x, label, j) in enumerate(zip(truth.examples, truth.labels.tolist(), pairs, strict=True)):
        rows.append(
            {
                "image": i,
                "match": j,
                **compare(domain, x, rebuilt[i], context.networks),
                "label_true": label,
                "label_pred": None if labels is None or j is None else int(labels[j]),
                "label_ok": right[i],
                "baseline_psnr": _psnr(x, baselines.mean_example),
                "class_baseline_psnr": _psnr(x, baselines.class_mean(label)),
            }
        )
    if rec.sources is not None:
        corr, fitted, source_pairs = correlations(domain.to_model(truth.examples.double()), rec.sources.cpu())
        for row, c, x, best, j in zip(rows, corr, truth.examples, domain.from_model(fitted), source_pairs, strict=True):
            row |= {"oracle_corr": c, "oracle_affine_psnr": psnr(x, best)}
            row["sign_ok"] = j is not None and has_right_sign(x, examples[j])
    if comparison is not None:
        _, others = _rebuilt(truth.examples, comparison.examples.cpu(), context)
        for row, x, other in zip(rows, truth.examples, others, strict=True):
            row["companion_psnr"] = psnr(x, other)
    if projection is not None:
        for row, x, best in zip(rows, truth.examples, projection.cpu(), strict=True):
            row["oracle_floor_psnr"] = psnr(x, best)
    record: dict[str, Any] = {
        "iterations": rec.iterations,
        "loss": rec.trace[-1] if rec.trace and math.isfinite(rec.trace[-1]) else None,
        "status": rec.status,
        "restarts": rec.restarts,
        "trace": thin(rec.trace),
    }
    if recoverable is not None:
        for row, single in zip(rows, recoverable.tolist(), strict=True):
            row["ceiling"] = single
        record["candidates"] = len(examples)
    if unrelated is not None:
        record["control"] = false_positive_rate(unrelated, rec, context)
    return TrialScore(rows, rebuilt, record)


def false_positive_rate(unrelated: Tensor, rec: Reconstruction, context: ScoringContext) -> float:
    """The share of examples (M, *shape), held by no client, that would count as recovered."""
    unrelated = unrelated.cpu()
    pairs, rebuilt = _rebuilt(unrelated, rec.examples.cpu(), context)
    hits = [
        j is not None and psnr(x, guess) >= RECOVERED_PSNR
        for x, j, guess in zip(unrelated, pairs, rebuilt, strict=True)
    ]
    return sum(hits) / len(hits)


def _rebuilt(truth: Tensor, examples: Tensor, context: ScoringContext) -> tuple[list[int | None], Tensor]:
    """For each true example (N, *shape) the index of its reconstruction (M, *shape) or None, and what it shows.

    Reconstructions with entries that are not finite are nobody's.
    """
    finite = torch.isfinite(examples).flatten(1).all(1).nonzero().flatten()
    valid = context.task.domain.project(examples[finite])
    pairs = pair(truth, valid)
    rebuilt = [context.missing_example if j is None else valid[j] for j in pairs]
    return [None if j is None else int(finite[j]) for j in pairs], torch.stack(rebuilt)


def _psnr(truth: Tensor, baseline: Tensor | None) -> float | None:
    return None if baseline is None else psnr(truth, baseline)
