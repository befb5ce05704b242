"""Batch statistics from the running statistics that a client returns. Ours; as a term of the objective: GradInversion.

BatchNorm in train mode moves its running statistics at each step by  r <- (1 - m) r + m b,  with m the momentum and b
the batch's mean, or its unbiased variance over the N = n H W entries of a channel. A client that uploads its buffers
reveals

    T     = num_batches_tracked, after minus before
    b     = (r_T - (1 - m)^T r_0) / (1 - (1 - m)^T),    a mean over the T steps, weights proportional to (1 - m)^(T-1-s)

With momentum None, r is the plain mean of all batches so far. The batch is normalised by the biased variance, which is
b (N - 1) / N: the number of entries counts, not the number of images. A guess is compared by the same mean over the
same steps: its statistics at the broadcast weights are not those of the later ones.

Yin et al., See through Gradients, CVPR 2021, match statistics of the broadcast model. https://arxiv.org/abs/2104.07586
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from attacks.matching.matcher import GradientMatcher
from attacks.matching.watched import Watched
from core.protocol import Observation

TINY = 1e-12
MOST_STEPS = 50  # of a simulation that keeps every step's inputs in memory


@dataclass(frozen=True)
class BatchStatistics:
    """Mean and unbiased variance (C,) of one layer's input, as a mean over `steps` of them.

    decay: weight of a step relative to that of the next one.
    """

    layer: str
    mean: Tensor
    variance: Tensor
    steps: int
    decay: float

    def over_steps(self, features: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Mean and unbiased variance (C,) of the inputs (N, C, ...) of each step, with the steps' weights."""
        assert len(features) == self.steps, f"{len(features)} steps, not {self.steps}"
        shares = [self.decay**age for age in reversed(range(self.steps))]
        mean, variance = (
            torch.stack([share / sum(shares) * t for share, t in zip(shares, side, strict=True)]).sum(0)
            for side in zip(*map(statistics_of, features), strict=True)
        )
        return mean, variance

    def misfit(self, mean: Tensor, variance: Tensor) -> Tensor:
        """Squared distance of a mean and a variance (C,), relative to the observed variance: ()."""
        of_mean = (mean - self.mean).square().sum() / self.variance.sum().clamp(min=TINY)
        of_variance = (variance - self.variance).square().sum() / self.variance.square().sum().clamp(min=TINY)
        return of_mean + of_variance


def statistics_of(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and unbiased variance of each channel (C,) of (N, C, ...)."""
    rows = features.transpose(0, 1).flatten(1)
    return rows.mean(1), rows.var(1)


def local_steps(model: nn.Module, buffers: Mapping[str, Tensor]) -> int | None:
    """T, as the returned buffers reveal it; None without a BatchNorm layer that counts."""
    counts = (_steps(name, layer, buffers) for name, layer in _batch_norms(model))
    return next((count for count in counts if count is not None), None)


def batch_statistics(model: nn.Module, buffers: Mapping[str, Tensor]) -> list[BatchStatistics]:
    """The statistics that a client's returned buffers reveal, one for each BatchNorm layer that moved.

    `steps` is how often the layer was called. Empty if the client computed in eval mode, or if it returned no buffers.
    """
    found = []
    for name, layer in _batch_norms(model):
        steps = _steps(name, layer, buffers) or 0
        if steps <= 0 or layer.running_mean is None or layer.running_var is None or layer.momentum == 0:
            continue
        if layer.momentum is None:
            before = int(layer.num_batches_tracked or 0)
            decay, kept = 1.0, before / (before + steps)
        else:
            decay = 1 - layer.momentum
            kept = decay**steps
        pairs = ((layer.running_mean, "running_mean"), (layer.running_var, "running_var"))
        mean, variance = (
            ((buffers[f"{name}.{kind}"].double() - kept * old.double()) / (1 - kept)).to(old) for old, kind in pairs
        )
        found.append(BatchStatistics(name, mean, variance.clamp(min=0), steps, decay))
    return found


def _batch_norms(model: nn.Module) -> Iterator[tuple[str, _BatchNorm]]:
    return ((name, layer) for name, layer in model.named_modules() if isinstance(layer, _BatchNorm))


def _steps(name: str, layer: _BatchNorm, buffers: Mapping[str, Tensor]) -> int | None:
    """How often a layer was called in train mode; None if it does not count, or if its buffers were not returned."""
    returned = buffers.get(f"{name}.num_batches_tracked")
    if layer.num_batches_tracked is None or returned is None:
        return None
    return int(returned) - int(layer.num_batches_tracked)


class MatchedStatistics:
    """The statistics that returned buffers reveal, and those of a guess that goes through `observation`'s model."""

    def __init__(self, observation: Observation, entries: Sequence[BatchStatistics]) -> None:
        self.entries = entries
        self._watched = Watched(observation, [entry.layer for entry in entries])

    def matcher(self, make: Callable[[Observation], GradientMatcher]) -> GradientMatcher:
        """The matcher that `make` builds, whose forward passes are compared from now on."""
        found = make(self._watched.observation)
        found.checkpoint = False  # statistics of every step need its graph
        self._watched.take()
        return found

    def moments(self, several_steps: bool) -> list[tuple[Tensor, Tensor]]:
        """Mean and variance of each layer's inputs since the last call.

        several_steps: whether each forward pass was a step; otherwise their inputs are one batch.
        """
        taken = self._watched.take()
        if several_steps:
            return [entry.over_steps(taken[entry.layer]) for entry in self.entries]
        return [statistics_of(torch.cat(taken[entry.layer])) for entry in self.entries]

    def misfit(self, found: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """The mean over layers of `BatchStatistics.misfit`."""
        pairs = zip(self.entries, found, strict=True)
        return torch.stack([entry.misfit(*moments) for entry, moments in pairs]).mean()


def matched_statistics(observation: Observation, matcher: GradientMatcher) -> MatchedStatistics | None:
    """What returned buffers reveal about the steps that `matcher` simulates; None where the two cannot be compared.

    They can in train mode, for one client and full batches, in at most MOST_STEPS steps. A layer is left out if it was
    called another number of times than there are steps.
    """
    recipe, steps = observation.recipe, len(matcher.batches) if matcher.unrolled else 1
    full = recipe.batch_size >= observation.update.num_examples  # the order of smaller batches is not known
    if recipe.model_mode != "train" or observation.aggregate > 1 or not full or steps > MOST_STEPS:
        return None
    entries = [
        entry
        for entry in batch_statistics(observation.model, observation.update.buffers)
        if entry.steps == steps and entry.mean.isfinite().all() and entry.variance.isfinite().all()
    ]
    return MatchedStatistics(observation, entries) if entries else None
