"""Client-level differential privacy. McMahan, Ramage, Talwar, Zhang, ICLR 2018.   https://arxiv.org/abs/1710.06963

delta <- delta min(1, S / ||delta||) + N(0, sigma^2 S^2 I)                         S: bound on the whole update

In the paper the server adds the noise to the sum of all clients, and so sees each update without it. Here the client
adds it: the guarantee then holds against the server. The unit of privacy is a client.
"""

import torch

from core.hyperparameters import hp
from defenses.base import Counter, Defense, Tensors, register
from defenses.clip import clipped
from defenses.gauss import with_noise


@register("dpfedavg")
class DPFedAvg(Defense):
    """Clip the whole update of a client and add noise to it."""

    citation = "McMahan, Ramage, Talwar, Zhang: Learning Differentially Private Recurrent Language Models. ICLR 2018"

    bound: float = hp(1.0, "largest l2 norm S of an update", gt=0)
    sigma: float = hp(1.0, "noise multiplier: standard deviation of the noise on an entry, in units of S", gt=0)

    def on_update(self, tensors: Tensors, rng: torch.Generator) -> Tensors:
        return with_noise(clipped(tensors, self.bound), self.sigma * self.bound, rng)

    def counter(self) -> Counter:
        """The update of the guess is clipped as well; the standard deviation of the noise is known."""
        return Counter(forward=lambda tensors: clipped(tensors, self.bound), noise=self.sigma * self.bound)
