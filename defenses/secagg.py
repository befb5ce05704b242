"""Secure aggregation. Bonawitz et al., CCS 2017.   https://doi.org/10.1145/3133956.3133982

the server sees  sum_k (n_k / n) delta_k  over K clients, and no single delta_k

The masks of the protocol cancel in the sum; here the weighted mean is computed directly.
"""

from collections.abc import Sequence

from torch import Tensor

from core.hyperparameters import hp
from core.protocol import Update
from defenses.base import Defense, register


@register("secagg")
class SecureAggregation(Defense):
    """Show the server the weighted mean of the updates of several clients, instead of each."""

    citation = "Bonawitz et al.: Practical Secure Aggregation for Privacy-Preserving Machine Learning. CCS 2017"

    clients: int = hp(0, "number K of clients in an aggregate; 0: all clients of a round", ge=0)

    def on_aggregate(self, updates: Sequence[Update]) -> Sequence[Update]:
        size = self.clients or len(updates)
        return [weighted_mean(updates[first : first + size]) for first in range(0, len(updates), size)]

    def visible_updates(self, clients: int) -> int:
        return -(-clients // (self.clients or clients))


def weighted_mean(updates: Sequence[Update]) -> Update:
    """One update in place of several, each weighted by its number of examples, as in FedAvg."""
    total = sum(u.num_examples for u in updates)

    def mean(tensors: Sequence[Tensor]) -> Tensor:
        pairs = zip(tensors, updates, strict=True)
        summed = sum(t.double() * u.num_examples for t, u in pairs) / total
        assert isinstance(summed, Tensor)
        return summed.to(tensors[0]) if tensors[0].is_floating_point() else summed.round().to(tensors[0])

    tensors = {name: mean([u.tensors[name] for u in updates]) for name in updates[0].tensors}
    buffers = {name: mean([u.buffers[name] for u in updates]) for name in updates[0].buffers}
    return Update(updates[0].kind, tensors, total, buffers)
