"""Robbing the Fed. Fowl, Geiping, Czaja, Goldblum, Goldstein, ICLR 2022. https://arxiv.org/abs/2110.13057

    x = (dW_k - dW_{k+1}) / (db_k - db_{k+1})       for the image alone between thresholds c_k and c_{k+1}, dW_{K+1} = 0

With thresholds at the k/K quantiles an image is alone with probability (1 - 1/K)^(n-1). After local training the
division is lost: float32 rounds b harder than W, and at the published scale thresholds drift past each other. So the
scale a/g = drift / (eta D P) bounds how far a threshold moves in a step, and rows are scaled by their bin instead.
"""

import math
from typing import Literal

import torch
from torch import Tensor, nn

from attacks.base import Attack, expect_update, register
from attacks.linear import distinct, plausible
from federated.wire import Batch, Observation, Recipe, Reconstruction, Task
from models.imprint import Connection, Imprint
from models.meta import MetaModel
from utils.cli import hp

PUBLISHED = 1e-3  # gain of the authors' notebook; its second layer is the inverse


@register("rtf")
class RobbingTheFed(Attack):
    """Robbing the Fed: an imprint block before the model, out of whose rows images are read one by one."""

    paper = "Fowl et al.: Robbing the Fed. ICLR 2022"
    threat = "malicious-architecture"
    instant = True
    names_labels = False

    bins: int = hp(256, "rows of the block, K", least=2, paper=100, source="authors' notebook, n = 64")
    connection: Connection = hp("addition", "how the block meets the model: models/imprint.py", paper="linear")
    quantiles: Literal["smooth", "empirical", "normal", "laplace", "official"] = hp(
        "smooth", "thresholds: of public brightness (smoothed, as it is, fitted) or Laplace(0, 0.71)", paper="official"
    )
    drift: float = hp(1e-5, "threshold drift per local step, in brightness; 0: the published scale", least=0, paper=0)
    shift: float = hp(1e-3, "mean brightness the block adds to an image", above=0)
    decoder: Literal["auto", "rows", "bias"] = hp(
        "auto", "rows: scale by the bin; bias: divide; auto: bias where it is exact", paper="bias"
    )
    sparse: bool = hp(False, "a row answers between two thresholds only (the paper's variant)")
    one_shot: bool = hp(False, "two rows around the middle bin of K: one image out of K (the paper's variant)")

    def implant(self, model: nn.Module, task: Task, public: Batch, recipe: Recipe | None = None) -> nn.Module:
        inner = model.inner if isinstance(model, Imprint) else model
        edges = self.edges(public.images.mean((1, 2, 3)))
        block = model if isinstance(model, Imprint) else Imprint(inner, task, edges, self.connection, self.sparse)
        gain, factor = PUBLISHED, 1 / PUBLISHED
        if self.drift:
            recipe = recipe or Recipe(batch_size=8)
            brightness = public.images.mean((1, 2, 3))
            energy = public.images.square().sum((1, 2, 3)).mean().item()  # P
            passed = (brightness[:, None] - edges[:-1]).relu().sum(1).mean().item()  # m
            ratio = self.drift / (recipe.lr * _pull(inner, task, public, recipe) * energy)
            gain = math.sqrt(self.shift / (ratio * passed))
            factor = ratio * gain
        block.scale(edges, gain, factor)
        return block

    def edges(self, brightness: Tensor) -> Tensor:
        """Thresholds c_0 .. c_{K-1} and the end of the last bin, from the brightness of public images (n,)."""
        h = brightness.double()
        share = torch.arange(1, self.bins, device=h.device, dtype=torch.float64) / self.bins
        if self.quantiles == "smooth":
            # Silverman's bandwidth: the private images are not the public ones, whose clumps they need not share
            width = 1.06 * h.std() * len(h) ** -0.2
            draws = torch.special.ndtri((torch.arange(64, device=h.device, dtype=torch.float64) + 0.5) / 64)
            inside = (h[:, None] + width * draws).flatten().sort().values
            inside = inside[(share * len(inside)).long()]
        elif self.quantiles == "empirical":
            inside = h.quantile(share)
        elif self.quantiles == "normal":
            inside = h.mean() + h.std() * torch.special.ndtri(share)
        else:
            centre, spread = h.median(), (h - h.median()).abs().mean()
            if self.quantiles == "official":
                centre, spread = torch.zeros_like(centre), torch.full_like(centre, 0.5**0.5)
            inside = centre - spread * (share - 0.5).sign() * torch.log1p(-2 * (share - 0.5).abs())
        # the first row is passed by every image; far below zero it would only be rounded harder
        first = inside.new_full((1,), -10.0 if self.quantiles == "official" else 0.0)
        inside = inside if self.quantiles == "official" else inside.clamp(1e-6, 1 - 1e-6)
        last = torch.maximum(1.02 * h.max(), inside[-1] + 1e-6).view(1)
        edges = torch.cat([first, inside, last]).to(brightness)
        middle = self.bins // 2
        return edges[[middle, middle + 1, -1]] if self.one_shot else edges

    def ceiling(self, model: nn.Module, task: Task, images: Tensor) -> Tensor:
        assert isinstance(model, Imprint)
        brightness = model.brightness(task.to_model(images))
        bins = torch.bucketize(brightness, model.edges[1:-1].contiguous(), right=True)
        alone = torch.bincount(bins)[bins] == 1
        return alone & (bins == 0) & (brightness >= model.edges[0]) if self.one_shot else alone

    def reconstruct(self, seen: Observation, rng: torch.Generator) -> Reconstruction:
        expect_update(seen.update, seen.model)
        block = seen.model
        assert isinstance(block, Imprint), f"an update of {type(block).__name__}, not of a model with the block"
        weight, bias = (t.double() for t in seen.update.tensors[:2])  # (K, N), (K,)
        noise = 2**-21 * weight.norm(dim=1)  # what float32 leaves of a row that is subtracted from its like
        if not block.sparse:
            weight, bias = -weight.diff(dim=0, append=weight[:1] * 0), -bias.diff(append=bias[:1] * 0)
        low, high = block.edges[:-1].double(), block.edges[1:].double()
        if self.one_shot:
            weight, bias, low, high, noise = weight[:1], bias[:1], low[:1], high[:1], noise[:1]
        stepped = seen.update.kind == "delta"
        images = self.scaled(weight, bias, low, high, exact=not stepped or block.connection == "split")
        size = weight.norm(dim=1)
        if stepped:
            noise = torch.maximum(2**-24 * block.weight.double().norm(dim=1).max(), 1e-4 * size.max())
        hit = size > noise
        images = images.view(-1, *seen.task.image_shape)
        hit &= plausible(images)
        order = hit.nonzero().flatten()
        order = order[size[order].argsort(descending=True)]
        # in one gradient an image stands in one row, and two that look alike are two; steps show it to several
        kept = order[distinct(images[order])] if stepped else order
        found = images[kept].clamp(0, 1).float()
        return Reconstruction(found, status="ok" if len(found) else "diverged")

    def scaled(self, weight: Tensor, bias: Tensor, low: Tensor, high: Tensor, exact: bool) -> Tensor:
        """Rows (K, N), each a multiple of an image -> images, their brightness known or taken from their bin."""
        if self.decoder == "bias":
            return weight / bias[:, None]
        sums = weight.mean(1)
        middle = (low.clamp(min=0) + high) / 2
        known = exact and self.decoder == "auto"
        # nothing but white bounds the last bin, if there is a brightness to go by
        bound = torch.cat([high[:-1], high[-1:].clamp(min=1)])
        brightness = torch.clamp(sums / bias, low, bound).nan_to_num() if known else middle
        return weight * (brightness / sums)[:, None]


def _pull(model: nn.Module, task: Task, public: Batch, recipe: Recipe) -> float:
    """D, root mean square over images of |sum_j dL/dx_j|: how hard the loss of a public batch pulls at brightness."""
    rng = torch.Generator().manual_seed(0)
    meta = MetaModel(model, recipe.model_mode)
    size = min(recipe.batch_size, len(public.images))
    pulls = []
    for _ in range(4):
        chosen = torch.randperm(len(public.images), generator=rng)[:size]
        labels = torch.randint(task.num_classes, (size,), generator=rng).to(public.labels.device)
        x = task.to_model(public.images[chosen.to(public.images.device)]).requires_grad_()
        loss = nn.functional.cross_entropy(meta(x), labels)
        pulls.append(torch.autograd.grad(loss, x)[0].sum((1, 2, 3)))
    return max(torch.cat(pulls).square().mean().sqrt().item(), 1e-12)
