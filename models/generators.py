"""Generators an attacker can own: what images of a class look like, learned from public images alone.

All stand behind one door: a `Prior` turns latents z (N, dim), standard normal before anything is seen, into images of
given classes. `ClassPCA` is there in a second; models/vae.py and models/wgan.py have to be trained first, which
models/priors.py does.
"""

from abc import ABC, abstractmethod

import numpy as np
import torch
from torch import Tensor, nn

from federated.wire import Batch


class Prior(nn.Module, ABC):
    """Latents z ~ N(0, 1) of images of a class. In eval mode, whatever is done with it; its parameters may be moved."""

    dim: int  # latents of an image

    @abstractmethod
    def decode(self, z: Tensor, labels: Tensor) -> Tensor:
        """Latents (N, dim) and labels (N,) int64 -> images (N, C, H, W) in [0, 1]."""

    def prior(self, z: Tensor) -> Tensor:
        """-log N(z; 0, 1) of latents (N, dim) up to a constant: (N,)."""
        return z.square().sum(1) / 2


class ClassPCA(Prior):
    """Each class a Gaussian: its mean image, and its `dim` strongest principal components, all from public images.

        G(z, y) = mu_y + sum_k z_k s_yk u_yk,      (s^2, u)_y leading eigenpairs of  S_y = (m S'_y + dim S') / (m + dim)

    S'_y is the covariance of the m public images of class y and S' that of all images about their class means: a class
    of few images borrows its directions from the others, and a class of none has the mean of all images.
    """

    def __init__(self, public: Batch, dim: int) -> None:
        """`public`: images (M, C, H, W) in [0, 1] and labels (M,). dim: latents of an image, at most C * H * W."""
        super().__init__()
        self.shape = public.images.shape[1:]
        self.dim = min(dim, self.shape.numel())
        self._rows, self._labels = public.images.flatten(1).double(), public.labels
        self._whole = self._rows.mean(0)
        within = self._rows.clone()
        for label in self._labels.unique():
            within[self._labels == label] -= self._rows[self._labels == label].mean(0)
        self._pooled = _components(within / len(within) ** 0.5, self.dim)  # (dim, C*H*W), each as long as its s
        self._classes: dict[int, tuple[Tensor, Tensor]] = {}

    def of_class(self, label: int) -> tuple[Tensor, Tensor]:
        """The mean image (C*H*W,) of a class and its components (dim, C*H*W), each s_k u_k."""
        if label not in self._classes:
            rows = self._rows[self._labels == label]
            m = len(rows)
            mean = rows.mean(0) if m else self._whole
            both = torch.cat([(rows - mean) / (m + self.dim) ** 0.5, self._pooled * (self.dim / (m + self.dim)) ** 0.5])
            self._classes[label] = (mean, _components(both, self.dim))
        return self._classes[label]

    def decode(self, z: Tensor, labels: Tensor) -> Tensor:
        pairs = [self.of_class(int(label)) for label in labels]
        means, components = (torch.stack(part).to(z) for part in zip(*pairs, strict=True))
        return (means + torch.einsum("nk,nkd->nd", z, components)).view(-1, *self.shape).clamp(0, 1)


def _components(rows: Tensor, dim: int) -> Tensor:
    """Principal components (dim, d) of rows (m, d), each as long as its singular value; zero where there are fewer."""
    from scipy.sparse.linalg import svds

    if (
        4 * dim < min(rows.shape) and rows.any()
    ):  # a few of many: an iteration finds them in a fraction of an SVD's time
        start = np.random.RandomState(0).standard_normal(min(rows.shape))
        _, sizes, directions = (torch.from_numpy(part.copy()) for part in svds(rows.cpu().numpy(), dim, v0=start))
        order = sizes.argsort(descending=True)
        sizes, directions = sizes[order].to(rows), directions[order].to(rows)
    else:
        _, sizes, directions = torch.linalg.svd(rows, full_matrices=False)
    found = (sizes[:, None] * directions)[:dim]
    # the decomposition leaves the sign open: the largest entry is positive, so that machines agree
    found = found * found.gather(1, found.abs().argmax(1, keepdim=True)).sign()
    return torch.cat([found, found.new_zeros(dim - len(found), rows.shape[1])])
