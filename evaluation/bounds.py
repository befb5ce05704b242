"""Oracles: what an attack could recover at best, computed with the truth that no attack sees.

A mask says which examples an attack on a linear layer can tell apart at all. A search-space bound is the closest that
an attack with a generator can come to the true examples. Both are registered under the name of the attack, and attacks
know nothing of them.
"""

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from attacks.base import Attack
from core.protocol import Batch, Task
from core.registry import Registry
from models.inspection import pixel_layer

if TYPE_CHECKING:
    from models.generators.base import Generator

# (attack, model as broadcast, task, true examples (N, *shape)) -> (N,) bool
MASKS: Registry[Callable[[Any, nn.Module, Task, Tensor], Tensor]] = Registry("recoverable mask")
# (attack, task, public examples, true examples and labels) -> examples (N, *shape)
SEARCH_SPACES: Registry[Callable[[Any, Task, Batch, Batch], Tensor]] = Registry("search-space bound")


def recoverable_mask(attack: Attack, model: nn.Module, task: Task, examples: Tensor) -> Tensor | None:
    """(N,) bool: which true examples (N, *shape) the attack can tell apart in the update of this batch.

    `model` is the model as it was broadcast. None for attacks without such a bound.
    """
    if attack.name not in MASKS:
        return None
    with torch.no_grad():
        return MASKS[attack.name](attack, model, task, examples)


def search_space_bound(attack: Attack, task: Task, public: Batch | None, truth: Batch) -> Tensor | None:
    """The examples (N, *shape) closest to the truth that the attack's search could end at.

    None for attacks without such a bound, and without public examples.
    """
    if attack.name not in SEARCH_SPACES or public is None:
        return None
    return SEARCH_SPACES[attack.name](attack, task, public, truth)


@MASKS.register("analytic")
@MASKS.register("trap")
def _alone_on_a_neuron(attack: Attack, model: nn.Module, task: Task, examples: Tensor) -> Tensor:
    """Alone in passing some ReLU neuron of the first layer."""
    from attacks.linear.layer import alone_on_a_neuron

    layer = pixel_layer(model, task)
    assert layer is not None, f"{attack.name} was run on a model without a fully connected first layer"
    return alone_on_a_neuron(layer, task.domain.to_model(examples))


@MASKS.register("rtf")
def _alone_in_a_bin(attack: Any, model: nn.Module, task: Task, examples: Tensor) -> Tensor:
    """Alone between two thresholds of the block; with one bin (`one_shot`), between these two."""
    from attacks.rtf import bins_of

    bins = bins_of(model, task, examples)  # (N,), -1 below the first threshold
    alone = ((bins[:, None] == bins).sum(1) == 1) & (bins >= 0)
    return alone & (bins == 0) if attack.one_shot else alone


@MASKS.register("fishing")
def _fished(attack: Attack, model: nn.Module, task: Task, examples: Tensor) -> Tensor:
    """The one example whose projection s is that of the gradient that is left, if there is one."""
    from models.implants.fishing import isolated, projections

    s = projections(model, task.domain.to_model(examples))
    nearest = (s - isolated(model)).abs()
    mask = torch.zeros(len(s), dtype=torch.bool)
    if not nearest.isnan().any():
        mask[nearest.argmin()] = True
    return mask


@SEARCH_SPACES.register("ggl")
def _generator_range(attack: Any, task: Task, public: Batch, truth: Batch) -> Tensor:
    """The best examples in the range of the attack's generator."""
    generator = attack.build_generator(public, task.num_classes)
    return oracle_projection(generator, truth.examples, truth.labels)


@SEARCH_SPACES.register("gias")
def _generator_with_moved_weights(attack: Any, task: Task, public: Batch, truth: Batch) -> Tensor:
    """As for ggl, and then the generator's weights move as far as the attack moves them."""
    generator = attack.build_generator(public, task.num_classes)
    z = project_latents(generator, truth.examples, truth.labels)
    return _move_weights(generator, z, truth, attack.weight_iterations, attack.weight_lr)


def oracle_projection(generator: "Generator", images: Tensor, labels: Tensor, steps: int = 500) -> Tensor:
    """The images (N, *shape) in the generator's range closest to true ones in squared error.

    images: (N, *shape). labels: (N,) int64, their true classes. steps: Adam steps on the latents from each start.
    """
    z = project_latents(generator, images, labels, steps)
    with torch.no_grad():
        return generator.decode(z, labels)


def project_latents(generator: "Generator", images: Tensor, labels: Tensor, steps: int = 500) -> Tensor:
    """The latents (N, latent_dim) of `oracle_projection`: the best of three starts, z = 0 and two random ones."""
    count, rng = len(images), torch.Generator().manual_seed(0)
    starts = [torch.zeros(count, generator.latent_dim)]
    starts += [torch.randn(count, generator.latent_dim, generator=rng) for _ in range(2)]
    z = torch.cat(starts).to(images).requires_grad_()
    targets, labels = torch.cat([images] * len(starts)), labels.repeat(len(starts))
    optimizer = torch.optim.Adam([z], lr=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        error = (generator.decode(z, labels) - targets).square().sum()
        (z.grad,) = torch.autograd.grad(error, z)
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        errors = (generator.decode(z, labels) - targets).square().flatten(1).sum(1)
        best = errors.view(len(starts), count).argmin(0)
    return z.detach().view(len(starts), count, -1)[best, torch.arange(count, device=best.device)]


def _move_weights(generator: "Generator", z: Tensor, truth: Batch, steps: int, lr: float) -> Tensor:
    """Images (N, *shape) of a copy of the generator whose weights approach the truth in squared error.

    Adam takes `steps` steps, whose size falls linearly from `lr` to zero; the step with the least error is returned.
    """
    moved = copy.deepcopy(generator).requires_grad_()
    weights = list(moved.parameters())
    optimizer = torch.optim.Adam(weights, lr=lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    best, least = moved.decode(z, truth.labels).detach(), torch.inf
    for step in range(steps + 1):
        images = moved.decode(z, truth.labels)
        error = (images - truth.examples).square().sum()
        if error.item() < least:
            best, least = images.detach(), error.item()
        if step == steps:
            break
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
        schedule.step()
    return best
