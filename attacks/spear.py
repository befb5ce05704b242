"""SPEAR. Dimitrov, Baader, Müller, Vechev, NeurIPS 2024. https://arxiv.org/abs/2403.03945

    dL/dW = D X = L R  of rank n,   so  D = L Q  and  X = Q^-1 R :   column q_i of Q is one where L q_i is sparse

D (h, n) is the gradient at the layer's outputs, half of which ReLU sets to zero. In the paper, n - 1 random rows on
which d_i happens to be zero give q_i as their null vector. Here ICA comes first: images unmixed as in the Cocktail
Party Attack predict the zeros of d_i, which works for batches of 32 images instead of 12. Then the null vectors of
random rows are starting points for minimising |L q|_1, which ends at some q_i far more often than a null vector is one.
The bias gradient gives the lengths of columns, D s = dL/db, or else the head does. Signs verify the
result: W x_i + b < 0 where d_i is zero.
"""

from dataclasses import replace
from functools import partial
from typing import Literal

import torch
from torch import nn

from attacks.base import Attack, register
from attacks.linear.column_space import ColumnSpace
from attacks.linear.ica import differences
from attacks.linear.layer import (
    assign_granted,
    failed_reconstruction,
    pixel_problem,
    require_pixel_layer,
    to_examples,
)
from attacks.linear.selection import EXACT, Selection, assign_labels, resolve_scales, select_best
from attacks.linear.sparse_columns import Candidates, search_from_ica, search_from_random_rows
from attacks.optim.tracker import current_tracker
from core.errors import UsageError
from core.hyperparameters import hp
from core.protocol import Observation, Recipe, Reconstruction, Task

CHUNK = 512  # random sets of rows that are searched from together
# largest sign mismatch of a solution that counts as found; a delta's is larger because weights move in local training
MAX_SIGN_MISMATCH = {"gradient": EXACT, "delta": 0.1}


@register("spear")
class Spear(Attack):
    """SPEAR: a small batch exactly, from the low rank of a layer's gradient and the zeros that ReLU leaves in it."""

    citation = "Dimitrov et al.: SPEAR. NeurIPS 2024"
    link = "https://arxiv.org/abs/2403.03945"
    threat = "honest-but-curious"
    uses = frozenset({"num_examples", "recipe", "defense"})
    requires = frozenset({"public", "pixel_layer", "relu"})
    paper = {"search": ("draws", "algorithm 1"), "descent": (0, "algorithm 1")}
    example_model = "fc2"

    search: Literal["images", "draws"] = hp(
        "images",
        "start of the search: images unmixed by ICA and then random sets of rows, or (draws) random sets alone",
    )
    subsets: int = hp(
        8192, "largest number of random sets of rows, after which a batch counts as diverged", ge=1, smoke=64
    )
    descent: int = hp(20, "steps that minimise |L q|_1 from each random set of rows; 0: only its null vector", ge=0)
    scale_from: Literal["auto", "bias", "head"] = hp(
        "auto", "source of the lengths of d_i: bias gradient, head, or auto (bias gradient if the layer has one)"
    )

    def requirements(self) -> frozenset[str]:
        return self.requires | ({"pixel_layer_bias"} if self.scale_from == "bias" else set())

    def check(self, model: nn.Module, task: Task, recipe: Recipe, kind: str, num_examples: int) -> None:
        super().check(model, task, recipe, kind, num_examples)
        rows = min(require_pixel_layer(model, task, self.name).weight.shape)
        if num_examples >= rows:
            raise UsageError(
                f"spear needs fewer images than the layer's {rows} independent rows, not {num_examples}: "
                "lower `batch_size` (or `client_images`)"
            )

    def reconstruct(self, observation: Observation, rng: torch.Generator) -> Reconstruction:
        assert observation.public is not None, "no public examples"
        layer = require_pixel_layer(observation.model, observation.task, self.name)
        problem = pixel_problem(observation, layer, project=False)
        if self.scale_from == "head":
            problem = replace(problem, bias_gradient=None)
        if not problem.gradient.isfinite().all():  # local training has diverged
            return failed_reconstruction(observation)
        public = observation.task.domain.to_model(observation.public.examples).flatten(1)
        space = ColumnSpace.of(problem.layer, problem.gradient, problem.n, public)
        if not space.rank:
            return failed_reconstruction(observation)
        candidates, selection = Candidates(space), Selection(space)
        view, resolve = partial(differences, task=observation.task), partial(resolve_scales, problem, space)
        if self.search == "images":
            search_from_ica(candidates, view, rng)
        trace, draws, max_mismatch = [], 0, MAX_SIGN_MISMATCH[observation.update.kind]
        while True:
            select_best(candidates, selection, resolve)
            trace.append(selection.sign_mismatch)
            if selection.sign_mismatch <= max_mismatch or draws >= self.subsets:
                break
            count = min(CHUNK, self.subsets - draws)
            draws += count
            search_from_random_rows(candidates, count, self.descent, rng)
            if self.search == "images":  # from another rotation, and without the columns found from random rows
                search_from_ica(candidates, view, rng, rounds=1)
            current_tracker().progress(draws, self.subsets, selection.sign_mismatch)
        if selection.best is None:
            return failed_reconstruction(observation, tuple(trace), draws)
        labels, similarity = assign_labels(problem, selection.best.inputs, selection.best.columns.T)
        labels = assign_granted(observation, labels, -similarity)
        examples = observation.task.domain.project(to_examples(selection.best.inputs, observation.task)).float()
        status = "ok" if selection.sign_mismatch <= max_mismatch else "diverged"
        return Reconstruction(examples, labels, tuple(trace), draws, status=status)
