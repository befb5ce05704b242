"""The no-information line: what an attacker shows who never looks at the update.

Every image of the batch is guessed to be the mean public image. With labels granted it is the mean public image of
the class, which is what a leaked label alone is worth. In federated mode the same command is plain FedAvg training,
with accuracy per round in rounds.jsonl.
"""

import torch

from attacks.base import Attack, register
from federated.wire import Observation, Reconstruction


@register("baseline")
class Baseline(Attack):
    """Mean public image. The line every score stands beside."""

    paper = "no attack: the mean public image"
    threat = "honest-but-curious"
    instant = True
    reads_adam = True

    def reconstruct(self, seen: Observation, rng: torch.Generator) -> Reconstruction:
        images, labels = seen.public
        mean = images.mean(0)  # (C, H, W)
        granted = seen.granted.get("labels")
        if granted is None:
            return Reconstruction(mean.expand(seen.update.num_examples, -1, -1, -1))
        classes = [images[labels == y] for y in granted]
        return Reconstruction(torch.stack([c.mean(0) if len(c) else mean for c in classes]), granted)
