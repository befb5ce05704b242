"""The registry of label rules: (mean gradient, observation) -> labels in ascending order."""

from collections.abc import Callable

from torch import Tensor

from core.protocol import Observation
from core.registry import Registry

Rule = Callable[[tuple[Tensor, ...], Observation], Tensor]

RULES: Registry[Rule] = Registry("label rule", package="attacks.labels")
