"""Scores sentences: token by token, as sentences, and as bags of words, beside what public text alone would score.

Reconstructions are paired with true sentences one to one, for the most tokens right (Hungarian algorithm). The last
token of a language model has no gradient: it is left out of all scores but `last_token`. docs/text.md has the
equations.
"""

import functools
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from core.protocol import Batch, Reconstruction
from evaluation.baselines import Baselines
from evaluation.candidates import Candidates
from evaluation.evaluator import ScoringContext, TrialScore, record_of
from evaluation.identification import ranks
from evaluation.intervals import share_interval
from evaluation.metrics import compare, metric
from evaluation.pairing import assign
from evaluation.scoring import SCORINGS, Scoring
from evaluation.summary import QUANTILES, gain, identified_share, mean_of, null_of, quantiles, unit_kind, unit_of


@metric("token_accuracy", domain="text")
def token_accuracy(truth: Tensor, guess: Tensor) -> float:
    """The share of positions with the right token."""
    return (truth == guess).double().mean().item()


@metric("exact", domain="text")
def exact(truth: Tensor, guess: Tensor) -> float:
    """1 if all tokens are right, else 0."""
    return float(torch.equal(truth, guess))


@metric("rouge1", domain="text")
def rouge1(truth: Tensor, guess: Tensor) -> float:
    """ROUGE-1 (Lin 2004): F1 of the words of a sentence as a multiset, wherever they stand."""
    true, guessed = Counter(truth.tolist()), Counter(guess.tolist())
    return 2 * (true & guessed).total() / (true.total() + guessed.total())


def bag_recall(truth: Tensor, guesses: Tensor) -> float:
    """The share of the different words of a sentence (L,) that occur anywhere in the reconstructions (M, L)."""
    words = set(truth.tolist())
    return len(words & set(guesses.flatten().tolist())) / len(words)


def distances(a: Tensor, b: Tensor) -> Tensor:
    """The share of differing tokens of every pair of sentences (N, L) and (M, L), in float64: (N, M)."""
    return (a[:, None] != b[None]).double().mean(-1)


def score_text(
    truth: Batch, rec: Reconstruction, context: ScoringContext, *, trial: int = 0, **oracles: Any
) -> TrialScore:
    """Score reconstructed sentences against the true ones: as `evaluator.score_trial`.

    No attack on sentences has an oracle, a comparison attack or a recoverable mask; `oracles` are None.
    """
    assert not any(value is not None for value in oracles.values()), sorted(oracles)
    domain, baselines = context.task.domain, context.baselines
    truth, guesses = truth.to("cpu"), domain.project(rec.examples.cpu())
    length = truth.examples.shape[1]
    scored = length - int(context.recipe is not None and context.recipe.loss == "next_token")
    x, r = truth.examples[:, :scored], guesses[:, :scored]
    pairs = _pair(x, r)
    fallback = baselines.mean_example if baselines.mean_example is not None else torch.zeros(length).long()
    rebuilt = torch.stack([fallback if j is None else guesses[j] for j in pairs])
    common = _frequent_words(baselines, len(set(r.flatten().tolist())))
    class_accuracy = _class_accuracy(truth, baselines, scored)
    rows: list[dict[str, Any]] = []
    for i, (label, j) in enumerate(zip(truth.labels.tolist(), pairs, strict=True)):
        last = (
            None
            if scored == length or j is None or guesses[j, -1] < 0
            else bool(guesses[j, -1] == truth.examples[i, -1])
        )
        rows.append(
            {
                "image": i,
                "match": j,
                "tokens": scored,
                **compare(domain, x[i], rebuilt[i, :scored]),
                "bag_recall": bag_recall(x[i], r),
                "last_token": last,
                "label_true": label,
                "label_pred": None,
                "label_ok": None,
                "baseline_token_accuracy": token_accuracy(x[i], fallback[:scored]),
                "class_baseline_token_accuracy": class_accuracy[i],
                "baseline_bag_recall": None if common is None else bag_recall(x[i], common),
            }
        )
    null: dict[str, Any] | None = None
    if context.candidates is not None:
        candidates = _Scored(context.candidates, scored)
        found = ranks(x, truth.labels, r, pairs, candidates, distances)
        null = _null(truth.labels, r, candidates, trial)
        for i, (row, place) in enumerate(zip(rows, found, strict=True)):
            row |= place
            row["null_token_accuracy"] = None if null is None else null["token_accuracy"][i]
            row["null_bag_recall"] = None if null is None else null["bag_recall"][i]
    record = record_of(rec, None, all(row["match"] is not None and row["token_accuracy"] == 1 for row in rows))
    if null is not None:
        record["null"] = null
    return TrialScore(rows, rebuilt, record)


class _Scored(Candidates):
    """Candidates without the tokens that are not scored."""

    def __init__(self, candidates: Candidates, scored: int) -> None:
        super().__init__(candidates.pools, candidates.seed)
        self._all, self._scored = candidates, scored

    def _of(self, label: int) -> tuple[Tensor, bool]:
        examples, same = self._all.of(label)
        return examples[:, : self._scored], same


def _pair(truth: Tensor, guesses: Tensor) -> list[int | None]:
    """The reconstruction of each sentence; words in wrong places decide between equal numbers of right tokens."""
    if not len(guesses):
        return [None] * len(truth)
    rouge = torch.tensor([[rouge1(x, r) for r in guesses] for x in truth], dtype=torch.float64)
    return assign(distances(truth, guesses) - 1e-3 * rouge)


def _class_accuracy(truth: Batch, baselines: Baselines, scored: int) -> list[float | None]:
    """The most frequent words of the true classes, paired as reconstructions are."""
    found = [baselines.class_mean(label) for label in truth.labels.tolist()]
    known = [guess for guess in found if guess is not None]
    if len(known) < len(found):
        return [None] * len(found)
    x, guesses = truth.examples[:, :scored], torch.stack(known)[:, :scored]
    return [token_accuracy(a, guesses[j]) for a, j in zip(x, _pair(x, guesses), strict=True)]  # type: ignore[index]


def _frequent_words(baselines: Baselines, count: int) -> Tensor | None:
    """The `count` most frequent words of the public sentences: as many as the reconstructions have."""
    if baselines.public is None:
        return None
    frequencies = baselines.public.examples.flatten().bincount()
    return frequencies.argsort(descending=True, stable=True)[:count]


def _null(labels: Tensor, guesses: Tensor, candidates: Candidates, trial: int) -> dict[str, Any] | None:
    """The reconstructions (M, L) scored against sets of other sentences with the true labels; None without any."""
    sets, same_labels = candidates.draws(labels, trial)
    if not sets:
        return None
    accuracy, recall, hits = [], [], []
    for others in sets:
        pairs = _pair(others, guesses)
        scores = [0.0 if j is None else token_accuracy(x, guesses[j]) for x, j in zip(others, pairs, strict=True)]
        accuracy.append(scores)
        recall.append([bag_recall(x, guesses) for x in others])
        hits += [score == 1 for score in scores]
    return {
        "token_accuracy": [statistics.fmean(column) for column in zip(*accuracy, strict=True)],
        "bag_recall": [statistics.fmean(column) for column in zip(*recall, strict=True)],
        "recovered": statistics.fmean(hits),
        "labels": same_labels,
    }


def summarize_text(
    rows: Sequence[Mapping[str, Any]], trials: Sequence[Mapping[str, Any]], thresholds: Sequence[float] = ()
) -> dict[str, Any]:
    """The numbers of summary.json: as `summary.summarize`. PSNR and the like are None; `thresholds` are unused."""
    units = [unit_of(r, number) for number, r in enumerate(rows)]

    mean = functools.partial(mean_of, rows, units)

    exact_share = share_interval([r["exact"] == 1 for r in rows], units) if rows else None
    last = [r["last_token"] for r in rows if r["last_token"] is not None]
    return {
        "domain": "text",
        "images": len(rows),
        "units": len(set(units)),
        "unit": unit_kind(rows),
        "tokens": rows[0]["tokens"] if rows else None,
        "psnr": None,
        "ssim": None,
        "lpips": None,
        "exact": exact_share,
        "success_rate": None if exact_share is None else exact_share["share"],
        **{key: mean(key) for key in ("token_accuracy", "rouge1", "bag_recall")},
        "token_accuracy_quantiles": quantiles([r["token_accuracy"] for r in rows], QUANTILES) if rows else None,
        "last_token": statistics.fmean(last) if last else None,
        "label_accuracy": None,
        "identified": identified_share(rows, units),
        "null": null_of(trials, "token_accuracy", "bag_recall"),
        "over_null": gain(rows, units, "token_accuracy", "null_token_accuracy"),
        "baseline_psnr": None,
        "class_baseline_psnr": None,
        "baseline_token_accuracy": (mean("baseline_token_accuracy") or {}).get("mean"),
        "class_baseline_token_accuracy": (mean("class_baseline_token_accuracy") or {}).get("mean"),
        "baseline_bag_recall": (mean("baseline_bag_recall") or {}).get("mean"),
        "over_class_mean": gain(rows, units, "token_accuracy", "class_baseline_token_accuracy"),
        "seconds": sum(t["seconds"] for t in trials),
        "missed": sum(r["match"] is None for r in rows),
        "status": dict(sorted(Counter(t["status"] for t in trials).items())),
    }


SCORINGS.add("text", Scoring(score_text, summarize_text, "token_accuracy", "tokens right"))
