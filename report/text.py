"""The table, the sentence and the page of runs on sentences."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from core.domain import Domain
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
)
from utils.files import write_bytes

_SHARED = ("identified", "missed", "status", "test accuracy", "training loss", "seconds", "granted (oracle)")
_shared = {entry.label: entry for entry in ENTRIES if entry.label in _SHARED}

TEXT_ENTRIES = (
    counted("sentences"),
    Entry(
        "exact sentences",
        "exact",
        lambda s: share(s["exact"]),
        "share of sentences whose own reconstruction has every token right; of a language model every token but the "
        "last, which has no gradient",
        always=True,
    ),
    Entry(
        "tokens right",
        "token_accuracy",
        lambda s: mean_std(s["token_accuracy"], 3),
        "share of tokens at their places, sentences paired one to one for the most tokens",
        always=True,
    ),
    Entry("ROUGE-1", "rouge1", lambda s: mean_std(s["rouge1"], 3), "F1 of a sentence's words, in any order"),
    Entry(
        "bag of words",
        "bag_recall",
        lambda s: mean_std(s["bag_recall"], 3),
        "share of a sentence's different words that occur anywhere in the reconstructions of its update",
    ),
    _shared["identified"],
    Entry(
        "null (tokens right)",
        "null",
        lambda s: f"{number(s['null']['token_accuracy'], 3)}, bag of words {number(s['null']['bag_recall'], 3)}",
        "tokens right of the same reconstructions for other sentences of the same labels, paired by the same rule",
        compared=False,
    ),
    Entry(
        "above null",
        "over_null",
        lambda s: interval(s["over_null"]),
        "tokens right minus the null, sentence by sentence: mean [95% interval]",
    ),
    Entry(
        "frequent words",
        "baseline_token_accuracy",
        lambda s: number(s["baseline_token_accuracy"], 3),
        "baseline: tokens right of the most frequent public word of each position",
    ),
    Entry(
        "frequent words (bag)",
        "baseline_bag_recall",
        lambda s: number(s["baseline_bag_recall"], 3),
        "baseline: bag of words of the most frequent public words, as many as the reconstructions have",
    ),
    Entry(
        "last token right",
        "last_token",
        lambda s: number(s["last_token"], 3),
        "share of last tokens that are right, where an attack reconstructs them",
    ),
    *(_shared[label] for label in _SHARED[1:]),
)


def verdict(summary: Summary) -> str:
    """One sentence: whether the update leaks, and the numbers that say so."""
    count = summary["images"]
    if not count:
        return "Nothing was scored, because the true sentences are unknown."
    parts = [
        f"{round(summary['success_rate'] * count)} of {plural(count, 'sentence')} exact "
        f"({summary['tokens']} tokens each)",
        f"{number(summary['token_accuracy']['mean'])} of all tokens right",
    ]
    if summary.get("identified") is not None:
        parts.append(identified_in_words(summary))
    if summary.get("over_null") is not None:
        parts.append(f"{interval(summary['over_null'])} tokens over the null")
    known = outcome(summary)
    start = "Nothing to compare with: there is no public text" if known is None else known[0].upper() + known[1:]
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
    """True sentences (N, L) over their reconstructions, as Markdown; words that are wrong stand in brackets."""
    lines = ["# Sentences and their reconstructions", ""]
    for x, r, row in zip(truth[:most], rebuilt[:most], rows, strict=False):
        scored = row["tokens"]
        note = "missed: frequent words" if row["match"] is None else f"{row['token_accuracy']:.0%} of tokens right"
        lines += [f"**Update {row['trial']}, sentence {row['image']}**, {note}", ""]
        lines += [f"- truth: {domain.render(x)}", f"- rebuilt: {_marked(x, r, scored, domain)}", ""]
    if len(truth) > most:
        lines.append(f"The first {most} of {len(truth)} sentences.")
    if rows and rows[0]["tokens"] < truth.shape[1]:
        lines.append(
            "The last word of a sentence has no gradient in these layers: … stands for it, and it is not scored."
        )
    write_bytes(path, ("\n".join(lines) + "\n").encode())


def _marked(truth: Tensor, guess: Tensor, scored: int, domain: Domain) -> str:
    """The words of a reconstruction (L,), those that are wrong in brackets."""
    words = []
    for position, (x, r) in enumerate(zip(truth, guess, strict=True)):
        word = domain.render(r[None])
        words.append(word if x == r or position >= scored else f"[{word}]")
    return " ".join(words)


VIEWS["text"] = View(
    TEXT_ENTRIES,
    verdict,
    "rebuilt.md",
    write_page,
    score="token_accuracy",
    score_label="tokens right, mean ± std over sentences",
    baseline_label="frequent public words",
)
