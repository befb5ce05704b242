"""What the attacks on linear layers share: the layer that sees the pixels, its gradient, and how candidates are sifted.

For a layer z = W x + b and a batch,  dL/dW = sum_i d_i x_i^T  and  dL/db = sum_i d_i  with  d_i = dL/dz_i.
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attacks.common import Matching
from federated.wire import Observation, Reconstruction, Task, UsageError

# how far, relative to it, db_k may be from what the model says of a row's image; weights move in local training
DOUBT = {"gradient": 1e-3, "delta": 0.1}


def pixel_layer(model: nn.Module, task: Task) -> nn.Linear | None:
    """The fully connected layer that is fed the flattened image; None if something else comes first."""
    first = next((m for m in model.modules() if list(m.parameters(recurse=False))), None)
    pixels = torch.Size(task.image_shape).numel()
    return first if isinstance(first, nn.Linear) and first.in_features == pixels else None


def require_pixel_layer(name: str, model: nn.Module, task: Task, bias: bool = False) -> nn.Linear:
    """The layer `name` reads, or the line that says why there is none."""
    layer = pixel_layer(model, task)
    if layer is None:
        raise UsageError(
            f"{name} reads images off a fully connected first layer, and this model's first layer is none: "
            "choose --model fc2 or mlp"
        )
    if bias and layer.bias is None:
        raise UsageError(f"{name} divides by the bias gradient of the first layer, and this model's has no bias")
    return layer


def has_relu(model: nn.Module) -> bool:
    """Whether the model's activations are all ReLU."""
    smooth = (nn.Sigmoid, nn.Tanh, nn.LeakyReLU, nn.GELU, nn.ELU, nn.Softplus)
    modules = list(model.modules())
    return any(isinstance(m, nn.ReLU) for m in modules) and not any(isinstance(m, smooth) for m in modules)


def layer_gradient(seen: Observation, layer: nn.Linear) -> tuple[Tensor, Tensor | None]:
    """dL/dW (h, d) and dL/db (h,) or None of `layer`, in float64: the mean gradient of the update."""
    index = {id(p): i for i, p in enumerate(seen.model.parameters())}
    tensors = Matching(seen, "average").mean_gradient
    weight = tensors[index[id(layer.weight)]].double()
    return weight, None if layer.bias is None else tensors[index[id(layer.bias)]].double()


def slopes(model: nn.Module, layer: nn.Linear, inputs: Tensor) -> Tensor:
    """d_i = dL_i/dz_i at `layer` for N model inputs (N, C, H, W), under every label each might have: (N, C, h)."""
    index = [id(m) for m in model.modules()].index(id(layer))
    private = copy.deepcopy(model).eval()
    outputs: list[Tensor] = []
    list(private.modules())[index].register_forward_hook(lambda module, args, output: outputs.append(output))
    parts = []
    for some in inputs.split(64):
        outputs.clear()
        with torch.enable_grad():
            logits = private(some)  # (n, classes)
        each = torch.eye(logits.shape[1]).to(logits)[:, None].expand(-1, len(some), -1)
        (pulls,) = torch.autograd.grad(logits, outputs, each, is_grads_batched=True)  # (classes, n, h)
        mean = torch.einsum("nc,cnh->nh", logits.detach().softmax(1), pulls)
        parts.append((mean - pulls).transpose(0, 1))
    return torch.cat(parts)


def to_image(rows: Tensor, task: Task) -> Tensor:
    """Rows (M, d) in the units of the model's input -> pixels (M, C, H, W), not clamped."""
    return task.to_pixels(rows.view(-1, *task.image_shape))


def plausible(pixels: Tensor, slack: float = 0.1, most: float = 0.1, white: float = 1.0) -> Tensor:
    """(M,) which of `pixels` (M, C, H, W) are images: at most a tenth lies outside [0, white] by more than a tenth."""
    outside = (pixels < -slack) | (pixels > white + slack) | ~pixels.isfinite()
    return outside.flatten(1).double().mean(1) <= most


def distinct(images: Tensor, same: float = 0.9995) -> list[int]:
    """Indices of `images` (M, C, H, W), without those that correlate above `same` with an earlier one that is kept."""
    flat = images.flatten(1).double()
    centred = F.normalize(flat - flat.mean(1, keepdim=True), dim=1)
    alike = centred @ centred.T > same  # (M, M)
    kept: list[int] = []
    for i in range(len(images)):
        if not kept or not alike[i, kept].any():
            kept.append(i)
    return kept


def alone_on_a_neuron(layer: nn.Linear, inputs: Tensor) -> Tensor:
    """(N,) which of N model inputs (N, C, H, W) are the only one to pass some ReLU neuron behind `layer`."""
    passed = layer(inputs.flatten(1)) > 0  # (N, h)
    return passed[:, passed.sum(0) == 1].any(1)


def nothing(seen: Observation, trace: tuple[float, ...] = (), iterations: int = 0) -> Reconstruction:
    """The answer of an attack that found no image."""
    return Reconstruction(seen.public.images[:0], seen.public.labels[:0], trace, iterations, status="diverged")


def divide_rows(seen: Observation, layer: nn.Linear) -> Reconstruction:
    """x = dW_k / db_k for every row k of `layer`, and which of these are images rather than mixtures.

    A row that one image alone has reached gives that image exactly, and then the broadcast model itself says what db_k
    has to be, for one of the labels. Rows are ranked by how well that holds, and at most K images are claimed.
    """
    weight, bias = layer_gradient(seen, layer)
    assert bias is not None, "the layer has no bias"
    count = seen.update.num_examples
    alive = (bias.abs() > 1e-7 * bias.abs().max()).nonzero().flatten()
    pixels = to_image(weight[alive] / bias[alive, None], seen.task)
    fit = plausible(pixels)
    alive, pixels = alive[fit], pixels[fit].clamp(0, 1)
    if not len(alive):
        return nothing(seen)
    inputs = seen.task.to_model(pixels.to(seen.public.images))
    said = slopes(seen.model, layer, inputs)  # (M, classes, h)
    said = said[torch.arange(len(alive)), :, alive] / count
    off = (said / bias[alive, None] - 1).abs()  # (M, classes)
    doubt, labels = off.min(1)
    order = doubt.argsort()
    # a mixture claimed as an image costs more than one not claimed: it can take an exact image's place in the pairing
    order = order[: max(1, int((doubt < DOUBT[seen.update.kind]).sum()))]
    kept = order[distinct(pixels[order])][:count]
    return Reconstruction(pixels[kept].float(), assign_granted(seen, labels[kept], off[kept]))


def assign_granted(seen: Observation, labels: Tensor, cost: Tensor) -> Tensor:
    """`labels` (M,) or, if labels were granted, each of those to the image it costs least; cost (M, classes)."""
    from scipy.optimize import linear_sum_assignment

    granted = seen.granted.get("labels")
    if granted is None:
        return labels
    mine, theirs = linear_sum_assignment(cost[:, granted].cpu().nan_to_num(nan=1e9, posinf=1e9).numpy())
    labels = labels.clone()
    labels[mine] = granted[theirs]
    return labels


def public_inputs(seen: Observation, count: int = 64) -> Tensor:
    """Some public images, as the model takes them."""
    chosen = torch.linspace(0, len(seen.public.images) - 1, count).long()
    return seen.task.to_model(seen.public.images[chosen])


def head_scale(
    model: nn.Module, layer: nn.Linear, gradient: Tensor, sources: Tensor, public: Tensor, n: int
) -> tuple[Tensor, Tensor]:
    """What the head says of sources U (r, d) unmixed from n images: kappa with x_i = kappa_i U_i, and a label each.

    gradient (h, d) = sum_i delta_i U_i^T is solved for delta_i, which is kappa_i d_i / n with d_i = dL/dz of image i
    under its label; d is guessed from `public` inputs, class by class, on the neurons where delta_i is large.
    """
    delta = torch.linalg.lstsq(sources.T, gradient.T).solution  # (r, h)
    said = slopes(model, layer, public).double()  # (64, classes, h)
    guess = said.sum(0) / (said != 0).sum(0).clamp(min=1) / n  # over images that pass a neuron
    large = delta.abs() > 0.25 * delta.abs().amax(1, keepdim=True)
    return explain(delta * large, guess * large[:, None])


def explain(delta: Tensor, guess: Tensor) -> tuple[Tensor, Tensor]:
    """The multiple of a guess (r, classes, h) nearest in direction to delta (r, h), and of which class it is."""
    dots = (guess * delta[:, None]).sum(2)  # (r, classes)
    energy = guess.square().sum(2).clamp(min=1e-300)
    labels = (dots.abs() / energy.sqrt()).argmax(1)
    return (dots / energy).gather(1, labels[:, None]).squeeze(1), labels
