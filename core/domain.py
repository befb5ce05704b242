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

Kind = Literal["continuous", "discrete"]
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
