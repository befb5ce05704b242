"""python -m evaluation.inspect --model MODEL: what an update of a model can give away, before any attack runs.

For each layer with weights, the equations that a gradient gives about the layer's input are counted as in R-GAP (Zhu,
Blaschko, ICLR 2021, https://arxiv.org/abs/2010.07733): one for each output and one for each weight, against one unknown
for each number of the input. For each fully connected layer with a bias, the share of a batch that is alone on some
neuron is measured on public examples: such an example is the weight gradient over the bias gradient.
"""

from utils.interrupt import die_of_sigint

if __name__ == "__main__":
    die_of_sigint()  # it writes nothing

import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

import data
import models
from core.errors import UsageError
from core.hyperparameters import help_of, hp, hyperparameters
from core.paths import ROOT
from core.protocol import LOSSES, Batch, Kind, Recipe, Task
from core.rng import stream
from evaluation.applicability import Applicability, applicability
from models import external
from models.inspection import differentiable_attention, eval_mode, pixel_layer
from models.validation import Validation, probe_inputs, validate
from utils.flags import Parser, add_flags, given
from utils.tools import one_line_errors

MAX_PROBES = 256  # public examples on which leakage is estimated


@dataclass(frozen=True)
class Layer:
    """A layer with weights, for one example: the numbers of its input and output, and its parameters."""

    name: str
    type: str
    inputs: int
    outputs: int
    parameters: int

    @property
    def surplus(self) -> int:
        """Equations minus unknowns; below zero the layer's gradient alone does not determine its input."""
        return self.outputs + self.parameters - self.inputs


@dataclass(frozen=True)
class AnalyticLeak:
    """A fully connected layer with bias. share: of a batch, expected to be alone on some neuron of the layer."""

    name: str
    share: float
    of: Literal["examples", "embeddings"]


@dataclass(frozen=True)
class Inspection:
    """Facts about a model and a recipe, from the model as it is broadcast and public examples alone."""

    parameters: int
    trainable: int
    input_numbers: int
    num_examples: int
    layers: tuple[Layer, ...]
    leaks: tuple[AnalyticLeak, ...]
    facts: tuple[str, ...]
    attacks: tuple[Applicability, ...]

    @property
    def ratio(self) -> float:
        """Trained parameters for each unknown number of the batch."""
        return self.trainable / (self.input_numbers * self.num_examples)

    def as_dict(self) -> dict[str, Any]:
        """The facts as JSON can hold them."""
        layers = [asdict(layer) | {"surplus": layer.surplus} for layer in self.layers]
        return asdict(self) | {"ratio": self.ratio, "layers": layers}

    def lines(self) -> Iterator[str]:
        """The facts as a reader sees them."""
        yield f"{self.parameters} parameters, {self.trainable} of them trained; {self.input_numbers} numbers an example"
        yield f"{self.ratio:.1f} gradient entries for each unknown number of {self.num_examples} example(s)"
        yield ""
        yield f"{'layer':<34} {'type':<14} {'inputs':>9} {'outputs':>9} {'weights':>9}  equations - unknowns"
        for layer in self.layers:
            numbers = f"{layer.inputs:>9} {layer.outputs:>9} {layer.parameters:>9}  {layer.surplus:+d}"
            yield f"{layer.name[-34:]:<34} {layer.type:<14} {numbers}"
        yield ""
        for leak in self.leaks:
            yield f"{leak.name}: {leak.share:.2f} of a batch of {self.num_examples} is alone on a neuron ({leak.of})"
        yield from self.facts
        yield ""
        yield from map(str, self.attacks)


def inspect_model(
    model: nn.Module,
    task: Task,
    recipe: Recipe,
    kind: Kind,
    num_examples: int,
    public: Batch | None,
    validation: Validation | None = None,
) -> Inspection:
    """Facts about a model and what its updates give away. Raises UsageError for a model that no attack can run on.

    public: examples on which leakage is estimated; without them, noise stands for the examples.
    """
    validation = validation or validate(model, task, mode=recipe.model_mode, loss=recipe.loss)
    example = probe_inputs(model, task, 1)
    facts = [*_batch_statistics(model, recipe), *_random_layers(model, recipe)]
    if public is None:
        facts.append("no public examples: leakage is estimated on noise")
    facts += [finding.text for finding in validation.findings]
    attacks = applicability(model, task, recipe, kind, num_examples, validation, public=public is not None)
    leaks = tuple(analytic_leaks(model, task, num_examples, public, recipe.loss))
    return Inspection(
        parameters=validation.parameters,
        trainable=validation.trainable,
        input_numbers=example.numel(),
        num_examples=num_examples,
        layers=tuple(_layers(model, example)),
        leaks=leaks,
        facts=tuple(facts),
        attacks=tuple(_with_share(entry, leaks) for entry in attacks),
    )


def _with_share(entry: Applicability, leaks: tuple[AnalyticLeak, ...]) -> Applicability:
    """The entry of `analytic` with the share of the batch that it can expect, if that is not all of it."""
    share = next((leak.share for leak in leaks if leak.of == "examples"), 1.0)
    if entry.attack != "analytic" or entry.verdict == "refused" or share == 1:
        return entry
    reason = "; ".join(filter(None, (f"expected for {share:.2f} of the examples", entry.reason)))
    return replace(entry, verdict="works in part", reason=reason)


def _layers(model: nn.Module, example: Tensor) -> list[Layer]:
    """The layers that one example passes, in that order."""
    found: list[Layer] = []

    def record(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            if inputs and isinstance(inputs[0], Tensor) and isinstance(output, Tensor):
                own = sum(p.numel() for p in module.parameters(recurse=False))
                found.append(Layer(name, type(module).__name__, inputs[0].numel(), output.numel(), own))

        return hook

    _run_with_hooks(model, example, {n: record(n) for n, m in model.named_modules() if _has_weights(m)})
    return found


def _has_weights(module: nn.Module) -> bool:
    return next(module.parameters(recurse=False), None) is not None


def _run_with_hooks(model: nn.Module, inputs: Tensor, hooks: dict[str, Any], grad: bool = False) -> Tensor:
    """The model's outputs in eval mode, with forward hooks by module name; modes and hooks are restored."""
    handles = [model.get_submodule(name).register_forward_hook(hook) for name, hook in hooks.items()]
    try:
        with eval_mode(model), torch.set_grad_enabled(grad), differentiable_attention():
            return model(inputs)
    finally:
        for handle in handles:
            handle.remove()


def analytic_leaks(
    model: nn.Module, task: Task, num_examples: int, public: Batch | None, loss: str = "cross_entropy"
) -> list[AnalyticLeak]:
    """The share of a batch that is alone on some neuron, for each fully connected layer with bias but the head.

    A neuron belongs to one example if the loss of that example alone depends on it. Batches of `num_examples` are drawn
    from public examples, without which noise stands for them.
    """
    linear = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and m.bias is not None}
    if not linear:
        return []
    examples, labels = _probes(model, task, num_examples, public)
    first = pixel_layer(model, task)
    alone: dict[str, list[float]] = {name: [] for name in linear}
    for inputs, targets in zip(examples.split(num_examples), labels.split(num_examples), strict=True):
        outputs: dict[str, Tensor] = {}

        def record(name: str, outputs: dict[str, Tensor] = outputs) -> Any:
            return lambda module, args, output: outputs.update({name: output})

        logits = _run_with_hooks(model, inputs, {name: record(name) for name in linear}, grad=True)
        # a layer with one row for each example; a layer on tokens mixes those of one example in its gradient
        flat = {name: z for name, z in outputs.items() if z.ndim == 2 and z is not logits and z.requires_grad}
        if not flat:
            return []
        value = LOSSES.find(loss)(logits, targets)
        grads = torch.autograd.grad(value, list(flat.values()), allow_unused=True)
        for name, grad in zip(flat, grads, strict=True):
            if grad is not None:
                active = grad != 0  # (n, h)
                alone[name].append(active[:, active.sum(0) == 1].any(1).double().mean().item())
    return [
        AnalyticLeak(name, sum(shares) / len(shares), "examples" if linear[name] is first else "embeddings")
        for name, shares in alone.items()
        if shares
    ]


def _probes(model: nn.Module, task: Task, num_examples: int, public: Batch | None) -> tuple[Tensor, Tensor]:
    """Model inputs (M, *shape) and labels (M,), M a multiple of `num_examples`."""
    rng = torch.Generator().manual_seed(0)
    like = next(model.parameters())
    if public is None:
        count = max(1, MAX_PROBES // num_examples) * num_examples
        examples, labels = (
            torch.rand(count, *task.domain.shape, generator=rng),
            torch.randint(task.num_classes, (count,)),
        )
    else:
        available = len(public.labels)
        count = max(1, min(MAX_PROBES, available) // num_examples) * num_examples
        chosen = torch.randperm(available, generator=rng)
        chosen = chosen.repeat(-(-count // available))[:count]
        examples, labels = public.examples.cpu()[chosen], public.labels.cpu()[chosen]
    return task.domain.to_model(examples.to(like)), labels.to(like.device)


def _batch_statistics(model: nn.Module, recipe: Recipe) -> Iterator[str]:
    layers = [m for m in model.modules() if isinstance(m, _BatchNorm)]
    tracked = [m for m in layers if m.track_running_stats and m.running_mean is not None]
    if not layers:
        return
    if recipe.model_mode == "eval":
        yield f"{len(layers)} BatchNorm layers in eval mode: the client's batch does not enter their statistics"
        return
    yield f"{len(layers)} BatchNorm layers in train mode: every example's gradient depends on its batch"
    if tracked:
        momentum = tracked[0].momentum
        yield (
            f"uploaded running statistics of {len(tracked)} layers hold the mean and variance of the client's batches "
            f"(momentum {momentum}); after one step they give them exactly"
        )
        yield "uploaded num_batches_tracked gives the number of local steps"


def _random_layers(model: nn.Module, recipe: Recipe) -> Iterator[str]:
    rates = sorted({m.p for m in model.modules() if isinstance(m, _DropoutNd) and m.p > 0})
    if rates:
        mode = "active" if recipe.model_mode == "train" else "off in eval mode"
        yield f"dropout with probability {', '.join(map(str, rates))}: {mode}"


@hyperparameters
class Flags:
    """Flags of `python -m evaluation.inspect`."""

    model: str = hp("lenet", "network of the zoo, package.module:factory, file.py:factory or torchvision:NAME")
    weights: Path | None = hp(None, "file of the weights as broadcast; default: new weights")
    dataset: str = hp("photos", "data set whose public examples serve as probes and whose size and classes are used")
    base_datadir: Path = hp(ROOT / "datasets", "folder of the data sets")
    image_size: int | None = hp(None, "side of the images in pixels; default: the data set's own")
    normalize: Literal["none", "dataset", "half"] = hp("none", "input of the model: pixels in [0, 1], or normalised")
    batch_size: int = hp(1, "number of examples behind an update", ge=1)
    local_epochs: int = hp(0, "local epochs behind a weight update; 0: a gradient", ge=0)
    model_mode: Literal["eval", "train"] = hp("eval", "mode of the client's model")
    loss: str = hp("cross_entropy", "loss by name, package.module:function or file.py:function")
    seed: int = hp(0, "random seed of new weights", ge=0)


def run(flags: Flags) -> Inspection:
    """The inspection that the flags ask for."""
    dataset = data.load(
        flags.dataset, base_datadir=flags.base_datadir, image_size=flags.image_size, normalize=flags.normalize
    )
    shape: Any = dataset.task.domain.shape
    make = external.load if external.is_external(flags.model) else models.build
    model = make(flags.model, shape, dataset.task.num_classes, rng=stream(flags.seed, "model"))
    if flags.weights is not None:
        models.load_weights(model, flags.weights)
    kind: Kind = "delta" if flags.local_epochs else "gradient"
    recipe = Recipe(flags.batch_size, flags.local_epochs or 1, model_mode=flags.model_mode, loss=flags.loss)
    recipe.steps(flags.batch_size)  # raises UsageError for too many
    public = dataset.public.take(torch.arange(min(len(dataset.public), 4 * MAX_PROBES)))
    return inspect_model(model, dataset.task, recipe, kind, flags.batch_size, public)


def main() -> None:
    """Print the inspection; exit code 2 and one line for a mistake of the user."""
    with one_line_errors(UsageError):
        parser = Parser(prog="python -m evaluation.inspect", description="What updates of a model can give away.")
        add_flags(parser, Flags, help_of, switches_only=True)
        inspection = run(Flags(**given(Flags, parser.parse(sys.argv[1:]))))
    print("\n".join(inspection.lines()))


if __name__ == "__main__":
    main()
