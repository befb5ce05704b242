"""Networks from outside the zoo: of the user's own code, and torchvision's classifiers by name."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from core.errors import UsageError
from core.references import describe, is_reference, resolve
from core.rng import seeded_global_rng
from models.zoo.registry import Shape

TORCHVISION = "torchvision:"


def is_external(name: str) -> bool:
    """Whether `name` is a reference to code, or torchvision:NAME, and not a network of the zoo."""
    return is_reference(name)


def load(reference: str, image_shape: Shape, num_classes: int, *, rng: torch.Generator | None = None) -> nn.Module:
    """The network that "package.module:factory", "file.py:factory" or "torchvision:resnet50" names, in float32.

    A factory is a function, a class, or a finished nn.Module. Of `num_classes`, `image_shape`, `in_channels` and
    `image_size` it is passed those that it has parameters for. With `rng` the weights are drawn from it. Raises
    UsageError, with the reason, if there is no such network or if the factory fails.
    """
    with seeded_global_rng(rng or torch.Generator().manual_seed(0)):
        if reference.startswith(TORCHVISION):
            model = _torchvision(reference, image_shape, num_classes)
        else:
            model = _call(resolve(reference, "model"), reference, image_shape, num_classes)
    if not isinstance(model, nn.Module):
        raise UsageError(f"`model={reference}` gives {type(model).__name__}, not a torch.nn.Module")
    if any(p.is_floating_point() and p.dtype != torch.float32 for p in model.parameters()):
        model = model.float()
    return model


def _call(factory: Any, reference: str, image_shape: Shape, num_classes: int) -> Any:
    """The result of a factory; a finished module is returned as it is."""
    if isinstance(factory, nn.Module):
        return factory
    if not callable(factory):
        raise UsageError(f"`model={reference}` is {type(factory).__name__}, neither a function nor a torch.nn.Module")
    facts = {
        "num_classes": num_classes,
        "image_shape": image_shape,
        "in_channels": image_shape[0],
        "image_size": image_shape[1],
    }
    return _guarded(reference, factory, {name: facts[name] for name in _accepted(factory) if name in facts})


def _accepted(factory: Callable[..., Any]) -> list[str]:
    """The names of the parameters that can be passed by name."""
    try:
        parameters = inspect.signature(factory).parameters.values()
    except (TypeError, ValueError):  # some built-in callables have no signature
        return []
    return [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]


def _guarded(reference: str, factory: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    try:
        return factory(**arguments)
    except Exception as error:  # a user's factory may raise anything
        passed = ", ".join(f"{key}={value}" for key, value in arguments.items())
        raise UsageError(f"`model={reference}` fails when called with ({passed}): {describe(error)}") from None


def _torchvision(reference: str, image_shape: Shape, num_classes: int) -> nn.Module:
    """A classifier of torchvision with new weights, built for the size of the images where it must know it."""
    from core.registry import unknown

    try:
        from torchvision import models
    except ImportError:
        raise UsageError(f"`model={reference}` needs torchvision: pip install torchvision") from None
    name, names = reference.removeprefix(TORCHVISION), models.list_models(module=models)
    if name not in names:
        raise UsageError(unknown("torchvision model", name, names))
    if image_shape[0] != 3:
        raise UsageError(f"`model={reference}` takes images of 3 channels, not {image_shape[0]}")
    arguments: dict[str, Any] = {"weights": None, "num_classes": num_classes}
    if name.startswith("vit_"):
        arguments["image_size"] = image_shape[1]
    elif name.startswith("maxvit"):
        arguments["input_size"] = tuple(image_shape[1:])
    elif name in ("googlenet", "inception_v3"):
        arguments |= {"aux_logits": False, "init_weights": False}  # logits alone, as the other networks return
    return _guarded(reference, lambda **given: models.get_model(name, **given), arguments)
