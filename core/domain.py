"""What one example of a learning task is, and how an attack may move it.

An attack optimises examples without knowing what they are: it starts where `init` says, keeps them valid with
`project_`, prefers plausible ones with `regularizer`, and hands `decode`d ones back.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NoReturn

import torch
from torch import Tensor

Kind = Literal["continuous", "tabular", "discrete"]
UNKNOWN = -1  # a token of a reconstructed sentence about which the attack says nothing


class Domain(ABC):
    """One kind of example. Examples are (N, *shape) in units of their own; `to_model` gives the model's inputs.

    `name` selects the metrics that compare two examples (evaluation/metrics.py). `kind` says whether examples can be
    optimised by gradients; attacks declare the kinds they reconstruct.
    """

    name: ClassVar[str]
    kind: ClassVar[Kind] = "continuous"
    noun: ClassVar[tuple[str, str]] = ("example", "examples")  # what tables call one of them, and several
    shape: tuple[int, ...]  # of one example, without the batch dimension

    @abstractmethod
    def init(self, n: int, rng: torch.Generator) -> Tensor:
        """Start values (n, *shape) near the middle of the domain, in its units."""

    @abstractmethod
    def to_model(self, examples: Tensor) -> Tensor:
        """Examples (N, *shape) -> the model's inputs, differentiable."""

    @abstractmethod
    def from_model(self, inputs: Tensor) -> Tensor:
        """The inverse of `to_model`; the result may lie outside the domain."""

    @abstractmethod
    def project(self, examples: Tensor) -> Tensor:
        """The nearest valid examples (N, *shape)."""

    @abstractmethod
    def project_(self, inputs: Tensor) -> None:
        """Project the model's inputs (N, *shape) onto valid examples, in place."""

    @abstractmethod
    def from_unbounded(self, u: Tensor) -> Tensor:
        """A differentiable map from any real tensor (N, *shape) onto valid examples."""

    @abstractmethod
    def to_unbounded(self, examples: Tensor) -> Tensor:
        """The inverse of `from_unbounded`, for examples inside the domain."""

    @abstractmethod
    def regularizer(self, inputs: Tensor) -> Tensor:
        """How implausible the model's inputs (N, *shape) are, a mean over examples: (). May have kinks."""

    @abstractmethod
    def smooth_regularizer(self, examples: Tensor) -> Tensor:
        """As `regularizer`, of examples, with a derivative everywhere: for second-order optimisers."""

    @abstractmethod
    def render(self, example: Tensor) -> Any:
        """One example (*shape) as a figure shows it."""

    def decode(self, inputs: Tensor) -> Tensor:
        """The model's inputs -> valid examples (N, *shape), detached."""
        return self.project(self.from_model(inputs.detach()))

    def typical(self, examples: Tensor) -> Tensor:
        """The one example (*shape) to guess for somebody who knows only that it is like these (N, *shape)."""
        return examples.mean(0)

    def fits(self, n: int) -> str | None:
        """Why the regulariser cannot be used on batches of `n` examples; None if it can."""
        return None


@dataclass(frozen=True)
class ImageDomain(Domain):
    """Images (C, H, W) with pixels in [0, 1]. The model takes (pixel - mean) / std, one mean and std per channel."""

    shape: tuple[int, int, int]  # (C, H, W)
    mean: tuple[float, ...]
    std: tuple[float, ...]

    name: ClassVar[str] = "image"
    noun: ClassVar[tuple[str, str]] = ("image", "images")

    def __post_init__(self) -> None:
        channels = self.shape[0]
        assert len(self.mean) == len(self.std) == channels, f"{channels} channels, mean {self.mean}, std {self.std}"
        assert all(s > 0 for s in self.std), f"std {self.std} must be positive"

    def init(self, n: int, rng: torch.Generator) -> Tensor:
        """Mid-grey with a little noise."""
        return 0.5 + 0.01 * torch.randn(n, *self.shape, generator=rng)

    def to_model(self, examples: Tensor) -> Tensor:
        return (examples - self._per_channel(self.mean, examples)) / self._per_channel(self.std, examples)

    def from_model(self, inputs: Tensor) -> Tensor:
        return inputs * self._per_channel(self.std, inputs) + self._per_channel(self.mean, inputs)

    def project(self, examples: Tensor) -> Tensor:
        return examples.clamp(0, 1)

    @torch.no_grad()
    def project_(self, inputs: Tensor) -> None:
        mean, std = (self._per_channel(values, inputs) for values in (self.mean, self.std))
        inputs.clamp_(-mean / std, (1 - mean) / std)

    def from_unbounded(self, u: Tensor) -> Tensor:
        """A sine: derivative 1 at mid-grey, and 0 and 1 are reached rather than approached."""
        return 0.5 + 0.5 * torch.sin(2 * u)

    def to_unbounded(self, examples: Tensor) -> Tensor:
        """Pixels are first moved to at least 0.01 from 0 and 1, where the sine has no derivative."""
        return torch.asin((2 * examples - 1).clamp(-0.98, 0.98)) / 2

    def regularizer(self, inputs: Tensor) -> Tensor:
        """Anisotropic total variation as in Inverting Gradients: mean |dx| + mean |dy|."""
        dx, dy = inputs.diff(dim=-1), inputs.diff(dim=-2)
        return dx.abs().mean() + dy.abs().mean()

    def smooth_regularizer(self, examples: Tensor) -> Tensor:
        """Isotropic total variation, mean over pixels of sqrt(dx^2 + dy^2 + 1e-4)."""
        dx = examples[..., :-1, 1:] - examples[..., :-1, :-1]
        dy = examples[..., 1:, :-1] - examples[..., :-1, :-1]
        return (dx.square() + dy.square() + 1e-4).sqrt().mean()

    def fits(self, n: int) -> str | None:
        if n > 1 and min(self.shape[1:]) < 2:
            return "the total-variation regulariser of a batch needs images of at least 2x2 pixels"
        return None

    def render(self, example: Tensor) -> Any:
        """An array (H, W) or (H, W, 3)."""
        array = example.permute(1, 2, 0).numpy()
        if array.shape[-1] in (1, 3):
            return array.squeeze(-1) if array.shape[-1] == 1 else array
        return array.mean(-1)  # no colour model for two or more than three channels: their mean

    @staticmethod
    def _per_channel(values: tuple[float, ...], like: Tensor) -> Tensor:
        return torch.tensor(values, dtype=like.dtype, device=like.device).view(-1, 1, 1)


@dataclass(frozen=True)
class TextDomain(Domain):
    """Sentences of L tokens: ids (L,) int64, indices into `words`. The model takes ids, and embeds them itself.

    Sentences are discrete: what only gradients can use (`regularizer`, `from_unbounded` and so on) raises TypeError.
    """

    shape: tuple[int]  # (L,)
    words: tuple[str, ...]  # the vocabulary, public knowledge as a tokeniser is

    name: ClassVar[str] = "text"
    kind: ClassVar[Kind] = "discrete"
    noun: ClassVar[tuple[str, str]] = ("sentence", "sentences")

    def init(self, n: int, rng: torch.Generator) -> Tensor:
        """Random tokens."""
        return torch.randint(len(self.words), (n, *self.shape), generator=rng)

    def to_model(self, examples: Tensor) -> Tensor:
        return examples.long()

    def from_model(self, inputs: Tensor) -> Tensor:
        return inputs

    def project(self, examples: Tensor) -> Tensor:
        """The nearest ids; UNKNOWN is one of them."""
        return examples.round().long().clamp(UNKNOWN, len(self.words) - 1)

    def render(self, example: Tensor) -> str:
        """The words, with a space before each but punctuation; an unknown one is an ellipsis."""
        text = " ".join("…" if i == UNKNOWN else self.words[i] for i in example.tolist())
        for mark in ".,;:":
            text = text.replace(f" {mark}", mark)
        return text

    def typical(self, examples: Tensor) -> Tensor:
        """The most frequent token of each position."""
        return examples.mode(0).values

    def encode(self, words: Sequence[str]) -> Tensor:
        """Known words -> ids (len(words),)."""
        index = {word: i for i, word in enumerate(self.words)}
        return torch.tensor([index[word] for word in words], dtype=torch.int64)

    def project_(self, inputs: Tensor) -> None:
        self._refuse()

    def from_unbounded(self, u: Tensor) -> Tensor:
        self._refuse()

    def to_unbounded(self, examples: Tensor) -> Tensor:
        self._refuse()

    def regularizer(self, inputs: Tensor) -> Tensor:
        self._refuse()

    def smooth_regularizer(self, examples: Tensor) -> Tensor:
        self._refuse()

    @staticmethod
    def _refuse() -> NoReturn:
        raise TypeError("sentences are discrete: no gradient moves them")


@dataclass(frozen=True)
class Column:
    """A column of a table.

    categories: the values of a categorical column, which is one-hot encoded; empty for a number. mean, std, low, high:
    of a number, in its own units.
    """

    name: str
    categories: tuple[str, ...] = ()
    mean: float = 0.0
    std: float = 1.0
    low: float = 0.0
    high: float = 0.0

    @property
    def width(self) -> int:
        """The number of entries in an encoded row."""
        return len(self.categories) or 1


@dataclass(frozen=True)
class TabularDomain(Domain):
    """Rows of a table, encoded as vectors (d,): numbers as (value - mean) / std, categories as one-hot blocks.

    The model takes rows as they are. The statistics are those of public rows: an attacker knows the schema.
    """

    shape: tuple[int]  # (d,)
    columns: tuple[Column, ...]

    name: ClassVar[str] = "table"
    kind: ClassVar[Kind] = "tabular"
    noun: ClassVar[tuple[str, str]] = ("record", "records")

    def __post_init__(self) -> None:
        width = sum(column.width for column in self.columns)
        assert self.shape == (width,), f"shape {self.shape}, columns of {width} entries"
        assert all(c.std > 0 and c.low < c.high for c in self.columns if not c.categories), self.columns

    def init(self, n: int, rng: torch.Generator) -> Tensor:
        """The middle, which is the mean of numbers and all categories at once, with a little noise."""
        return self.project(self.middle(torch.zeros(())) + 0.01 * torch.randn(n, *self.shape, generator=rng))

    def to_model(self, examples: Tensor) -> Tensor:
        return examples

    def from_model(self, inputs: Tensor) -> Tensor:
        return inputs

    def project(self, examples: Tensor) -> Tensor:
        """Numbers within their public range, entries of one-hot blocks in [0, 1]."""
        low, high = self._limits(examples)
        return torch.minimum(torch.maximum(examples, low), high)

    @torch.no_grad()
    def project_(self, inputs: Tensor) -> None:
        inputs.copy_(self.project(inputs))

    def from_unbounded(self, u: Tensor) -> Tensor:
        """A sigmoid onto each entry's range, with the middle at zero."""
        low, high = self._limits(u)
        return low + (high - low) * torch.sigmoid(u + self._logit(self.middle(u)))

    def to_unbounded(self, examples: Tensor) -> Tensor:
        return self._logit(examples) - self._logit(self.middle(examples))

    def regularizer(self, inputs: Tensor) -> Tensor:
        """The mean square of standardised numbers, and of what the entries of each one-hot block lack to a sum of 1."""
        penalties = [
            (inputs[:, place].sum(1) - 1).square() if column.categories else inputs[:, place].square().sum(1)
            for column, place in self.places()
        ]
        return torch.stack(penalties).mean()

    def smooth_regularizer(self, examples: Tensor) -> Tensor:
        return self.regularizer(examples)

    def places(self) -> list[tuple[Column, slice]]:
        """Each column with its entries in an encoded row."""
        found, start = [], 0
        for column in self.columns:
            found.append((column, slice(start, start + column.width)))
            start += column.width
        return found

    def cells(self, examples: Tensor) -> Tensor:
        """Rows (N, d) -> one value for each column (N, columns): standardised numbers, and indices of categories."""
        cells = [
            examples[:, place].argmax(1).to(examples) if column.categories else examples[:, place.start]
            for column, place in self.places()
        ]
        return torch.stack(cells, 1)

    def render(self, example: Tensor) -> tuple[str, ...]:
        """The value of each column as text."""
        return tuple(
            c.categories[int(value)] if c.categories else f"{value * c.std + c.mean:.4g}"
            for c, value in zip(self.columns, self.cells(example[None])[0].tolist(), strict=True)
        )

    def typical(self, examples: Tensor) -> Tensor:
        """Means of numbers, and the most frequent category of each block."""
        parts = []
        for column, place in self.places():
            mean = examples[:, place].mean(0)
            parts.append(torch.eye(column.width).to(mean)[mean.argmax()] if column.categories else mean)
        return torch.cat(parts)

    def middle(self, like: Tensor) -> Tensor:
        """The row (d,) without any knowledge: zero, the mean, of numbers; 1 / K of K categories."""
        entries = [1 / c.width if c.categories else self._inside(c) for c in self.columns for _ in range(c.width)]
        return torch.tensor(entries, dtype=like.dtype, device=like.device)

    @staticmethod
    def _inside(column: Column) -> float:
        """The mean of a number, standardised, moved off the ends of its range."""
        low, high = ((limit - column.mean) / column.std for limit in (column.low, column.high))
        return min(max(0.0, low + 0.05 * (high - low)), high - 0.05 * (high - low))

    def _limits(self, like: Tensor) -> tuple[Tensor, Tensor]:
        pairs = [
            (0.0, 1.0) if c.categories else ((c.low - c.mean) / c.std, (c.high - c.mean) / c.std)
            for c in self.columns
            for _ in range(c.width)
        ]
        low, high = torch.tensor(pairs, dtype=like.dtype, device=like.device).T
        return low, high

    def _logit(self, examples: Tensor) -> Tensor:
        low, high = self._limits(examples)
        return torch.logit(((examples - low) / (high - low)).clamp(1e-3, 1 - 1e-3))
