"""The labels that an attack holds fixed: granted, or inferred by the best rule that applies."""

import torch
from torch import Tensor

from attacks.labels.counts import bias_counts
from attacks.labels.rules import bias_sign, dlf_counts, smallest_row_sums
from core.protocol import Observation
from models.inspection import head_gradient


def infer_labels(mean_gradient: tuple[Tensor, ...], observation: Observation, rng: torch.Generator) -> Tensor:
    """Labels (K,): those granted or, without a grant, inferred from the update and shuffled.

    Counts come in ascending order and minibatches are cut in order: shuffled, no minibatch is all of one class.
    """
    granted = observation.granted.get("labels")
    if granted is not None:
        return granted
    labels = labels_from_bias(mean_gradient, observation)
    if labels is None:
        single = observation.update.num_examples == 1
        labels = (smallest_row_sums if single else dlf_counts)(mean_gradient, observation)
    return labels[torch.randperm(len(labels), generator=rng).to(labels.device)]


def labels_from_bias(mean_gradient: tuple[Tensor, ...], observation: Observation) -> Tensor | None:
    """Labels (K,) of the private examples from the bias gradient; None for a head without bias."""
    _, bias = head_gradient(mean_gradient, observation.task.num_classes)
    if bias is None:
        return None
    if observation.update.num_examples == 1:
        return torch.tensor([bias_sign(bias)], device=bias.device)
    return bias_counts(mean_gradient, observation)
