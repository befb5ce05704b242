"""Networks by name. A builder's keyword-only arguments are the options it takes, with its own defaults."""

from collections.abc import Callable, Mapping
from inspect import Parameter, signature
from typing import Literal, NamedTuple

import torch
from torch import nn

from core.errors import UsageError
from core.registry import Registry
from utils.memory import total_memory

Shape = tuple[int, int, int]  # (C, H, W)
Inputs = Literal["images", "vectors", "tokens"]  # (N, C, H, W); those and (N, d); (N, L) int64
Builder = Callable[..., nn.Module]


class Entry(NamedTuple):
    builder: Builder
    smallest: int  # the least height and width on which every layer has an output
    options: tuple[str, ...]
    takes: Inputs = "images"
    loss: str = "cross_entropy"  # that it is trained with, a name in core.protocol.LOSSES


MODELS: Registry[Entry] = Registry("model", package="models.zoo")


def model(
    name: str, smallest: int, takes: Inputs = "images", loss: str = "cross_entropy"
) -> Callable[[Builder], Builder]:
    """Register `builder(image_shape, num_classes, *, option=default, ...)`, whose head is its last two parameters.

    takes: "vectors" for a network that flattens its input, so that it takes images and tables; "tokens" for one of
    token ids, whose builder takes the shape (L,) and the option `vocabulary`, the number of different tokens.
    """

    def register(builder: Builder) -> Builder:
        parameters = signature(builder).parameters.values()
        options = tuple(p.name for p in parameters if p.kind is Parameter.KEYWORD_ONLY)
        MODELS.add(name, Entry(builder, smallest, options, takes, loss))
        return builder

    return register


def build(
    name: str,
    image_shape: tuple[int, ...],
    num_classes: int,
    *,
    rng: torch.Generator | None = None,
    **options: object,
) -> nn.Module:
    """A new network (N, *image_shape) -> (N, num_classes). An option that is None keeps the network's own default.

    image_shape: (C, H, W) of images, (d,) of a table's rows, or the length (L,) of sentences, together with the option
    `vocabulary`.

    With `rng` the weights are drawn from it, and torch's global stream is not changed. Raises UsageError for a network
    or option that does not exist, and for images that are too small.
    """
    entry = MODELS.find(name)
    given = {key: value for key, value in options.items() if value is not None}
    _check_inputs(name, entry, image_shape, "vocabulary" in given)
    for key in given:
        if key not in entry.options:
            raise UsageError(f"{name} has no option {key}; it takes {', '.join(entry.options) or 'no options'}")
    dropout, units = given.get("dropout"), given.get("width")
    if isinstance(dropout, int | float) and not 0 <= dropout < 1:
        raise UsageError(f"`dropout={dropout}` is not a probability in [0, 1)")
    if isinstance(units, int) and units < 1:
        raise UsageError(f"`width={units}` leaves a layer without units")
    if num_classes < 2:
        raise UsageError(f"{name} needs at least 2 classes, not {num_classes}")
    if units is not None:
        _check_memory(entry, image_shape, num_classes, given)
    if rng is None:
        return entry.builder(image_shape, num_classes, **given)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int(torch.randint(2**62, (), generator=rng, device=rng.device)))
        return entry.builder(image_shape, num_classes, **given)


def _check_memory(entry: Entry, image_shape: tuple[int, ...], num_classes: int, given: Mapping[str, object]) -> None:
    """Raise UsageError if the weights alone, in float32, would not fit in the memory of this machine."""
    try:
        with torch.device("meta"):
            count = sum(p.numel() for p in entry.builder(image_shape, num_classes, **given).parameters())
    except (RuntimeError, TypeError, OverflowError):  # more than 2^63 numbers
        count = 1 << 63
    if 4 * count > total_memory():
        raise UsageError(f"`width={given['width']}`: the weights do not fit in this machine's memory; lower it")


def _check_inputs(name: str, entry: Entry, shape: tuple[int, ...], tokens: bool) -> None:
    """Raise UsageError if the network takes other inputs than examples of this shape."""
    kind = "tokens" if tokens else "images" if len(shape) == 3 else "vectors"
    fitting = {"images": ("images", "vectors"), "vectors": ("vectors",), "tokens": ("tokens",)}[kind]
    if entry.takes not in fitting:
        names = ", ".join(n for n, other in MODELS.items() if other.takes in fitting)
        examples = {"images": "images", "vectors": "rows of a table", "tokens": "sentences"}[kind]
        raise UsageError(f"`model={name}` does not take {examples}; choose one of {names}")
    if kind == "images":
        channels, height, width = shape
        if channels < 1 or min(height, width) < entry.smallest:
            least = f"{max(channels, 1)}x{entry.smallest}x{entry.smallest}"
            raise UsageError(f"{name} needs images of at least {least}, not {channels}x{height}x{width}")
    if kind == "tokens" and shape[0] < entry.smallest:
        raise UsageError(f"{name} needs sentences of at least {entry.smallest} tokens, not {shape[0]}")
