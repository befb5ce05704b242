"""Soteria: hide what the representation says of the input. Sun, Li, Wang, Pasquini, Li, Lin, CVPR 2021.

s_j = ||d r_j / d x|| / |r_j|;   the columns j of the head's gradient with the smallest s_j are zero

r is the input of the head. With more than one example, s_j is the mean over them.   https://arxiv.org/abs/2012.06043
"""

import torch
from torch import Tensor, nn
from torch.func import functional_call

from core.hyperparameters import hp
from defenses.base import Counter, Defense, Gradient, Step, Tensors, register
from models.inspection import head_layer

CHUNK = 64  # features whose derivatives are taken at the same time
TINY = 1e-10  # added to |r_j|; as in GGL's experiments with Soteria


@register("soteria")
class Soteria(Defense):
    """Remove columns of the gradient of the last layer."""

    citation = "Sun et al.: Soteria. CVPR 2021"

    share: float = hp(0.8, "share of the columns of the head's gradient that is removed", ge=0, lt=1)

    def on_gradient(self, gradient: Step, rng: torch.Generator) -> Gradient:
        grads = list(gradient())
        head = head_layer(gradient.model)
        index = next(i for i, p in enumerate(gradient.model.parameters()) if p is head.weight)
        own = grads[index]
        if own is not None:
            keep = self.columns(feature_sensitivity(gradient.model, head, gradient.inputs))
            grads[index] = own * keep.view(1, -1, *[1] * (own.ndim - 2)).to(own)
        return tuple(grads)

    def columns(self, sensitivity: Tensor) -> Tensor:
        """(D,) bool: which columns remain, from the sensitivity of features (D,)."""
        keep = torch.ones(len(sensitivity), dtype=torch.bool, device=sensitivity.device)
        keep[sensitivity.argsort()[: int(self.share * len(sensitivity))]] = False
        return keep

    def counter(self) -> Counter:
        """The head's weights do not count: all other layers are sent as they are."""

        def weights(tensors: Tensors) -> Tensors:
            head = max(i for i, t in enumerate(tensors) if t.ndim > 1)
            return tuple(torch.full_like(t, float(i != head)) for i, t in enumerate(tensors))

        return Counter(weights=weights)


def feature_sensitivity(model: nn.Module, head: nn.Module, inputs: Tensor) -> Tensor:
    """(D,): the mean over examples of ||d r_j / d x|| / |r_j|, for the inputs r (N, D) of the head."""
    captured: list[Tensor] = []
    handle = head.register_forward_pre_hook(lambda module, values: captured.append(values[0]))
    x = inputs.detach().requires_grad_()
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}  # BatchNorm counts the step alone
    with torch.enable_grad():
        functional_call(model, buffers, (x,))
    handle.remove()
    features = captured[0].flatten(1)  # (N, D)
    norms = []
    for chunk in torch.eye(features.shape[1], device=x.device, dtype=x.dtype).split(CHUNK):
        # all examples at once: in eval mode, r of one example does not depend on another one
        wanted = chunk[:, None].expand(-1, len(x), -1)
        (grads,) = torch.autograd.grad(features, x, wanted, retain_graph=True, is_grads_batched=True)
        norms.append(grads.flatten(2).norm(dim=2))  # (chunk, N)
    return (torch.cat(norms) / (features.detach().abs().T + TINY)).mean(1)
