"""InstaHide. Huang, Song, Li, Arora, ICML 2020.   https://arxiv.org/abs/2010.02772

x <- s * sum_j l_j x_pi_j,   y <- sum_j l_j y_pi_j,   l random with sum 1 and l_j <= 0.65,   s random signs of pixels

Inside InstaHide: all k images are the client's own. Signs apply to images centred on mid-grey.
"""

import torch
from torch import Tensor

from core.hyperparameters import hp
from core.protocol import Batch, Task
from defenses.base import Counter, Defense, register
from defenses.mixup import mixed, mixing_counter

LARGEST = 0.65  # of the weights of a mixture; the authors' code


@register("instahide")
class InstaHide(Defense):
    """Train on mixtures of several images, with the signs of random pixels flipped."""

    citation = "Huang, Song, Li, Arora: InstaHide. ICML 2020"

    images: int = hp(4, "number k of images in a mixture, at most those of a minibatch", ge=1)

    def on_batch(self, batch: Batch, task: Task, rng: torch.Generator) -> Batch:
        count = len(batch.labels)
        matrix = torch.zeros(count, count)
        for own in range(count):
            others = torch.randperm(count, generator=rng)
            chosen = torch.cat([torch.tensor([own]), others[others != own]])[: self.images]
            matrix[own, chosen] = _weights(len(chosen), rng)
        examples, labels = mixed(batch.examples, batch.labels, matrix.to(batch.examples), task)
        signs = (torch.randint(2, examples.shape, generator=rng) * 2 - 1).to(examples)
        return Batch(0.5 + signs * (examples - 0.5), labels)

    def counter(self) -> Counter:
        """The weights of all mixtures are optimised with the guess, which is the encoded images.

        Their signs cannot be undone from one update. The labels are those of the images before they were mixed.
        """

        def batch(examples: Tensor, labels: Tensor, task: Task, logits: Tensor) -> tuple[Tensor, Tensor]:
            return examples, mixed(examples, labels, logits.softmax(1).to(examples), task).labels

        return Counter(batch=batch, variables=mixing_counter().variables)


def _weights(count: int, rng: torch.Generator) -> torch.Tensor:
    """(count,) uniform on those that sum to 1; none above 0.65 where that is possible."""
    for _ in range(100):
        draws = torch.empty(count).exponential_(generator=rng)
        weights = draws / draws.sum()
        if count < 2 or weights.max() <= LARGEST:
            break
    return weights
