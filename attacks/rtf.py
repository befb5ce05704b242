"""Robbing the Fed. Fowl, Geiping, Czaja, Goldblum, Goldstein, ICLR 2022. https://arxiv.org/abs/2110.13057

    x = (dW_k - dW_{k+1}) / (db_k - db_{k+1})       for the image alone between thresholds c_k and c_{k+1}, dW_{K+1} = 0

With thresholds at the k/K quantiles an image is alone with probability (1 - 1/K)^(n-1). After local training the
division is lost: float32 rounds b harder than W, and at the published scale thresholds drift past each other. So the
scale a/g = drift / (eta D P) bounds how far a threshold moves in a step, and rows are scaled by their bin instead.
Deeper in the net the block sees features, whose rows give features, and images are sought that have them.
"""

import math
from typing import Literal

import torch
from torch import Tensor, nn

from attacks.base import Attack, expect_update, register
from attacks.features import Embedding, Tail, invert_features
from attacks.linear import distinct, has_relu, pixel_layer, plausible
from federated.wire import Batch, Observation, Recipe, Reconstruction, Task, UsageError
from models.imprint import Connection, Deep, Imprint
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
    position: Literal["input", "features"] = hp("input", "before the model, or before its first fully connected layer")
    fi_iterations: int = hp(300, "of feature inversion, behind convolutions", least=1)
    fi_lr: float = hp(0.1, "Adam's, of feature inversion", above=0)
    fi_tv: float = hp(1.0, "feature inversion: total variation's share of the matching slope", least=0)

    def check(self, model: nn.Module, task: Task, recipe: Recipe, kind: str, num_examples: int) -> None:
        super().check(model, task, recipe, kind, num_examples)
        if self.position == "input":
            return
        if pixel_layer(model, task) is not None:
            raise UsageError("rtf: nothing stands before this model's first fully connected layer: --position input")
        if not has_relu(model):
            raise UsageError("rtf sorts features by a mean above zero, and this model has no ReLU: --activation relu")

    def implant(self, model: nn.Module, task: Task, public: Batch, recipe: Recipe | None = None) -> nn.Module:
        recipe = recipe or Recipe(batch_size=8)
        there = _block(model)
        if self.position == "input":
            inner = there.inner if there else model
            block = there or Imprint(
                inner, task, self.edges(public.images.mean((1, 2, 3))), self.connection, self.sparse
            )
            self.calibrate(block, inner, public, recipe)
            return block
        layer = there.inner if there else next(m for m in model.modules() if isinstance(m, nn.Linear))
        features = _features(model, _deep(model) or layer, task.to_model(public.images))  # (n, d)
        seen = there.task if there else Deep.task(features, task)
        pictures = seen.to_pixels(features.view(-1, *seen.image_shape))
        inner = nn.Sequential(nn.Flatten(), Tail(model, layer, task))
        if there is None:
            edges = self.edges(pictures.mean((1, 2, 3)))
            there = Imprint(nn.Sequential(nn.Flatten(), layer), seen, edges, self.connection, self.sparse)
            Deep.insert(model, layer, there)
        self.calibrate(there, inner, Batch(pictures, public.labels), recipe)
        return model

    def calibrate(self, block: Imprint, inner: nn.Module, public: Batch, recipe: Recipe) -> None:
        """Thresholds and scale of the block from public pictures of its own kind; `inner` is all that follows it."""
        task, brightness = block.task, public.images.mean((1, 2, 3))
        edges = self.edges(brightness)
        gain, factor = PUBLISHED, 1 / PUBLISHED
        if self.drift:
            energy = public.images.square().sum((1, 2, 3)).mean().item()  # P
            passed = (brightness[:, None] - edges[:-1]).relu().sum(1).mean().item()  # m
            ratio = self.drift / (recipe.lr * _pull(inner, task, public, recipe) * energy)
            gain = math.sqrt(self.shift / (ratio * passed))
            factor = ratio * gain
        block.scale(edges, gain, factor)

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
        block, deep = _block(model), _deep(model)
        assert block is not None
        x = task.to_model(images)
        brightness = block.brightness(x if deep is None else deep[0](_features(model, deep, x)))
        bins = torch.bucketize(brightness, block.edges[1:-1].contiguous(), right=True)
        alone = torch.bincount(bins)[bins] == 1
        return alone & (bins == 0) & (brightness >= block.edges[0]) if self.one_shot else alone

    def reconstruct(self, seen: Observation, rng: torch.Generator) -> Reconstruction:
        expect_update(seen.update, seen.model)
        block, deep = _block(seen.model), _deep(seen.model)
        assert block is not None, f"an update of {type(seen.model).__name__}, not of a model with the block"
        first = next(i for i, p in enumerate(seen.model.parameters()) if p is block.weight)
        weight, bias = (t.double() for t in seen.update.tensors[first : first + 2])  # (K, N), (K,)
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
        images = images.view(-1, *block.task.image_shape)
        hit &= plausible(images, white=1.0 if deep is None else math.inf)
        order = hit.nonzero().flatten()
        order = order[size[order].argsort(descending=True)]
        # in one gradient an image stands in one row, and two that look alike are two; steps show it to several
        kept = order[distinct(images[order])] if stepped else order
        status = "ok" if len(kept) else "diverged"
        found = images[kept].clamp(min=0).float()
        if deep is None or not len(kept):
            return Reconstruction(found.clamp(max=1) if deep is None else seen.public.images[:0], status=status)
        embedding, features = Embedding(seen.model, deep), block.task.to_model(found).flatten(1)
        images, trace = invert_features(embedding, features, seen.task, self.fi_iterations, self.fi_lr, self.fi_tv, rng)
        return Reconstruction(images.float(), None, trace, len(trace))

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


def _block(model: nn.Module) -> Imprint | None:
    return next((m for m in model.modules() if isinstance(m, Imprint)), None)


def _deep(model: nn.Module) -> Deep | None:
    return next((m for m in model.modules() if isinstance(m, Deep)), None)


@torch.no_grad()
def _features(model: nn.Module, module: nn.Module, inputs: Tensor) -> Tensor:
    """What `module` is fed of model inputs (N, C, H, W): (N, d)."""
    embedding = Embedding(model, module)
    return torch.cat([embedding(x) for x in inputs.split(128)])


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
