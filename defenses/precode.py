"""PRECODE: a variational bottleneck before the head. Scheliga, Mäder, Seeland, WACV 2022.

z = mu + exp(v / 2) e,   (mu, v) = E(h),   e ~ N(0, I),   h <- D(z),   loss + b KL(N(mu, exp v) || N(0, I))

It changes the network for everyone. A client draws e anew in every step, in either mode of its model. The broadcast
network, which the server evaluates, has e = 0.   https://arxiv.org/abs/2108.04725
"""

from typing import Any

import torch
from torch import Tensor, nn

from core.errors import UsageError
from core.hyperparameters import hp
from defenses.base import Counter, Defense, Variable, register
from models.inspection import head_layer


class _WithDivergence(torch.autograd.Function):
    """Identity in (mu, v), whose backward pass adds the gradient of weight * KL, a mean over examples."""

    @staticmethod
    def forward(ctx: Any, mu: Tensor, log_var: Tensor, weight: float) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(mu, log_var)
        ctx.weight = weight / len(mu)
        return mu.clone(), log_var.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        mu, log_var = ctx.saved_tensors
        return grads[0] + ctx.weight * mu, grads[1] + ctx.weight * (log_var.exp() - 1) / 2, None


class Bottleneck(nn.Module):
    """Features (N, d) -> features (N, d) through a random code of `units` entries.

    sample: whether e is drawn; noise: e (N, units) itself, if it is given; else e = 0.
    """

    def __init__(self, features: int, units: int, weight: float) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(features, 2 * units), nn.Linear(units, features)
        self.weight = weight
        self.sample = False
        self.noise: Tensor | None = None

    def forward(self, h: Tensor) -> Tensor:
        mu, log_var = _WithDivergence.apply(*self.encoder(h).chunk(2, dim=1), self.weight)
        if self.noise is not None and len(self.noise) == len(h):
            return self.decoder(mu + (log_var / 2).exp() * self.noise)
        if self.sample:
            return self.decoder(mu + (log_var / 2).exp() * torch.randn_like(mu))
        return self.decoder(mu)


@register("precode")
class Precode(Defense):
    """A variational bottleneck before the last layer, which all clients and the server have in their network."""

    citation = "Scheliga, Mäder, Seeland: PRECODE. WACV 2022"

    units: int = hp(256, "number of entries of the code z", ge=1, source="authors' code")
    weight: float = hp(1e-3, "weight b of the divergence in the loss", ge=0)

    def on_architecture(self, model: nn.Module, rng: torch.Generator) -> nn.Module:
        if find_bottleneck(model) is not None:
            return model
        head = head_layer(model)
        if not isinstance(head, nn.Linear):
            raise UsageError("`defense`: precode needs a fully connected last layer, which this model does not have")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(torch.randint(2**62, (), generator=rng)))
            bottleneck = Bottleneck(head.in_features, self.units, self.weight).to(head.weight)
        path = next(path for path, module in model.named_modules() if module is head)
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, nn.Sequential(bottleneck, head))
        return model

    def on_model(self, model: nn.Module) -> nn.Module:
        bottleneck = find_bottleneck(model)
        assert bottleneck is not None, "a model without the bottleneck: call on_architecture first"
        bottleneck.sample = True
        return model

    def counter(self) -> Counter:
        """e is optimised with the guess."""

        def start(model: nn.Module, num_examples: int) -> Tensor:
            return torch.zeros(num_examples, self.units)

        def install(model: nn.Module, noise: Tensor) -> None:
            bottleneck = find_bottleneck(model)
            assert bottleneck is not None, "a model without the bottleneck"
            bottleneck.noise = noise

        return Counter(variables=(Variable(start, 0.05),), model=install)


def find_bottleneck(model: nn.Module) -> Bottleneck | None:
    """The bottleneck of a model, if it has one."""
    return next((m for m in model.modules() if isinstance(m, Bottleneck)), None)
