"""SPEAR. Dimitrov, Baader, Müller, Vechev, NeurIPS 2024. https://arxiv.org/abs/2403.03945

    dL/dW = D X = L R  of rank n,   so  D = L Q  and  X = Q^-1 R :   column q_i of Q is one where L q_i is sparse

D (h, n) is the gradient at the layer's outputs, which ReLU empties by half. n - 1 rows drawn where d_i happens to be
empty name q_i as their null vector. Here a draw is only a start: from it |L q|_1 is brought down, which ends at some
q_i far more often than a draw hits one, so that hundreds of them do the work of 2^(n-1). The bias gradient gives the
lengths, D s = dL/db, or else the head does. The result tells whether it is right: W x_i + b < 0 where d_i is empty.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attacks.base import Attack, progress, register
from attacks.linear import (
    assign_granted,
    explain,
    has_relu,
    head_scale,
    layer_gradient,
    public_inputs,
    require_pixel_layer,
    slopes,
    to_image,
)
from federated.wire import Observation, Recipe, Reconstruction, Task, UsageError
from utils.cli import hp

ZERO = 1e-6  # entries of a unit vector below this are zero
CHUNK = 512  # draws brought down together
ROUNDS = 20  # in which lengths and the head's answer to them settle
# share of outputs whose sign does not fit the images found; in local training weights move, and signs with them
DOUBT = {"gradient": 0.002, "delta": 0.1}


@register("spear")
class Spear(Attack):
    """SPEAR: a small batch exactly, from the low rank of a layer's gradient and the zeros that ReLU leaves in it."""

    paper = "Dimitrov et al.: SPEAR. NeurIPS 2024"
    threat = "honest-but-curious"
    wants_model = "fc2"

    subsets: int = hp(65536, "draws at the most; a batch not found by then counts as diverged", least=1)
    descent: int = hp(20, "steps that bring |L q|_1 down from a draw; 0: the draw itself has to hit", least=0, paper=0)
    lengths: Literal["auto", "bias", "head"] = hp(
        "auto", "of d_i: from the bias gradient, from the head, or from the bias if the layer has one"
    )

    def check(self, model: nn.Module, task: Task, recipe: Recipe, kind: str, num_examples: int) -> None:
        super().check(model, task, recipe, kind, num_examples)
        layer = require_pixel_layer("spear", model, task, bias=self.lengths == "bias")
        if not has_relu(model):
            raise UsageError("spear looks for the zeros of ReLU, and this model has none: --activation relu")
        if num_examples >= min(layer.weight.shape):
            raise UsageError(
                f"spear wants fewer images than the layer's {min(layer.weight.shape)} independent rows, not "
                f"{num_examples}: lower --batch-size (or --client-images)"
            )

    def reconstruct(self, seen: Observation, rng: torch.Generator) -> Reconstruction:
        layer = require_pixel_layer("spear", seen.model, seen.task)
        gradient, bias = layer_gradient(seen, layer)  # (h, d), (h,)
        left, sizes, _ = torch.linalg.svd(gradient, full_matrices=False)
        n = seen.update.num_examples
        rank = int((sizes[:n] > 4 * sizes[n]).sum())  # from the (n + 1)th value on there is nothing but rounding
        if not rank:
            return Reconstruction(seen.public.images[:0], seen.public.labels[:0], status="diverged")
        live = gradient.norm(dim=1) > 1e-6 * gradient.norm(dim=1).max()
        noise = (sizes[n] / sum(side**0.5 for side in gradient.shape)).item()
        public = seen.task.to_model(seen.public.images)
        silent = (layer(public.flatten(1)) <= 0).double().mean(0)[live]  # of public images
        search = Search(left[live, :rank] * sizes[:rank], noise, (4 * silent * (1 - silent)).detach().clamp(min=0.01))
        best, least, trace, drawn = None, 1.0, [], 0
        tried: set[tuple[int, ...]] = set()
        while drawn < self.subsets and least > DOUBT[seen.update.kind]:
            count = min(CHUNK, self.subsets - drawn)
            drawn += count
            search.draw(count, self.descent, rng)
            # near the end it may be one vector that stands in a sparser one's place: try without each
            for banned in [None, *search.chosen()] if least < 0.1 else [None]:
                chosen = search.chosen(banned)
                key = tuple(search.names[chosen].tolist())
                if key in tried or (len(key) < rank and best is not None):
                    continue
                tried.add(key)
                slope = torch.zeros(len(live), len(key)).to(gradient)  # (h, r)
                slope[live] = search.found[chosen].T
                x, labels = self.images(seen, layer, gradient, slope, bias)
                outputs = layer(x.to(layer.weight.dtype)).T[live]  # (live, r)
                doubt = ((outputs < 0) != search.empty(slope[live])).double().mean().item()
                if best is None or doubt < least:
                    best, least = (x, labels), doubt
            trace.append(least)
            progress(drawn, self.subsets, least)
        x, labels = best
        images = to_image(x, seen.task).clamp(0, 1).float()
        status = "ok" if least <= DOUBT[seen.update.kind] else "diverged"
        return Reconstruction(images, labels, tuple(trace), drawn, status=status)

    def images(
        self, seen: Observation, layer: nn.Linear, gradient: Tensor, slope: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Images (r, d) in model units and their labels, from D (h, r) up to the length of its columns."""
        x = torch.linalg.lstsq(slope, gradient).solution  # (r, d)
        pixels, n = seen.task.image_shape, seen.update.num_examples

        def said() -> Tensor:  # (r, classes, h)
            return slopes(seen.model, layer, x.view(-1, *pixels).to(layer.weight.dtype)).double() / n

        if bias is not None and self.lengths != "head":
            length = torch.linalg.lstsq(slope, bias[:, None]).solution.squeeze(1)
            x, slope = x / length[:, None], slope * length
        else:
            scale, _ = head_scale(seen.model, layer, gradient, x, public_inputs(seen), n)
            for _ in range(ROUNDS):
                x, slope = x * scale[:, None], slope / scale
                scale, _ = explain(slope.T, said())
        guess = said()
        _, labels = explain(slope.T, guess)
        likeness = F.cosine_similarity(guess, slope.T[:, None], dim=2)  # (r, classes)
        return x, assign_granted(seen, labels, -likeness)


class Search:
    """The sparsest independent vectors in the column space of L (h, r).

    A zero counts for as much as it is likely, `prior` (h,): neurons that every image passes say nothing of one image,
    and with more images than classes there are vectors that vanish on all of them.
    """

    def __init__(self, factor: Tensor, noise: float, prior: Tensor) -> None:
        self.factor, self.noise, self.prior = factor, noise, prior  # noise: of an entry of L
        self.white, self.root = torch.linalg.qr(factor)  # (h, r), (r, r)
        self.rank = factor.shape[1]
        self.squares = (self.white[:, :, None] * self.white[:, None]).flatten(1)  # (h, r * r)
        self.found = factor.new_empty(0, len(factor))  # (m, h), of unit length
        self.zeros = factor.new_empty(0)  # (m,)
        self.names = torch.empty(0, dtype=torch.int64)  # (m,), one for each vector that was ever found
        self.count = 0

    def empty(self, vectors: Tensor) -> Tensor:
        """Where vectors (h, m) of the space are zero but for rounding."""
        return vectors.abs() <= self.rounding(vectors)

    def rounding(self, vectors: Tensor) -> Tensor:
        """What an entry that should be zero may be, in each of the vectors (h, m): (m,)."""
        q = torch.linalg.solve_triangular(self.root, self.white.T @ vectors, upper=True)  # vectors = L q
        return torch.maximum(ZERO * vectors.norm(dim=0), 10 * self.noise * q.norm(dim=0))

    def chosen(self, banned: int | None = None) -> list[int]:
        """Which of the found are D's columns: the sparsest, each outside the span of those before it, none `banned`."""
        chosen: list[int] = []
        basis = self.white.new_zeros(len(self.white), 0)
        for i, vector in enumerate(self.found):
            rest = vector - basis @ (basis.T @ vector)
            if i != banned and rest.norm() > 1e-3 and len(chosen) < self.rank:
                chosen.append(i)
                basis = torch.cat([basis, (rest / rest.norm())[:, None]], 1)
        return chosen

    def draw(self, count: int, descent: int, rng: torch.Generator) -> None:
        """Null vectors of `count` random sets of r - 1 rows, and what they come down to, join the found."""
        rows, like = self.rank - 1, {"generator": rng, "dtype": torch.float64}
        lean = torch.rand(count, 1, **like).round().to(self.prior)
        weight = self.prior**lean  # (count, h): half of the draws prefer neurons that tell images apart
        lots = torch.rand(count, len(self.white), **like).to(self.white).log() / weight
        subset = lots.argsort(1, descending=True)[:, :rows]
        extra = torch.randn(count, 1, self.rank, **like).to(self.white)
        system = torch.cat([self.white[subset], extra], 1)  # (count, r, r)
        target = system.new_zeros(count, self.rank, 1)
        target[:, -1] = 1
        q = _unit(torch.linalg.solve_ex(system, target)[0].squeeze(2))  # (count, r)
        # where the floor of |s_j| starts decides how far from its draw a vector may be taken
        floor = 0.1 ** (1 + 3 * torch.rand(count, 1, **like)).to(q)
        ridge, drawn = 1e-12 * torch.eye(self.rank).to(q), q
        for step in range(descent):  # |s|_1 = sum_j w_j s_j^2 with w_j = 1 / |s_j|: one inverse iteration for each w
            size = (q @ self.white.T).abs()  # (count, h)
            pull = weight / (size + (ZERO / floor) ** (step / descent) * floor)
            moment = (pull / pull.sum(1, keepdim=True)) @ self.squares
            cholesky, _ = torch.linalg.cholesky_ex(moment.view(-1, self.rank, self.rank) + ridge)
            q = _unit(torch.cholesky_solve(q[:, :, None], cholesky).squeeze(2))
        q = torch.cat([drawn, q]) if descent else q
        vectors = self.white @ q.T  # (h, m)
        vectors = self.polish(vectors.T)
        order = self.worth(vectors).argsort(descending=True, stable=True)
        # a cut before copies are gone would leave copies of the easiest image only
        self.keep(vectors[order[_first(vectors[order], 1e-5)][: 4 * self.rank]])

    def polish(self, vectors: Tensor) -> Tensor:
        """Vectors (m, h) that are zero, as nearly as L's rounding allows, on all rows where these nearly are."""
        squares = (self.factor[:, :, None] * self.factor[:, None]).flatten(1)
        for slack in (10, 3):
            rows = vectors.abs() < slack * self.rounding(vectors.T)[:, None]
            enough = rows.sum(1) >= self.rank - 1
            moment = rows.double() @ squares
            _, directions = torch.linalg.eigh(moment.view(-1, self.rank, self.rank))
            better = _unit(directions[:, :, 0] @ self.factor.T)
            vectors = torch.where(enough[:, None], better, vectors)
        return vectors

    def keep(self, vectors: Tensor) -> None:
        """Merge vectors (m, h) with those found before."""
        found, zeros = torch.cat([self.found, vectors]), torch.cat([self.zeros, self.worth(vectors)])
        names = torch.cat([self.names, self.count + torch.arange(len(vectors))])
        self.count += len(vectors)
        order = zeros.argsort(descending=True, stable=True)
        order = order[_first(found[order], 1e-5)][: 8 * self.rank]
        self.found, self.zeros, self.names = found[order], zeros[order], names[order.cpu()]

    def worth(self, vectors: Tensor, slack: float = 1) -> Tensor:
        """How many zeros vectors (m, h) have: (m,). Negative if one of these zeros does not follow from the others.

        Then the vector was made to have it, whereas d_i has all of its zeros for one reason.
        """
        empty = (vectors.abs() <= slack * self.rounding(vectors.T)[:, None]).double()  # (m, h)
        values, directions = torch.linalg.eigh((empty @ self.squares).view(-1, self.rank, self.rank))
        spread = (self.white @ directions[:, :, 1:]).square()  # (m, h, r - 1)
        leverage = (spread / values[:, None, 1:].clamp(min=1e-12)).sum(2) * empty  # 1: follows from no other row
        count = empty @ self.prior
        return torch.where((leverage > 1 - 1e-6).any(1), count - len(self.white), count)


def _unit(vectors: Tensor) -> Tensor:
    return F.normalize(vectors.nan_to_num(0, 0, 0), dim=1)


def _first(vectors: Tensor, same: float) -> Tensor:
    """(m,) which of unit vectors (m, k) point another way than all before them."""
    alike = (vectors @ vectors.T).abs() > 1 - same
    return ~alike.tril(-1).any(1)
