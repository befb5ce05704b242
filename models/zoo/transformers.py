"""Small transformers: sequences of token ids (N, L) -> logits."""

import math

import torch
from torch import Tensor, nn

from core.errors import UsageError
from models.zoo.registry import model

HEADS = 4
BLOCKS = 2


class Attention(nn.Module):
    """Multi-head self-attention with one stacked projection [W_Q; W_K; W_V] (3 d, d).

    Softmax and products are written out: torch's fused kernels have no second derivative.
    """

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, length, width = x.shape
        q, k, v = self.qkv(x).view(n, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)  # each (N, heads, L, d / heads)
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])  # (N, heads, L, L)
        if self.causal:
            later = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
            scores = scores.masked_fill(later, -math.inf)
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(n, length, width))


class LoRA(nn.Module):
    """A frozen linear layer W with a trained low-rank addition B A. Hu et al., ICLR 2022.

    https://arxiv.org/abs/2106.09685      y = W x + b + B A x,    A (r, d) normal, B (outputs, r) zero at first
    """

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.a = nn.Parameter(torch.randn(rank, base.in_features) / math.sqrt(base.in_features))
        self.b = nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.a.T @ self.b.T


class Block(nn.Module):
    """Attention and a two-layer network of 4 d GELU units, each with a residual connection.

    Layer norms come before each of the two (`pre_norm`, as in GPT-2) or after (as in BERT).
    """

    def __init__(self, width: int, heads: int, causal: bool, pre_norm: bool) -> None:
        super().__init__()
        self.pre_norm = pre_norm
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads, causal)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        if self.pre_norm:
            x = x + self.attention(self.norm1(x))
            return x + self.mlp(self.norm2(x))
        x = self.norm1(x + self.attention(x))
        return self.norm2(x + self.mlp(x))


class Embedding(nn.Module):
    """Token ids (N, L) -> the sum of a vector for each token and one for each position (N, L, d)."""

    def __init__(self, vocabulary: int, length: int, width: int) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(vocabulary, width), nn.Embedding(length, width)

    def forward(self, ids: Tensor) -> Tensor:
        return self.token(ids) + self.position.weight[: ids.shape[1]]


class GPT(nn.Module):
    """A decoder with pre-norm blocks: token ids (N, L) -> logits of the next token (N, vocabulary, L)."""

    def __init__(self, vocabulary: int, length: int, width: int, tied: bool) -> None:
        super().__init__()
        self.embedding = Embedding(vocabulary, length, width)
        self.blocks = nn.Sequential(*(Block(width, HEADS, causal=True, pre_norm=True) for _ in range(BLOCKS)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.apply(_initialize)
        if tied:
            self.head.weight = self.embedding.token.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.embedding(ids)))).transpose(1, 2)


class BERT(nn.Module):
    """An encoder with post-norm blocks and mean pooling: token ids (N, L) -> logits (N, num_classes)."""

    def __init__(self, vocabulary: int, length: int, width: int, num_classes: int) -> None:
        super().__init__()
        self.embedding, self.norm = Embedding(vocabulary, length, width), nn.LayerNorm(width)
        self.blocks = nn.Sequential(*(Block(width, HEADS, causal=False, pre_norm=False) for _ in range(BLOCKS)))
        self.head = nn.Linear(width, num_classes)
        self.apply(_initialize)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.blocks(self.norm(self.embedding(ids))).mean(1))


def _initialize(layer: nn.Module) -> None:
    """As in GPT-2 and BERT: normal weights of standard deviation 0.02, and biases of zero."""
    if isinstance(layer, nn.Linear | nn.Embedding):
        nn.init.normal_(layer.weight, std=0.02)
    if isinstance(layer, nn.Linear) and layer.bias is not None:
        nn.init.zeros_(layer.bias)


@model("gpt", smallest=2, takes="tokens", loss="next_token")
def gpt(shape: tuple[int], num_classes: int, *, vocabulary: int, width: int = 128) -> nn.Module:
    """GPT-2 with 2 blocks, 4 heads and `width` units. Radford et al. 2019.

    Its output layer has weights of its own; `gpt_tied` shares them with the embedding, as GPT-2 does.
    """
    return GPT(vocabulary, shape[0], _width(width), tied=False)


@model("gpt_tied", smallest=2, takes="tokens", loss="next_token")
def gpt_tied(shape: tuple[int], num_classes: int, *, vocabulary: int, width: int = 128) -> nn.Module:
    """As `gpt`; the output layer's weights are those of the token embedding."""
    return GPT(vocabulary, shape[0], _width(width), tied=True)


@model("gpt_lora", smallest=2, takes="tokens", loss="next_token")
def gpt_lora(shape: tuple[int], num_classes: int, *, vocabulary: int, width: int = 128) -> nn.Module:
    """As `gpt`, frozen but for adapters of rank `width` / 2 on the QKV projections, which alone are trained.

    The adapters change nothing at first; `--pretrain-epochs 1` trains them on public text.
    """
    net = GPT(vocabulary, shape[0], _width(width), tied=False).requires_grad_(False)
    for block in net.blocks:
        block.attention.qkv = LoRA(block.attention.qkv, width // 2)  # type: ignore[union-attr, arg-type, assignment]
    return net


@model("bert", smallest=1, takes="tokens")
def bert(shape: tuple[int], num_classes: int, *, vocabulary: int, width: int = 128) -> nn.Module:
    """BERT with 2 blocks, 4 heads and `width` units, for classification. Devlin et al., NAACL 2019."""
    return BERT(vocabulary, shape[0], _width(width), num_classes)


def _width(width: int) -> int:
    if width % HEADS:
        raise UsageError(f"`width={width}` must be a multiple of {HEADS}, the number of attention heads")
    return width
