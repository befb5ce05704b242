"""The labels that an attack holds fixed: granted, or inferred by the best rule that applies."""

import torch
from torch import Tensor, nn

from attacks.labels.counts import bias_counts, public_head_inputs
from attacks.labels.head import LARGEST, proven_labels
from attacks.labels.rules import bias_sign, dlf_counts, smallest_row_sums
from core.protocol import Observation
from models.inspection import head_gradient, head_layer


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
    """Labels (K,) of the private examples from the head's gradient; None for a head without bias.

    Counts from its bias alone or, where those of few examples follow exactly from the weights as well, these.
    """
    _, bias = head_gradient(mean_gradient, observation.task.num_classes)
    if bias is None:
        return None
    if observation.update.num_examples == 1:
        return torch.tensor([bias_sign(bias)], device=bias.device)
    counts = bias_counts(mean_gradient, observation)
    single = observation.update.kind == "gradient" or observation.recipe.steps(len(counts)) == 1
    exact = single and observation.recipe.optimizer == "sgd" and observation.recipe.defense == "none"
    exact = exact and observation.recipe.loss == "cross_entropy"
    head = head_layer(observation.model)
    if not exact or len(counts) > LARGEST or not isinstance(head, nn.Linear):
        return counts
    weight, _ = head_gradient(mean_gradient, observation.task.num_classes)
    own = head.weight.detach(), head.bias.detach()
    features = public_head_inputs(observation)
    proven = proven_labels(weight, bias, *own, features, counts) if features.ndim == 2 else None
    return counts if proven is None else proven
