"""Networks that the zoo does not have, as users bring them: images of 3x8x8 and 4 classes."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Plain(nn.Module):
    def __init__(self, num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, 4, 3, 2, 1)
        self.head = nn.Linear(64, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.sigmoid(self.conv(x)).flatten(1))


class InPlace(Plain):
    """Overwrites its inputs, and adds in place."""

    def forward(self, x: Tensor) -> Tensor:
        x.sub_(0.5)
        z = F.relu(self.conv(x), inplace=True)
        z = z * 2
        z += 1
        return self.head(z.flatten(1))


class HeadFirst(nn.Module):
    """Its head is registered before its convolution."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.head = nn.Linear(64, num_classes)
        self.conv = nn.Conv2d(3, 4, 3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.sigmoid(self.conv(x)).flatten(1))


class Attention(nn.Module):
    """Fused attention, which cannot be differentiated twice as it stands."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, 4)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        z = self.patches(x).flatten(2).transpose(1, 2)  # (N, T, D)
        return self.head((z + self.attention(z, z, z, need_weights=False)[0]).mean(1))


class SharedAndFrozen(Plain):
    """One convolution in two places, and a frozen one."""

    def __init__(self, num_classes: int, in_channels: int) -> None:
        super().__init__(num_classes, in_channels)
        self.conv.requires_grad_(False)
        self.mix = nn.Conv2d(4, 4, 3, 1, 1)
        self.again = self.mix
        self.head = self._modules.pop("head")

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.sigmoid(self.again(torch.sigmoid(self.mix(self.conv(x))))).flatten(1))


class Tied(nn.Module):
    """The head's weights are another layer's."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.mix, self.head = nn.Linear(192, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.head.weight = self.mix.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.mix(torch.tanh(self.first(x.flatten(1))))))


class NoHead(nn.Module):
    """Distances from prototypes."""

    def __init__(self) -> None:
        super().__init__()
        self.prototypes = nn.Parameter(torch.linspace(0, 1, 4 * 192).view(4, 192))

    def forward(self, x: Tensor) -> Tensor:
        return -(x.flatten(1)[:, None] - self.prototypes).square().mean(2)


class Untrainable(Plain):
    """An in-place addition changes what the convolution's gradient needs."""

    def forward(self, x: Tensor) -> Tensor:
        z = torch.sigmoid(self.conv(x))
        z += z.square()
        return self.head(z.flatten(1))


class Complex(Plain):
    def __init__(self, num_classes: int, in_channels: int) -> None:
        super().__init__(num_classes, in_channels)
        self.phase = nn.Parameter(torch.zeros(2, dtype=torch.complex64))


class Integers(Plain):
    def __init__(self, num_classes: int, in_channels: int) -> None:
        super().__init__(num_classes, in_channels)
        self.table = nn.Parameter(torch.zeros(2, dtype=torch.int64), requires_grad=False)


class Frozen(Plain):
    def __init__(self, num_classes: int, in_channels: int) -> None:
        super().__init__(num_classes, in_channels)
        self.requires_grad_(False)


class Dictionary(Plain):
    def forward(self, x: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        return {"logits": super().forward(x)}


class Constant(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return F.one_hot(super().forward(x).argmax(1), 4).float()


class NotFinite(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / 0


def fails() -> nn.Module:
    raise KeyError("no such layer")


def a_number() -> int:
    return 3


def squared(logits: Tensor, labels: Tensor) -> Tensor:
    """A loss that takes classes and no probabilities."""
    return (logits - F.one_hot(labels, logits.shape[1])).square().mean()


def per_example(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels, reduction="none")


class TokenMixer(nn.Module):
    """Fully connected layers that are applied to every token, as transformers have them, and one behind the pool."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 6, 4, 4)
        self.each = nn.Linear(6, 12)
        self.pooled = nn.Linear(12, 10)
        self.relu = nn.ReLU()
        self.head = nn.Linear(10, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        return self.head(self.relu(self.pooled(self.relu(self.each(input=tokens)).mean(1))))


class Norms(nn.Module):
    """BatchNorm layers as users call them: one twice, one by keyword, one never."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv, self.again = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 1, 1)
        self.shared, self.by_name, self.unused = (nn.BatchNorm2d(8) for _ in range(3))
        self.head = nn.Linear(128, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        z = torch.sigmoid(self.shared(self.conv(x)))
        z = torch.sigmoid(self.by_name(input=self.shared(self.again(z))))
        return self.head(z.flatten(1))
