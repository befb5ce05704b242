"""iDLG: Improved Deep Leakage from Gradients. Zhao, Mopuri, Bilen 2020. https://arxiv.org/abs/2001.02610

The label of a single example is read from the gradient, then DLG runs with it fixed:

    y* = argmin_c  sum_m [dL/dW_head]_{c, m}         x* = argmin_x  || dL(F(x; W), y*)/dW - g* ||^2

The row sums are exact if features are not negative; the only negative entry of the bias gradient is exact for every
activation. The paper has no rule for several examples: their labels are counted from the bias gradient.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from attacks.base import register
from attacks.labels.inference import labels_from_bias
from attacks.labels.rules import row_sum
from attacks.matching.lbfgs_inversion import LbfgsInversion
from attacks.matching.matcher import GradientMatcher
from core.errors import UsageError
from core.hyperparameters import hp
from core.protocol import Observation, Recipe, Reconstruction, Task
from models.inspection import head_gradient


@register("idlg")
class IDLG(LbfgsInversion):
    """iDLG: the label analytically, then the example by L-BFGS on the squared gradient distance."""

    citation = "Zhao, Mopuri, Bilen: iDLG, Improved Deep Leakage from Gradients. 2020"
    link = "https://arxiv.org/abs/2001.02610"
    paper = {"label_rule": ("row_sum", "eq. 6")}

    label_rule: Literal["auto", "bias", "row_sum"] = hp(
        "auto", "rule for the label: bias gradient, row sums of the weight gradient, or auto (bias if there is one)"
    )

    def check(self, model: nn.Module, task: Task, recipe: Recipe, kind: str, num_examples: int) -> None:
        super().check(model, task, recipe, kind, num_examples)
        _, bias = head_gradient(tuple(model.parameters()), task.num_classes)
        if num_examples > 1 and bias is None:
            raise UsageError("idlg counts the labels of a batch from the bias of the last layer, which has none")
        if num_examples > 1 and self.label_rule == "row_sum":
            raise UsageError("`label_rule=row_sum` infers one label: lower `batch_size`, or choose another rule")

    def reconstruct(self, observation: Observation, rng: torch.Generator) -> Reconstruction:
        matcher = GradientMatcher(observation, self.update_model)
        granted = observation.granted.get("labels")
        labels = self._infer(observation, matcher) if granted is None else granted
        return self.invert(observation, rng, labels=labels)

    def _infer(self, observation: Observation, matcher: GradientMatcher) -> Tensor | None:
        """Labels (N,) in ascending order."""
        weight, bias = head_gradient(matcher.mean_gradient, observation.task.num_classes)
        if bias is None or self.label_rule == "row_sum":
            return torch.tensor([row_sum(weight)], device=matcher.device)
        return labels_from_bias(matcher.mean_gradient, observation)
