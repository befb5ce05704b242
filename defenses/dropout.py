"""Dropout before the head, as a defence. Srivastava, Hinton, Krizhevsky, Sutskever, Salakhutdinov, JMLR 2014.

r <- r * m / (1 - p),   m_j ~ Bernoulli(1 - p)                        https://jmlr.org/papers/v15/srivastava14a.html

Scheliga, Mäder, Seeland (AAAI Workshop 2023, https://arxiv.org/abs/2208.04767) measure it as a defence and optimise
the masks with the guess, which is the counter here.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.hyperparameters import hp
from defenses.base import Counter, Defense, Variable, register
from models.inspection import head_layer


class Masked:
    """A hook on the input of a layer: multiplies it by a random mask or, if one is given, by that.

    A given mask (N, D) does not apply to a minibatch of another size.
    """

    def __init__(self, probability: float, mask: Tensor | None = None) -> None:
        self.probability, self.mask = probability, mask

    def __call__(self, module: nn.Module, inputs: tuple[Tensor]) -> Tensor:
        if self.mask is None:
            return F.dropout(inputs[0], self.probability)
        if len(self.mask) != len(inputs[0]):
            return inputs[0]
        return inputs[0] * self.mask / (1 - self.probability)


@register("dropout")
class Dropout(Defense):
    """Drop inputs of the last layer at random while the client computes, in either mode of its model."""

    citation = "Srivastava et al.: Dropout. JMLR 2014"

    probability: float = hp(0.5, "probability p that an input of the last layer is dropped", ge=0, lt=1)

    def on_model(self, model: nn.Module) -> nn.Module:
        head_layer(model).register_forward_pre_hook(Masked(self.probability))
        return model

    def counter(self) -> Counter:
        """A mask for each guessed example is optimised with it."""

        def start(model: nn.Module, num_examples: int) -> Tensor:
            weight: Tensor = head_layer(model).weight  # type: ignore[assignment]
            return torch.full((num_examples, weight.shape[1]), 1 - self.probability)

        def install(model: nn.Module, mask: Tensor) -> None:
            head = head_layer(model)
            for key, hook in list(head._forward_pre_hooks.items()):
                if isinstance(hook, Masked):
                    del head._forward_pre_hooks[key]
            head.register_forward_pre_hook(Masked(self.probability, mask))

        return Counter(variables=(Variable(start, 0.05, lambda mask: mask.clamp(0, 1)),), model=install)
