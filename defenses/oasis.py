"""OASIS: train on every image and on transformed copies of it. Jeter, Nguyen, Alharbi, Thai, ICDCS 2024.

D <- D + {R x : x in D, R in rotations by 90, 180 and 270 degrees}                https://arxiv.org/abs/2311.13739

Copies share what a malicious layer measures, such as brightness, so its rows hold mixtures of them.
"""

import torch
from torch import Tensor

from core.errors import UsageError
from core.hyperparameters import hp
from core.protocol import Batch, Task
from defenses.base import Counter, Defense, register


@register("oasis")
class Oasis(Defense):
    """Add transformed copies of the images to every minibatch."""

    citation = "Jeter, Nguyen, Alharbi, Thai: OASIS. ICDCS 2024"

    copies: str = hp("rotations", "copies of an image: rotations (by 90, 180, 270 degrees), flips, or both")

    def __post_init__(self) -> None:
        if self.copies not in ("rotations", "flips", "both"):
            raise UsageError(f"`copies` is rotations, flips or both, not {self.copies!r}")

    def on_batch(self, batch: Batch, task: Task, rng: torch.Generator) -> Batch:
        return Batch(*self.expanded(batch.examples, batch.labels, task))

    def expanded(self, examples: Tensor, labels: Tensor, task: Task) -> tuple[Tensor, Tensor]:
        """The batch followed by copies of all of it."""
        height, width = examples.shape[-2:]
        images = [examples]
        if self.copies != "flips":
            if height != width:
                raise UsageError(f"`defense`: oasis rotates square images, not {height}x{width}: choose copies=flips")
            images += [examples.rot90(quarter, (-2, -1)) for quarter in (1, 2, 3)]
        if self.copies != "rotations":
            images += [examples.flip(-1), examples.flip(-2)]
        return torch.cat(images), torch.cat([labels] * len(images))

    def counter(self) -> Counter:
        """The guess is copied and transformed as well."""
        return Counter(batch=self.expanded)
