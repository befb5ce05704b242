"""Trained weights from a file."""

import pickle
import struct
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from core.errors import UsageError

# what torch.load raises on damaged files, on files of other kinds, and on pickled objects
UNREADABLE = (
    *(pickle.UnpicklingError, struct.error, EOFError, OSError, RuntimeError, AssertionError),
    *(ValueError, TypeError, LookupError, AttributeError),
)


def load_weights(module: nn.Module, path: str | Path) -> None:
    """Copy the state dict in the file `path` into `module`.

    Reads safetensors files, and torch files that hold only tensors: a state dict, or a dictionary with a state dict
    under "state_dict" or "model". Raises UsageError if the file cannot be read or does not fit the module, which is
    then unchanged.
    """
    path = Path(path)
    state = _read(path)
    expected = module.state_dict()
    for name, tensor in expected.items():
        if name not in state:
            raise UsageError(f"`weights={path}` belongs to another model: the file has no tensor {name}")
        found = state[name]
        if found.shape != tensor.shape:
            shapes = f"{name} has shape {tuple(found.shape)} in the file and {tuple(tensor.shape)} in this model"
            raise UsageError(f"`weights={path}` belongs to another model: {shapes}")
        if found.is_floating_point() != tensor.is_floating_point() or found.layout != torch.strided:
            kinds = f"{found.dtype} ({found.layout}), not {tensor.dtype} ({tensor.layout})"
            raise UsageError(f"`weights={path}` belongs to another model: {name} is {kinds}")
        if found.is_meta or not found.to(tensor.dtype).isfinite().all():
            raise UsageError(f"`weights={path}` is not a trained model: {name} has values that are not finite")
    for name in state:
        if name not in expected:
            raise UsageError(f"`weights={path}` belongs to another model: this model has no tensor {name}")
    module.load_state_dict(state)


def _read(path: Path) -> Mapping[str, Tensor]:
    """The state dict in a file. Raises UsageError if there is none."""
    try:
        if path.exists() and not path.is_file():
            raise UsageError(f"cannot read `weights={path}`: it is not a regular file")
        with path.open("rb") as file:
            start = file.read(9)
    except OSError as error:
        raise UsageError(f"cannot read `weights={path}`: {error.strerror}") from error
    # a safetensors file starts with the 8-byte length of its JSON header; torch.load looks at the suffix
    safetensors = start[8:] == b"{" or path.suffix == ".safetensors"
    content = _read_safetensors(path) if safetensors else _read_torch(path)
    for state in (content, *(content.get(key) for key in ("state_dict", "model") if isinstance(content, Mapping))):
        if isinstance(state, Mapping) and state and all(isinstance(value, Tensor) for value in state.values()):
            return state
    raise UsageError(f"`weights={path}` is not a weights file: there is no state dict in it")


def _read_safetensors(path: Path) -> object:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise UsageError(f"`weights={path}` is not a weights file: its safetensors header is damaged") from error


def _read_torch(path: Path) -> object:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns about pickle protocols before it raises
            return torch.load(path, map_location="cpu", weights_only=True)
    except UNREADABLE as error:
        hint = "save model.state_dict() with torch.save or safetensors"
        raise UsageError(f"`weights={path}` is not a weights file: torch finds no tensors in it; {hint}") from error
