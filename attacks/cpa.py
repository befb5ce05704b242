"""Cocktail Party Attack. Kariyappa et al., ICML 2023. https://arxiv.org/abs/2209.05578

    dL/dW = (1/n) sum_i d_i x_i^T :  rows are mixtures of the images.   U = V W_w dL/dW,  V unmixing, W_w whitening

ICA finds V. By default it looks at pixel differences of every row, which mix as the images do and are sparse and nearly
uncorrelated, as ICA wants its sources; `--start adam` is the paper's optimiser. What ICA leaves open, sign, scale and
label, the head decides: d_i is what the broadcast model says of x_i and its label. Images also say where ReLU leaves
d_i empty, and as in SPEAR those zeros, once there are enough of them, name the exact d_i and with it the exact image.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attacks.base import Attack, progress, register
from attacks.features import Embedding, Tail, hidden_layer, invert_features
from attacks.ica import GAUSS, differences, fast_ica, log_cosh, rotation, whitening
from attacks.linear import (
    explain,
    has_relu,
    head_scale,
    layer_gradient,
    nothing,
    pixel_layer,
    public_inputs,
    slopes,
    to_image,
)
from attacks.sparsity import SURE, Search, factors, measure, named
from federated.wire import Observation, Recipe, Reconstruction, Task, UsageError
from utils.cli import hp


@register("cpa")
class CocktailParty(Attack):
    """Cocktail Party Attack: images unmixed from the rows of a fully connected layer's gradient by ICA.

    Behind convolutions what is unmixed are embeddings, and images are then sought that have them.
    """

    paper = "Kariyappa et al.: Cocktail Party Attack. ICML 2023"
    threat = "honest-but-curious"
    wants_model = "fc2"

    start: Literal["differences", "pixels", "adam", "random"] = hp(
        "differences",
        "FastICA on differences (of embeddings: whitened) or as is, the paper's Adam, or no unmixing",
        paper="adam",
    )
    restarts: int = hp(3, "FastICA runs from random rotations; the least Gaussian wins", least=1, paper=1)
    iterations: int = hp(400, "at the most, of FastICA or Adam", least=1, paper=25000, source="authors' README")
    lr: float = hp(1e-2, "Adam's", above=0, paper=1e-3, source="authors' README")
    schedule: Literal["cosine", "constant"] = hp("cosine", "of Adam's rate", paper="constant", source="authors' code")
    tv: float = hp(3.1, "Adam: weight of total variation", least=0, source="authors' README, FC2")
    mi: float = hp(1.47, "Adam: weight of mutual independence", least=0, source="authors' README, FC2")
    sharpness: float = hp(12.4, "Adam: T, of mutual independence", above=0, source="authors' README, FC2")
    nonneg: float = hp(0.13, "Adam, embeddings: weight of the smaller of both signs", least=0, source="authors' README")
    l1: float = hp(5.0, "Adam, embeddings: weight of |s|", least=0, source="authors' README, VGG16")
    refine: int = hp(8, "rounds of images from d, d from images, after the zeros of d; 0: neither", least=0, paper=0)
    fi_iterations: int = hp(300, "of feature inversion, behind convolutions", least=1, paper=25000)
    fi_lr: float = hp(0.1, "Adam's, of feature inversion", above=0, source="authors' README")
    fi_tv: float = hp(1.0, "feature inversion: total variation's share of the matching slope", least=0)
    cut: float = hp(1e-11, "eigenvalues below this share of the largest carry no image", above=0)

    def check(self, model: nn.Module, task: Task, recipe: Recipe, kind: str, num_examples: int) -> None:
        super().check(model, task, recipe, kind, num_examples)
        layer = hidden_layer(model)
        if layer is None:
            raise UsageError(
                "cpa unmixes a fully connected layer before the head, and this model has none: "
                "choose --model fc2, mlp, cnn or vgg16"
            )
        if pixel_layer(model, task) is None and not has_relu(model):
            raise UsageError(
                "cpa inverts embeddings that are not negative, and this model has no ReLU: --activation relu"
            )
        if num_examples > min(layer.weight.shape):
            raise UsageError(
                f"cpa: {num_examples} images are mixed in {min(layer.weight.shape)} independent rows, which carry no "
                "more images than that: lower --batch-size (or --client-images)"
            )

    def reconstruct(self, seen: Observation, rng: torch.Generator) -> Reconstruction:
        layer, n, task = hidden_layer(seen.model), seen.update.num_examples, seen.task
        assert layer is not None, "a model without a hidden layer"
        gradient, bias = layer_gradient(seen, layer)  # (h, d), (h,)
        if not gradient.isfinite().all():  # local training has blown up
            return nothing(seen)
        pictures = pixel_layer(seen.model, task) is layer
        model, public, whiter = seen.model, public_inputs(seen), None
        if not pictures:
            embedding, model = Embedding(model, layer), Tail(model, layer, task)
            layer, public = model.layer, embedding(public).detach()
            if self.start == "differences":
                whiter = Whitening(torch.cat([embedding(x).detach() for x in public_inputs(seen, 1024).split(128)]))

        def inputs(rows: Tensor) -> Tensor:
            """Sources in their units (r, d) -> what the model behind them takes."""
            if pictures:
                return task.to_model(to_image(rows, task).clamp(0, 1).to(public))
            return rows.clamp(min=0).to(public)

        search, better = Search(layer, gradient, n, public.flatten(1)), []
        if self.refine and self.start in ("differences", "pixels") and has_relu(model):
            see = self.see(task if pictures else None, whiter)
            known = search.follow(see, rng)
            search.settle(lambda slope: measure(model, search, slope, inputs, public, n, bias))
            better = [search.sources(known, see, rng)] if 0 < len(known) < search.rank else []
        if search.best is not None and search.doubt <= SURE:
            x, slope = search.best
            labels, _ = named(model, layer, x, slope, inputs)
            sources, trace = x, (search.doubt,)
        else:
            sources, trace = self.unmix(gradient, n, task if pictures else None, rng, whiter)
            starts = [*better, sources]  # where neither explains the gradient, as after local steps, the first
            ends = [self.consistent(model, layer, gradient, start, inputs, public, n) for start in starts]
            sources, (x, labels, _) = min(zip(starts, ends, strict=True), key=lambda run: run[1][2])
        granted = seen.granted.get("labels")
        if granted is not None:
            labels = granted[: len(x)]
        if pictures:
            images = task.to_pixels(inputs(x).view(-1, *task.image_shape)).clamp(0, 1)
            found = sources.float().view(-1, *task.image_shape)
            return Reconstruction(images.float(), labels, trace, len(trace), self.restarts - 1, sources=found)
        images, trace = invert_features(embedding, inputs(x), task, self.fi_iterations, self.fi_lr, self.fi_tv, rng)
        return Reconstruction(images.float(), labels, trace, len(trace), self.restarts - 1)

    def unmix(
        self,
        gradient: Tensor,
        n: int,
        task: Task | None,
        rng: torch.Generator,
        whiter: Callable[[Tensor], Tensor] | None = None,
    ) -> tuple[Tensor, tuple[float, ...]]:
        """Sources U (r, d) of a gradient (h, d), each an image up to its scale and sign, and the objective's course.

        Without a task they are embeddings, whose entries have no neighbours: `whiter` then does what differences do.
        """
        view = self.see(task, whiter)(gradient)
        whiten = whitening(view, n, self.cut)
        white = whiten @ view
        if self.start == "random":
            return rotation(len(white), rng, white) @ whiten @ gradient, ()
        if self.start == "adam":
            unmixing, trace = self.adam(white, whiten @ gradient, task)
            return unmixing @ whiten @ gradient, trace
        runs = [fast_ica(white, rng, self.iterations) for _ in range(self.restarts)]
        unmixing, trace = max(runs, key=lambda run: -run[1][-1])
        return unmixing @ whiten @ gradient, trace

    def see(self, task: Task | None, whiter: Callable[[Tensor], Tensor] | None) -> Callable[[Tensor], Tensor]:
        """What ICA is to look at of rows (h, d)."""
        if self.start == "differences":
            return whiter if task is None else partial(differences, task=task)
        if self.start == "random":
            return lambda rows: rows
        return lambda rows: rows - rows.mean(1, keepdim=True)

    def consistent(
        self,
        model: nn.Module,
        layer: nn.Linear,
        gradient: Tensor,
        sources: Tensor,
        inputs: Callable[[Tensor], Tensor],
        public: Tensor,
        n: int,
    ) -> tuple[Tensor, Tensor, float]:
        """Images (r, d) in model units, labels, and the share of the gradient they leave unexplained.

        Sources take sign, scale and label from the head; then come rounds of d = d(x, y) and
        x = argmin |dL/dW - (1/n) d^T x|. A neuron whose ReLU is guessed wrong spoils its row only, so rows are weighted
        down by their residual. The round that explains the gradient best is kept, if it explains more than half of it.
        """
        scale, labels = head_scale(model, layer, gradient, sources, public, n)
        if public.dim() == 2:  # an embedding is not negative, which says more of its sign than the head does
            sign = (sources.relu().norm(dim=1) - (-sources).relu().norm(dim=1)).sign()
            scale = scale.abs() * sign
        x = scale[:, None] * sources
        best, least, previous = (x, labels, 1.0), 0.4, math.inf
        size = gradient.norm(dim=1).median()
        left, sizes, right = factors(gradient)
        whole, right = (left * sizes)[:, :n], right[:n]  # (h, n), rows as long and as far apart as the gradient's
        for number in range(self.refine):
            said = slopes(model, layer, inputs(x)).double() / n
            if number < 3:
                labels = explain(torch.linalg.lstsq(x.T, gradient.T).solution, said)[1]
            d = said[torch.arange(len(x)), labels].T  # (h, r)
            weight = torch.ones_like(d[:, :1])
            for _ in range(5):
                turned = torch.linalg.lstsq(weight * d, weight * whole).solution  # (r, k)
                residual = (whole - d @ turned).norm(dim=1, keepdim=True)
                weight = (residual + 1e-3 * residual.median() + 1e-30).rsqrt()
            x = turned @ right
            share = (residual.median() / size).item()
            if share < least:
                best, least = (x, labels, share), share
            # where it leads nowhere it shows early, and where it leads to the exact images it leads there fast
            if not 1e-5 < share < (0.97 * previous if number > 2 else math.inf):
                break
            previous = share
        return best

    def adam(self, white: Tensor, whole: Tensor, task: Task | None) -> tuple[Tensor, tuple[float, ...]]:
        """The paper's objective by Adam: -negentropy + mi * mutual independence + tv * total variation."""
        v = torch.eye(len(white), dtype=white.dtype, device=white.device, requires_grad=True)
        optimizer = torch.optim.Adam([v], lr=self.lr)
        end = self.lr if self.schedule == "constant" else 0.0
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.iterations, end)
        trace = []
        for iteration in range(self.iterations):
            rows = F.normalize(v, dim=1)
            negentropy = (log_cosh(rows @ white).mean(1) - GAUSS).square().mean()
            alike = (rows @ rows.T - torch.eye(len(rows)).to(rows)).abs()
            if task is None:  # embeddings are not negative, and sparse
                sources = rows @ whole
                negative = torch.minimum(sources.relu().norm(dim=1), (-sources).relu().norm(dim=1)).mean()
                prior = self.nonneg * negative + self.l1 * sources.abs().mean()
            else:
                pictures = (rows @ whole).view(-1, *task.image_shape)
                prior = self.tv * sum(pictures.diff(dim=axis).abs().mean() for axis in (2, 3))
            independence = (self.sharpness * alike).exp().mean() - 1
            loss = prior + self.mi * independence - negentropy
            (v.grad,) = torch.autograd.grad(loss, [v])
            optimizer.step()
            schedule.step()
            trace.append(loss.item())
            progress(iteration, self.iterations, trace[-1])
        return F.normalize(v.detach(), dim=1), tuple(trace)


class Whitening:
    """Rows (h, d) without what public embeddings (m, d) have in common, and with their correlations evened out."""

    def __init__(self, public: Tensor, floor: float = 3e-3) -> None:
        self.mean = F.normalize(public.double().mean(0), dim=0)
        spread = public - public.mean(0)
        _, sizes, directions = torch.linalg.svd(spread, full_matrices=False)
        least = floor * sizes[0]
        self.directions = directions.double()  # (m, d)
        self.gains = (least / (sizes.square() + least**2).sqrt()).double()  # (m,): 1 where the public ones hardly vary

    def __call__(self, rows: Tensor) -> Tensor:
        rows = rows - (rows @ self.mean)[:, None] * self.mean
        return rows + (rows @ self.directions.T * (self.gains - 1)) @ self.directions
