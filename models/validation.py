"""What a stranger's network is, before any attack runs on it: found by running it on one or two examples.

A finding is a refusal (no attack can run), a limit (some attacks cannot run or are weaker; `affects` names what they
rely on) or a note. Nothing here sees private examples: the probes are inputs near the middle of the domain.
"""

import copy
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from core.errors import UsageError
from core.protocol import LOSSES, Task
from core.references import describe, is_reference
from models.inspection import REQUIREMENTS, differentiable_attention, eval_mode, head_gradient

Affects = Literal["labels", "soft labels", "loss", "gradients", "everything", "nothing"]


@dataclass(frozen=True)
class Finding:
    """One fact about a model. `affects` names what an attack must rely on for the fact to limit it."""

    text: str
    affects: Affects = "nothing"


@dataclass(frozen=True)
class Validation:
    """What the probes found. `head` is the layer whose outputs are the logits; None if no layer's are."""

    parameters: int
    trainable: int
    findings: tuple[Finding, ...]
    head: str | None
    silent: tuple[str, ...] = field(default=())  # parameters without gradient at the broadcast weights

    def limits(self, *affects: str) -> list[str]:
        """The texts of the findings that affect one of these."""
        return [f.text for f in self.findings if f.affects in affects]


def validate(
    model: nn.Module, task: Task, *, mode: Literal["eval", "train"] = "eval", loss: str = "cross_entropy"
) -> Validation:
    """Probe a model and a loss; the model's weights, modes and names are not changed.

    A head that is not registered last is moved there. Raises UsageError, with what to do, for a model on which no
    attack can run: without weights, with complex or integer weights, all frozen, of another input size, with outputs
    that are not logits (N, C), or without a gradient.
    """
    findings = list(_weights(model))
    examples = probe_inputs(model, task, 2)
    prepare(model, examples, findings)
    logits = _forward(model, examples[:1], task)
    _check_logits(logits, 1, task)
    findings += _behaviour(model, examples, logits)
    if mode == "train":
        _check_train_mode(model, examples)
    silent, gradients = _gradients(model, examples[:1], loss, mode, findings)
    findings += _losses(logits, loss)
    reason = REQUIREMENTS["double_backward"].missing(model, task)
    if reason is not None:
        findings.append(Finding(reason, "nothing"))  # attacks that need it refuse by themselves
    head, of_head = _head(model, examples[:1], gradients, task)
    findings += of_head
    counts = [p.numel() for p in model.parameters()]
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return Validation(sum(counts), trained, tuple(findings), head, tuple(silent))


def probe_inputs(model: nn.Module, task: Task, count: int) -> Tensor:
    """Inputs (count, *shape) of the model near the middle of the domain, on its device, of its dtype."""
    parameter = next(model.parameters())
    return task.domain.to_model(task.domain.init(count, torch.Generator().manual_seed(0)).to(parameter)).detach()


def prepare(model: nn.Module, examples: Tensor, findings: list[Finding] | None = None) -> None:
    """Make the model differentiable twice where that is possible without changing what it computes.

    Hard sigmoids are replaced by their formula, and a model that overwrites its inputs in place is given a copy of them
    in every call. (Fused attention is avoided where gradients are computed: `models.inspection`.)
    """
    places = [(m, n) for m in model.modules() for n, child in m.named_children() if type(child) is nn.Hardsigmoid]
    for parent, name in places:
        setattr(parent, name, Hardsigmoid())
    if places and findings is not None:
        findings.append(
            Finding(f"{len(places)} hard sigmoids are computed by their formula, which has two derivatives")
        )
    before = examples.clone()
    with torch.no_grad(), eval_mode(model):
        try:
            model(examples)
        except Exception as error:  # a user's module may raise anything
            raise _does_not_take(before, error) from None
    if not torch.equal(before, examples):
        examples.copy_(before)
        model.register_forward_pre_hook(copy_inputs)
        if findings is not None:
            findings.append(Finding("the model overwrites its inputs in place; it is now given a copy"))


class Hardsigmoid(nn.Module):
    """min(max(x + 3, 0), 6) / 6, as torch's, whose second derivative torch does not have."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.relu6(x + 3) / 6


def copy_inputs(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """A forward pre-hook that hands a module copies of its input tensors."""
    return tuple(x.clone() if isinstance(x, Tensor) else x for x in inputs)


def _weights(model: nn.Module) -> Iterable[Finding]:
    parameters = dict(model.named_parameters())
    if not parameters:
        raise UsageError("the model has no parameters: nothing is trained, and no update is sent")
    for name, p in parameters.items():
        if isinstance(p, nn.parameter.UninitializedParameter):
            raise UsageError(f"{name} of the model has no shape yet: call the model once in the factory")
        if p.is_complex():
            raise UsageError(f"{name} of the model is complex ({p.dtype}), and attacks match real gradients")
        if not p.is_floating_point():
            raise UsageError(f"{name} of the model holds integers ({p.dtype}): register it as a buffer")
        if not p.isfinite().all():
            raise UsageError(f"{name} of the model has values that are not finite")
    frozen = [name for name, p in parameters.items() if not p.requires_grad]
    if len(frozen) == len(parameters):
        raise UsageError("every parameter of the model is frozen: nothing is trained, and no update is sent")
    if frozen:
        yield Finding(f"{len(frozen)} of {len(parameters)} parameters are frozen and send zeros: {_some(frozen)}")
    places: dict[int, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        places.setdefault(id(p), []).append(name)
    for names in places.values():
        if len(names) > 1:
            yield Finding(f"one parameter is used in {len(names)} places, and its gradients are added: {_some(names)}")
    buffers = [name for name, _ in model.named_buffers()]
    if buffers:
        yield Finding(f"{len(buffers)} buffers may be sent with an update: {_some(buffers)}")


def _forward(model: nn.Module, examples: Tensor, task: Task) -> Tensor:
    with torch.no_grad(), eval_mode(model):
        try:
            return model(examples)
        except Exception as error:  # a user's module may raise anything
            raise _does_not_take(examples, error) from None


def _does_not_take(examples: Tensor, error: Exception) -> UsageError:
    shape = "x".join(map(str, examples.shape[1:]))
    return UsageError(f"the model does not take inputs of {shape}: {describe(error)}; see `image_size`")


def _check_logits(logits: object, count: int, task: Task) -> None:
    if not isinstance(logits, Tensor):
        raise UsageError(
            f"the model returns {type(logits).__name__}, not a tensor: let the factory wrap it in a module whose "
            "forward returns the logits alone"
        )
    if tuple(logits.shape) != (count, task.num_classes):
        raise UsageError(
            f"the model returns shape {tuple(logits.shape)} for {count} example, not ({count}, {task.num_classes}), "
            "one number for each class"
        )
    if not logits.isfinite().all():
        raise UsageError("the model's outputs are not finite in eval mode")


def _behaviour(model: nn.Module, examples: Tensor, logits: Tensor) -> Iterable[Finding]:
    with torch.no_grad(), eval_mode(model):
        again, both = model(examples[:1]), model(examples)
    if not torch.equal(again, logits):
        yield Finding("outputs in eval mode differ from call to call, so simulated updates are random", "gradients")
    elif tuple(both.shape) == (2, logits.shape[1]) and not torch.allclose(both[:1], logits, rtol=1e-3, atol=1e-4):
        yield Finding("an example's outputs in eval mode depend on the other examples of its batch", "gradients")
    if any(isinstance(m, nn.RNNBase) for m in model.modules()):
        yield Finding("recurrent layers run without cuDNN where they are differentiated twice")


def _check_train_mode(model: nn.Module, examples: Tensor) -> None:
    private = copy.deepcopy(model).train()
    try:
        with torch.no_grad():
            private(examples)
    except Exception as error:  # a user's module may raise anything
        raise UsageError(f"the model fails in train mode: {describe(error)}; choose `model_mode=eval`") from None


def _gradients(
    model: nn.Module, examples: Tensor, loss: str, mode: str, findings: list[Finding]
) -> tuple[list[str], dict[str, Tensor]]:
    """Names of parameters without gradient, and the gradients of one example of class 0 by name."""
    label = torch.zeros(1, dtype=torch.int64, device=examples.device)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with eval_mode(model):
        try:
            with torch.enable_grad(), differentiable_attention():
                value = LOSSES.find(loss)(model(examples), label)
        except UsageError:
            raise
        except Exception as error:  # a user's loss may raise anything
            raise UsageError(f"`loss={loss}` fails on logits and a label: {describe(error)}") from None
    if not isinstance(value, Tensor) or value.ndim:
        raise UsageError(f"`loss={loss}` must return a scalar tensor, the mean over the examples")
    if not value.isfinite():
        raise UsageError(f"`loss={loss}` is not finite on this model")
    if not value.requires_grad:
        raise UsageError("the loss does not depend on any trained parameter: no update is sent")
    try:
        found = torch.autograd.grad(value, list(trained.values()), allow_unused=True)
    except RuntimeError as error:
        raise UsageError(f"the model cannot be trained: {describe(error)}") from None
    grads = {name: g for name, g in zip(trained, found, strict=True) if g is not None}
    silent = [name for name in trained if name not in grads or not grads[name].any()]
    if len(silent) == len(trained):
        raise UsageError("the gradient of every parameter is zero at these weights: an update tells nothing")
    if silent:
        findings.append(
            Finding(
                f"{len(silent)} of {len(trained)} parameters have no gradient at these weights: {_some(silent)}",
                "gradients",
            )
        )
    return silent, grads


def _losses(logits: Tensor, loss: str) -> Iterable[Finding]:
    if loss == "cross_entropy":
        return
    yield Finding(f"labels are inferred as under cross-entropy, and the loss is {loss}", "loss")
    if is_reference(loss):
        try:
            LOSSES.find(loss)(logits, logits.softmax(1))
        except Exception as error:  # a user's loss may raise anything
            yield Finding(f"{loss} takes no probabilities as labels: {describe(error)}", "soft labels")


def _head(
    model: nn.Module, examples: Tensor, gradients: dict[str, Tensor], task: Task
) -> tuple[str | None, list[Finding]]:
    """The layer whose outputs are the logits, and why labels cannot be inferred from it, if they cannot."""
    outputs: dict[str, Tensor] = {}
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}

    def record(name: str) -> Any:
        return lambda module, inputs, output: outputs.update({name: output})

    hooks = [layer.register_forward_hook(record(name)) for name, layer in layers.items()]
    with torch.no_grad(), eval_mode(model):
        logits = model(examples)
    for hook in hooks:
        hook.remove()
    flat = {name: out.flatten() for name, out in outputs.items() if out.numel() == logits.numel()}
    heads = [name for name, out in flat.items() if torch.equal(out, logits.flatten())]
    if not heads:
        text = "no nn.Linear or nn.Conv2d layer gives the logits, so labels cannot be inferred: grant them"
        return None, [Finding(text, "labels")]
    head, layer = heads[-1], layers[heads[-1]]
    prefix = f"{head}." if head else ""
    names = [name for name, _ in model.named_parameters()]
    expected = [prefix + n for n, _ in layer.named_parameters(recurse=False)]
    places = [name for name, p in model.named_parameters(remove_duplicate=False) if p is layer.weight]
    if len(places) > 1:
        text = f"the head's weights are tied to {_some([p for p in places if not p.startswith(prefix)])}"
        return head, [Finding(f"{text}: labels cannot be inferred from them: grant them", "labels")]
    if any(not p.requires_grad for p in layer.parameters()):
        return head, [Finding("the head is frozen, so labels cannot be inferred: grant them", "labels")]
    if names[-len(expected) :] != expected and _register_last(model, head, examples, logits):
        names = [name for name, _ in model.named_parameters()]
    if names[-len(expected) :] != expected:
        text = f"the head {head} is not registered last in the model, so labels cannot be inferred: grant them"
        return head, [Finding(text, "labels")]
    try:
        head_gradient(tuple(gradients[n] for n in expected if n in gradients), task.num_classes)
    except (UsageError, ValueError):
        return head, [Finding("the head has no gradient of one row per class: grant labels", "labels")]
    return head, []


def _register_last(model: nn.Module, head: str, examples: Tensor, logits: Tensor) -> bool:
    """Move the head behind all other layers in the order of `model.parameters()`, by which label rules find it.

    Names do not change. False, and nothing is moved, if the outputs would change: the model runs its layers in order.
    """
    moved: list[tuple[nn.Module, list[str]]] = []
    parent, path = model, head.split(".")
    for name in path:
        moved.append((parent, list(parent._modules)))
        parent._modules[name] = parent._modules.pop(name)
        parent = parent.get_submodule(name)
    try:
        with torch.no_grad(), eval_mode(model):
            same = torch.equal(model(examples), logits)
    except Exception:  # a user's module may raise anything when its layers run in another order
        same = False
    if not same:
        for module, order in moved:
            for name in order:
                module._modules[name] = module._modules.pop(name)
    return same


def _some(names: list[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")
