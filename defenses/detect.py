"""python -m defenses.detect MODEL: signs in a received model that its server wants to read single examples.

A client runs this before it trains. It looks for what published attacks of malicious servers need: imprint blocks
(Fowl et al., ICLR 2022, https://arxiv.org/abs/2110.13057), trap weights (Boenisch et al., EuroS&P 2023,
https://arxiv.org/abs/2112.02918), convolutions that pass pixels through, heads that fish for single examples (Wen et
al., ICML 2022, https://arxiv.org/abs/2202.00580; measured as in D-SNR, Garov et al., ICLR 2024,
https://arxiv.org/abs/2306.03013), and dead layers. Silence proves nothing: an honest model leaks too.
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import models
from core.errors import UsageError
from core.hyperparameters import help_of, hp, hyperparameters
from core.protocol import Task, image_task
from core.rng import stream
from models import external
from models.inspection import eval_mode, pixel_layer
from models.validation import validate
from utils.flags import Parser, add_flags, given
from utils.tools import one_line_errors

PROBES = 64
PARALLEL = 0.999  # least cosine of neighbouring rows that count as copies of one another
MONOTONE = 12  # values in order are no accident from this many on: 2 / 12! = 4e-9
CONCENTRATION = 0.999  # share of a kernel's energy in one entry, from which on it passes that entry through
TRAP_TOLERANCE = 1e-3  # relative spread of the ratio of positive to negative weights
RARE = 0.25  # share of examples that activate a neuron of a trap, at most
SILENT = 1e-3  # gradient of an example as a share of the largest, below which the head hides it
OUTLIER = 30.0  # size of a head's bias or row, as a multiple of what is typical


@dataclass(frozen=True)
class Sign:
    """One reason to distrust a model: what was found, where, and what it is good for."""

    kind: str
    where: str
    reason: str

    def __str__(self) -> str:
        return f"{self.kind} at {self.where}: {self.reason}"


Check = Callable[[nn.Module, Task, Tensor], Iterator[Sign]]  # model, task, inputs (N, *shape)


@torch.no_grad()
def detect(model: nn.Module, task: Task, examples: Tensor | None = None) -> list[Sign]:
    """The signs found in a model, none for an honest one. The model is not changed.

    examples: (N, *shape) of the client's own, in the domain's units; without them, synthetic images stand for them.
    """
    examples = synthetic_images(task, PROBES) if examples is None else examples
    inputs = task.domain.to_model(examples.to(next(model.parameters())))
    with eval_mode(model):
        return [sign for check in CHECKS for sign in check(model, task, inputs)]


def synthetic_images(task: Task, count: int) -> Tensor:
    """Images (count, *shape) with the smoothness, brightness and contrast of photographs, the same in every call."""
    rng = torch.Generator().manual_seed(0)
    channels, height, width = task.domain.shape
    fy, fx = torch.fft.fftfreq(height)[:, None], torch.fft.rfftfreq(width)[None]
    amplitude = 1 / (fy.square() + fx.square()).sqrt().clamp(min=1 / max(height, width))  # of natural images: 1 / f
    noise = torch.randn(count, channels, height, width, generator=rng)
    grey = torch.randn(count, 1, height, width, generator=rng)  # channels of photographs go together
    smooth = torch.fft.irfft2(torch.fft.rfft2(0.4 * noise + grey) * amplitude, s=(height, width))
    smooth = smooth / smooth.flatten(1).std(1).view(-1, 1, 1, 1)
    brightness = 0.2 + 0.6 * torch.rand(count, 1, 1, 1, generator=rng)
    contrast = 0.05 + 0.25 * torch.rand(count, 1, 1, 1, generator=rng)
    return task.domain.project(brightness + contrast * smooth)


def _matrices(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters with rows, as (rows, entries); the head's are not among them."""
    parameters = list(model.named_parameters())
    head = {name for name, p in parameters[-2:]}
    for name, p in parameters:
        if p.ndim >= 2 and len(p) >= 2 and name not in head and p.is_floating_point():
            yield name, p.detach().flatten(1)


def imprint_rows(model: nn.Module, task: Task, inputs: Tensor) -> Iterator[Sign]:
    """Weights whose rows are copies of one another, and thresholds in ascending or descending order."""
    for name, rows in _matrices(model):
        norms = rows.norm(dim=1)
        if rows.shape[1] < 4 or not norms.all():
            continue
        cosines = F.cosine_similarity(rows[:-1], rows[1:], dim=1)
        if cosines.min() >= PARALLEL:
            reason = f"its {len(rows)} rows are parallel: with rising thresholds they sort examples into bins"
            yield Sign("imprint block", name, reason)
    tensors = [*model.named_parameters(), *model.named_buffers()]
    for name, tensor in tensors:
        if tensor.ndim != 1 or len(tensor) < MONOTONE or not tensor.is_floating_point():
            continue
        steps = tensor.diff()
        if (steps > 0).all() or (steps < 0).all():
            yield Sign("imprint block", name, f"its {len(tensor)} values are in order, as thresholds of bins are")


def trap_weights(model: nn.Module, task: Task, inputs: Tensor) -> Iterator[Sign]:
    """Rows whose positive weights are scaled copies of the negative ones, and neurons that few examples activate."""
    for name, rows in _matrices(model):
        if rows.shape[1] < 32:
            continue
        negative, positive = (-rows).clamp(min=0).sort(1).values, rows.clamp(min=0).sort(1).values
        half = rows.shape[1] // 2 - 1
        if ((rows > 0).sum(1) < half).any() or ((rows < 0).sum(1) < half).any():
            continue
        ratio = positive[:, -half:] / negative[:, -half:]
        if (ratio.std(1) / ratio.mean(1)).median() < TRAP_TOLERANCE:
            reason = f"positive weights are {ratio.mean():.3g} times the negative ones, so that few examples pass"
            yield Sign("trap weights", name, reason)
    layer = pixel_layer(model, task)
    if layer is None or layer.bias is None:
        return
    rates = ((inputs.flatten(1) @ layer.weight.T + layer.bias) > 0).float().mean(0)  # (h,)
    if len(rates) >= MONOTONE and (rates <= RARE).float().mean() >= 0.9 and (rates > 0).float().mean() >= 0.5:
        name = next(name for name, module in model.named_modules() if module is layer)
        reason = f"a neuron is activated by {rates.mean():.0%} of the examples: one that is alone on it can be read off"
        yield Sign("trap weights", name, reason)


def pass_through(model: nn.Module, task: Task, inputs: Tensor) -> Iterator[Sign]:
    """Convolutions and layers that copy entries of their input."""
    for name, rows in _matrices(model):
        energy = rows.square()
        total = energy.sum(1)
        if rows.shape[1] < 8 or not total.any():
            continue
        concentrated = energy.max(1).values >= CONCENTRATION * total.clamp(min=1e-30)
        if concentrated[total > 0].float().mean() >= 0.9:
            yield Sign("pass-through kernels", name, "each row copies one entry, so that pixels reach a later layer")


def fishing_head(model: nn.Module, task: Task, inputs: Tensor) -> Iterator[Sign]:
    """Heads under which most examples send almost no gradient, and rows or biases far beyond the others."""
    head = next((m for m in reversed(list(model.modules())) if isinstance(m, nn.Linear)), None)
    if head is None or head.out_features != task.num_classes:
        return
    name = next(name for name, module in model.named_modules() if module is head)
    norms = head.weight.norm(dim=1)
    typical = norms.median().clamp(min=1e-12)
    if norms.max() > OUTLIER * typical and norms.any():
        yield Sign("fishing head", name, f"one row is {(norms.max() / typical).item():.0f} times the median row")
    features: list[Tensor] = []
    hook = head.register_forward_pre_hook(lambda module, args: features.append(args[0]))
    logits = model(inputs)
    hook.remove()
    if head.bias is not None:
        spread = (logits - head.bias).std().item()
        largest = (head.bias - head.bias.median()).abs().max().item()
        if largest > OUTLIER * (1 + spread):
            yield Sign("fishing head", name, f"a bias of {largest:.3g} beside logits that vary by {spread:.2g}")
    # labels of all classes: with most of them an honest model is wrong, and sends a gradient
    labels = torch.arange(len(logits), device=logits.device) % task.num_classes
    residual = logits.softmax(1) - F.one_hot(labels, task.num_classes)
    # (N,) of the head's weight gradient, example by example: the outer product of dL/dlogits and the features
    sizes = residual.norm(dim=1) * features[0].flatten(1).norm(dim=1)
    hidden = (sizes < SILENT * sizes.max()).float().mean().item()
    if hidden >= 0.5:
        reason = f"{hidden:.0%} of the examples send almost no gradient: the rest can be read (D-SNR)"
        yield Sign("fishing head", name, reason)


def dead_layers(model: nn.Module, task: Task, inputs: Tensor) -> Iterator[Sign]:
    """Weights that are all zero or all equal, and ReLUs that no example passes."""
    for name, rows in _matrices(model):
        if rows.shape[1] >= 4 and not rows.any():
            yield Sign("dead layer", name, "its weights are all zero: what follows hides or replaces it")
    passed: dict[str, bool] = {}

    def record(name: str) -> Any:
        return lambda module, args, output: passed.update({name: passed.get(name, False) or bool(output.any())})

    relus = {n: m for n, m in model.named_modules() if isinstance(m, nn.ReLU | nn.ReLU6)}
    hooks = [module.register_forward_hook(record(name)) for name, module in relus.items()]
    model(inputs)
    for hook in hooks:
        hook.remove()
    for name, alive in passed.items():
        if not alive:
            yield Sign("dead layer", name, "no example passes it: gradients of other examples are suppressed")


CHECKS: tuple[Check, ...] = (imprint_rows, trap_weights, pass_through, fishing_head, dead_layers)


@hyperparameters
class Flags:
    """Flags of `python -m defenses.detect`."""

    model: str = hp("lenet", "network of the zoo, package.module:factory, file.py:factory or torchvision:NAME")
    weights: Path | None = hp(None, "file of the weights as received; default: new weights")
    image_shape: tuple[int, ...] = hp((3, 32, 32), "channels, height and width of the images")
    classes: int = hp(10, "number of classes", ge=2)


def run(flags: Flags) -> list[Sign]:
    """The signs in the model that the flags name."""
    if len(flags.image_shape) != 3 or min(flags.image_shape) < 1:
        raise UsageError("`image_shape` takes channels, height and width")
    shape: Any = flags.image_shape
    task = image_task(shape, flags.classes)
    make = external.load if external.is_external(flags.model) else models.build
    model = make(flags.model, shape, flags.classes, rng=stream(0, "model"))
    if flags.weights is not None:
        models.load_weights(model, flags.weights)
    validate(model, task)
    return detect(model, task)


def main() -> None:
    """Print the signs; exit code 1 if there are any, 2 and one line for a mistake of the user."""
    words = sys.argv[1:]
    if words and not words[0].startswith("-"):
        words = ["--model", *words]
    with one_line_errors(UsageError):
        parser = Parser(prog="python -m defenses.detect", usage="python -m defenses.detect MODEL [flags]")
        add_flags(parser, Flags, help_of, switches_only=True)
        signs = run(Flags(**given(Flags, parser.parse(words))))
    for sign in signs:
        print(sign)
    print(f"{len(signs)} sign(s) of a malicious server" + ("" if signs else "; an honest model leaks as well"))
    raise SystemExit(bool(signs))


if __name__ == "__main__":
    main()
