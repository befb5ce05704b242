"""The imprint block of Robbing the Fed, which a malicious server puts in front of any network. Fowl et al., ICLR 2022.

https://arxiv.org/abs/2110.13057      x' = x + a sum_k relu(W_k . pixels + b_k)      W_k = (g/N) 1,  b_k = -g c_k

All rows W_k measure the brightness of the image (its mean pixel) against rising thresholds c_k. An image adds its
gradient to every row whose threshold it exceeds, so two neighbouring rows differ by the images between their
thresholds.

Ours: R neurons for each threshold, whose outputs enter x' as different patterns v_r instead of all as a 1. The
differences of neighbouring rows are then an R x N matrix  sum_i d_i x_i^T,  with d_i in R^R another one for each image
between the two thresholds: its rank is the number of these images, up to R.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.domain import ImageDomain
from core.protocol import Task

Connection = Literal["addition", "split", "cat", "linear"]


class Imprint(nn.Module):
    """`inner` behind the block. The rows are its first two parameters, weight (R K, N) and bias (R K,).

    connection "addition": as above; only the rows are trained. "split": thresholds are buffers, and W and b start at
    zero, so that updates keep full float32 precision. "cat": the sum is concatenated to the image as one more channel,
    and a 1x1 convolution, at first the identity plus that channel, maps back. "linear": as published, a second layer
    of constant weights a replaces the image; the network no longer sees it. `sparse` saturates each row at the next
    threshold: an image then reaches one row only. neurons: R; the first K rows are the first neurons of all thresholds.
    """

    edges: Tensor  # (K + 1,) thresholds c_k in brightness, the last above every image
    gain: Tensor  # g
    factor: Tensor  # a
    inverted: Tensor  # (C, H, W), 1 for a pixel that is measured by its distance from white; 0 by default
    resolution: Tensor  # least s_2 / s_1 of the rows of a bin with two images, as pairs of public images have it
    patterns: Tensor  # (R, C, H, W), what the neurons of a threshold add to an image: 1 for the first, else +1 and -1

    def __init__(
        self, inner: nn.Module, task: Task, edges: Tensor, connection: Connection, sparse: bool, neurons: int = 1
    ) -> None:
        super().__init__()
        self.task, self.connection, self.sparse = task, connection, sparse
        channels, height, width = task.domain.shape
        rows, pixels = neurons * (len(edges) - 1), channels * height * width
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
        self.register_buffer("resolution", torch.zeros((), **like))
        self.register_buffer("inverted", torch.zeros(channels, height, width, **like))
        signs = torch.randint(2, (neurons, channels, height, width), generator=torch.Generator().manual_seed(0))
        signs[0] = 1
        self.register_buffer("patterns", (2 * signs - 1).to(edges))
        self.reset(edges, 1.0, 1.0)

    @torch.no_grad()
    def reset(self, edges: Tensor, gain: float, factor: float) -> None:
        """Set the block to thresholds `edges`, g and a, whatever training has made of it."""
        self.edges.copy_(edges)
        self.gain.fill_(gain)
        self.factor.fill_(factor)
        trained = 0.0 if self.connection == "split" else gain
        self.weight.fill_(trained / self.weight.shape[1])
        self.bias.copy_(-trained * self.for_all_neurons(edges[:-1]))
        if self.connection == "linear":
            of_neurons = factor * self.patterns.flatten(1).T  # (N, R)
            self.second.weight.copy_(of_neurons.repeat_interleave(len(edges) - 1, dim=1))
            self.second.bias.zero_()
        elif self.connection == "cat":
            channels = self.second.out_channels
            self.second.weight.zero_()
            self.second.weight[:, :channels, 0, 0] = torch.eye(channels, device=edges.device)
            self.second.weight[:, channels] = 1.0
            self.second.bias.zero_()

    def for_all_neurons(self, values: Tensor) -> Tensor:
        """(K,), one value for each threshold -> (R K,), for each row."""
        return values.repeat(len(self.patterns))

    def brightness(self, x: Tensor) -> Tensor:
        """The mean pixels, which thresholds are compared with, of inputs (N, C, H, W) of the block: (N,)."""
        return self.measured(self.task.domain.from_model(x)).mean((1, 2, 3))

    def measured(self, pixels: Tensor) -> Tensor:
        """Images (N, C, H, W) with the chosen pixels inverted, which is its own inverse."""
        return pixels + self.inverted * (1 - 2 * pixels)

    def bin_of(self, x: Tensor) -> Tensor:
        """The bin between two thresholds of inputs (N, C, H, W) of the block: (N,) int64, -1 below the first one."""
        brightness = self.brightness(x)
        bins = torch.bucketize(brightness, self.edges[1:-1].contiguous(), right=True)
        return torch.where(brightness >= self.edges[0], bins, -1)

    def forward(self, x: Tensor) -> Tensor:
        pixels = self.measured(self.task.domain.from_model(x)).flatten(1)  # (N, C*H*W)
        z = F.linear(pixels, self.weight, self.bias)  # (N, K)
        if self.connection == "split":
            z = z + self.gain * (pixels.mean(1, keepdim=True) - self.for_all_neurons(self.edges[:-1]))
        active = z.relu()
        if self.sparse:
            width = torch.cat([self.edges[1:-1], self.edges.new_full((1,), torch.inf)]) - self.edges[:-1]
            active = torch.minimum(active, self.gain * self.for_all_neurons(width))
        if self.connection == "linear":
            return self.inner(self.second(active).view_as(x))
        added = self.factor * active.view(len(x), len(self.patterns), -1).sum(2)  # (N, R)
        if self.connection == "cat":
            plane = torch.einsum("nr,rchw->nchw", added, self.patterns[:, :1])
            return self.inner(self.second(torch.cat([x, plane], 1)))
        return self.inner(x + torch.einsum("nr,rchw->nchw", added, self.patterns))


class FeatureImprint(nn.Sequential):
    """A block in front of a fully connected layer inside the network; its images are the layer's inputs (N, d)."""

    def __init__(self, block: Imprint) -> None:
        super().__init__(nn.Unflatten(1, block.task.domain.shape), block)

    @property
    def block(self) -> Imprint:
        return self[1]

    @staticmethod
    def feature_task(features: Tensor, task: Task) -> Task:
        """Features (n, d) as single-channel images (1, d, 1), the brightest of which has brightness 1."""
        brightest = features.mean(1).max().clamp(min=1e-12).item()
        return Task(ImageDomain((1, features.shape[1], 1), (0.0,), (1 / brightest,)), task.num_classes)

    @staticmethod
    def insert(model: nn.Module, layer: nn.Linear, block: Imprint) -> None:
        """Replace `layer` of `model` by the block, whose `inner` ends in that layer."""
        path = next(path for path, module in model.named_modules() if module is layer)
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, FeatureImprint(block))


def find_imprint(model: nn.Module) -> Imprint | None:
    """The block of a model, if it has one."""
    return next((m for m in model.modules() if isinstance(m, Imprint)), None)


def find_feature_imprint(model: nn.Module) -> FeatureImprint | None:
    """The block inside a model, in front of a fully connected layer, if it has one."""
    return next((m for m in model.modules() if isinstance(m, FeatureImprint)), None)
