"""Updates in files, so that an update of any federated system can be audited.

A capture is a folder with `manifest.json` (what the auditor knows), `update.safetensors` (the tensors that the server
received) and, if it was saved, `model.safetensors` (the state dict as broadcast). `save_update` writes one from a
training loop; `from_flower`, `from_nvflare` and `from_fedml` read those systems' messages. `load_capture` reads one:
nothing in the files is executed, and names, sizes, shapes and dtypes are checked before a tensor is made.
"""

import dataclasses
import json
import math
import stat
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from core.domain import ImageDomain
from core.errors import UsageError
from core.protocol import LOSSES, Kind, Recipe, Task, Update, by_name, image_task
from core.references import is_reference
from defenses.base import canonical
from utils.files import write_bytes, write_json

SCHEMA = 1
MANIFEST, UPDATE, MODEL = "manifest.json", "update.safetensors", "model.safetensors"
PARAMETER, BUFFER = "parameter:", "buffer:"  # prefixes of the names in update.safetensors
MAX_JSON = 2**24  # bytes of a manifest, and of the header of a safetensors file
MAX_TENSORS = 2**35  # bytes of a safetensors file
MAX_NUMBERS = 2**20  # numbers of one example
MAX_CLASSES = 2**16
MAX_EXAMPLES = 2**16  # examples behind an update
MAX_STEPS = 10_000  # local steps behind an update
BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
FLOATS = ("F64", "F32", "F16", "BF16")

State = Mapping[str, Any]  # tensors or numpy arrays by name
Header = dict[str, tuple[str, tuple[int, ...]]]  # dtype and shape by name


@dataclass(frozen=True)
class Capture:
    """What a capture's manifest and the headers of its files say; its tensors are read by `read_update`.

    recipe: with the defaults of `Recipe` where the manifest leaves a field open; `unknown` names these fields, and
    num_examples if it is among them. header, model_header: dtypes and shapes in the two files of tensors; model_header
    is None if the model was not saved. model: its name in the manifest, which is never loaded.
    """

    folder: Path
    task: Task
    recipe: Recipe
    kind: Kind
    num_examples: int
    unknown: tuple[str, ...]
    header: Header
    model_header: Header | None
    class_names: tuple[str, ...] | None
    origin: Mapping[str, int]
    model: str


# --- writing ---


def save_update(
    folder: str | Path,
    model: nn.Module,
    *,
    input_shape: tuple[int, int, int],
    num_examples: int | None = None,
    after: nn.Module | State | None = None,
    change: State | None = None,
    gradients: Iterable[Any] | State | None = None,
    recipe: Recipe | Mapping[str, Any] | None = None,
    num_classes: int | None = None,
    mean: Iterable[float] | None = None,
    std: Iterable[float] | None = None,
    class_names: Iterable[str] | None = None,
    origin: Mapping[str, int] | None = None,
    save_model: bool = True,
) -> Path:
    """Write one update of `model`, the network as it was broadcast, to `folder`, and return the folder.

    Args:
        after: the model, or its state dict, as the client returned it.
        change: instead, after minus before by parameter name. Buffers may be among them.
        gradients: instead, the gradient of one batch, by name or in the order of `model.parameters()`; None for a
            parameter without gradient.
        num_examples: examples behind the update, as FedAvg weights it; None if unknown.
        recipe: the client's training. A mapping may leave out what is unknown.
        input_shape: (C, H, W) of the images; the model takes (pixel - mean) / std of pixels in [0, 1].
        num_classes: default: the length of the last parameter.
        class_names: in the order of the labels.
        origin: the round and the client, as numbers.
        save_model: whether the weights as broadcast are saved too. Without them, `weights` must be given to the audit.

    Raises UsageError if the tensors do not fit the model.
    """
    if sum(given is not None for given in (after, change, gradients)) != 1:
        raise UsageError("pass one of `after`, `change` and `gradients`")
    before = {name: p.detach() for name, p in model.named_parameters()}
    buffers: dict[str, Tensor] = {}
    if gradients is not None:
        kind: Kind = "gradient"
        named = _named(model, gradients)
        tensors = {n: torch.zeros_like(p) if named.get(n) is None else _tensor(named[n]) for n, p in before.items()}
    else:
        kind = "delta"
        # an nn.Module is a mapping of nothing: its state dict is read
        state = {
            n: _tensor(v) for n, v in (after.state_dict() if isinstance(after, nn.Module) else after or {}).items()
        }
        moved = {n: _tensor(v) for n, v in (change or {}).items()}
        _require_names(before, state if change is None else moved)
        tensors = {n: p - state[n].to(p) if change is None else -moved[n].to(p) for n, p in before.items()}
        sent = {n: b for n, b in model.named_buffers() if n in state or n in moved}
        buffers = {n: state[n] if change is None else b + moved[n].to(b) for n, b in sent.items()}
    last = list(before.values())[-1]
    training = recipe if recipe is not None else {}
    update = Update(kind, tensors, num_examples or 1, buffers)
    update.ordered(model)
    manifest = {
        "schema": SCHEMA,
        "kind": kind,
        "num_examples": num_examples,
        "model": f"{type(model).__module__}.{type(model).__qualname__}",
        "input_shape": list(input_shape),
        "num_classes": num_classes or len(last),
        "mean": None if mean is None else list(mean),
        "std": None if std is None else list(std),
        "class_names": None if class_names is None else list(class_names),
        "recipe": dict(training) if isinstance(training, Mapping) else dataclasses.asdict(training),
        "origin": dict(origin or {}),
    }
    write_capture(folder, manifest, update, model.state_dict() if save_model else None)
    return Path(folder)


def export(
    folder: str | Path, model: nn.Module, update: Update, task: Task, recipe: Recipe, origin: Mapping[str, int] = {}
) -> Path:
    """Write an update of one of our own clients."""
    domain = task.domain
    assert isinstance(domain, ImageDomain), f"captures hold updates on images, not on {domain.name}"
    manifest = {
        "schema": SCHEMA,
        "kind": update.kind,
        "num_examples": update.num_examples,
        "model": f"{type(model).__module__}.{type(model).__qualname__}",
        "input_shape": list(domain.shape),
        "num_classes": task.num_classes,
        "mean": list(domain.mean),
        "std": list(domain.std),
        "class_names": None,
        "recipe": dataclasses.asdict(recipe),
        "origin": dict(origin),
    }
    write_capture(folder, manifest, update, model.state_dict())
    return Path(folder)


def write_capture(
    folder: str | Path, manifest: Mapping[str, Any], update: Update, state_dict: Mapping[str, Tensor] | None
) -> None:
    """Write the files of a capture; the manifest, which makes the folder a capture, comes last."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    named = {PARAMETER + n: t for n, t in update.tensors.items()} | {BUFFER + n: t for n, t in update.buffers.items()}
    _write_tensors(folder / UPDATE, named)
    if state_dict is not None:
        _write_tensors(folder / MODEL, state_dict)
    shapes = {"parameters": _shapes(update.tensors), "buffers": _shapes(update.buffers)}
    write_json(folder / MANIFEST, {**manifest, **shapes})


def from_flower(content: Any) -> dict[str, Any]:
    """The arguments `after` and `num_examples` of `save_update` from the content of a Flower reply.

    `message.content` of `flwr.app.Message`: an ArrayRecord "arrays", and a MetricRecord "metrics" with "num-examples".
    """
    metrics = content.get("metrics", {})
    count = metrics.get("num-examples")
    return {"after": content["arrays"].to_torch_state_dict(), "num_examples": None if count is None else int(count)}


def from_nvflare(model: Any) -> dict[str, Any]:
    """The arguments of `save_update` from NVIDIA FLARE's FLModel, or from a mapping with its fields.

    `params` are the weights after training (`params_type` FULL), or after minus before (DIFF).
    """
    fields: Any = model.get if isinstance(model, Mapping) else lambda key, default=None: getattr(model, key, default)
    kind = fields("params_type", "FULL")
    key = {"FULL": "after", "DIFF": "change"}.get(str(getattr(kind, "value", kind)).rsplit(".")[-1].upper())
    if key is None:
        raise UsageError(f"params_type {kind} is neither FULL nor DIFF")
    return {key: fields("params"), "num_examples": None}


def from_fedml(local: tuple[int, State]) -> dict[str, Any]:
    """The arguments of `save_update` from FedML's (number of samples, state dict) of one client."""
    count, state = local
    return {"after": state, "num_examples": int(count)}


def _named(model: nn.Module, gradients: Iterable[Any] | State) -> Mapping[str, Any]:
    if isinstance(gradients, Mapping):
        _require_names(dict(model.named_parameters()), gradients)
        return gradients
    found = list(gradients)
    if len(found) != len(list(model.parameters())):
        raise UsageError(f"`gradients` holds {len(found)} tensors, and the model has another number of parameters")
    return by_name(model, found)


def _require_names(expected: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    missing = [name for name in expected if name not in given]
    if missing:
        raise UsageError(f"the update does not fit the model: it has no tensor {missing[0]}")


def _tensor(value: Any) -> Tensor:
    return (value if isinstance(value, Tensor) else torch.as_tensor(value)).detach().cpu()


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in tensors.items()}


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    # tied weights are one tensor under two names, which safetensors refuses
    own = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    write_bytes(path, save(own))


# --- reading ---


def load_capture(folder: str | Path) -> Capture:
    """The capture in a folder. Raises UsageError, in one line, for a file that is missing, damaged or contradictory."""
    folder = Path(folder).expanduser()
    manifest = _read_manifest(folder / MANIFEST)
    kind: Any = _choice(manifest, "kind", ("gradient", "delta"), folder)
    recipe, unknown = _recipe(manifest, kind, folder)
    count = 1
    if manifest.get("num_examples") is None:
        unknown.append("num_examples")
    else:
        count = _integer(manifest, "num_examples", 1, MAX_EXAMPLES, folder)
    if recipe.steps(count) > MAX_STEPS:
        raise _broken(folder, f"its recipe takes more than {MAX_STEPS} local steps")
    task, header = _task(manifest, folder), _read_header(folder / UPDATE)
    _check_against_manifest(header, manifest, folder)
    return Capture(
        folder=folder,
        task=task,
        recipe=recipe,
        kind=kind,
        num_examples=count,
        unknown=tuple(unknown),
        header=header,
        model_header=_read_header(folder / MODEL) if (folder / MODEL).exists() else None,
        class_names=_class_names(manifest, task, folder),
        origin=_origin(manifest, folder),
        model=str(manifest.get("model", "unknown"))[:200],
    )


def read_update(capture: Capture, model: nn.Module) -> Update:
    """The captured update, on the model's device. The weights as broadcast, if they were saved, go into the model.

    Names and shapes are compared with the model's before a tensor is read. A frozen parameter may be missing: it sends
    zeros. Raises UsageError if the files do not fit the model or hold values that are not finite.
    """
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    sent = {name for name in capture.header if name.startswith(PARAMETER)}
    for name, p in parameters.items():
        if p.requires_grad or PARAMETER + name in sent:
            _require_shape(capture.header, PARAMETER + name, p, UPDATE)
    for name in capture.header:
        own = parameters if name.startswith(PARAMETER) else buffers
        if name.partition(":")[2] not in own:
            raise UsageError(f"the update does not fit the model: the model has no {name[:80].replace(':', ' ')}")
    for name, buffer in buffers.items():
        if BUFFER + name in capture.header:
            _require_shape(capture.header, BUFFER + name, buffer, UPDATE)
    state = model.state_dict()
    if capture.model_header is not None:
        for name, tensor in state.items():
            _require_shape(capture.model_header, name, tensor, MODEL)
        saved = _read_tensors(capture.folder / MODEL)
        model.load_state_dict({name: saved[name].to(tensor) for name, tensor in state.items()})
    tensors = _read_tensors(capture.folder / UPDATE)
    return Update(
        kind=capture.kind,
        tensors={
            n: tensors[PARAMETER + n].to(p) if PARAMETER + n in sent else torch.zeros_like(p)
            for n, p in parameters.items()
        },
        num_examples=capture.num_examples,
        buffers={n: tensors[BUFFER + n].to(b) for n, b in buffers.items() if BUFFER + n in capture.header},
    )


def _require_shape(header: Header, name: str, tensor: Tensor, file: str) -> None:
    shown = name[:80].replace(":", " ")
    if name not in header:
        raise UsageError(f"{file} does not fit the model: it has no {shown}")
    if header[name][1] != tuple(tensor.shape):
        raise UsageError(
            f"{file} does not fit the model: {shown} has shape {header[name][1]}, not {tuple(tensor.shape)}"
        )


def _broken(path: Path, reason: str) -> UsageError:
    return UsageError(f"`update={path}` is not a capture that can be read: {reason}")


def _size(path: Path, most: int) -> int:
    """The size of a regular file in bytes."""
    try:
        status = path.stat()
    except OSError as error:
        raise _broken(path, error.strerror or "it cannot be opened") from None
    if not stat.S_ISREG(status.st_mode):
        raise _broken(path, "it is not a regular file")
    if not 0 < status.st_size <= most:
        raise _broken(path, f"it has {status.st_size} bytes; allowed are 1 to {most}")
    return status.st_size


def _parse_json(text: bytes, path: Path) -> Any:
    def refuse(constant: str) -> Any:
        raise ValueError(f"{constant} is not a JSON number")

    try:
        return json.loads(text.decode("utf-8"), parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise _broken(path, f"its JSON cannot be read ({' '.join(str(error).split())[:80]})") from None


def _read_manifest(path: Path) -> dict[str, Any]:
    _size(path, MAX_JSON)
    manifest = _parse_json(path.read_bytes(), path)
    if not isinstance(manifest, dict):
        raise _broken(path, "it holds no JSON object")
    if manifest.get("schema") != SCHEMA:
        raise _broken(path, f"its schema is {str(manifest.get('schema'))[:20]}, and this version reads {SCHEMA}")
    return manifest


def _read_header(path: Path) -> Header:
    """Names, dtypes and shapes of a safetensors file, after all that can be checked without its tensors."""
    total = _size(path, MAX_TENSORS)
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if total < 8 or length > min(MAX_JSON, total - 8):
            raise _broken(path, "it is truncated, or no safetensors file")
        content = _parse_json(file.read(length), path)
    if not isinstance(content, dict):
        raise _broken(path, "its header is no JSON object")
    content.pop("__metadata__", None)
    found: Header = {}
    spans = []
    for name, entry in content.items():
        if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= set(entry):
            raise _broken(path, f"the entry of {name[:60]!r} is damaged")
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        whole = all(isinstance(values, list) and all(_is_count(v) for v in values) for values in (shape, offsets))
        if not isinstance(dtype, str) or dtype not in BYTES:
            raise _broken(path, f"{name[:60]!r} has the dtype {str(dtype)[:20]}; allowed are {', '.join(BYTES)}")
        if not whole or len(offsets) != 2 or len(shape) > 8:
            raise _broken(path, f"the entry of {name[:60]!r} is damaged")
        if math.prod(shape) * BYTES[dtype] != offsets[1] - offsets[0]:
            raise _broken(path, f"the size of {name[:60]!r} contradicts its shape")
        spans.append(tuple(offsets))
        found[name] = (dtype, tuple(shape))
    end = 0
    for start, stop in sorted(spans):
        if start != end:
            raise _broken(path, "its tensors overlap or leave gaps")
        end = stop
    if end != total - 8 - length:
        raise _broken(path, f"its tensors need {end} bytes, and it has {total - 8 - length}")
    return found


def _is_id(value: object) -> bool:
    """Whether a value can name a round or a node; Flower's node ids have 64 bits."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**64


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**40


def _check_against_manifest(header: Header, manifest: Mapping[str, Any], folder: Path) -> None:
    for prefix, key in ((PARAMETER, "parameters"), (BUFFER, "buffers")):
        declared = manifest.get(key)
        if not isinstance(declared, dict):
            raise _broken(folder, f"the manifest has no {key}")
        found = {n.removeprefix(prefix): shape for n, (_, shape) in header.items() if n.startswith(prefix)}
        if set(found) != set(declared):
            (name, *_) = sorted(set(found) ^ set(declared))
            raise _broken(folder, f"{name[:60]!r} is only in one of manifest and {UPDATE}")
        for name, shape in found.items():
            if declared[name] != list(shape):
                raise _broken(folder, f"manifest and {UPDATE} give {name[:60]!r} different shapes")
    for name, (dtype, _) in header.items():
        if not name.startswith((PARAMETER, BUFFER)):
            raise _broken(folder, f"{name[:60]!r} in {UPDATE} is neither a parameter nor a buffer")
        if name.startswith(PARAMETER) and dtype not in FLOATS:
            raise _broken(folder, f"{name[:60]!r} is {dtype}, not a floating-point tensor")
    if not any(name.startswith(PARAMETER) for name in header):
        raise _broken(folder, f"{UPDATE} has no parameters")


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise _broken(path, " ".join(str(error).split())[:80]) from None
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise _broken(path, f"{name[:60]!r} has values that are not finite")
    return tensors


def _task(manifest: Mapping[str, Any], folder: Path) -> Task:
    shape = manifest.get("input_shape")
    if not isinstance(shape, list) or len(shape) != 3 or not all(_is_count(n) and n for n in shape):
        raise _broken(folder, "input_shape must be [channels, height, width]")
    if math.prod(shape) > MAX_NUMBERS:
        raise _broken(folder, f"input_shape {shape} has more than {MAX_NUMBERS} numbers")
    classes = _integer(manifest, "num_classes", 2, MAX_CLASSES, folder)
    statistics = []
    for key in ("mean", "std"):
        values = manifest.get(key)
        if values is not None and not (
            isinstance(values, list) and len(values) == shape[0] and all(_is_number(v) for v in values)
        ):
            raise _broken(folder, f"{key} must hold one number for each of {shape[0]} channels")
        statistics.append(None if values is None else tuple(map(float, values)))
    mean, std = statistics
    if std is not None and min(std) <= 0:
        raise _broken(folder, "std must be positive")
    return image_task(tuple(shape), classes, mean, std)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e6


def _recipe(manifest: Mapping[str, Any], kind: Kind, folder: Path) -> tuple[Recipe, list[str]]:
    """The recipe, with defaults where the manifest leaves a field open, and the names of these fields."""
    given = manifest.get("recipe")
    if not isinstance(given, dict):
        raise _broken(folder, "the manifest has no recipe")
    hints = typing.get_type_hints(Recipe)
    unknown_fields = sorted(set(given) - set(hints))
    if unknown_fields:
        raise _broken(folder, f"the recipe has an unknown field {unknown_fields[0][:40]!r}")
    values = {name: _field(name, value, hints[name], folder) for name, value in given.items() if value is not None}
    matters = hints if kind == "delta" else ("model_mode", "loss", "defense")
    unknown = [name for name in matters if name not in values]
    count = manifest.get("num_examples")
    values.setdefault("batch_size", count if _is_count(count) and count else 1)
    return Recipe(**values), unknown


def _field(name: str, value: Any, hint: Any, folder: Path) -> Any:
    limits = {"batch_size": (1, MAX_EXAMPLES), "local_epochs": (1, MAX_STEPS)}
    if get_origin(hint) is Literal:
        fits = isinstance(value, str) and value in get_args(hint)
    elif hint is int:
        low, high = limits[name]
        fits = _is_count(value) and low <= value <= high
    elif hint is float:
        fits = _is_number(value) and value >= 0 and (value > 0 or name != "lr")
    else:
        fits = isinstance(value, str) and len(value) <= 200
    if not fits:
        raise _broken(folder, f"{name} of the recipe cannot be {str(value)[:40]!r}")
    if name == "loss" and (is_reference(value) or value not in LOSSES):
        raise _broken(
            folder, f"the loss {value[:40]!r} has no name here; pass `loss`, and leave it out of the manifest"
        )
    if name == "defense":
        return canonical(value)
    return float(value) if hint is float else value


def _class_names(manifest: Mapping[str, Any], task: Task, folder: Path) -> tuple[str, ...] | None:
    names = manifest.get("class_names")
    if names is None:
        return None
    if not isinstance(names, list) or len(names) != task.num_classes or not all(isinstance(n, str) for n in names):
        raise _broken(folder, f"class_names must hold {task.num_classes} strings")
    return tuple(names)


def _origin(manifest: Mapping[str, Any], folder: Path) -> dict[str, int]:
    origin = manifest.get("origin") or {}
    if not isinstance(origin, dict) or not set(origin) <= {"round", "client"} or not all(map(_is_id, origin.values())):
        raise _broken(folder, "origin holds numbers under round and client")
    return origin


def _integer(manifest: Mapping[str, Any], key: str, low: int, high: int, folder: Path) -> int:
    value = manifest.get(key)
    if not _is_count(value) or not low <= value <= high:  # type: ignore[operator]
        raise _broken(folder, f"{key} must be a number from {low} to {high}, not {str(value)[:40]}")
    return value  # type: ignore[return-value]


def _choice(manifest: Mapping[str, Any], key: str, allowed: tuple[str, ...], folder: Path) -> str:
    value = manifest.get(key)
    if value not in allowed:
        raise _broken(folder, f"{key} must be {' or '.join(allowed)}, not {str(value)[:40]}")
    return value
