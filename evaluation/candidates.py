"""Examples that are not in any attacked update: what a reconstruction must tell its victim from.

They serve two comparisons. Identification: the victim among candidates of its own class. Null: the reconstructions of
an update scored against other examples with the same labels.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from core.rng import stream

CANDIDATES = 1000  # the victim and at most 999 others
ENOUGH = 99  # others: a class with fewer takes the next pool as well, and at last all classes
MAX_NUMBERS = 2**24  # in the candidates of one class: 64 MB
KEPT_NUMBERS = 8 * MAX_NUMBERS
DRAWS = 8  # sets of other examples in the null of an update


@dataclass(frozen=True)
class Pool:
    """Examples that no victim sent. take: indices (n,) int64 -> examples (n, *shape)."""

    labels: Tensor  # (N,) int64
    take: Callable[[Tensor], Tensor]


class Candidates:
    """Candidates of each class, the same for all trials of a seed; examples are loaded when their class is needed.

    pools: in order of preference. The first should hold examples of the victims' own split, which alone are
    exchangeable with them; a later one is used only for a class with fewer than 99 examples in those before it.
    """

    def __init__(self, pools: Sequence[Pool], seed: int) -> None:
        self.pools, self.seed = list(pools), seed
        self._kept: dict[int, tuple[Tensor, bool]] = {}  # class -> its candidates

    def of(self, label: int) -> tuple[Tensor, bool]:
        """As `_of`; the classes that were asked for first are kept in memory, up to KEPT_NUMBERS."""
        if label not in self._kept:
            found = self._of(label)
            if found[0].numel() + sum(examples.numel() for examples, _ in self._kept.values()) > KEPT_NUMBERS:
                return found
            self._kept[label] = found
        return self._kept[label]

    def _of(self, label: int) -> tuple[Tensor, bool]:
        """At most 999 examples (N, *shape) in random order, and whether all are of class `label`.

        They are of all classes where the class has fewer than 99 in all pools.
        """
        own = [(pool.labels == label).nonzero().flatten() for pool in self.pools]
        same = sum(map(len, own)) >= ENOUGH
        chosen = own if same else [torch.arange(len(pool.labels)) for pool in self.pools]
        rng = stream(self.seed, "candidates", label if same else "all")
        found: list[Tensor] = []
        count, most = 0, CANDIDATES - 1
        for pool, indices in zip(self.pools, chosen, strict=True):
            if not len(indices) or count >= ENOUGH:
                continue
            size = math.prod(pool.take(indices[:1]).shape[1:])
            most = min(most, max(ENOUGH, MAX_NUMBERS // size))
            drawn = indices[torch.randperm(len(indices), generator=rng)[: most - count]]
            found.append(pool.take(drawn))
            count += len(drawn)
        return (torch.cat(found), same) if found else (torch.empty(0), same)

    def draws(self, labels: Tensor, trial: int) -> tuple[list[Tensor], bool]:
        """Sets of examples (n, *shape) with these labels (n,), and whether every class had some of its own.

        No set holds an example twice unless a class has too few. No sets without candidates.
        """
        rng = stream(self.seed, "null", trial)
        sets: list[list[Tensor]] = [[None] * len(labels) for _ in range(DRAWS)]  # type: ignore[list-item]
        all_own = True
        for label in labels.unique().tolist():
            examples, own = self.of(label)
            all_own &= own
            positions = (labels == label).nonzero().flatten().tolist()
            if not len(examples):
                return [], False
            for drawn in sets:
                repeats = -(-len(positions) // len(examples))
                order = torch.cat([torch.randperm(len(examples), generator=rng) for _ in range(repeats)])
                for position, index in zip(positions, order.tolist(), strict=False):
                    drawn[position] = examples[index]
        return [torch.stack(drawn) for drawn in sets], all_own
