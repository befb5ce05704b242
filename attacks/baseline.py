"""Baseline: the score of an attacker who ignores the update.

Every example of the batch is guessed to be the mean public example; a sentence is guessed to have the most frequent
word of each position. With labels granted it is the mean of the class, the best guess from the label alone. In
federated mode the same command is plain FedAvg training, with the accuracy of each round in rounds.jsonl.
"""

import torch

from attacks.base import Attack, register
from core.protocol import Observation, Reconstruction


@register("baseline")
class Baseline(Attack):
    """Mean public image: the score of an attacker who ignores the update."""

    citation = "no attack: the mean public image"
    threat = "honest-but-curious"
    uses = frozenset({"num_examples"})
    requires = frozenset({"public"})
    kinds = frozenset({"continuous", "tabular", "discrete"})
    supports_adam = True

    def needs_workers(self) -> bool:
        return False

    def reconstruct(self, observation: Observation, rng: torch.Generator) -> Reconstruction:
        assert observation.public is not None, "the baseline is a mean of public examples"
        examples, labels = observation.public
        mean = observation.task.domain.typical(examples)
        granted = observation.granted.get("labels")
        if granted is None:
            return Reconstruction(mean.expand(observation.update.num_examples, *mean.shape))
        classes = [examples[labels == y] for y in granted]
        typical = observation.task.domain.typical
        return Reconstruction(torch.stack([typical(c) if len(c) else mean for c in classes]), granted)
