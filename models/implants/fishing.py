"""Heads of a fishing server: of a batch, few examples send a gradient to the body. Wen et al., ICML 2022.

https://arxiv.org/abs/2202.00580      logit_c = b (s(x) - v),    logit_j = -log(C - 1),    s(x) = (1 / d) sum_i h_i(x)

h (d,) are the head's inputs. With p_c the probability of class c, an example of label y sends b (p_c - [y = c]) ds/dW.
"""

import copy
import math

import torch
from torch import Tensor, nn

from core.protocol import Update
from models.inspection import head_layer

GAP = 256.0  # by which biases differ in a class query


@torch.no_grad()
def class_query(model: nn.Module, chosen: int) -> nn.Module:
    """A copy of the model under which p_c = 0 for every example: those of class `chosen` alone reach the body."""
    return _with_row(model, chosen, 1.0, -GAP, 0.0)


@torch.no_grad()
def cutoff_query(model: nn.Module, chosen: int, cutoff: float, sharpness: float) -> nn.Module:
    """A copy of the model under which p_c rises from 0 to 1 where s(x) passes `cutoff`; -inf: p_c = 1 everywhere.

    sharpness: b. At a cutoff of -inf it is 1.
    """
    if cutoff == -math.inf:
        return _with_row(model, chosen, 1.0, GAP, 0.0)
    return _with_row(model, chosen, sharpness, -sharpness * cutoff, -math.log(len(_head(model).bias) - 1))


def projections(model: nn.Module, inputs: Tensor) -> Tensor:
    """s(x) of the model's inputs (N, *shape): (N,)."""
    features: list[Tensor] = []
    hook = head_layer(model).register_forward_pre_hook(lambda module, args: features.append(args[0]))
    model(inputs)
    hook.remove()
    return features[0].mean(1)


def chosen_class(model: nn.Module) -> int:
    """The class whose row alone has weights."""
    return int(_head(model).weight.abs().sum(1).argmax())


def mark(model: nn.Module, update: Update) -> None:
    """Store in the head s(x) of the one example behind an update, NaN if there are several: for scoring."""
    *_, weight, bias = update.tensors.values()
    head, chosen = _head(model), chosen_class(model)
    count = -update.num_examples * bias[chosen]
    mean = update.num_examples * -(weight[chosen] @ head.weight[chosen].detach())
    alone = abs(count.item() - 1) <= 0.5  # False for an update that is not finite
    head.register_buffer("isolated", mean if alone else mean * math.nan, persistent=False)


def isolated(model: nn.Module) -> Tensor:
    """What `mark` stored: (); NaN if nothing."""
    value = getattr(_head(model), "isolated", None)
    return torch.tensor(math.nan) if value is None else value


def _with_row(model: nn.Module, chosen: int, factor: float, bias: float, other_biases: float) -> nn.Module:
    """A copy of the model whose head has one row, factor / d."""
    other = copy.deepcopy(model)
    head = _head(other)
    head.weight.zero_()
    head.weight[chosen] = factor / head.in_features
    head.bias.fill_(other_biases)
    head.bias[chosen] = bias
    return other


def _head(model: nn.Module) -> nn.Linear:
    head = head_layer(model)
    assert isinstance(head, nn.Linear), head
    return head
