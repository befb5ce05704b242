"""Networks by name. A builder's keyword-only arguments are the options it takes, with its own defaults."""

from collections.abc import Callable, Iterable
from difflib import get_close_matches
from inspect import Parameter, signature
from typing import NamedTuple

import torch
from torch import nn

from federated.wire import UsageError

Shape = tuple[int, int, int]  # (C, H, W)


class Entry(NamedTuple):
    builder: Callable[..., nn.Module]
    smallest: int  # the least height and width that leave every layer something to work on
    options: tuple[str, ...]


MODELS: dict[str, Entry] = {}


def model(name: str, smallest: int) -> Callable[[Callable[..., nn.Module]], Callable[..., nn.Module]]:
    """Register `builder(image_shape, num_classes, *, option=default, ...)`, whose head is its last two parameters."""

    def register(builder: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
        assert name not in MODELS, f"two models called {name}"
        parameters = signature(builder).parameters.values()
        options = tuple(p.name for p in parameters if p.kind is Parameter.KEYWORD_ONLY)
        MODELS[name] = Entry(builder, smallest, options)
        return builder

    return register


def build(
    name: str,
    image_shape: Shape,
    num_classes: int,
    *,
    activation: str | None = None,
    norm: str | None = None,
    dropout: float | None = None,
    width: int | None = None,
    rng: torch.Generator | None = None,
) -> nn.Module:
    """A fresh network (N, C, H, W) -> (N, num_classes). An option left at None is the network's own default.

    With `rng` the weights are drawn from it and torch's global stream stays where it was.
    """
    entry = MODELS[known(name, MODELS, "model")]
    given = {"activation": activation, "norm": norm, "dropout": dropout, "width": width}
    options = {key: value for key, value in given.items() if value is not None}
    for key in options:
        if key not in entry.options:
            raise UsageError(f"{name} has no option {key}; it takes {', '.join(entry.options) or 'none at all'}")
    if dropout is not None and not 0 <= dropout < 1:
        raise UsageError(f"dropout {dropout} is not a probability in [0, 1)")
    if width is not None and width < 1:
        raise UsageError(f"width {width} leaves a layer without units")
    if num_classes < 2:
        raise UsageError(f"{name} needs at least 2 classes, got {num_classes}")
    channels, height, width = image_shape
    if channels < 1 or min(height, width) < entry.smallest:
        least = f"{max(channels, 1)}x{entry.smallest}x{entry.smallest}"
        raise UsageError(f"{name} needs images of at least {least}, got {channels}x{height}x{width}")
    if rng is None:
        return entry.builder(image_shape, num_classes, **options)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int(torch.randint(2**62, (), generator=rng, device=rng.device)))
        return entry.builder(image_shape, num_classes, **options)


def known(name: str, names: Iterable[str], what: str) -> str:
    """`name` if it is one of `names`; otherwise the line that says which are close and which there are."""
    names = sorted(names)
    if name in names:
        return name
    close = get_close_matches(name, names)
    hint = f" Did you mean {' or '.join(close)}?" if close else ""
    raise UsageError(f"there is no {what} called {name!r}.{hint} Choose from {', '.join(names)}")
