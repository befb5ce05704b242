"""Deep Leakage from Gradients. Zhu, Liu, Han, NeurIPS 2019. https://arxiv.org/abs/1906.08935

    x*, y* = argmin_{x, y}  || dL(F(x; W), softmax(y))/dW - g* ||^2          (summed over all layers)

Examples and label logits are optimised together by L-BFGS. The activation should be twice differentiable: with ReLU
the curvature of the objective is zero almost everywhere.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from attacks.base import register
from attacks.labels.inference import labels_from_bias
from attacks.matching.lbfgs_inversion import LbfgsInversion
from attacks.matching.matcher import GradientMatcher
from core.hyperparameters import hp
from core.protocol import Observation, Reconstruction


@register("dlg")
class DLG(LbfgsInversion):
    """Deep Leakage from Gradients: examples and labels together, by L-BFGS on the squared gradient distance."""

    citation = "Zhu, Liu, Han: Deep Leakage from Gradients. NeurIPS 2019"
    link = "https://arxiv.org/abs/1906.08935"
    paper = {"label_init": ("normal", "authors' main.py")}

    label_init: Literal["inferred", "normal"] = hp(
        "inferred",
        "start of the label logits: the labels that the bias gradient suggests (in every other run), or N(0, 1)",
    )

    def reconstruct(self, observation: Observation, rng: torch.Generator) -> Reconstruction:
        matcher = GradientMatcher(observation, self.update_model)
        granted = observation.granted.get("labels")
        if granted is not None:
            return self.invert(observation, rng, labels=granted)

        def logits(run: int) -> Tensor:
            noise = torch.randn(matcher.num_examples, observation.task.num_classes, generator=rng)
            if self.label_init == "normal":
                return noise
            labels = labels_from_bias(matcher.mean_gradient, observation)
            # a failed run may have been misled by these labels: every other run starts without them
            if labels is None or run % 2:
                return 0.1 * noise
            return 5.0 * F.one_hot(labels, observation.task.num_classes).to(noise)

        return self.invert(observation, rng, logits=logits)
