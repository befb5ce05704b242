"""A network as a pure function of its weights: an attack differentiates through a client's training with it."""

from collections.abc import Callable, Sequence
from copy import copy, deepcopy
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call

from core.protocol import LOSSES, Recipe
from models.inspection import differentiable_attention
from models.winograd import WinogradConv, taps_first, use_fast_convs_

CHECKPOINT_FROM = 4  # local steps
BETAS, EPS = (0.9, 0.999), 1e-8  # torch.optim.Adam's


class MetaModel:
    """Logits, gradients and local training of `module`, differentiable with respect to inputs and soft labels.

    Works on a private copy: mode, buffers, `requires_grad` and `.grad` of `module` are never touched. Weights, and all
    that is shaped like them, are tuples in the order of `module.parameters()`. Take outer derivatives with
    `torch.autograd.grad(objective, [x])`: `objective.backward()` would also differentiate with respect to the weights.
    """

    def __init__(
        self,
        module: nn.Module,
        mode: Literal["eval", "train"] = "eval",
        *,
        loss: str = "cross_entropy",
        fast_convs: Tensor | None = None,
        conv_dtype: torch.dtype | None = None,
    ) -> None:
        """
        mode: how BatchNorm (any layer with a `running_mean`) behaves. "train" normalises by the batch, and every call
            starts from the running statistics that were broadcast. Everything else stays in eval mode, so dropout is
            off: a server does not know the client's masks, and masks of its own would make its objective random.
        loss: a name in `core.protocol.LOSSES`.
        fast_convs: inputs of the shape the model will be called with; 3x3 convolutions on which Winograd's algorithm
            pays are then replaced by it. None keeps torch's convolutions.
        conv_dtype: what fast convolutions compute in, such as torch.bfloat16. None: the dtype of their input.
        """
        assert mode in ("eval", "train"), f"mode {mode}"
        self._module = deepcopy(module).eval()
        self._mode, self._loss_name = mode, loss
        if fast_convs is not None:
            use_fast_convs_(self._module, fast_convs)
        self._set_up(conv_dtype)

    def _set_up(self, conv_dtype: torch.dtype | None) -> None:
        """Everything that depends on the layers of the private copy."""
        self._loss, self._conv_dtype = LOSSES[self._loss_name], conv_dtype
        self._parameters = tuple(self._module.parameters())
        self._trainable = tuple(p.requires_grad for p in self._parameters)
        self.weights = tuple(p.detach() for p in self._parameters)

        # one name per place of a parameter: a tied weight has several places, a shared module's has one
        index = {id(p): i for i, p in enumerate(self._parameters)}
        self._places: list[tuple[str, int]] = []
        self._statistics: dict[str, Tensor] = {}
        for prefix, layer in self._module.named_modules():
            for name, p in layer.named_parameters(prefix, recurse=False, remove_duplicate=False):
                self._places.append((name, index[id(p)]))
            if self._mode == "train" and hasattr(layer, "running_mean"):
                layer.training = True
                self._statistics.update(layer.named_buffers(prefix, recurse=False))
            if isinstance(layer, WinogradConv):
                layer.compute_dtype = conv_dtype

    @property
    def module(self) -> nn.Module:
        """The private copy."""
        return self._module

    def full_precision(self) -> "MetaModel":
        """The same model, with the same weights, whose convolutions compute in the dtype of their input."""
        if self._conv_dtype is None:
            return self
        other = copy(self)
        other._module = deepcopy(self._module, memo={id(p): p for p in self._parameters})
        other._set_up(conv_dtype=None)
        return other

    def to_memory_format(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Tensors shaped as the weights, laid out in memory as the gradients are: both can then be read in one go."""
        fast = {id(m.weight) for m in self._module.modules() if isinstance(m, WinogradConv)}
        pairs = zip(self._parameters, tensors, strict=True)
        return tuple(taps_first(t) if id(p) in fast else t for p, t in pairs)

    def __call__(self, x: Tensor, weights: Sequence[Tensor] | None = None) -> Tensor:
        """Model inputs (N, *shape) -> logits (N, num_classes), at the broadcast weights unless given others."""
        if weights is None and not self._statistics:
            with differentiable_attention():
                return self._module(x)
        tensors = {name: buffer.clone() for name, buffer in self._statistics.items()}
        if weights is not None:
            assert len(weights) == len(self._parameters), f"{len(weights)} weights, not {len(self._parameters)}"
            tensors.update((name, weights[i]) for name, i in self._places)
        with differentiable_attention():
            return functional_call(self._module, tensors, (x,), tie_weights=False)

    def gradient(
        self, x: Tensor, y: Tensor, weights: Sequence[Tensor] | None = None, create_graph: bool = True
    ) -> tuple[Tensor, ...]:
        """dL/dW of the mean cross-entropy; zero for a weight that is frozen or unused.

        x: (N, *shape) model inputs. y: (N,) int64 classes or (N, num_classes) probabilities.
        """
        weights = self._parameters if weights is None else weights
        grads = self._gradient(x, y, weights, create_graph)
        return tuple(torch.zeros_like(w) if g is None else g for w, g in zip(weights, grads, strict=True))

    def train(
        self,
        inputs: Tensor,
        labels: Tensor,
        batches: Sequence[Tensor],
        recipe: Recipe,
        create_graph: bool = True,
        checkpoint: bool | None = None,
    ) -> tuple[Tensor, ...]:
        """W_0 - W_T after a client's steps on the T batches of indices into `inputs`, as `recipe` orders them."""
        rates, decay = recipe.learning_rates(len(batches)), recipe.weight_decay
        if recipe.optimizer == "adam":
            return self.adam(inputs, labels, batches, rates, decay, create_graph, checkpoint)
        return self.sgd(inputs, labels, batches, rates, recipe.momentum, decay, create_graph, checkpoint)

    def sgd(
        self,
        inputs: Tensor,
        labels: Tensor,
        batches: Sequence[Tensor],
        lr: float | Sequence[float],
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        create_graph: bool = True,
        checkpoint: bool | None = None,
    ) -> tuple[Tensor, ...]:
        """W_0 - W_T after one step of `torch.optim.SGD` on each of the T batches of indices into `inputs`.

            d_t = dL(W_t)/dW + weight_decay W_t,    v_t = momentum v_{t-1} + d_t  (v_0 = d_0),    W_{t+1} = W_t - lr v_t

        inputs: (N, *shape) model inputs. labels: (N,) int64 or (N, num_classes) probabilities. `lr` may be one for
        each step. The graph is built only if inputs or labels require a gradient. As in torch, a frozen or unused
        weight does not even decay.

        `checkpoint` stores only the weights of each step and recomputes the step in the backward pass: memory for one
        step's graph instead of T, at a third more time. None: from CHECKPOINT_FROM steps on. The steps are summed,
        because W_0 - W_T has few correct digits where lr is small.
        """
        velocity: list[Tensor | None] = [None] * len(self.weights)

        def direction(i: int, step: int, d: Tensor) -> Tensor:
            if momentum:
                v = velocity[i]
                d = velocity[i] = d if v is None else d + momentum * v
            return d

        return self._unroll(inputs, labels, batches, lr, weight_decay, direction, create_graph, checkpoint)

    def adam(
        self,
        inputs: Tensor,
        labels: Tensor,
        batches: Sequence[Tensor],
        lr: float | Sequence[float],
        weight_decay: float = 0.0,
        create_graph: bool = True,
        checkpoint: bool | None = None,
    ) -> tuple[Tensor, ...]:
        """As `sgd`, by `torch.optim.Adam` with its own betas and eps: W_{t+1} = W_t - lr m^_t / (sqrt(v^_t) + eps)."""
        (beta1, beta2), eps = BETAS, EPS
        mean: list[Tensor | float] = [0.0] * len(self.weights)
        square: list[Tensor | float] = [0.0] * len(self.weights)

        def direction(i: int, step: int, d: Tensor) -> Tensor:
            m = mean[i] = beta1 * mean[i] + (1 - beta1) * d
            v = square[i] = beta2 * square[i] + (1 - beta2) * d * d
            # a weight no step has moved yet: the derivative of the root at zero is infinite, and zero times that is nan
            moved = v > 0
            root = torch.where(moved, v, 1.0).sqrt() * moved
            return m / (1 - beta1 ** (step + 1)) / (root / (1 - beta2 ** (step + 1)) ** 0.5 + eps)

        return self._unroll(inputs, labels, batches, lr, weight_decay, direction, create_graph, checkpoint)

    def _unroll(
        self,
        inputs: Tensor,
        labels: Tensor,
        batches: Sequence[Tensor],
        lr: float | Sequence[float],
        weight_decay: float,
        direction: Callable[[int, int, Tensor], Tensor],
        create_graph: bool,
        checkpoint: bool | None,
    ) -> tuple[Tensor, ...]:
        """The steps themselves: `direction(weight's index, step, its gradient with decay)` is an optimiser's part."""
        create_graph = create_graph and (inputs.requires_grad or labels.requires_grad)
        checkpoint = create_graph and (len(batches) >= CHECKPOINT_FROM if checkpoint is None else checkpoint)
        rates = [lr] * len(batches) if isinstance(lr, int | float) else lr
        weights: Sequence[Tensor] = self.weights
        moved = [torch.zeros_like(w) for w in weights]
        for step, (batch, rate) in enumerate(zip(batches, rates, strict=True)):
            if checkpoint:
                grads = _Recomputed.apply(self, inputs[batch], labels[batch], *weights)
            else:
                grads = self._gradient(inputs[batch], labels[batch], weights, create_graph)
            stepped = list(weights)
            with torch.set_grad_enabled(create_graph):
                for i, (w, g) in enumerate(zip(weights, grads, strict=True)):
                    if g is None:
                        continue
                    d = direction(i, step, g.add(w, alpha=weight_decay) if weight_decay else g)
                    stepped[i] = w.add(d, alpha=-rate)
                    moved[i] = moved[i].add(d, alpha=rate)
            weights = stepped
        return tuple(moved)

    def _gradient(self, x: Tensor, y: Tensor, weights: Sequence[Tensor], create_graph: bool) -> list[Tensor | None]:
        """As `gradient`, with None for a weight that is frozen or unused."""
        with torch.enable_grad():
            if weights is self._parameters:
                logits = self(x)
            else:
                pairs = zip(weights, self._trainable, strict=True)
                weights = [w.detach().requires_grad_() if t and not w.requires_grad else w for w, t in pairs]
                logits = self(x, weights)
            trained = [w for w, t in zip(weights, self._trainable, strict=True) if t]
            found = iter(
                torch.autograd.grad(self._loss(logits, y), trained, create_graph=create_graph, allow_unused=True)
            )
        return [next(found) if trainable else None for trainable in self._trainable]


class _Recomputed(torch.autograd.Function):
    """`MetaModel._gradient` without its graph, which is built again when an outer derivative passes through."""

    @staticmethod
    def forward(ctx: Any, meta: MetaModel, x: Tensor, y: Tensor, *weights: Tensor) -> tuple[Tensor | None, ...]:
        ctx.meta = meta
        ctx.save_for_backward(x, y, *weights)
        x, y, *apart = (t.detach() for t in (x, y, *weights))
        return tuple(meta._gradient(x, y, apart, create_graph=False))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[1:]
        tensors = ctx.saved_tensors
        inputs = [t.detach().requires_grad_(n) for t, n in zip(tensors, needed, strict=True)]
        x, y, *weights = inputs
        grads = ctx.meta._gradient(x, y, weights, create_graph=True)
        pairs = [(g, s) for g, s in zip(grads, grad_outputs, strict=True) if g is not None and s is not None]
        differentiated = [t for t, n in zip(inputs, needed, strict=True) if n]
        outputs, gains = zip(*pairs, strict=True)
        found = iter(torch.autograd.grad(outputs, differentiated, gains, allow_unused=True))
        return None, *(next(found) if n else None for n in needed)
