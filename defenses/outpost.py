"""OUTPOST: noise where the Fisher information is large, less often with every step. Wang, Hugh, Li, INFOCOM 2023.

g_l <- [|g_l| >= percentile] g_l + m_l N(0, (s min(Var W_l, 1))^2),   with probability 1 / (1 + b t) at step t

m_l = 1 where the empirical Fisher information, the mean of g_l^2 over the layer's outputs, is among the largest phi of
the network, else 0. Var W_l is the spread of the layer's weights, the risk of the paper.
https://iqua.ece.toronto.edu/research/gradient-leakage-in-federated-learning

version=code is the authors' program in Plato: it computes all this and returns the gradient as it was.
"""

import torch
from torch import Tensor

from core.errors import UsageError
from core.hyperparameters import hp
from defenses.base import Counter, Defense, Gradient, Memory, Step, Tensors, register

PLATO = "Plato's configuration"


@register("outpost")
class Outpost(Defense):
    """Prune the gradients of early steps and add noise to their most informative columns."""

    citation = (
        "Wang, Hugh, Li: Adaptive Defenses against Gradient Leakage in Production Federated Learning. INFOCOM 2023"
    )

    noise: float = hp(0.8, "noise s, in units of the variance of a layer's weights", ge=0, source=PLATO)
    phi: float = hp(0.4, "share phi of the network's columns that receive noise", ge=0, le=1, source=PLATO)
    prune: float = hp(0.8, "share of each layer's entries that is pruned", ge=0, lt=1, source=PLATO)
    decay: float = hp(0.125, "decay b of the probability that a step is defended", ge=0, source=PLATO)
    version: str = hp("paper", "algorithm: paper or code (the authors' program, which changes nothing)")

    def __post_init__(self) -> None:
        if self.version not in ("paper", "code"):
            raise UsageError(f"`version` is paper or code, not {self.version!r}")

    def for_client(self, memory: Memory, position: int = 0) -> Defense:
        return _OfClient(self, memory)

    def on_gradient(self, gradient: Step, rng: torch.Generator) -> Gradient:
        return self.at_step(1, gradient, rng)

    def at_step(self, step: int, gradient: Step, rng: torch.Generator) -> Gradient:
        """The gradient of the client's step number `step`, from 1."""
        grads = gradient()
        if self.version == "code" or torch.rand((), generator=rng).item() >= 1 / (1 + self.decay * step):
            return grads
        present = [g for g in grads if g is not None]
        fisher = [g.square().mean(0) for g in present]  # (*shape) -> (*shape[1:])
        columns = torch.cat([f.flatten() for f in fisher])
        chosen = columns.topk(int(self.phi * len(columns))).values
        threshold = chosen[-1].item() if len(chosen) else torch.inf
        weights = [p.detach() for p, g in zip(gradient.model.parameters(), grads, strict=True) if g is not None]
        sent = iter(
            self.pruned(g) + (f >= threshold) * self.noise_std(w) * torch.randn(g.shape, generator=rng).to(g)
            for g, f, w in zip(present, fisher, weights, strict=True)
        )
        return tuple(None if g is None else next(sent) for g in grads)

    def pruned(self, grad: Tensor) -> Tensor:
        """The gradient of a layer, whose smallest entries are 0."""
        count = int(self.prune * grad.numel())
        smallest = grad.abs().flatten().argsort()[:count]
        return grad.flatten().index_fill(0, smallest, 0.0).view_as(grad)

    def noise_std(self, weight: Tensor) -> float:
        """The standard deviation of the noise on a layer with these weights."""
        spread = weight.var().item() if weight.numel() > 1 else 0.0
        return self.noise * min(spread, 1.0)

    def counter(self) -> Counter:
        """Entries with noise do not count; of the others it is known which are small. It is one defended step."""
        if self.version == "code":
            return Counter()
        return Counter(misfit=self.misfit) if self.prune else Counter(noise=None)

    def misfit(self, ours: Tensors, theirs: Tensors) -> Tensor:
        """Squared distance on columns without noise, which have zeros; a zero costs what exceeds the smallest entry.

        Relative to the squared norm of `theirs`. An update without zeros was not defended: the plain distance.
        """
        total, norm = theirs[0].new_zeros(()), theirs[0].new_zeros(())
        defended = any(zeros(t).max() >= self.prune / 2 for t in theirs)
        for o, t in zip(ours, theirs, strict=True):
            clean = (zeros(t) >= self.prune / 4).expand_as(t) if defended else torch.ones_like(t, dtype=torch.bool)
            sent = clean & (t != 0)
            smallest = t[sent].abs().amin() if sent.any() else torch.inf
            error = torch.where(sent, o - t, (o.abs() - smallest).relu())
            total, norm = total + (clean * error).square().sum(), norm + t.square().sum()
        return total / norm.clamp(min=1e-30)


def zeros(tensor: Tensor) -> Tensor:
    """The share of zeros in each column of a layer's gradient, (out, *shape) -> (*shape)."""
    return (tensor == 0).float().mean(0)


class _OfClient(Defense):
    """OUTPOST at a client that counts its steps."""

    def __init__(self, defense: Outpost, memory: Memory) -> None:
        self.defense, self.memory = defense, memory

    def on_gradient(self, gradient: Step, rng: torch.Generator) -> Gradient:
        return self.defense.at_step(self.memory.steps + 1, gradient, rng)
