"""Thresholds and scale of an imprint block, from public examples.

In a step of local training at learning rate eta, a threshold moves by at most about  eta D P a / g,  where D is the
size of the loss's gradient in brightness, P the mean squared norm of an image, and a and g the block's two gains. So
a / g follows from a bound on that drift, and a g from the brightness that the block adds to an image.
"""

import math
from typing import Literal

import torch
from torch import Tensor, nn

from core.protocol import LOSSES, Batch, Recipe, Task
from models.implants.imprint import Imprint
from models.meta import MetaModel

Quantiles = Literal["smooth", "empirical", "normal", "laplace", "official"]
PUBLISHED_GAIN = 1e-3  # of the authors' notebook; the gain of its second layer is the inverse
BATCHES = 4  # over which D is measured
KERNEL_POINTS = 64  # that stand for the Gaussian kernel around each public example


def thresholds(brightness: Tensor, bins: int, quantiles: Quantiles) -> Tensor:
    """Thresholds c_0 .. c_{K-1} and the end of the last bin (bins + 1,), from the brightness of public images (n,).

    quantiles: the distribution whose k/K quantiles are the inner thresholds. "smooth": a kernel density estimate,
    "empirical": the public values, "normal" and "laplace": a fit to these, "official": Laplace(0, 0.71), as in the
    authors' notebook.
    """
    h = brightness.double()
    share = torch.arange(1, bins, device=h.device, dtype=torch.float64) / bins
    if quantiles == "smooth":
        # Silverman's bandwidth: clumps of the public images need not be clumps of the private ones
        width = 1.06 * h.std() * len(h) ** -0.2
        points = (torch.arange(KERNEL_POINTS, device=h.device, dtype=torch.float64) + 0.5) / KERNEL_POINTS
        inside = (h[:, None] + width * torch.special.ndtri(points)).flatten().sort().values
        inside = inside[(share * len(inside)).long()]
    elif quantiles == "empirical":
        inside = h.quantile(share)
    elif quantiles == "normal":
        inside = h.mean() + h.std() * torch.special.ndtri(share)
    else:
        center, scale = h.median(), (h - h.median()).abs().mean()
        if quantiles == "official":
            center, scale = torch.zeros_like(center), torch.full_like(center, 0.5**0.5)
        inside = center - scale * (share - 0.5).sign() * torch.log1p(-2 * (share - 0.5).abs())
    # every image exceeds the first threshold; far below zero it would only be rounded more coarsely
    first = inside.new_full((1,), -10.0 if quantiles == "official" else 0.0)
    inside = inside if quantiles == "official" else inside.clamp(1e-6, 1 - 1e-6)
    last = torch.maximum(1.02 * h.max(), inside[-1] + 1e-6).view(1)
    return torch.cat([first, inside, last]).to(brightness)


def calibrate(
    block: Imprint,
    inner: nn.Module,
    edges: Tensor,
    public: Batch,
    recipe: Recipe,
    threshold_drift: float,
    brightness_shift: float,
) -> None:
    """Set the block's thresholds to `edges`, and its scale for the training that `recipe` orders.

    inner: all that follows the block. public: images of the block's own kind. threshold_drift: the largest drift of a
    threshold in a step, in brightness; 0 for the published scale. brightness_shift: mean brightness added to an image.
    """
    gain, factor = PUBLISHED_GAIN, 1 / PUBLISHED_GAIN
    certifies = len(block.patterns) > 1
    if threshold_drift or certifies:
        examples, grads = pattern_gradients(inner, block.task, public, recipe, block.patterns)
    if certifies:
        block.resolution.fill_(resolution(examples, grads))
    if threshold_drift:
        brightness = public.examples.mean((1, 2, 3))
        # black images have neither
        energy = max(public.examples.square().sum((1, 2, 3)).mean().item(), 1e-12)  # P
        exceeded = max((brightness[:, None] - edges[:-1]).relu().sum(1).mean().item(), 1e-12)
        rms = max(grads.square().mean(0).max().sqrt().item(), 1e-12)  # D
        ratio = threshold_drift / (recipe.lr * rms * energy)
        gain = math.sqrt(brightness_shift / (ratio * exceeded))
        factor = ratio * gain
    block.reset(edges, gain, factor)


def pattern_gradients(
    model: nn.Module, task: Task, public: Batch, recipe: Recipe, patterns: Tensor
) -> tuple[Tensor, Tensor]:
    """Public images (n, C, H, W), with random labels, and their sum_j v_j dL/dx_j for patterns v: (n, R)."""
    rng = torch.Generator().manual_seed(0)
    meta, loss = MetaModel(model, recipe.model_mode), LOSSES[recipe.loss]
    size = min(recipe.batch_size, len(public.examples))
    images, grads = [], []
    for _ in range(BATCHES):
        chosen = torch.randperm(len(public.examples), generator=rng)[:size]
        labels = torch.randint(task.num_classes, (size,), generator=rng).to(public.labels.device)
        images.append(public.examples[chosen.to(public.examples.device)])
        x = task.domain.to_model(images[-1]).requires_grad_()
        (grad,) = torch.autograd.grad(loss(meta(x), labels), x)
        grads.append(torch.einsum("nchw,rchw->nr", grad, patterns))
    return torch.cat(images), torch.cat(grads)


def resolution(examples: Tensor, grads: Tensor) -> float:
    """The s_2 / s_1 of  d_1 x_1^T + d_2 x_2^T  that 99 of 100 pairs of examples exceed.

    examples: x (n, *shape). grads: d (n, R). Two examples whose ratio is below it look like one.
    """
    i, j = torch.triu_indices(len(examples), len(examples), 1).to(examples.device)

    def gram(rows: Tensor) -> Tensor:
        products = rows.double() @ rows.double().T
        return torch.stack([products[i, i], products[i, j], products[i, j], products[j, j]], 1).view(-1, 2, 2)

    product = gram(examples.flatten(1)) @ gram(grads)  # (pairs, 2, 2), with eigenvalues s_1^2 and s_2^2
    squares = product.diagonal(dim1=1, dim2=2).sum(1)
    ratios = torch.linalg.det(product).clamp(min=0).sqrt() / squares  # s_1 s_2 / (s_1^2 + s_2^2)
    ratios = ratios[squares > 0]  # without pairs of which neither has a gradient
    return float(ratios.quantile(0.01)) if len(ratios) else 0.0
