"""Sentences whose hidden states lie in two spans: by beams for decoders, by exchange of tokens for encoders."""

from dataclasses import dataclass

import torch
from torch import Tensor

from attacks.text.spans import Probe, Span


@dataclass(frozen=True)
class Rules:
    """Which candidates survive.

    words: most tokens for a position. beams: most prefixes for each sentence. margin: candidates farther than this
    many times the B-th nearest are dropped. thresholds: the largest distance in each of the two layers, None for none.
    """

    words: int
    beams: int
    margin: float
    thresholds: tuple[float, float] | None = None

    def choose(self, scores: Tensor, sentences: int, most: int, layer: int) -> Tensor:
        """Indices into `scores` (M,), the lowest first. At least `sentences` survive, unless there are thresholds."""
        if not len(scores):
            return torch.empty(0, dtype=torch.int64)
        if self.thresholds is not None:
            good = (scores < self.thresholds[layer]).nonzero().flatten()
            return good[scores[good].argsort()]
        values, order = scores.sort()
        limit = self.margin * values[min(sentences, len(values)) - 1]
        return order[: min(most, int((values <= limit).sum()))]


def token_candidates(probe: Probe, span: Span, vocabulary: int, length: int, sentences: int, rules: Rules) -> list:
    """For each position p the tokens w whose input of the first layer lies near its span: [(ids, distances)] * L."""
    words = torch.arange(vocabulary)
    distances = torch.cat(
        [span.distances(probe.inputs(w[:, None].expand(-1, length), 0)) for w in words.split(256)]
    )  # (V, L)
    found = []
    for column in distances.T:
        chosen = rules.choose(column, sentences, rules.words, 0)
        found.append((chosen, column[chosen]))
    return found


def decode(probe: Probe, span: Span, candidates: list, sentences: int, rules: Rules) -> tuple[Tensor, Tensor]:
    """Sentences (M, L), the most plausible first, and their mean distances (M,), by beams from the first token on.

    In a causal model the input of the second layer at position p depends on tokens 0 .. p alone, so a wrong prefix
    leaves the span at once. The score of a prefix is the mean of its distances.
    """
    prefixes, scores = torch.empty(1, 0, dtype=torch.int64), torch.zeros(1, dtype=torch.float64)
    for tokens, _ in candidates:
        if not len(tokens) or not len(prefixes):
            break
        extended = torch.cat(
            [prefixes.repeat_interleave(len(tokens), 0), tokens.repeat(len(prefixes))[:, None]], 1
        )  # (M * k, p + 1)
        distances = span.distances(probe.inputs(extended, 1, last=True))
        if rules.thresholds is not None:
            chosen = rules.choose(distances, sentences, 0, 1)
            scores = scores.repeat_interleave(len(tokens))[chosen] + distances[chosen]
        else:
            total = scores.repeat_interleave(len(tokens)) + distances
            chosen = rules.choose(total, sentences, rules.beams * sentences, 1)
            scores = total[chosen]
        prefixes = extended[chosen]
    return prefixes, scores / max(1, prefixes.shape[1])


def distinct(sentences: Tensor, scores: Tensor, count: int, exact: float, overlap: float = 0.7) -> Tensor:
    """Indices of at most `count` sentences (M, L), the best first.

    A sentence that shares `overlap` or more of its tokens with a better one is passed over unless its score is below
    `exact`; such sentences come last.
    """
    chosen: list[int] = []
    passed: list[int] = []
    for i in scores.argsort().tolist():
        same = [(sentences[i] == sentences[j]).double().mean().item() for j in chosen]
        (passed if scores[i] > exact and same and max(same) >= overlap else chosen).append(i)
    return torch.tensor((chosen + passed)[:count], dtype=torch.int64)


def encode(
    probe: Probe,
    span: Span,
    candidates: list,
    sentences: int,
    rules: Rules,
    restarts: int,
    rng: torch.Generator,
    sweeps: int = 10,
) -> tuple[Tensor, Tensor]:
    """Sentences (M, L), the most plausible first, and their mean distances (M,), by exchange of single tokens.

    In an encoder every hidden state depends on the whole sentence. From `restarts` random sentences for each one that
    is sought, each position in turn takes the token with the least mean distance of all positions, until nothing
    changes.
    """
    if not all(len(tokens) for tokens, _ in candidates):
        return torch.empty(0, 0, dtype=torch.int64), torch.empty(0, dtype=torch.float64)
    columns = [tokens[torch.randint(len(tokens), (restarts * sentences,), generator=rng)] for tokens, _ in candidates]
    current = torch.stack(columns, 1)  # (M, L)
    found: dict[tuple[int, ...], float] = {}
    for sweep in range(sweeps + 1):
        current = torch.unique(current, dim=0)
        scores = span.distances(probe.inputs(current, 1)).mean(1)
        moving = [i for i, row in enumerate(current.tolist()) if tuple(row) not in found]
        found |= {tuple(current[i].tolist()): scores[i].item() for i in moving}
        if not moving or sweep == sweeps:
            break
        current = current[moving]
        for position in torch.randperm(len(candidates), generator=rng).tolist():
            tokens = candidates[position][0]
            if len(tokens) == 1:
                continue
            tried = current.repeat_interleave(len(tokens), 0)
            tried[:, position] = tokens.repeat(len(current))
            means = span.distances(probe.inputs(tried, 1)).mean(1).view(-1, len(tokens))  # (M, k)
            current[:, position] = tokens[means.argmin(1)]
    best = sorted(found, key=lambda row: found[row])
    return torch.tensor(best), torch.tensor([found[row] for row in best], dtype=torch.float64)
