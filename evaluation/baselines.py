"""What public examples alone would score: reconstructions of somebody who never looked at the update."""

from collections.abc import Callable
from functools import cached_property

from torch import Tensor

from core.protocol import Batch


class Baselines:
    """The mean public example, and the mean public example of a class; None without public examples.

    The second one is worth what a leaked label is worth. A class without public examples has the mean of all.
    """

    def __init__(
        self, public: Batch | None, typical: Callable[[Tensor], Tensor] = lambda examples: examples.mean(0)
    ) -> None:
        """`public`: the examples that the attacker may own. `typical`: that of their domain (`Domain.typical`)."""
        self.typical = typical
        self.public = None if public is None or not len(public.examples) else public.to("cpu")
        self._class_means: dict[int, Tensor] = {}

    @cached_property
    def mean_example(self) -> Tensor | None:  # (*shape)
        return None if self.public is None else self.typical(self.public.examples)

    def class_mean(self, label: int) -> Tensor | None:  # (*shape)
        if self.public is None or self.mean_example is None:
            return None
        if label not in self._class_means:
            own = self.public.examples[self.public.labels == label]
            self._class_means[label] = self.typical(own) if len(own) else self.mean_example
        return self._class_means[label]
