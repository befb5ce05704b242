"""The gradient of a fully connected layer as a linear problem, and the tools that attacks on it share.

For a layer z = W x + b, n examples and their mean loss,

    dL/dW = (1/n) sum_i d_i x_i^T,      dL/db = (1/n) sum_i d_i,      d_i = dL_i/dz_i
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attacks.linear.certificate import ROUNDING, is_certain, main_direction
from attacks.linear.denoising import denoised, noise_on_mean_gradient
from attacks.matching.matcher import mean_gradient
from core.domain import Domain
from core.protocol import Observation, Reconstruction, Task
from models.inspection import pixel_layer, require

# largest relative difference between an observed db_k and the model's own for the example of row k; a delta's is
# larger because weights move in local training
MAX_BIAS_MISMATCH = {"gradient": 1e-3, "delta": 0.1}
MAX_NOISE = 0.03  # relative standard deviation of db_k from which on its agreement says nothing
CHUNK = 64  # examples whose output gradients are computed at once


@dataclass(frozen=True)
class LinearProblem:
    """The observed gradient of one fully connected layer, and what an attacker knows about the layer.

    The layer's inputs are the private examples themselves or, behind other layers, their embeddings.
    """

    model: nn.Module  # maps `to_input(rows)` to logits
    layer: nn.Linear  # a module of `model`
    gradient: Tensor  # dL/dW (h, d), float64
    bias_gradient: Tensor | None  # dL/db (h,), float64; None for a layer without bias
    n: int  # examples behind the gradient
    public: Tensor  # inputs of `model` that belong to public examples (m, *shape)
    to_input: Callable[[Tensor], Tensor]  # inputs of the layer (r, d) -> inputs of `model` (r, *shape)
    nonnegative: bool = False  # whether inputs of the layer come out of a ReLU

    def output_gradients(self, rows: Tensor) -> Tensor:
        """d_i of inputs (r, d) of the layer, for every label that each might have: (r, C, h), float64."""
        return output_gradients(self.model, self.layer, self.to_input(rows)).double()

    def deltas(self, rows: Tensor) -> Tensor:
        """delta (r, h) with dL/dW = sum_i delta_i x_i^T, by least squares, for inputs x (r, d) of the layer."""
        return torch.linalg.lstsq(rows.T, self.gradient.T).solution


def require_pixel_layer(model: nn.Module, task: Task, who: str) -> nn.Linear:
    """The first layer, which is fed the flattened example. Raises UsageError in the name of `who` if there is none."""
    require(model, task, frozenset({"pixel_layer"}), who)
    layer = pixel_layer(model, task)
    assert layer is not None
    return layer


def layer_gradient(observation: Observation, layer: nn.Linear) -> tuple[Tensor, Tensor | None]:
    """dL/dW (h, d) and dL/db (h,) of `layer` in float64; None for a layer without bias.

    A delta counts as one mean gradient. Noise of a defence that the attacker knows is reduced (denoising.py).
    """
    index = {id(p): i for i, p in enumerate(observation.model.parameters())}
    tensors = mean_gradient(observation, observation.update.ordered(observation.model))
    weight = tensors[index[id(layer.weight)]].double()
    bias = None if layer.bias is None else tensors[index[id(layer.bias)]].double()
    return denoised(weight, bias, noise_on_mean_gradient(observation), observation.update.num_examples)


def pixel_problem(observation: Observation, layer: nn.Linear, project: bool) -> LinearProblem:
    """The problem of a first layer, whose inputs are the private examples.

    project: whether examples are projected onto their domain before the model is evaluated on them.
    """
    task, public = observation.task, public_inputs(observation)
    gradient, bias_gradient = layer_gradient(observation, layer)

    def to_input(rows: Tensor) -> Tensor:
        if project:
            return task.domain.to_model(task.domain.project(to_examples(rows, task)).to(public))
        return rows.view(-1, *task.domain.shape).to(public)

    n = observation.update.num_examples
    return LinearProblem(observation.model, layer, gradient, bias_gradient, n, public, to_input)


def output_gradients(model: nn.Module, layer: nn.Linear, inputs: Tensor) -> Tensor:
    """d_i = dL_i/dz_i of cross-entropy at `layer`, for inputs (N, *shape) of `model` and every label: (N, C, h)."""
    index = [id(m) for m in model.modules()].index(id(layer))
    private = copy.deepcopy(model).eval()
    outputs: list[Tensor] = []
    list(private.modules())[index].register_forward_hook(lambda module, args, output: outputs.append(output))
    chunks = []
    for chunk in inputs.split(CHUNK):
        outputs.clear()
        with torch.enable_grad():
            logits = private(chunk)  # (n, C)
        one_hot = torch.eye(logits.shape[1]).to(logits)[:, None].expand(-1, len(chunk), -1)
        (jacobian,) = torch.autograd.grad(logits, outputs, one_hot, is_grads_batched=True)  # (C, n, h)
        mean = torch.einsum("nc,cnh->nh", logits.detach().softmax(1), jacobian)
        chunks.append((mean - jacobian).transpose(0, 1))
    return torch.cat(chunks)


def to_examples(rows: Tensor, task: Task) -> Tensor:
    """Rows (M, d) in the units of the model's input -> examples (M, *shape), which may lie outside the domain."""
    return task.domain.from_model(rows.view(-1, *task.domain.shape))


def plausible(pixels: Tensor, slack: float = 0.1, max_share: float = 0.1, white: float = 1.0) -> Tensor:
    """(M,) which of `pixels` (M, C, H, W) are images: at most a tenth lies outside [0, white] by more than `slack`."""
    outside = (pixels < -slack) | (pixels > white + slack) | ~pixels.isfinite()
    return outside.flatten(1).double().mean(1) <= max_share


def lies_in(domain: Domain, examples: Tensor, slack: float = 0.1, max_share: float = 0.1) -> Tensor:
    """(M,) which examples (M, *shape) are valid: at most a tenth lies outside the domain by more than `slack`."""
    outside = ((examples - domain.project(examples)).abs() > slack) | ~examples.isfinite()
    return outside.flatten(1).double().mean(1) <= max_share


def distinct(examples: Tensor, max_correlation: float = 0.9995) -> list[int]:
    """Indices of `examples` (M, *shape) that correlate with no earlier one of them above `max_correlation`."""
    flat = examples.flatten(1).double()
    centred = F.normalize(flat - flat.mean(1, keepdim=True), dim=1)
    equal = centred @ centred.T > max_correlation  # (M, M)
    indices: list[int] = []
    for i in range(len(examples)):
        if not indices or not equal[i, indices].any():
            indices.append(i)
    return indices


def alone_on_a_neuron(layer: nn.Linear, inputs: Tensor) -> Tensor:
    """(N,) which of N model inputs (N, *shape) are the only one to activate some ReLU neuron behind `layer`."""
    active = layer(inputs.flatten(1)) > 0  # (N, h)
    return active[:, active.sum(0) == 1].any(1)


def failed_reconstruction(
    observation: Observation, trace: tuple[float, ...] = (), iterations: int = 0
) -> Reconstruction:
    """A reconstruction without examples, of status "diverged"."""
    shape, device = observation.task.domain.shape, observation.update.device
    labels = torch.empty(0, dtype=torch.int64, device=device)
    return Reconstruction(torch.empty(0, *shape, device=device), labels, trace, iterations, status="diverged")


def invert_rows(
    observation: Observation, layer: nn.Linear, neurons: int = 1, resolution: float = 0.0
) -> Reconstruction:
    """x = dW_k / db_k for the rows k of `layer` that belong to one example each; at most n examples.

    A row that one example alone has activated is a multiple of it, and the broadcast model then predicts db_k for one
    of the labels. Rows are ranked by how well db_k agrees; most others are mixtures of examples.

    neurons: R, rows with equal weights: row k + r K for r < R. Their rank certifies examples, which then rank first;
    `resolution` is that of `certificate.is_certain`.
    """
    weight, bias = layer_gradient(observation, layer)
    assert bias is not None, "the layer has no bias"
    n, task, count = observation.update.num_examples, observation.task, len(bias) // neurons
    weight, bias = (t[: neurons * count].unflatten(0, (neurons, count)) for t in (weight, bias))  # (R, K, d), (R, K)
    main, second = main_direction(weight)
    rounding = ROUNDING * weight.norm(dim=(0, 2))
    weight, bias = torch.einsum("rk,rkd->kd", main, weight), (main * bias).sum(0)
    certified = is_certain(second, weight.norm(dim=1), rounding, resolution)
    rows = (bias.abs() > 1e-7 * bias.abs().max()).nonzero().flatten()
    pixels = to_examples(weight[rows] / bias[rows, None], task)
    valid = lies_in(task.domain, pixels)
    rows, pixels = rows[valid], task.domain.project(pixels[valid])
    if not len(rows):
        return failed_reconstruction(observation)
    certified = certified[rows]
    inputs = task.domain.to_model(pixels.to(layer.weight.dtype))
    predicted = output_gradients(observation.model, layer, inputs)  # (M, C, h)
    places = rows[:, None] + count * torch.arange(neurons, device=rows.device)  # (M, R)
    of_rows = predicted.double().gather(2, places[:, None].expand(-1, predicted.shape[1], -1))  # (M, C, R)
    of_rows = (of_rows * main.T[rows][:, None]).sum(2) / n  # (M, C)
    mismatch = (of_rows / bias[rows, None] - 1).abs()
    least, labels = mismatch.min(1)
    # of a defence's noise, denoising has left the share n / h in a column
    noise = noise_on_mean_gradient(observation) * (n / len(layer.weight)) ** 0.5 / bias[rows].abs()
    order = torch.where(certified, -1, least + noise).argsort(stable=True)
    # a mixture among the answers costs more than a missing example: it can take an exact one's place in the pairing
    largest = MAX_BIAS_MISMATCH[observation.update.kind]
    accepted = certified | ((least < largest + 3 * noise) & (noise < MAX_NOISE))
    order = order[: max(1, int(accepted.sum()))]
    order = order[distinct(pixels[order])][:n]
    labels = assign_granted(observation, labels[order], mismatch[order])
    return Reconstruction(pixels[order].float(), labels, certified=certified[order] if neurons > 1 else None)


def assign_granted(observation: Observation, labels: Tensor, cost: Tensor) -> Tensor:
    """`labels` (M,), or granted labels matched to the examples at the least total cost; `cost` is (M, C)."""
    from scipy.optimize import linear_sum_assignment

    granted = observation.granted.get("labels")
    if granted is None:
        return labels
    examples, chosen = linear_sum_assignment(cost[:, granted].cpu().nan_to_num(nan=1e9, posinf=1e9).numpy())
    labels = labels.clone()
    labels[examples] = granted[chosen]
    return labels


def public_inputs(observation: Observation, count: int = 64) -> Tensor:
    """Inputs (count, *shape) of the model from public examples, evenly spaced over all of them."""
    assert observation.public is not None, "no public examples"
    examples = observation.public.examples
    chosen = torch.linspace(0, len(examples) - 1, count).long()
    return observation.task.domain.to_model(examples[chosen])


def scale_from_head(problem: LinearProblem, sources: Tensor) -> tuple[Tensor, Tensor]:
    """Scales kappa (r,) and labels (r,) with x_i = kappa_i U_i, for unmixed sources U (r, d).

    dL/dW = sum_i delta_i U_i^T is solved for delta_i, which is kappa_i d_i / n. d_i is not known yet: the mean over
    public inputs stands for it, class by class, on the neurons where delta_i is large.
    """
    delta = problem.deltas(sources)  # (r, h)
    public = output_gradients(problem.model, problem.layer, problem.public).double()  # (m, C, h)
    mean = public.sum(0) / (public != 0).sum(0).clamp(min=1) / problem.n  # over inputs that activate a neuron
    large = delta.abs() > 0.25 * delta.abs().amax(1, keepdim=True)
    return match_class_gradients(delta * large, mean * large[:, None])


def match_class_gradients(delta: Tensor, class_gradients: Tensor) -> tuple[Tensor, Tensor]:
    """Factors (r,) and classes (r,): delta (r, h) is nearest to factor times the class's gradient of (r, C, h).

    The class is the one whose gradient is closest in direction, up to sign.
    """
    dots = (class_gradients * delta[:, None]).sum(2)  # (r, C)
    energy = class_gradients.square().sum(2).clamp(min=1e-300)
    labels = (dots.abs() / energy.sqrt()).argmax(1)
    return (dots / energy).gather(1, labels[:, None]).squeeze(1), labels
