"""mixup. Zhang, Cisse, Dauphin, Lopez-Paz, ICLR 2018.   https://arxiv.org/abs/1710.09412

x <- l x_i + (1 - l) x_j,   y <- l y_i + (1 - l) y_j,   l ~ Beta(a, a),   j a random permutation of the minibatch
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.hyperparameters import hp
from core.protocol import Batch, Task
from defenses.base import Counter, Defense, Variable, register


@register("mixup")
class Mixup(Defense):
    """Train on weighted means of two examples and of their labels."""

    citation = "Zhang, Cisse, Dauphin, Lopez-Paz: mixup. ICLR 2018"

    alpha: float = hp(1.0, "parameter a of the Beta distribution of the weights", gt=0)

    def on_batch(self, batch: Batch, task: Task, rng: torch.Generator) -> Batch:
        weight = beta(self.alpha, rng)
        other = torch.randperm(len(batch.labels), generator=rng)
        matrix = weight * torch.eye(len(other)) + (1 - weight) * torch.eye(len(other))[other]
        return mixed(batch.examples, batch.labels, matrix.to(batch.examples), task)

    def counter(self) -> Counter:
        """The weights of all pairs are optimised with the guess: it is the examples before they were mixed."""
        return mixing_counter()


def mixed(examples: Tensor, labels: Tensor, matrix: Tensor, task: Task) -> Batch:
    """Row i of `matrix` (M, N) are the weights of the N examples, and of their labels, in mixture i."""
    if labels.ndim == 1:
        labels = F.one_hot(labels, task.num_classes).to(examples)
    return Batch((matrix @ examples.flatten(1)).view(-1, *examples.shape[1:]), matrix @ labels.to(examples))


def beta(a: float, rng: torch.Generator) -> float:
    """One draw from Beta(a, a), by inverting its distribution function."""
    from scipy.special import betaincinv

    return float(betaincinv(a, a, torch.rand((), generator=rng, dtype=torch.float64).item()))


def mixing_counter() -> Counter:
    """A matrix of weights, rows summing to 1, is optimised with the guess; at first an example is mostly itself."""

    def start(model: nn.Module, num_examples: int) -> Tensor:
        return 2.0 * torch.eye(num_examples)

    def batch(examples: Tensor, labels: Tensor, task: Task, logits: Tensor) -> tuple[Tensor, Tensor]:
        return mixed(examples, labels, logits.softmax(1).to(examples), task)

    return Counter(batch=batch, variables=(Variable(start, 0.05),))
