"""Batch statistics from the running statistics that a client returns. Ours; as a term of the objective: GradInversion.

BatchNorm in train mode moves its running statistics at each step by  r <- (1 - m) r + m b,  with m the momentum and b
the batch's mean, or its unbiased variance over the N = n H W entries of a channel. A client that uploads its buffers
reveals

    T     = num_batches_tracked, after minus before
    b     = (r_T - (1 - m)^T r_0) / (1 - (1 - m)^T),    a mean over the T steps, weights proportional to (1 - m)^(T-1-s)

With momentum None, r is the plain mean of all batches so far. The batch is normalised by the biased variance, which is
b (N - 1) / N: the number of entries counts, not the number of images.

Yin et al., See through Gradients, CVPR 2021, match statistics of the broadcast model. https://arxiv.org/abs/2104.07586
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

TINY = 1e-12


@dataclass(frozen=True)
class BatchStatistics:
    """Mean and unbiased variance (C,) of one layer's input, over a batch or as a weighted mean over T of them."""

    layer: str
    mean: Tensor
    variance: Tensor
    steps: int

    def biased_variance(self, entries: int) -> Tensor:
        """What the layer normalises by in one step, over `entries` entries of a channel (N H W)."""
        return self.variance * (entries - 1) / entries

    def distance(self, features: Tensor) -> Tensor:
        """Squared distance of the statistics of inputs (N, C, ...), relative to the observed variance: ()."""
        mean, variance = statistics_of(features)
        of_mean = (mean - self.mean).square().sum() / self.variance.sum().clamp(min=TINY)
        of_variance = (variance - self.variance).square().sum() / self.variance.square().sum().clamp(min=TINY)
        return of_mean + of_variance


def statistics_of(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and unbiased variance of each channel (C,) of (N, C, ...)."""
    rows = features.transpose(0, 1).flatten(1)
    return rows.mean(1), rows.var(1)


def local_steps(model: nn.Module, buffers: Mapping[str, Tensor]) -> int | None:
    """T, as the returned buffers reveal it; None without a BatchNorm layer that counts."""
    for name, layer in model.named_modules():
        if isinstance(layer, _BatchNorm) and layer.num_batches_tracked is not None:
            returned = buffers.get(f"{name}.num_batches_tracked")
            return None if returned is None else int(returned) - int(layer.num_batches_tracked)
    return None


def batch_statistics(model: nn.Module, buffers: Mapping[str, Tensor]) -> list[BatchStatistics]:
    """The statistics that a client's returned buffers reveal, one for each BatchNorm layer that moved.

    Empty if the client computed in eval mode, or if it returned no buffers.
    """
    steps = local_steps(model, buffers) or 0
    if steps <= 0:
        return []
    found = []
    for name, layer in model.named_modules():
        if not isinstance(layer, _BatchNorm) or layer.running_mean is None or layer.running_var is None:
            continue
        if layer.momentum is None:
            before = int(layer.num_batches_tracked or 0)
            kept = before / (before + steps)
        else:
            kept = (1 - layer.momentum) ** steps
        pairs = ((layer.running_mean, "running_mean"), (layer.running_var, "running_var"))
        mean, variance = (
            ((buffers[f"{name}.{kind}"].double() - kept * old.double()) / (1 - kept)).to(old) for old, kind in pairs
        )
        found.append(BatchStatistics(name, mean, variance.clamp(min=0), steps))
    return found
