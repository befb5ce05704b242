"""A class-conditional variational autoencoder. Kingma, Welling, ICLR 2014. https://arxiv.org/abs/1312.6114

    max  E log p(x | z, y) - KL( q(z | x, y) || N(0, 1) ),      p(x | z, y) = N(x; G(z, y), 0.1^2)

Over all images of a class, the latents from q are not standard normal, and they differ between classes. They are
therefore whitened class by class at the end of training, so that z ~ N(0, 1) draws images of the given class.
"""

import math
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

PIXEL_STD = 0.1  # of p(x | z, y)
LR = 2e-3


class VAE(Generator):
    """The decoder, and the encoder that training and whitening need."""

    latent_mean: Tensor  # (classes, latent_dim)
    latent_root: Tensor  # (classes, latent_dim, latent_dim), Cholesky factors of the latents' covariances

    def __init__(self, config: GeneratorConfig, shape: Shape, classes: int) -> None:
        super().__init__()
        self.latent_dim, self.scaler = config.latent_dim, PixelScaler(shape[0], config.output_normalization)
        self.label = nn.Embedding(classes, LABEL_DIM)
        self.encoder, features = conv_encoder(config, shape, negative_slope=0.0)
        self.head = nn.Linear(features + LABEL_DIM, 2 * self.latent_dim)
        self.decoder = UpsamplingDecoder(self.latent_dim + LABEL_DIM, config, shape, kernel_size=4)
        self.register_buffer("latent_mean", torch.zeros(classes, self.latent_dim))
        self.register_buffer("latent_root", torch.eye(self.latent_dim).repeat(classes, 1, 1))

    def encode(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance (N, latent_dim) of q(z | x, y), before whitening."""
        features = self.encoder(self.scaler.normalize(images))
        mean, log_variance = self.head(torch.cat([features, self.label(labels)], 1)).chunk(2, 1)
        return mean, log_variance.clamp(-12, 8)

    def decode_unwhitened(self, z: Tensor, labels: Tensor) -> Tensor:
        """Latents (N, latent_dim) as drawn from q -> pixels (N, C, H, W), not clamped."""
        return self.scaler.to_pixels(self.scaler.activation(self.decoder(torch.cat([z, self.label(labels)], 1))))

    def decode(self, z: Tensor, labels: Tensor) -> Tensor:
        unwhitened = self.latent_mean[labels].to(z) + torch.einsum("nij,nj->ni", self.latent_root[labels].to(z), z)
        return self.decode_unwhitened(unwhitened, labels).clamp(0, 1)

    @torch.no_grad()
    def whiten(self, public: Batch) -> None:
        """Set `latent_mean` and `latent_root` to the first two moments of each class's latents.

        The covariance of a class with few images is shrunk towards that of all classes.
        """
        self.eval()
        batches = zip(public.examples.split(256), public.labels.split(256), strict=True)
        means, log_variances = zip(*(self.encode(*batch) for batch in batches), strict=True)
        mean, variance = torch.cat(means), torch.cat(log_variances).exp()  # (M, latent_dim)
        centred, overall_mean = mean.clone(), mean.mean(0)
        for label in public.labels.unique():
            centred[public.labels == label] -= mean[public.labels == label].mean(0)
        pooled = centred.T @ centred / len(centred) + variance.mean(0).diag()
        for label in range(len(self.latent_mean)):
            in_class = public.labels == label  # (M,)
            m = int(in_class.sum())
            self.latent_mean[label] = mean[in_class].mean(0) if m else overall_mean
            deviation = mean[in_class] - self.latent_mean[label]
            scatter = deviation.T @ deviation + variance[in_class].sum(0).diag()
            covariance = (scatter + self.latent_dim * pooled) / (m + self.latent_dim)
            self.latent_root[label] = torch.linalg.cholesky(covariance)


@register("vae", steps=2000, width=32)
class VAETrainer(Trainer):
    """Adam with a rate that falls linearly to zero over the second half; KL's weight rises over the first fifth."""

    generator_class = VAE

    def __init__(self, config: GeneratorConfig, public: Batch, classes: int) -> None:
        self.config, self.public = config, public
        self.generator: VAE = VAE(config, tuple(public.examples.shape[1:]), classes).to(public.examples.device)
        self.generator.scaler.fit(public)
        self.optimizer = torch.optim.Adam(self.generator.parameters(), lr=LR)

    def stateful(self) -> dict[str, nn.Module | torch.optim.Optimizer]:
        return {"generator": self.generator, "optimizer": self.optimizer}

    def steps(self, start: int, rng: torch.Generator) -> Iterator[float]:
        """The loss is the negative evidence bound, in nats per entry of an image."""
        self.generator.train()
        for step in range(start, self.config.steps):
            done = step / self.config.steps
            self.optimizer.param_groups[0]["lr"] = LR * min(1.0, 2 - 2 * done)
            images, labels = augmented_batch(self.public, self.config.batch_size, rng)
            mean, log_variance = self.generator.encode(images, labels)
            noise = torch.randn(mean.shape, generator=rng).to(mean)
            decoded = self.generator.decode_unwhitened(mean + noise * (log_variance / 2).exp(), labels)
            misfit = (decoded - images).square().flatten(1).sum(1) / (2 * PIXEL_STD**2)  # (N,)
            divergence = (mean.square() + log_variance.exp() - 1 - log_variance).sum(1) / 2  # (N,)
            loss = (misfit + min(1.0, 5 * done) * divergence).mean()
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            yield loss.item() / math.prod(images.shape[1:])

    def finish(self) -> None:
        fill_unseen_embeddings(self.generator.label, self.public.labels)
        self.generator.whiten(self.public)
