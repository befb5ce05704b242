"""ATS: train on images that an augmentation policy has changed. Gao, Guo, Zhang, Liu, Wen, Chen, CVPR 2021.

x <- T_1(T_2(... x)),   the policy T drawn anew for every image among those given      https://arxiv.org/abs/2011.12505

The authors search policies among operations of AutoAugment. Here a policy names its operations and their strengths;
the numbers of the authors' list, as in "3-1-7", are not reproduced.
"""

import math
import re
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from core.errors import UsageError
from core.hyperparameters import hp
from core.protocol import Batch, Task
from defenses.base import Defense, register


def _affine(x: Tensor, matrix: list[list[float]]) -> Tensor:
    """Resample images (N, C, H, W) by a 2x3 matrix in units of half a side; the outside is black."""
    theta = torch.tensor(matrix, dtype=x.dtype, device=x.device).expand(len(x), 2, 3)
    return F.grid_sample(x, F.affine_grid(theta, list(x.shape), align_corners=False), align_corners=False)


def _rotate(x: Tensor, degrees: float) -> Tensor:
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return _affine(x, [[c, -s, 0.0], [s, c, 0.0]])


OPERATIONS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "translate": lambda x, share: _affine(x, [[1.0, 0.0, 2 * share], [0.0, 1.0, 0.0]]),
    "shear": lambda x, share: _affine(x, [[1.0, share, 0.0], [0.0, 1.0, 0.0]]),
    "rotate": _rotate,
    "contrast": lambda x, factor: x.mean((1, 2, 3), keepdim=True).lerp(x, factor),
    "brightness": lambda x, factor: factor * x,
    "invert": lambda x, share: x.lerp(1 - x, share),
    "solarize": lambda x, above: torch.where(x > above, 1 - x, x),
    "posterize": lambda x, bits: torch.floor(x.clamp(0, 1 - 1e-6) * 2**bits) / (2**bits - 1),
    "flip": lambda x, share: x.lerp(x.flip(-1), share),
}


@register("ats")
class ATS(Defense):
    """Train on images changed by strong augmentations; a policy is drawn for every image."""

    citation = "Gao et al.: Privacy-preserving Collaborative Learning with Automatic Transformation Search. CVPR 2021"

    policy: str = hp(
        "translate:0.3-invert:1-contrast:0.5/shear:0.4-rotate:25-brightness:0.6",
        "policies, separated by slashes; each one is operations with strengths, such as rotate:25-invert:1",
    )

    def __post_init__(self) -> None:
        self.policies()

    def policies(self) -> list[list[tuple[str, float]]]:
        found = []
        for policy in self.policy.split("/"):
            steps = []
            for word in re.split(r"-(?=[a-z])", policy):
                name, _, strength = word.strip().partition(":")
                try:
                    steps.append((name, float(strength)))
                except ValueError:
                    name = ""
                if name not in OPERATIONS:
                    raise UsageError(
                        f"`policy` cannot hold {word!r}; write one of {', '.join(OPERATIONS)} as rotate:25"
                    )
            found.append(steps)
        return found

    def on_batch(self, batch: Batch, task: Task, rng: torch.Generator) -> Batch:
        policies = self.policies()
        chosen = torch.randint(len(policies), (len(batch.labels),), generator=rng).tolist()
        changed = []
        for x, number in zip(batch.examples.split(1), chosen, strict=True):
            for name, strength in policies[number]:
                x = OPERATIONS[name](x, strength).clamp(0, 1)
            changed.append(x)
        return Batch(torch.cat(changed), batch.labels)
