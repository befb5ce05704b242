"""APRIL. Lu, Zhang, Zhao, He, Cheng, CVPR 2022. https://arxiv.org/abs/2112.14087

    (dL/dz)^T z = W_q^T dL/dW_q + W_k^T dL/dW_k + W_v^T dL/dW_v,       dL/dz = dL/dE_pos

z (T, D) are the tokens that enter the first attention; the learned position embedding E_pos is added to them, so its
gradient is dL/dz. Where no normalisation and no residual surrounds that attention, this is a linear system, and pixels
follow from z - E_pos by the patch embedding: the closed form, for one example. Elsewhere (the paper's APRIL-O) the
cosine distance of the position embedding's gradients is added to gradient matching.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attacks.base import register
from attacks.labels.inference import infer_labels
from attacks.matching.matcher import GradientMatcher
from attacks.matching.runs import to_reconstruction
from attacks.matching.signed_inversion import MatchingObjective, SignedInversion
from core.errors import UsageError
from core.hyperparameters import hp
from core.protocol import Observation, Recipe, Reconstruction, Task
from models.zoo.vit import ViT


@register("april")
class April(SignedInversion):
    """APRIL: tokens of a vision transformer from the gradient of its position embedding."""

    citation = "Lu, Zhang, Zhao, He, Cheng: APRIL. CVPR 2022"
    link = "https://arxiv.org/abs/2112.14087"
    requires = frozenset({"vit", "double_backward"})
    example_model = "vit"
    paper = {"ridge": (0.0, "section 4.1, a plain inverse")}

    method: Literal["auto", "closed", "matching"] = hp(
        "auto", "closed form (one example, no normalisation before the first attention), matching, or auto"
    )
    ridge: float = hp(
        10.0,
        "size, in rounding errors of float32, below which the closed form ignores a singular value",
        ge=0,
        source="ours, tuning victims",
    )
    position_weight: float = hp(1.0, "weight of the position embedding's gradient in matching", ge=0)

    def check(self, model: nn.Module, task: Task, recipe: Recipe, kind: str, num_examples: int) -> None:
        super().check(model, task, recipe, kind, num_examples)
        if self.method == "closed" and not _has_closed_form(model, num_examples):
            raise UsageError(
                "april has a closed form for one example and `model=vit_plain` alone: choose `method=matching`"
            )

    def reconstruct(self, observation: Observation, rng: torch.Generator) -> Reconstruction:
        matcher = GradientMatcher(observation)
        labels = infer_labels(matcher.mean_gradient, observation, rng)
        model = observation.model
        assert isinstance(model, ViT)
        if self.method != "matching" and _has_closed_form(model, observation.update.num_examples):
            names = [name for name, _ in model.named_parameters()]
            pixels = closed_form(
                model, dict(zip(names, matcher.mean_gradient, strict=True)), observation.task, self.ridge
            )
            return Reconstruction(observation.task.domain.decode(pixels), labels)
        index = [name for name, _ in model.named_parameters()].index("position")
        return to_reconstruction(self.descend(PositionObjective(matcher, index, self.position_weight), labels, rng))


class PositionObjective(MatchingObjective):
    """The cosine distance of whole updates plus that of the position embedding's alone."""

    def __init__(self, matcher: GradientMatcher, index: int, weight: float) -> None:
        super().__init__(matcher)
        self.index, self.weight = index, weight

    def distance(self, examples: Tensor, labels: Tensor, *extra: Tensor) -> Tensor:
        distance = self.matcher.cosine_distance(examples, labels, *extra)
        ours = self.matcher.simulate(examples, labels, *extra)[self.index].flatten()
        return distance + self.weight * (
            1 - F.cosine_similarity(ours, self.matcher.target[self.index].flatten(), dim=0)
        )


def _has_closed_form(model: nn.Module, num_examples: int) -> bool:
    return isinstance(model, ViT) and bool(model.blocks[0].plain) and num_examples == 1


@torch.no_grad()
def closed_form(model: ViT, grads: dict[str, Tensor], task: Task, ridge: float) -> Tensor:
    """The model's input (1, C, H, W) from the gradient of one example, in float64 by two least-squares problems.

    At initialisation dL/dz has almost the same rows for all tokens, and float32 leaves no digits in its small singular
    values: directions below `ridge` times float32's rounding error keep a mid-grey image's value.
    """
    attention, patch = model.blocks[0].attention, model.patches.stride
    layers = {name: getattr(attention, name) for name in ("query", "key", "value")}
    weights = {name: grads[f"blocks.0.attention.{name}.weight"].double() for name in layers}
    right = sum(layer.weight.double().T @ weights[name] for name, layer in layers.items())  # (D, D)
    of_tokens = grads["position"][0].double()  # (T, D), dL/dz
    kernel = model.patches.weight.double().flatten(1)  # (D, C * P * P)
    grey = task.domain.to_model(torch.full((1, *task.domain.shape), 0.5).to(kernel))
    patches = F.unfold(grey, patch, stride=patch)[0].T  # (T - 1, C * P * P)
    embedded = patches @ kernel.T + model.patches.bias.double()
    start = torch.cat([model.class_token[0].double(), embedded]) + model.position[0].double()  # (T, D)
    u, sizes, v = torch.linalg.svd(of_tokens[1:], full_matrices=False)
    gains = sizes / (sizes.square() + (ridge * 2**-23 * sizes[0]) ** 2)
    change = u @ (gains[:, None] * (v @ (right - of_tokens.T @ start)))  # (T - 1, D)
    pixels = patches + torch.linalg.lstsq(kernel, change.T).solution.T
    height, width = (side - side % size for side, size in zip(task.domain.shape[1:], patch, strict=True))
    grey[..., :height, :width] = F.fold(pixels.T[None], (height, width), patch, stride=patch)
    return grey.to(model.position.dtype)
