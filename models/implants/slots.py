"""An imprint block with a place for each client of a sum. Zhao et al., LOKI, IEEE S&P 2024.

https://arxiv.org/abs/2303.12233      x -> K C channels, those of client k: its image; all others: zero

A convolution copies the image of client k into channels k C .. (k + 1) C, by kernels that only this client receives.
The block's rows look at all channels, so that the columns of client k hold its gradient alone, whatever the others do.
"""

import copy

import torch
from torch import Tensor, nn

from core.domain import Domain, ImageDomain
from core.protocol import Task
from models.implants.imprint import Imprint

SCALE = 500.0  # of the kernels: their gradient is smaller by as much, so that local steps do not mix the clients


class Slots(nn.Module):
    """`block` behind the convolution; it has a slot for each of `clients` clients.

    edges: (bins + 1,) thresholds of brightness, the last above every image.
    """

    def __init__(self, inner: nn.Module, task: Task, edges: Tensor, clients: int) -> None:
        super().__init__()
        self.task, self.clients = task, clients
        channels, height, width = task.domain.shape
        planes = clients * channels
        wide = ImageDomain((planes, height, width), (0.0,) * planes, (1 / SCALE,) * planes)
        self.conv = nn.Conv2d(channels, planes, 3, padding=1).to(edges)
        merged = nn.Sequential(Merge(clients, task.domain), inner)
        self.block = Imprint(merged, Task(wide, task.num_classes), edges / clients, "addition", sparse=True)
        self.assign(0)

    @property
    def inner(self) -> nn.Module:
        """The model behind the block."""
        return self.block.inner[1]  # type: ignore[index, return-value]

    @torch.no_grad()
    def assign(self, client: int) -> None:
        """Set the kernels to those of a client: pixels, which are zero for black, in its own channels."""
        channels = self.conv.in_channels
        first = client % self.clients * channels
        domain = self.task.domain
        zero, one = (domain.from_model(torch.full((1, *domain.shape), v)).flatten(2)[0, :, 0] for v in (0.0, 1.0))
        self.conv.weight.zero_()
        self.conv.bias.zero_()  # type: ignore[union-attr]
        for c in range(channels):
            self.conv.weight[first + c, c, 1, 1] = SCALE * (one - zero)[c]
            self.conv.bias[first + c] = SCALE * zero[c]  # type: ignore[index]

    def for_client(self, client: int) -> "Slots":
        """A copy with the kernels of this client."""
        other = copy.deepcopy(self)
        other.assign(client)
        return other

    def pixels(self, examples: Tensor) -> Tensor:
        """Images (N, C, H, W) as the block's own images (N, K C, H, W), in the first slot."""
        empty = examples.new_zeros(len(examples), self.conv.out_channels - self.conv.in_channels, *examples.shape[2:])
        return torch.cat([examples, empty], 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.conv(x))


class Merge(nn.Module):
    """The sum over all slots, as inputs (N, C, H, W) of the model."""

    def __init__(self, clients: int, domain: Domain) -> None:
        super().__init__()
        self.clients, self.domain = clients, domain

    def forward(self, z: Tensor) -> Tensor:
        return self.domain.to_model(z.unflatten(1, (self.clients, -1)).sum(1) / SCALE)
