"""Generative Gradient Leakage's 32x32 generator, trained on the Wasserstein distance with gradient penalty.

Gulrajani, Ahmed, Arjovsky, Dumoulin, Courville, NeurIPS 2017. https://arxiv.org/abs/1704.00028

    min_G max_D  E D(x, y) - E D(G(z, y), y) - 10 E (|dD/dx^| - 1)^2,      x^ between a real and a generated image

After hours of training its images are sharper than the VAE's; after minutes they are worse.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from core.protocol import Batch
from models.generators.base import Generator
from models.generators.parts import (
    LABEL_DIM,
    GeneratorConfig,
    PixelScaler,
    Trainer,
    UpsamplingDecoder,
    augmented_batch,
    conv_encoder,
    fill_unseen_embeddings,
    register,
)
from models.zoo.registry import Shape

PENALTY, CRITIC_STEPS, LR = 10.0, 5, 1e-4  # Gulrajani et al., algorithm 1
BETAS = (0.5, 0.999)  # GGL's training script


class WGAN(Generator):
    """A linear layer, then transposed 2x2 convolutions that double height and width."""

    def __init__(self, config: GeneratorConfig, shape: Shape, classes: int) -> None:
        super().__init__()
        self.latent_dim, self.scaler = config.latent_dim, PixelScaler(shape[0], config.output_normalization)
        self.label = nn.Embedding(classes, LABEL_DIM)
        self.decoder = UpsamplingDecoder(self.latent_dim + LABEL_DIM, config, shape, kernel_size=2)

    def generate(self, z: Tensor, labels: Tensor) -> Tensor:
        """As `decode`, in the last layer's units, which are the critic's inputs."""
        return self.scaler.activation(self.decoder(torch.cat([z, self.label(labels)], 1)))

    def decode(self, z: Tensor, labels: Tensor) -> Tensor:
        return self.scaler.to_pixels(self.generate(z, labels)).clamp(0, 1)


class Critic(nn.Module):
    """D(x, y) = head(f(x)) + <e_y, f(x)> / size, after Miyato, Koyama, ICLR 2018.

    It has no normalisation layers: the gradient penalty is per image, and they would make images depend on each other.
    """

    def __init__(self, config: GeneratorConfig, shape: Shape, classes: int) -> None:
        super().__init__()
        self.features, size = conv_encoder(config, shape, negative_slope=0.2)
        self.head, self.label = nn.Linear(size, 1), nn.Embedding(classes, size)
        nn.init.zeros_(self.label.weight)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        """Images (N, C, H, W) in the generator's units and labels (N,) -> scores (N,)."""
        f = self.features(x)  # (N, size)
        return self.head(f).squeeze(1) + (self.label(labels) * f).mean(1)


@register("wgan", steps=20000, width=128)
class WGANTrainer(Trainer):
    """Five steps of the critic for each step of the generator, both by Adam."""

    generator_class = WGAN

    def __init__(self, config: GeneratorConfig, public: Batch, classes: int) -> None:
        shape, device = tuple(public.examples.shape[1:]), public.examples.device
        self.config, self.public = config, public
        self.generator: WGAN = WGAN(config, shape, classes).to(device)
        self.generator.scaler.fit(public)
        self.critic = Critic(config, shape, classes).to(device)
        self.generator_optimizer = torch.optim.Adam(self.generator.parameters(), lr=LR, betas=BETAS)
        self.critic_optimizer = torch.optim.Adam(self.critic.parameters(), lr=LR, betas=BETAS)

    def stateful(self) -> dict[str, nn.Module | torch.optim.Optimizer]:
        return {
            "generator": self.generator,
            "critic": self.critic,
            "generator_optimizer": self.generator_optimizer,
            "critic_optimizer": self.critic_optimizer,
        }

    def steps(self, start: int, rng: torch.Generator) -> Iterator[float]:
        """The loss is the critic's estimate of the Wasserstein distance, from its last step."""
        self.generator.train()
        for _ in range(start, self.config.steps):
            for _ in range(CRITIC_STEPS):
                images, labels = augmented_batch(self.public, self.config.batch_size, rng)
                real = self.generator.scaler.normalize(images)
                with torch.no_grad():
                    generated = self.generator.generate(self._latents(rng), labels)
                share = torch.rand(len(real), 1, 1, 1, generator=rng).to(real)
                between = (share * real + (1 - share) * generated).requires_grad_()
                (grad,) = torch.autograd.grad(self.critic(between, labels).sum(), between, create_graph=True)
                distance = (self.critic(real, labels) - self.critic(generated, labels)).mean()
                penalty = PENALTY * (grad.flatten(1).norm(dim=1) - 1).square().mean()
                self._step(self.critic_optimizer, penalty - distance)
            chosen = torch.randint(len(self.public.labels), (self.config.batch_size,), generator=rng)
            labels = self.public.labels[chosen.to(self.public.labels.device)]
            generated = self.generator.generate(self._latents(rng), labels)
            self._step(self.generator_optimizer, -self.critic(generated, labels).mean())
            yield distance.item()

    def _latents(self, rng: torch.Generator) -> Tensor:
        return torch.randn(self.config.batch_size, self.generator.latent_dim, generator=rng).to(self.public.examples)

    def finish(self) -> None:
        fill_unseen_embeddings(self.generator.label, self.public.labels)

    @staticmethod
    def _step(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
