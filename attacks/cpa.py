"""Cocktail Party Attack. Kariyappa et al., ICML 2023. https://arxiv.org/abs/2209.05578

    dL/dW = (1/n) sum_i d_i x_i^T :  rows are mixtures of the images.   U = V W_w dL/dW,  V unmixing, W_w whitening

`unmixing="adam"` is the paper's way to V; FastICA on pixel differences is ours. ICA leaves sign, scale and label open:
the head decides, because the broadcast model says what d_i is for x_i and its label. Our refinement goes on to the
exact images, by the zeros that ReLU leaves in d_i (as in SPEAR) or else by consistency of x_i and d_i.
"""

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attacks.base import register
from attacks.linear import features, ica
from attacks.linear.layer import LinearProblem, assign_granted, failed_reconstruction
from attacks.linear.refinement import recover_inputs
from attacks.linear.selection import assign_labels
from attacks.optim.adam import Adam
from attacks.optim.loop import Function, Phase, descend
from attacks.optim.tracker import current_tracker
from core.errors import UsageError
from core.hyperparameters import hp
from core.protocol import Observation, Recipe, Reconstruction, Task
from models.inspection import has_relu, hidden_layer, pixel_layer

# of the help of flags that the search by the zeros of ReLU, which runs first, does not read
FALLBACK = " (where the zeros of ReLU do not determine the images)"


@register("cpa")
class CocktailParty(features.FeatureInversionAttack):
    """Cocktail Party Attack: images unmixed by ICA from the rows of a fully connected layer's gradient.

    Behind other layers the unmixed sources are embeddings, and images with these embeddings are searched for.
    """

    citation = "Kariyappa et al.: Cocktail Party Attack. ICML 2023"
    link = "https://arxiv.org/abs/2209.05578"
    threat = "honest-but-curious"
    uses = frozenset({"num_examples", "recipe", "defense"})
    requires = frozenset({"public", "hidden_layer"})
    paper = {
        "unmixing": ("adam", "section 4"),
        "restarts": (1, "authors' code"),
        "iterations": (25000, "authors' README"),
        "lr": (1e-3, "authors' README"),
        "schedule": ("constant", "authors' code"),
        "refine": (0, "ours alone"),
        "feature_inversion_iterations": (25000, "authors' README"),
    }
    example_model = "fc2"

    unmixing: Literal["differences", "pixels", "adam", "random"] = hp(
        "differences",
        "unmixing method: FastICA on differences of pixels (embeddings: whitened), FastICA on pixels, Adam, or random",
    )
    restarts: int = hp(
        3,
        f"number of FastICA runs from random rotations, whose least Gaussian result is the answer{FALLBACK}",
        ge=1,
        smoke=1,
    )
    iterations: int = hp(400, f"largest number of iterations of FastICA or Adam{FALLBACK}", ge=1, smoke=3)
    lr: float = hp(1e-2, "Adam learning rate of the unmixing", gt=0)
    schedule: Literal["cosine", "constant"] = hp("cosine", "learning-rate schedule of the unmixing by Adam")
    tv: float = hp(3.1, "total-variation weight of the unmixing by Adam", ge=0, source="authors' README, FC2")
    independence_weight: float = hp(
        1.47,
        "weight of mutual independence of the sources, in the unmixing by Adam",
        ge=0,
        source="authors' README, FC2",
    )
    sharpness: float = hp(
        12.4,
        "sharpness T of the measure of mutual independence, in the unmixing by Adam",
        gt=0,
        source="authors' README, FC2",
    )
    nonnegativity_weight: float = hp(
        0.13,
        "weight of the norm of an embedding's negative part (up to sign), in the unmixing by Adam",
        ge=0,
        source="authors' README",
    )
    l1_weight: float = hp(
        5.0, "weight of the l1 norm of embeddings, in the unmixing by Adam", ge=0, source="authors' README, VGG16"
    )
    refine: int = hp(
        8,
        "largest number of refinement rounds (output gradients from the model and images by least squares, in turn); "
        "0: no refinement and no search by the zeros of ReLU",
        ge=0,
    )
    rank_tolerance: float = hp(
        1e-11, f"share of the largest eigenvalue below which eigenvalues hold no image{FALLBACK}", gt=0
    )

    def check(self, model: nn.Module, task: Task, recipe: Recipe, kind: str, num_examples: int) -> None:
        super().check(model, task, recipe, kind, num_examples)
        layer = hidden_layer(model, task)
        assert layer is not None
        if pixel_layer(model, task) is None and not has_relu(model):
            raise UsageError(
                "cpa inverts non-negative embeddings, and this model has no ReLU: choose `activation=relu`"
            )
        if num_examples > min(layer.weight.shape):
            raise UsageError(
                f"cpa unmixes at most {min(layer.weight.shape)} images, the number of the layer's independent rows, "
                f"not {num_examples}: lower `batch_size` (or `client_images`)"
            )

    def reconstruct(self, observation: Observation, rng: torch.Generator) -> Reconstruction:
        task = observation.task
        layer = hidden_layer(observation.model, task)
        assert layer is not None, "the model has no fully connected layer before the head"
        problem, extractor = features.layer_problem(observation, layer)
        # local training has diverged, or moved nothing
        if not problem.gradient.isfinite().all() or not problem.gradient.any():
            return failed_reconstruction(observation)
        view = self.view(observation, extractor)
        use_zeros = self.refine and self.unmixing in ("differences", "pixels") and has_relu(observation.model)
        unmix = partial(self.unmix, problem, view, rng)
        x, labels, sources, trace = recover_inputs(problem, unmix, view if use_zeros else None, self.refine, rng)
        if "labels" in observation.granted:
            labels = assign_granted(observation, labels, -assign_labels(problem, x, problem.deltas(x))[1])
        if extractor is None:
            examples = task.domain.decode(problem.to_input(x)).float()
            sources = sources.float().view(-1, *task.domain.shape)
            return Reconstruction(examples, labels, trace, len(trace), self.restarts - 1, sources=sources)
        found = self.invert_features(extractor, problem.to_input(x), task, rng)
        return Reconstruction(found.examples.float(), labels, found.trace, len(found.trace), self.restarts - 1)

    def view(self, observation: Observation, extractor: features.FeatureExtractor | None) -> ica.View:
        """What ICA is run on; the entries of an embedding have no neighbours, so embeddings are whitened instead."""
        if self.unmixing != "differences":
            return ica.centred if self.unmixing != "random" else lambda rows: rows
        if extractor is None:
            return partial(ica.differences, task=observation.task)
        return features.EmbeddingWhitening.of(observation, extractor)

    def unmix(self, problem: LinearProblem, view: ica.View, rng: torch.Generator) -> tuple[Tensor, tuple[float, ...]]:
        """Sources U (r, d), each an input of the layer up to scale and sign, and the objective's trace."""
        data = view(problem.gradient)
        whiten = ica.whitening(data, problem.n, self.rank_tolerance)
        white, rows = whiten @ data, whiten @ problem.gradient
        if self.unmixing == "random":
            return ica.rotation(len(white), rng, white) @ rows, ()
        if self.unmixing == "adam":
            work = partial(self.unmix_by_adam, white, partial(self.prior, problem, rows), rng)
            found = current_tracker().run_segment(ica.Unmixing, rng, work)
            return found.matrix @ rows, found.trace
        runs = [ica.fast_ica(white, rng, self.iterations) for _ in range(self.restarts)]
        found = max(runs, key=lambda run: -run.trace[-1])
        return found.matrix @ rows, found.trace

    def unmix_by_adam(self, white: Tensor, prior: Callable[[Tensor], Tensor], rng: torch.Generator) -> ica.Unmixing:
        """The paper's objective: prior + independence_weight * mutual independence - negentropy."""
        v = torch.eye(len(white), dtype=white.dtype, device=white.device, requires_grad=True)

        def objective(v: Tensor) -> Tensor:
            rows = F.normalize(v, dim=1)
            negentropy = (ica.log_cosh(rows @ white).mean(1) - ica.GAUSSIAN_LOG_COSH).square().mean()
            cosines = (rows @ rows.T - torch.eye(len(rows)).to(rows)).abs()
            independence = (self.sharpness * cosines).exp().mean() - 1
            return prior(rows) + self.independence_weight * independence - negentropy

        end = self.lr if self.schedule == "constant" else 0.0
        phase = Phase(lambda i: [features.cosine_annealing(self.lr, i, self.iterations, end)], self.iterations)
        state = descend([v], Function(objective), Adam([v]), [phase], rng)
        return ica.Unmixing(F.normalize(state.variables[0].detach(), dim=1), tuple(state.trace))

    def prior(self, problem: LinearProblem, rows: Tensor, unmixing: Tensor) -> Tensor:
        """The paper's prior on sources: images are smooth, embeddings are not negative and sparse."""
        sources = unmixing @ rows
        if problem.nonnegative:
            negative = torch.minimum(sources.relu().norm(dim=1), (-sources).relu().norm(dim=1)).mean()
            return self.nonnegativity_weight * negative + self.l1_weight * sources.abs().mean()
        images = sources.view(-1, *problem.public.shape[1:])
        return self.tv * sum(images.diff(dim=axis).abs().mean() for axis in (2, 3))
