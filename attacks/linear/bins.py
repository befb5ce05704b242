"""Bins of an imprint block: what their rows are multiples of, and which example is in which."""

from typing import Literal

import torch
from torch import Tensor, nn

from attacks.linear.features import FeatureExtractor
from core.protocol import Task
from models.implants.imprint import find_feature_imprint, find_imprint

Decoder = Literal["auto", "rows", "bias"]


def scale_rows(decoder: Decoder, weight: Tensor, bias: Tensor, low: Tensor, high: Tensor, exact: bool) -> Tensor:
    """Images from rows (K, N) that are multiples of one, by the bias gradient (K,) or the thresholds of their bin.

    exact: whether the bias gradient is precise enough.
    """
    if decoder == "bias":
        return weight / bias[:, None]
    means = weight.mean(1)
    brightness = (low.clamp(min=0) + high) / 2
    if exact and decoder == "auto":
        # only white bounds the last bin
        bound = torch.cat([high[:-1], high[-1:].clamp(min=1)])
        brightness = torch.clamp(means / bias, low, bound).nan_to_num()
    return weight * (brightness / means)[:, None]


@torch.no_grad()
def bins_of(model: nn.Module, task: Task, examples: Tensor) -> Tensor:
    """The bin of each example (N, *shape) in a model with a block, at the input or inside: (N,), -1 below the first."""
    block, feature_block = find_imprint(model), find_feature_imprint(model)
    assert block is not None, "the model has no imprint block"
    inputs = task.domain.to_model(examples)
    if feature_block is not None:
        inputs = FeatureExtractor(model, feature_block).in_chunks(inputs).view(-1, *block.task.domain.shape)
    return block.bin_of(inputs)
