"""A network cut in two at a fully connected layer, and images from their embeddings, the inputs of that layer.

Feature inversion as in the Cocktail Party Attack, Kariyappa et al., ICML 2023:  min_x 1 - cos(z(x), z*) + a TV(x)
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attacks.base import Attack
from attacks.linear.layer import LinearProblem, layer_gradient, pixel_problem, public_inputs
from attacks.matching.distances import add_balanced
from attacks.optim.adam import Adam
from attacks.optim.loop import Evaluation, Objective, Phase, State, descend
from attacks.optim.tracker import current_tracker
from core.hyperparameters import hp, hyperparameters
from core.protocol import Observation, Task
from models.inspection import pixel_layer


class FeatureExtractor(nn.Module):
    """The part of `model` before `layer`: inputs (N, *shape) -> the inputs of `layer` (N, d). A private copy."""

    def __init__(self, model: nn.Module, layer: nn.Module) -> None:
        super().__init__()
        self.model, self.layer = copy.deepcopy((model, layer))
        self.model.eval()
        self.layer.register_forward_pre_hook(lambda module, args: self.captured.append(args[0]))
        self.captured: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.captured.clear()
        self.model(x)
        return self.captured.pop()

    @torch.no_grad()
    def in_chunks(self, x: Tensor) -> Tensor:
        """The same for many inputs, without a graph."""
        return torch.cat([self(chunk) for chunk in x.split(128)])


class Head(nn.Module):
    """The part of `model` from `layer` on: embeddings (N, d) -> logits. A private copy; `layer` is the copy's own."""

    def __init__(self, model: nn.Module, layer: nn.Module, task: Task) -> None:
        super().__init__()
        self.model, self.layer, self.shape = *copy.deepcopy((model, layer)), task.domain.shape
        self.model.eval()

    def forward(self, z: Tensor) -> Tensor:
        hook = self.layer.register_forward_pre_hook(lambda module, args: (z,))
        logits = self.model(z.new_zeros(len(z), *self.shape))
        hook.remove()
        return logits


def layer_problem(observation: Observation, layer: nn.Linear) -> tuple[LinearProblem, FeatureExtractor | None]:
    """The problem of any layer; behind other layers its unknowns are embeddings, and their extractor comes with it."""
    if pixel_layer(observation.model, observation.task) is layer:
        return pixel_problem(observation, layer, project=True), None
    gradient, bias_gradient = layer_gradient(observation, layer)
    extractor, head = FeatureExtractor(observation.model, layer), Head(observation.model, layer, observation.task)
    public = extractor(public_inputs(observation)).detach()
    problem = LinearProblem(
        model=head,
        layer=head.layer,
        gradient=gradient,
        bias_gradient=bias_gradient,
        n=observation.update.num_examples,
        public=public,
        to_input=lambda rows: rows.clamp(min=0).to(public),
        nonnegative=True,
    )
    return problem, extractor


class EmbeddingWhitening:
    """Rows (h, d) without the mean direction of public embeddings (m, d), and with their correlations evened out.

    Directions along which public embeddings vary by less than `min_gain` of the largest variation are left as they are.
    """

    def __init__(self, public: Tensor, min_gain: float = 3e-3) -> None:
        self.mean = F.normalize(public.double().mean(0), dim=0)
        _, sizes, directions = torch.linalg.svd(public - public.mean(0), full_matrices=False)
        least = min_gain * sizes[0]
        self.directions = directions.double()  # (m, d)
        self.gains = (least / (sizes.square() + least**2).sqrt()).double()  # (m,)

    @classmethod
    def of(cls, observation: Observation, extractor: FeatureExtractor) -> "EmbeddingWhitening":
        """The whitening by 1024 public examples."""
        return cls(extractor.in_chunks(public_inputs(observation, 1024)))

    def __call__(self, rows: Tensor) -> Tensor:
        rows = rows - (rows @ self.mean)[:, None] * self.mean
        return rows + (rows @ self.directions.T * (self.gains - 1)) @ self.directions


@dataclass(frozen=True)
class FeatureInversion:
    """Examples with given embeddings."""

    examples: Tensor  # (N, *shape), valid in the domain
    trace: tuple[float, ...]  # mean cosine distance of the embeddings


class FeatureDistance(Objective):
    """sum_i 1 - cos(z(x_i), z*_i), whose gradient is the sign of its own plus the regulariser's, example by example.

    `tv` is the mean size of the regulariser's gradient as a share of the distance's.
    """

    def __init__(self, extractor: FeatureExtractor, target: Tensor, regularizer: Callable[[Tensor], Tensor], tv: float):
        self.extractor, self.target, self.regularizer, self.tv = extractor, target, regularizer, tv

    def __call__(self, state: State) -> Evaluation:
        (x,) = state.variables
        distance = (1 - F.cosine_similarity(self.extractor(x), self.target, dim=1)).sum()
        (grad,) = torch.autograd.grad(distance, x)
        (prior_grad,) = torch.autograd.grad(self.regularizer(x), x)
        mean = distance.item() / len(self.target)
        return Evaluation(mean, (add_balanced(grad, prior_grad, self.tv).sign(),), mean)


@hyperparameters
class FeatureInversionAttack(Attack):
    """An attack that recovers the embeddings of a batch and searches for examples that have them."""

    feature_inversion_iterations: int = hp(
        300, "iterations of feature inversion, of examples from embeddings", ge=1, smoke=3
    )
    feature_inversion_lr: float = hp(
        0.1, "Adam step of feature inversion in the model's units", gt=0, source="Cocktail Party README"
    )
    feature_inversion_tv: float = hp(
        1.0, "total-variation weight of feature inversion, as a share of the matching gradient", ge=0
    )

    def invert_features(
        self, extractor: FeatureExtractor, target: Tensor, task: Task, rng: torch.Generator
    ) -> FeatureInversion:
        """Examples whose embeddings have the directions of `target` (N, d), by Adam on signed gradients."""
        work = partial(self._invert_features, extractor, target, task, rng)
        return current_tracker().run_segment(FeatureInversion, rng, work)

    def _invert_features(
        self, extractor: FeatureExtractor, target: Tensor, task: Task, rng: torch.Generator
    ) -> FeatureInversion:
        domain, lr, iterations = task.domain, self.feature_inversion_lr, self.feature_inversion_iterations
        x = domain.to_model(domain.init(len(target), rng).to(target)).requires_grad_()
        phase = Phase(rates=lambda i: [cosine_annealing(lr, i, iterations)], steps=iterations)
        distance = FeatureDistance(extractor, target, domain.regularizer, self.feature_inversion_tv)
        state = descend([x], distance, Adam([x]), [phase], rng, project=lambda: domain.project_(x))
        return FeatureInversion(domain.decode(x), tuple(state.trace))


def cosine_annealing(lr: float, step: int, steps: int, end: float = 0.0) -> float:
    """The learning rate of one of `steps` steps that fall from `lr` towards `end` along half a cosine."""
    return end + (lr - end) * (1 + math.cos(math.pi * step / steps)) / 2
