"""What an attacker can learn about the images of a class from public images alone.

A `Generator` maps latents z (N, latent_dim) and class labels to images. Before an update is observed, z is standard
normal. `ClassPCA` is fitted in a second; vae.py and wgan.py are trained by training.py, and saved and loaded by
store.py.
"""

from abc import ABC, abstractmethod

import numpy as np
import torch
from torch import Tensor, nn

from core.protocol import Batch


class Generator(nn.Module, ABC):
    """Images of a class from latents z ~ N(0, 1). Always in eval mode; an attack may optimise a copy's parameters."""

    latent_dim: int  # number of latents of an image

    @abstractmethod
    def decode(self, z: Tensor, labels: Tensor) -> Tensor:
        """Latents (N, latent_dim) and labels (N,) int64 -> images (N, C, H, W) in [0, 1], differentiable in z."""

    def negative_log_prior(self, z: Tensor) -> Tensor:
        """-log N(z; 0, 1) up to a constant: (N, latent_dim) -> (N,)."""
        return z.square().sum(1) / 2


class ClassPCA(Generator):
    """A Gaussian for each class: the mean of its public images and their strongest principal components.

        G(z, y) = mu_y + sum_k z_k s_yk u_yk,      (s^2, u)_y leading eigenpairs of  S_y = (m S'_y + d S') / (m + d)

    S'_y is the covariance of the m public images of class y, S' the covariance of all public images about their class
    means, and d the number of latents. So a class with few images borrows directions from the others. A class without
    images has the mean of all images.
    """

    def __init__(self, public: Batch, latent_dim: int) -> None:
        """
        public: images (M, C, H, W) in [0, 1] and labels (M,) int64.
        latent_dim: number of components of a class; C * H * W if that is less.
        """
        super().__init__()
        self.shape = public.examples.shape[1:]
        self.latent_dim = min(latent_dim, self.shape.numel())
        self._rows, self._labels = public.examples.flatten(1).double(), public.labels  # (M, C*H*W), (M,)
        self._overall_mean = self._rows.mean(0)  # (C*H*W,)
        centred = self._rows.clone()
        for label in self._labels.unique():
            centred[self._labels == label] -= self._rows[self._labels == label].mean(0)
        self._pooled = _components(centred / len(centred) ** 0.5, self.latent_dim)  # (latent_dim, C*H*W)
        self._classes: dict[int, tuple[Tensor, Tensor]] = {}

    def class_components(self, label: int) -> tuple[Tensor, Tensor]:
        """The mean image (C*H*W,) of a class and its components (latent_dim, C*H*W), each s_k u_k."""
        if label not in self._classes:
            rows = self._rows[self._labels == label]
            m, d = len(rows), self.latent_dim
            mean = rows.mean(0) if m else self._overall_mean
            # S_y = stacked.T @ stacked
            stacked = torch.cat([(rows - mean) / (m + d) ** 0.5, self._pooled * (d / (m + d)) ** 0.5])
            self._classes[label] = (mean, _components(stacked, d))
        return self._classes[label]

    def decode(self, z: Tensor, labels: Tensor) -> Tensor:
        pairs = [self.class_components(int(label)) for label in labels]
        means, components = (torch.stack(part).to(z) for part in zip(*pairs, strict=True))
        return (means + torch.einsum("nk,nkd->nd", z, components)).view(-1, *self.shape).clamp(0, 1)


def _components(rows: Tensor, count: int) -> Tensor:
    """The `count` strongest right singular vectors of rows (m, d), each times its singular value: (count, d).

    Zero beyond the rank. Signs are fixed so that the largest entry of each is positive on every machine.
    """
    from scipy.sparse.linalg import svds

    # for few of many components Lanczos iterations take a fraction of the time of a full SVD
    if 4 * count < min(rows.shape) and rows.any():
        start = np.random.RandomState(0).standard_normal(min(rows.shape))
        _, sizes, directions = (torch.from_numpy(part.copy()) for part in svds(rows.cpu().numpy(), count, v0=start))
        order = sizes.argsort(descending=True)
        sizes, directions = sizes[order].to(rows), directions[order].to(rows)
    else:
        _, sizes, directions = torch.linalg.svd(rows, full_matrices=False)
    components = (sizes[:, None] * directions)[:count]
    components = components * components.gather(1, components.abs().argmax(1, keepdim=True)).sign()
    return torch.cat([components, components.new_zeros(count - len(components), rows.shape[1])])
