"""SPEAR. Dimitrov, Baader, Müller, Vechev, NeurIPS 2024. https://arxiv.org/abs/2403.03945

    dL/dW = D X = L R  of rank n,   so  D = L Q  and  X = Q^-1 R :   column q_i of Q is one where L q_i is sparse

D (h, n) is the gradient at the layer's outputs, which ReLU empties by half. n - 1 rows drawn where d_i happens to be
empty name q_i as their null vector. Here that is the last resort, and then a draw is only a start: from it |L q|_1 is
brought down, which ends at some q_i far more often than a draw hits one. First come images that ICA unmixes, as the
Cocktail Party does: their outputs say which entries of d_i to expect empty, which takes batches of 32 instead of 12.
The bias gradient gives the lengths, D s = dL/db, or else the head does. The result tells whether it is right:
W x_i + b < 0 where d_i is empty.
"""

from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from attacks.base import Attack, progress, register
from attacks.ica import differences
from attacks.linear import (
    assign_granted,
    has_relu,
    layer_gradient,
    nothing,
    public_inputs,
    require_pixel_layer,
    to_image,
)
from attacks.sparsity import SURE, Search, measure, named
from federated.wire import Observation, Recipe, Reconstruction, Task, UsageError
from utils.cli import hp

CHUNK = 512  # draws brought down together
# share of outputs whose sign does not fit the images found; in local training weights move, and signs with them
DOUBT = {"gradient": SURE, "delta": 0.1}


@register("spear")
class Spear(Attack):
    """SPEAR: a small batch exactly, from the low rank of a layer's gradient and the zeros that ReLU leaves in it."""

    paper = "Dimitrov et al.: SPEAR. NeurIPS 2024"
    threat = "honest-but-curious"
    wants_model = "fc2"

    start: Literal["images", "draws"] = hp(
        "images", "ICA's images lead, draws find what they left; or draws alone", paper="draws"
    )
    subsets: int = hp(8192, "draws at the most; a batch not found by then counts as diverged", least=1)
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
        n, public = seen.update.num_examples, seen.task.to_model(seen.public.images)
        if not gradient.isfinite().all():  # local training has blown up
            return nothing(seen)
        search = Search(layer, gradient, n, public.flatten(1))
        if not search.rank:
            return nothing(seen)
        see = partial(differences, task=seen.task)
        if self.start == "images":
            search.follow(see, rng)
        trace, drawn, enough = [], 0, DOUBT[seen.update.kind]
        known = None if self.lengths == "head" else bias
        shown = public_inputs(seen)

        def inputs(rows: Tensor) -> Tensor:
            return rows.view(-1, *seen.task.image_shape).to(layer.weight.dtype)

        while True:
            search.settle(lambda slope: measure(seen.model, search, slope, inputs, shown, n, known))
            trace.append(search.doubt)
            if search.doubt <= enough or drawn >= self.subsets:
                break
            count = min(CHUNK, self.subsets - drawn)
            drawn += count
            search.draw(count, self.descent, rng)
            if self.start == "images":  # from another rotation, and beside what draws have found
                search.follow(see, rng, rounds=1)
            progress(drawn, self.subsets, search.doubt)
        if search.best is None:
            return nothing(seen, tuple(trace), drawn)
        labels, likeness = named(seen.model, layer, *search.best, inputs)
        labels = assign_granted(seen, labels, -likeness)
        images = to_image(search.best[0], seen.task).clamp(0, 1).float()
        status = "ok" if search.doubt <= enough else "diverged"
        return Reconstruction(images, labels, tuple(trace), drawn, status=status)
