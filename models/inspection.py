"""What a model is made of, as far as attacks depend on it, and the requirements that attacks declare.

An attack names its requirements in `Attack.requires`. Refusals, the table in the README and the answer to "which
attacks apply to my model" all follow from the entries of `REQUIREMENTS`.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from core.errors import UsageError
from core.protocol import Task

SMOOTH_ACTIVATIONS = (nn.Sigmoid, nn.Tanh, nn.LeakyReLU, nn.GELU, nn.ELU, nn.Softplus)


def differentiable_attention() -> AbstractContextManager[None]:
    """A context in which `scaled_dot_product_attention` can be differentiated twice, which its fused forms cannot.

    It matters for the forward pass alone: the backward passes follow the operations that were recorded there.
    """
    return sdpa_kernel(SDPBackend.MATH)


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """A context in which a model is in eval mode; the mode of each of its modules is restored afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def pixel_layer(model: nn.Module, task: Task) -> nn.Linear | None:
    """The fully connected layer that is fed the flattened example; None if something else comes first."""
    first = next((m for m in model.modules() if list(m.parameters(recurse=False))), None)
    size = torch.Size(task.domain.shape).numel()
    return first if isinstance(first, nn.Linear) and first.in_features == size else None


def hidden_layer(model: nn.Module, task: Task) -> nn.Linear | None:
    """The first fully connected layer that is called once with one row for each example, if it is not the head.

    Layers that are applied to every token or position, as in a transformer, are left out.
    """
    linear = [m for m in model.modules() if isinstance(m, nn.Linear)]
    if len(linear) < 2:
        return None
    calls: list[tuple[nn.Linear, torch.Size]] = []

    def note(layer: nn.Module, _: object, output: Tensor) -> None:
        assert isinstance(layer, nn.Linear)
        calls.append((layer, output.shape))

    hooks = [layer.register_forward_hook(note) for layer in linear]
    example = task.domain.init(2, torch.Generator().manual_seed(0))
    try:
        with eval_mode(model), torch.no_grad():
            model(task.domain.to_model(example.to(linear[0].weight)))
    except RuntimeError:  # it does not take such examples
        return None
    finally:
        for hook in hooks:
            hook.remove()
    counts = Counter(layer for layer, _ in calls)
    fits = (layer for layer, shape in calls[:-1] if counts[layer] == 1 and shape == (2, layer.out_features))
    return next(fits, None)


def head_layer(model: nn.Module) -> nn.Module:
    """The last layer with weights, fully connected or convolutional."""
    layers = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    if not layers:
        raise UsageError("labels are inferred from the last layer, and this model has neither nn.Linear nor nn.Conv2d")
    return layers[-1]


def attention_layers(model: nn.Module) -> list[nn.Linear]:
    """The stacked projections [W_Q; W_K; W_V] of a transformer's blocks, in order: linear layers from d to 3 d."""
    return [m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == 3 * m.in_features]


def has_relu(model: nn.Module) -> bool:
    """Whether the model's activations are all ReLU."""
    modules = list(model.modules())
    return any(isinstance(m, nn.ReLU) for m in modules) and not any(isinstance(m, SMOOTH_ACTIVATIONS) for m in modules)


def head_gradient(tensors: tuple[Tensor, ...], num_classes: int) -> tuple[Tensor, Tensor | None]:
    """The last layer's weight gradient (C, D) and bias gradient (C,), None for a head without bias.

    `tensors` are in the order of `model.parameters()`. Raises UsageError if the last layer has not one row per class.
    """
    *_, last = tensors
    if last.ndim == 1 and len(last) == num_classes and len(tensors) > 1 and tensors[-2].ndim > 1:
        return tensors[-2].flatten(1), last
    if last.ndim == 2 and len(last) == num_classes:
        return last, None
    raise UsageError(
        f"labels are inferred from the last layer, which must have {num_classes} rows, not shape {tuple(last.shape)}"
    )


@dataclass(frozen=True)
class Requirement:
    """Something an attack needs. `missing(model, task)` is None or says what is missing and what to do."""

    summary: str  # a noun phrase, for tables
    missing: Callable[[nn.Module, Task], str | None]


def require(model: nn.Module, task: Task, names: frozenset[str], who: str) -> None:
    """Raise UsageError for the first requirement, in the order of `REQUIREMENTS`, that the model does not meet."""
    assert names <= set(REQUIREMENTS), f"{who} declares unknown requirements: {sorted(names - set(REQUIREMENTS))}"
    for name, requirement in REQUIREMENTS.items():
        if name in names and (reason := requirement.missing(model, task)) is not None:
            raise UsageError(f"{who} {reason}")


def _always(model: nn.Module, task: Task) -> None:
    """Met by every model: the observation is checked instead."""
    return


def _pixel_layer(model: nn.Module, task: Task) -> str | None:
    if pixel_layer(model, task) is None:
        return (
            "reads examples from a fully connected first layer, and this model begins with another one: "
            "choose `model=fc2` or `model=mlp`"
        )
    return None


def _pixel_layer_bias(model: nn.Module, task: Task) -> str | None:
    layer = pixel_layer(model, task)
    return (
        None
        if layer is None or layer.bias is not None
        else "divides by the first layer's bias gradient, and it has none"
    )


def _hidden_layer(model: nn.Module, task: Task) -> str | None:
    if hidden_layer(model, task) is None:
        return (
            "needs a fully connected layer before the head, and this model has none: "
            "choose `model=fc2`, `model=mlp`, `model=cnn` or `model=vgg16`"
        )
    return None


def _linear_head(model: nn.Module, task: Task) -> str | None:
    layers = [m for m in model.modules() if list(m.parameters(recurse=False))]
    head = layers[-1] if layers else None
    if isinstance(head, nn.Linear) and head.bias is not None and head.out_features == task.num_classes:
        return None
    return "prepares a fully connected head with bias, and this model has none: choose `model=lenet` or `model=cnn`"


def _attention(model: nn.Module, task: Task) -> str | None:
    if len(attention_layers(model)) < 2:
        return (
            "reads the gradients of a transformer's first two attention layers, whose query, key and value weights are "
            "one matrix (3 d, d), and this model has no two of them: choose `model=gpt` or `model=bert`"
        )
    return None


def _relu(model: nn.Module, task: Task) -> str | None:
    return None if has_relu(model) else "needs ReLU activations, which this model does not have: `activation=relu`"


def _double_backward(model: nn.Module, task: Task) -> str | None:
    """A second derivative through one example, in eval mode; the model is not changed."""
    x = task.domain.to_model(task.domain.init(1, torch.Generator().manual_seed(0)))
    parameter = next(model.parameters(), None)
    if parameter is None:
        return None
    x = x.to(parameter).requires_grad_()
    training = model.training
    model.eval()
    try:
        parameters = [p for p in model.parameters() if p.requires_grad]
        with differentiable_attention():
            outputs = model(x)
        grads = torch.autograd.grad(outputs.square().sum(), parameters, create_graph=True, allow_unused=True)
        total = torch.stack([g.square().sum() for g in grads if g is not None]).sum()
        # with respect to the parameters as well: a node that cannot be differentiated twice may lie on their path alone
        torch.autograd.grad(total, [x, *parameters], allow_unused=True)
    except RuntimeError as error:
        return f"differentiates gradients, and this model cannot: {' '.join(str(error).split())[:200]}"
    finally:
        model.train(training)
    return None


def _vit(model: nn.Module, task: Task) -> str | None:
    from models.zoo.vit import ViT

    return None if isinstance(model, ViT) else "reads the position embedding of a vision transformer: `model=vit`"


REQUIREMENTS: dict[str, Requirement] = {
    "public": Requirement("public examples", _always),
    "pixel_layer": Requirement("a fully connected first layer", _pixel_layer),
    "pixel_layer_bias": Requirement("a bias in the first layer", _pixel_layer_bias),
    "hidden_layer": Requirement("a fully connected layer before the head", _hidden_layer),
    "linear_head": Requirement("a fully connected head with bias", _linear_head),
    "attention": Requirement("a transformer with stacked QKV weights", _attention),
    "relu": Requirement("ReLU activations", _relu),
    "vit": Requirement("the zoo's vision transformer", _vit),
    "double_backward": Requirement("a twice differentiable model", _double_backward),
}
