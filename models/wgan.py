"""The 32x32 generator of Generative Gradient Leakage, by Wasserstein distance with gradient penalty.

Gulrajani, Ahmed, Arjovsky, Dumoulin, Courville, NeurIPS 2017. https://arxiv.org/abs/1704.00028

    min_G max_D  E D(x, y) - E D(G(z, y), y) - 10 E (|dD/dx^| - 1)^2,      x^ between a true and a made image

Of the generators here it is the sharpest after hours and the worst after minutes: for those with the time or a GPU.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from federated.wire import Batch
from models.generators import Prior
from models.registry import Shape
from models.trained import LABEL, Order, Trainer, Units, Upward, augmented, downward, level

PENALTY, CRITIC_STEPS, LR = 10.0, 5, 1e-4  # Gulrajani et al., algorithm 1
BETAS = (0.5, 0.999)  # GGL's training script


class WGAN(Prior):
    """Linear layer, then transposed convolutions of 2x2, each twice as large as the one before."""

    def __init__(self, order: Order, shape: Shape, classes: int) -> None:
        super().__init__()
        self.dim, self.units = order.dim, Units(shape[0], order.normalize)
        self.label = nn.Embedding(classes, LABEL)
        self.up = Upward(self.dim + LABEL, order, shape, kernel=2)

    def generate(self, z: Tensor, labels: Tensor) -> Tensor:
        """As `decode`, in the units the critic is shown."""
        return self.units.last(self.up(torch.cat([z, self.label(labels)], 1)))

    def decode(self, z: Tensor, labels: Tensor) -> Tensor:
        return self.units.pixels(self.generate(z, labels)).clamp(0, 1)


class Critic(nn.Module):
    """D(x, y) = head(f(x)) + <e_y, f(x)> / size, after Miyato, Koyama, ICLR 2018; no norm, which would tie images."""

    def __init__(self, order: Order, shape: Shape, classes: int) -> None:
        super().__init__()
        self.features, size = downward(order, shape, slope=0.2)
        self.head, self.label = nn.Linear(size, 1), nn.Embedding(classes, size)
        nn.init.zeros_(self.label.weight)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        """(N, C, H, W) in the generator's units, (N,) -> (N,)."""
        f = self.features(x)
        return self.head(f).squeeze(1) + (self.label(labels) * f).mean(1)


class WGANTrainer(Trainer):
    """Five steps of the critic for each of the generator's."""

    def __init__(self, order: Order, public: Batch, classes: int) -> None:
        shape, device = tuple(public.images.shape[1:]), public.images.device
        self.order, self.public = order, public
        self.prior: WGAN = WGAN(order, shape, classes).to(device)
        self.prior.units.fit(public)
        self.critic = Critic(order, shape, classes).to(device)
        self.of_prior = torch.optim.Adam(self.prior.parameters(), lr=LR, betas=BETAS)
        self.of_critic = torch.optim.Adam(self.critic.parameters(), lr=LR, betas=BETAS)

    def stateful(self) -> dict[str, nn.Module | torch.optim.Optimizer]:
        return {"prior": self.prior, "critic": self.critic, "of_prior": self.of_prior, "of_critic": self.of_critic}

    def steps(self, start: int, rng: torch.Generator) -> Iterator[float]:
        """Says the critic's estimate of the Wasserstein distance."""
        self.prior.train()
        for _ in range(start, self.order.steps):
            for _ in range(CRITIC_STEPS):
                images, labels = augmented(self.public, self.order.batch, rng)
                true = self.prior.units.scaled(images)
                with torch.no_grad():
                    made = self.prior.generate(self._latents(rng), labels)
                share = torch.rand(len(true), 1, 1, 1, generator=rng).to(true)
                between = (share * true + (1 - share) * made).requires_grad_()
                (slope,) = torch.autograd.grad(self.critic(between, labels).sum(), between, create_graph=True)
                distance = (self.critic(true, labels) - self.critic(made, labels)).mean()
                self._descend(self.of_critic, PENALTY * (slope.flatten(1).norm(dim=1) - 1).square().mean() - distance)
            chosen = torch.randint(len(self.public.labels), (self.order.batch,), generator=rng)
            labels = self.public.labels[chosen.to(self.public.labels.device)]
            made = self.prior.generate(self._latents(rng), labels)
            self._descend(self.of_prior, -self.critic(made, labels).mean())
            yield distance.item()

    def _latents(self, rng: torch.Generator) -> Tensor:
        return torch.randn(self.order.batch, self.prior.dim, generator=rng).to(self.public.images)

    def finish(self) -> None:
        level(self.prior.label, self.public.labels)

    @staticmethod
    def _descend(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
