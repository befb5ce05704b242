"""Vision transformers. Dosovitskiy et al., An Image is Worth 16x16 Words, ICLR 2021. https://arxiv.org/abs/2010.11929

Small ones: patches of 4x4 pixels, width 96, two blocks of three heads. `vit` normalises before attention and adds a
residual, as published. `vit_plain` has neither around its first attention: the variant for which APRIL (Lu et al., CVPR
2022) has a closed form.
"""

import math

import torch
from torch import Tensor, nn

from models.zoo.registry import Shape, model

PATCH = 4
WIDTH = 96
HEADS = 3


class Attention(nn.Module):
    """Multi-head self-attention (N, T, D) -> (N, T, D), in operations that can be differentiated twice."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)

    def forward(self, z: Tensor) -> Tensor:
        q, k, v = (self._split(layer(z)) for layer in (self.query, self.key, self.value))  # (N, heads, T, D / heads)
        weights = (q @ k.transpose(2, 3) / math.sqrt(q.shape[3])).softmax(3)  # (N, heads, T, T)
        return self.out((weights @ v).transpose(1, 2).flatten(2))

    def _split(self, z: Tensor) -> Tensor:
        return z.unflatten(2, (self.heads, -1)).transpose(1, 2)


class Block(nn.Module):
    """Attention and a two-layer network; `plain` leaves out the normalisation and the residual around attention."""

    def __init__(self, width: int, heads: int, plain: bool) -> None:
        super().__init__()
        self.plain = plain
        self.norm = nn.Identity() if plain else nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, z: Tensor) -> Tensor:
        attended = self.attention(self.norm(z))
        z = attended if self.plain else z + attended
        return z + self.mlp(z)


class ViT(nn.Module):
    """Images -> patches -> blocks -> logits of the class token."""

    def __init__(self, image_shape: Shape, num_classes: int, blocks: int, plain: bool) -> None:
        super().__init__()
        channels, height, width = image_shape
        tokens = (height // PATCH) * (width // PATCH) + 1
        self.patches = nn.Conv2d(channels, WIDTH, PATCH, PATCH)
        self.class_token = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.position = nn.Parameter(torch.randn(1, tokens, WIDTH) * 0.02)
        self.blocks = nn.Sequential(*(Block(WIDTH, HEADS, plain and i == 0) for i in range(blocks)))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        z = self.patches(x).flatten(2).transpose(1, 2)  # (N, T - 1, D)
        z = torch.cat([self.class_token.expand(len(z), -1, -1), z], 1) + self.position
        return self.head(self.norm(self.blocks(z))[:, 0])


@model("vit", smallest=PATCH)
def vit(image_shape: Shape, num_classes: int) -> nn.Module:
    """A small vision transformer, with normalisation before attention."""
    return ViT(image_shape, num_classes, blocks=2, plain=False)


@model("vit_plain", smallest=PATCH)
def vit_plain(image_shape: Shape, num_classes: int) -> nn.Module:
    """The same, without normalisation and residual around the first attention."""
    return ViT(image_shape, num_classes, blocks=2, plain=True)
