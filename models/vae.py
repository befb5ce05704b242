"""A class-conditional variational autoencoder as a prior. Kingma, Welling, ICLR 2014. https://arxiv.org/abs/1312.6114

    max  E log p(x | z, y) - KL( q(z | x, y) || N(0, 1) ),      p(x | z, y) = N(x; G(z, y), 0.1^2)

What q makes of all images of a class together is no standard normal, nor the same for every class. So latents are
whitened once training has ended, class by class: z ~ N(0, 1) then draws what images of that class look like.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from federated.wire import Batch
from models.generators import Prior
from models.registry import Shape
from models.trained import LABEL, Order, Trainer, Units, Upward, augmented, downward, level

SPREAD = 0.1  # deviation of a pixel about its prediction
LR = 2e-3


class VAE(Prior):
    """The decoder and, for training and whitening, the encoder."""

    mean: Tensor  # (classes, dim)
    root: Tensor  # (classes, dim, dim)

    def __init__(self, order: Order, shape: Shape, classes: int) -> None:
        super().__init__()
        self.dim, self.units = order.dim, Units(shape[0], order.normalize)
        self.label = nn.Embedding(classes, LABEL)
        self.down, features = downward(order, shape, slope=0.0)
        self.head = nn.Linear(features + LABEL, 2 * self.dim)
        self.up = Upward(self.dim + LABEL, order, shape, kernel=4)
        self.register_buffer("mean", torch.zeros(classes, self.dim))
        self.register_buffer("root", torch.eye(self.dim).repeat(classes, 1, 1))

    def encode(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance (N, dim) of q(z | x, y), before whitening."""
        features = self.down(self.units.scaled(images))
        mean, log_variance = self.head(torch.cat([features, self.label(labels)], 1)).chunk(2, 1)
        return mean, log_variance.clamp(-12, 8)

    def generate(self, raw: Tensor, labels: Tensor) -> Tensor:
        """Latents (N, dim) as the encoder makes them -> pixels (N, C, H, W), not clamped."""
        return self.units.pixels(self.units.last(self.up(torch.cat([raw, self.label(labels)], 1))))

    def decode(self, z: Tensor, labels: Tensor) -> Tensor:
        raw = self.mean[labels].to(z) + torch.einsum("nij,nj->ni", self.root[labels].to(z), z)
        return self.generate(raw, labels).clamp(0, 1)

    @torch.no_grad()
    def whiten(self, public: Batch) -> None:
        """Set `mean` and `root` to the first two moments of each class's latents; a class of few leans on all."""
        self.eval()
        batches = zip(public.images.split(256), public.labels.split(256), strict=True)
        means, log_variances = zip(*(self.encode(*batch) for batch in batches), strict=True)
        centre, spread = torch.cat(means), torch.cat(log_variances).exp()  # (M, dim)
        within, whole = centre.clone(), centre.mean(0)
        for label in public.labels.unique():
            within[public.labels == label] -= centre[public.labels == label].mean(0)
        pooled = within.T @ within / len(within) + spread.mean(0).diag()
        for label in range(len(self.mean)):
            mine = public.labels == label
            m = int(mine.sum())
            self.mean[label] = centre[mine].mean(0) if m else whole
            off = centre[mine] - self.mean[label]
            own = off.T @ off + spread[mine].sum(0).diag()
            self.root[label] = torch.linalg.cholesky((own + self.dim * pooled) / (m + self.dim))


class VAETrainer(Trainer):
    """Adam, its step falling to nothing over the second half; KL's weight rises over the first fifth."""

    def __init__(self, order: Order, public: Batch, classes: int) -> None:
        self.order, self.public = order, public
        self.prior: VAE = VAE(order, tuple(public.images.shape[1:]), classes).to(public.images.device)
        self.prior.units.fit(public)
        self.optimizer = torch.optim.Adam(self.prior.parameters(), lr=LR)

    def stateful(self) -> dict[str, nn.Module | torch.optim.Optimizer]:
        return {"prior": self.prior, "optimizer": self.optimizer}

    def steps(self, start: int, rng: torch.Generator) -> Iterator[float]:
        """Says misfit and divergence, in nats per number of an image."""
        self.prior.train()
        for step in range(start, self.order.steps):
            share = step / self.order.steps
            self.optimizer.param_groups[0]["lr"] = LR * min(1.0, 2 - 2 * share)
            images, labels = augmented(self.public, self.order.batch, rng)
            mean, log_variance = self.prior.encode(images, labels)
            noise = torch.randn(mean.shape, generator=rng).to(mean)
            made = self.prior.generate(mean + noise * (log_variance / 2).exp(), labels)
            misfit = (made - images).square().flatten(1).sum(1) / (2 * SPREAD**2)
            divergence = (mean.square() + log_variance.exp() - 1 - log_variance).sum(1) / 2
            loss = (misfit + min(1.0, 5 * share) * divergence).mean()
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            yield loss.item() / math.prod(images.shape[1:])

    def finish(self) -> None:
        level(self.prior.label, self.public.labels)
        self.prior.whiten(self.public)
