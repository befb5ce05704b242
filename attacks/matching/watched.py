"""What chosen layers of a model receive while it simulates an update."""

import copy
import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from core.protocol import Observation


class Watched:
    """An observation with a copy of its model, whose layers `names` store their inputs."""

    def __init__(self, observation: Observation, names: Iterable[str]) -> None:
        self._inputs: dict[str, list[Tensor]] = {name: [] for name in names}
        model = copy.deepcopy(observation.model)
        for name, found in self._inputs.items():
            model.get_submodule(name).register_forward_pre_hook(_append_to(found), with_kwargs=True)
        self.observation = dataclasses.replace(observation, model=model)

    def take(self) -> dict[str, list[Tensor]]:
        """The inputs (N, *shape) of each layer since the last call, one for each forward pass."""
        taken = {name: [*found] for name, found in self._inputs.items()}
        for found in self._inputs.values():
            found.clear()
        return taken


def _append_to(found: list[Tensor]) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
    """A hook that stores a layer's input. A function, because copies of a model share the functions of its hooks."""

    def append(_: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        found.append(args[0] if args else next(iter(named.values())))

    return append
