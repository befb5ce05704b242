"""The Imprint block of Robbing the Fed, in front of any network. Fowl et al., ICLR 2022.

https://arxiv.org/abs/2110.13057      x' = x + a sum_k relu(W_k . pixels + b_k)      W_k = (g/N) 1,  b_k = -g c_k

All rows W_k ask the same question, how bright is the image, against rising thresholds c_k: an image adds its gradient
to every row whose threshold it passes, so that two neighbouring rows differ by the images between their thresholds.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from federated.wire import Task

Connection = Literal["addition", "split", "cat", "linear"]


class Imprint(nn.Module):
    """`inner` behind the block. The rows are its first two parameters, weight (K, N) and bias (K,).

    connection "addition": as above, nothing else is trained. "split": the thresholds live in buffers and W and b start
    at zero, so that updates keep full float32 precision. "cat": the sum is stacked on the image as one more channel,
    and a 1x1 convolution, at first the identity plus that channel, leads back. "linear": a second layer of constant a
    and nothing else passes, as published; the network no longer sees the image. `sparse` closes each row above the
    next threshold: an image then reaches one row only.
    """

    edges: Tensor  # (K + 1,) thresholds c_k in brightness, the last above every image
    gain: Tensor  # g
    factor: Tensor  # a

    def __init__(self, inner: nn.Module, task: Task, edges: Tensor, connection: Connection, sparse: bool) -> None:
        super().__init__()
        self.task, self.connection, self.sparse = task, connection, sparse
        channels, height, width = task.image_shape
        rows, pixels = len(edges) - 1, channels * height * width
        like = {"dtype": edges.dtype, "device": edges.device}
        self.weight = nn.Parameter(torch.zeros(rows, pixels, **like))
        self.bias = nn.Parameter(torch.zeros(rows, **like))
        if connection == "linear":
            self.second = nn.Linear(rows, pixels, **like)
        elif connection == "cat":
            self.second = nn.Conv2d(channels + 1, channels, 1, **like)
        self.inner = inner
        self.register_buffer("edges", edges.clone())
        self.register_buffer("gain", torch.ones((), **like))
        self.register_buffer("factor", torch.ones((), **like))
        self.scale(edges, 1.0, 1.0)

    @torch.no_grad()
    def scale(self, edges: Tensor, gain: float, factor: float) -> None:
        """Set the block to thresholds `edges`, g and a, whatever training made of it."""
        self.edges.copy_(edges)
        self.gain.fill_(gain)
        self.factor.fill_(factor)
        here = 0.0 if self.connection == "split" else gain
        self.weight.fill_(here / self.weight.shape[1])
        self.bias.copy_(-here * edges[:-1])
        if self.connection == "linear":
            self.second.weight.fill_(factor)
            self.second.bias.zero_()
        elif self.connection == "cat":
            channels = self.second.out_channels
            self.second.weight.zero_()
            self.second.weight[:, :channels, 0, 0] = torch.eye(channels, device=edges.device)
            self.second.weight[:, channels] = 1.0
            self.second.bias.zero_()

    def brightness(self, x: Tensor) -> Tensor:
        """What the thresholds are compared with, of inputs (N, C, H, W): (N,)."""
        return self.task.to_pixels(x).mean((1, 2, 3))

    def forward(self, x: Tensor) -> Tensor:
        pixels = self.task.to_pixels(x).flatten(1)  # (N, C*H*W)
        z = F.linear(pixels, self.weight, self.bias)  # (N, K)
        if self.connection == "split":
            z = z + self.gain * (pixels.mean(1, keepdim=True) - self.edges[:-1])
        passed = z.relu()
        if self.sparse:
            width = torch.cat([self.edges[1:-1], self.edges.new_full((1,), torch.inf)]) - self.edges[:-1]
            passed = torch.minimum(passed, self.gain * width)
        if self.connection == "linear":
            return self.inner(self.second(passed).view_as(x))
        added = self.factor * passed.sum(1).view(-1, 1, 1, 1)
        if self.connection == "cat":
            plane = added.expand(-1, 1, *x.shape[2:])
            return self.inner(self.second(torch.cat([x, plane], 1)))
        return self.inner(x + added)


class Deep(nn.Sequential):
    """A block before a fully connected layer, deeper in the net: what the layer is fed (N, d) are its pictures."""

    def __init__(self, block: Imprint) -> None:
        super().__init__(nn.Unflatten(1, block.task.image_shape), block)

    @property
    def block(self) -> Imprint:
        return self[1]

    @staticmethod
    def task(features: Tensor, task: Task) -> Task:
        """Features (n, d) as single-channel pictures (1, d, 1), the brightest of which has brightness 1."""
        brightest = features.mean(1).max().clamp(min=1e-12).item()
        return Task((1, features.shape[1], 1), task.num_classes, (0.0,), (1 / brightest,))

    @staticmethod
    def insert(model: nn.Module, layer: nn.Linear, block: Imprint) -> None:
        """Put the block, whose `inner` leads into `layer`, in that layer's place."""
        name = next(name for name, module in model.named_modules() if module is layer)
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, Deep(block))
