"""Scores one trial: every reconstruction beside its true example, and beside what public data alone would score.

Reconstructions are paired with true examples one to one. A true example without one is missed: it is scored with the
mean public example, which is what an attacker without a result would show, and it never counts as recovered.

What an attacker scores who learns nothing is measured with the same freedom: the means of the true classes are paired
with the true examples by the same rule, and so is the reconstruction with other examples of the same labels.
docs/metrics.md has the equations.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from core.protocol import Batch, Recipe, Reconstruction, Task
from evaluation.baselines import Baselines
from evaluation.candidates import Candidates
from evaluation.identification import ranks
from evaluation.metrics import Network, compare, psnr
from evaluation.objective import Objectives, status_of
from evaluation.pairing import correlations, has_right_sign, labels_right, pair
from evaluation.summary import RECOVERED_PSNR, is_recovered, thin


@dataclass(frozen=True)
class ScoringContext:
    """What all trials of a run are scored with.

    networks: pretrained networks by the name of their metric, such as {"lpips": Lpips(print)}. candidates: examples
    that nobody sent, for identification and the null; without them rows have neither. recipe: the clients' training,
    which says what of an example can leave a trace.
    """

    task: Task
    baselines: Baselines
    networks: Mapping[str, Network] = field(default_factory=dict)
    candidates: Candidates | None = None
    recipe: Recipe | None = None

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
    found: Objectives | None = None,
    unrelated: Tensor | None = None,
    trial: int = 0,
) -> TrialScore:
    """Score a reconstruction against the truth.

    Args:
        truth: the N private examples and their labels.
        rec: the reconstruction of the attack.
        context: the task, the baselines and the networks.
        comparison: the reconstruction of another attack from the same update. Its PSNR is reported.
        projection: (N, *shape), an oracle from `bounds.search_space_bound`. Its PSNR is reported.
        recoverable: (N,) bool, an oracle from `bounds.recoverable_mask`.
        found: the attack's objective at its answer and at the truth, from `objective.objectives`.
        unrelated: (M, *shape), examples that no client holds, for the false-positive rate.
        trial: the number of the update, which seeds the draws of its null.

    Returns:
        Rows, reconstructions and a record, all on the CPU.
    """
    truth, examples = truth.to("cpu"), rec.examples.cpu()
    labels = None if rec.labels is None else rec.labels.cpu()
    domain, baselines = context.task.domain, context.baselines
    pairs, rebuilt = _rebuilt(truth.examples, examples, context)
    right = labels_right(truth.labels, labels, pairs)
    class_psnr = class_mean_psnr(truth, baselines)
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
                "class_baseline_psnr": None if class_psnr is None else class_psnr[i],
            }
        )
    if rec.sources is not None:
        corr, fitted, source_pairs = correlations(domain.to_model(truth.examples.double()), rec.sources.cpu())
        for row, c, x, best, j in zip(rows, corr, truth.examples, domain.from_model(fitted), source_pairs, strict=True):
            row |= {"oracle_corr": c, "oracle_affine_psnr": psnr(x, best)}
            row["sign_ok"] = j is not None and has_right_sign(x, examples[j])
    if rec.certified is not None:
        for row, j in zip(rows, pairs, strict=True):
            row["certified"] = j is not None and bool(rec.certified[j])
    if comparison is not None:
        _, others = _rebuilt(truth.examples, comparison.examples.cpu(), context)
        for row, x, other in zip(rows, truth.examples, others, strict=True):
            row["companion_psnr"] = psnr(x, other)
    if projection is not None:
        for row, x, best in zip(rows, truth.examples, projection.cpu(), strict=True):
            row["oracle_floor_psnr"] = psnr(x, best)
    null: dict[str, Any] | None = None
    if context.candidates is not None:
        valid = domain.project(examples[_finite(examples)])
        for row, place in zip(rows, ranks(truth.examples, truth.labels, valid, pairs, context.candidates), strict=True):
            row |= place
        null = _null(truth, examples, labels is not None, context, context.candidates, trial)
        for i, row in enumerate(rows):
            row["null_psnr"] = None if null is None else statistics.fmean(draw[i] for draw in null["psnr"])
    record = record_of(rec, found, _determined_recovered(rows, recoverable))
    if null is not None:
        record["null"] = null | {"psnr": [round(value, 2) for draw in null["psnr"] for value in draw]}
    if recoverable is not None:
        for row, single in zip(rows, recoverable.tolist(), strict=True):
            row["ceiling"] = single
        record["candidates"] = len(examples)
    if rec.certified is not None:
        record["certified_n"] = int(rec.certified.sum())
        record["certified_wrong"] = sum(
            all(psnr(x, guess) < RECOVERED_PSNR for x in truth.examples) for guess in examples[rec.certified]
        )
    if unrelated is not None:
        record["control"] = false_positive_rate(unrelated, rec, context)
    return TrialScore(rows, rebuilt, record)


def record_of(rec: Reconstruction, found: Objectives | None, recovered: bool) -> dict[str, Any]:
    """What trials.jsonl says of a reconstruction. recovered: whether it shows all that the update determines."""
    return {
        "iterations": rec.iterations,
        "loss": _finite_or_none(rec.trace[-1]) if rec.trace else None,
        "objective": None if found is None else {k: _finite_or_none(v) for k, v in asdict(found).items()},
        "status": status_of(rec, found, recovered),
        "restarts": rec.restarts,
        "trace": thin(rec.trace),
    }


def _determined_recovered(rows: Sequence[Mapping[str, Any]], recoverable: Tensor | None) -> bool:
    """Whether all examples that the update determines, by the mask (N,) if there is one, are recovered.

    Beside a PSNR of 20 dB that takes rank 1 among candidates, where there are any.
    """
    chosen = [True] * len(rows) if recoverable is None else recoverable.tolist()
    hits = [is_recovered(row) and row.get("identified") in (True, None) for row in rows]
    return any(hits) and all(hit for hit, needed in zip(hits, chosen, strict=True) if needed)


def _finite_or_none(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def false_positive_rate(unrelated: Tensor, rec: Reconstruction, context: ScoringContext) -> float:
    """The share of examples (M, *shape), held by no client, that would count as recovered."""
    unrelated = unrelated.cpu()
    pairs, rebuilt = _rebuilt(unrelated, rec.examples.cpu(), context)
    hits = [
        j is not None and psnr(x, guess) >= RECOVERED_PSNR
        for x, j, guess in zip(unrelated, pairs, rebuilt, strict=True)
    ]
    return sum(hits) / len(hits)


def class_mean_psnr(truth: Batch, baselines: Baselines) -> list[float] | None:
    """The PSNR of the means of the true classes, paired with the examples as reconstructions are; None without public.

    These are the reconstructions of an attacker who knows the labels of the update and nothing else.
    """
    means = [baselines.class_mean(label) for label in truth.labels.tolist()]
    known = [mean for mean in means if mean is not None]
    if len(known) < len(means):
        return None
    guesses = torch.stack(known)
    return [psnr(x, guesses[j]) for x, j in zip(truth.examples, pair(truth.examples, guesses), strict=True)]  # type: ignore[index]


def mean_psnr(truth: Batch, baselines: Baselines) -> list[float] | None:
    """The PSNR of the mean public example for each example; None without public examples."""
    mean = baselines.mean_example
    return None if mean is None else [psnr(x, mean) for x in truth.examples]


def _null(
    truth: Batch, examples: Tensor, names_labels: bool, context: ScoringContext, candidates: Candidates, trial: int
) -> dict[str, Any] | None:
    """The reconstructions (M, *shape) scored against sets of other examples with the true labels; None without any.

    Returns:
        psnr: for each set, one value for each place in the batch; a set that is easier to guess than the truth counts
        for less by the difference, measured by the PSNR of the means of the true classes, or by that of the mean of
        all examples where neither the set has these classes nor the attack names any. recovered: the share that
        reaches 20 dB, not corrected. labels: whether all classes had candidates of their own.
    """
    sets, same_labels = candidates.draws(truth.labels, trial)
    if not sets:
        return None
    guess_psnr = class_mean_psnr if same_labels or names_labels else mean_psnr
    own = guess_psnr(truth, context.baselines)
    corrected, hits = [], []
    for others in sets:
        pairs, rebuilt = _rebuilt(others, examples, context)
        scores = [psnr(x, guess) for x, guess in zip(others, rebuilt, strict=True)]
        hits += [j is not None and score >= RECOVERED_PSNR for j, score in zip(pairs, scores, strict=True)]
        theirs = guess_psnr(Batch(others, truth.labels), context.baselines)
        if own is not None and theirs is not None:
            scores = [score + a - b for score, a, b in zip(scores, own, theirs, strict=True)]
        corrected.append(scores)
    return {"psnr": corrected, "recovered": statistics.fmean(hits), "labels": same_labels}


def _finite(examples: Tensor) -> Tensor:
    """Indices of the examples (M, *shape) without an entry that is not finite."""
    return torch.isfinite(examples).flatten(1).all(1).nonzero().flatten()


def _rebuilt(truth: Tensor, examples: Tensor, context: ScoringContext) -> tuple[list[int | None], Tensor]:
    """For each true example (N, *shape) the index of its reconstruction (M, *shape) or None, and what it shows.

    Reconstructions with entries that are not finite are nobody's.
    """
    finite = _finite(examples)
    valid = context.task.domain.project(examples[finite])
    pairs = pair(truth, valid)
    rebuilt = [context.missing_example if j is None else valid[j] for j in pairs]
    return [None if j is None else int(finite[j]) for j in pairs], torch.stack(rebuilt)


def _psnr(truth: Tensor, baseline: Tensor | None) -> float | None:
    return None if baseline is None else psnr(truth, baseline)
