"""FGLA, Fast Generation-Based Gradient Leakage Attacks. Xue et al., INFOCOM 2023. https://github.com/pigeon-dove/FGLA

    h_y = (dW_y - o_W) / (db_y - o_b),   o = (1 - 1/K) mean of the rows of absent classes,   x = G(h_y)

h_y is what the head received for the one example of class y, and G is a network that inverts the features of public
images under the broadcast model. Offsets are approximate. Ours are `refinements`, which make features exact for
K <= C - 2: a fixed point of  p_i = softmax(W h_i + b),   H = K (P - Y)^T+ dW.

Examples of one class share the mean of their features. As G regresses to its prior, its score means nothing without the
mean of the class beside it.
"""

import inspect
import sys
from dataclasses import asdict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attacks.base import Attack, register
from attacks.labels.inference import infer_labels
from attacks.linear.features import FeatureExtractor, cosine_annealing
from attacks.matching.matcher import mean_gradient
from attacks.optim.adam import Adam
from core.errors import UsageError
from core.hyperparameters import hp
from core.protocol import Observation, Recipe, Reconstruction, Task
from core.rng import seeded_global_rng, stream
from models.generators import store
from models.inspection import head_gradient, head_layer
from utils.files import digest

CUTOFF = 1e-4  # of singular values of the probabilities, relative to the largest; examples of one class are alike


@register("fgla")
class FGLA(Attack):
    """FGLA: features of the head's input from its gradient, and images from a network that inverts features."""

    citation = "Xue et al.: Fast Generation-Based Gradient Leakage Attacks. INFOCOM 2023"
    link = "https://openreview.net/forum?id=CYT8vnoupz"
    threat = "honest-but-curious"
    requires = frozenset({"public"})
    infers_labels = True
    kinds = frozenset({"continuous"})
    paper = {
        "refinements": (0, "as published"),
        "lr": (1e-4, "authors' gen_attack/train.py"),
        "mixing": (0.0, "authors' gen_attack/train.py"),
    }

    refinements: int = hp(30, "largest number of refinements of the features; 0: offsets alone, as published", ge=0)
    steps: int = hp(1500, "training steps of the generator", ge=1, smoke=2)
    batch: int = hp(64, "number of public images in a training step", ge=1, smoke=4)
    channels: int = hp(32, "channels of the generator before its last layer; twice as many before", ge=1, smoke=2)
    lr: float = hp(2e-3, "largest learning rate of Adam; it falls to zero by a cosine", gt=0)
    mixing: float = hp(0.5, "share of training images that are weighted means of two public ones", ge=0, le=1)

    def check(self, model: nn.Module, task: Task, recipe: Recipe, kind: str, num_examples: int) -> None:
        super().check(model, task, recipe, kind, num_examples)
        head = head_layer(model)
        *_, last = model.parameters()
        if not isinstance(head, nn.Linear) or head.bias is not last or head.out_features != task.num_classes:
            raise UsageError("fgla divides by the head's bias gradient, and this model has no linear head with a bias")
        head_gradient(tuple(model.parameters()), task.num_classes)

    def reconstruct(self, observation: Observation, rng: torch.Generator) -> Reconstruction:
        gradient = mean_gradient(observation, observation.update.ordered(observation.model))
        labels = infer_labels(gradient, observation, rng)
        weight, bias = head_gradient(gradient, observation.task.num_classes)
        head = head_layer(observation.model)
        assert bias is not None and isinstance(head, nn.Linear), "a head without bias: see check"
        features = offset_features(weight, bias, labels)
        own = head.weight.detach(), head.bias.detach()
        features, trace = refine(features, weight, bias, labels, *own, self.refinements)
        generator = self.generator(observation)
        with torch.no_grad():
            examples = observation.task.domain.project(generator(features.float().nan_to_num(0, 0, 0)))
        return Reconstruction(examples, labels, trace, len(trace))

    def generator(self, observation: Observation) -> nn.Module:
        """The network from features (N, D) to images, trained once on these public images and this model."""
        assert observation.public is not None, "fgla needs public images"
        code = digest(inspect.getsource(sys.modules[__name__]))
        facts = [{**asdict(self), "refinements": None}, asdict(observation.task.domain), code]
        facts += [store.model_digest(observation.model), store.data_digest(observation.public)]
        state = store.load_or_compute("fgla", facts, lambda: self.train(observation), observation.update.device)
        network = self.network(observation, len(state["mean"]))
        network.load_state_dict(state)
        return network

    def network(self, observation: Observation, size: int) -> "FeatureDecoder":
        with seeded_global_rng(stream("fgla", "network")):
            return FeatureDecoder(size, observation.task.domain.shape, self.channels).to(observation.update.device)

    def train(self, observation: Observation) -> dict[str, Tensor]:
        public, task, rng = observation.public, observation.task, stream("fgla", "training")
        assert public is not None, "fgla needs public images"
        images = torch.cat([public.examples, public.examples.flip(-1)])
        extract = FeatureExtractor(observation.model, head_layer(observation.model))
        features = extract.in_chunks(task.domain.to_model(images)).flatten(1)
        network = self.network(observation, features.shape[1])
        network.mean.copy_(features.mean(0))
        network.scale.copy_(1 / features.std(0).clamp(min=1e-3 * features.std(0).max().item() + 1e-12))
        parameters = list(network.parameters())
        optimizer = Adam(parameters)
        for step in range(self.steps):
            first, second = torch.randint(len(images), (2, self.batch), generator=rng)
            share = torch.rand(self.batch, generator=rng) * (torch.rand(self.batch, generator=rng) < self.mixing)
            mixed = images[first].lerp(images[second], share.view(-1, *[1] * (images.ndim - 1)).to(images))
            with torch.no_grad():
                inputs = extract(task.domain.to_model(mixed)).flatten(1)
            loss = (network(inputs) - mixed).square().mean()
            rate = cosine_annealing(self.lr, step, self.steps, 0.0)
            optimizer.step(torch.autograd.grad(loss, parameters), [rate] * len(parameters))
        return {name: t.detach().contiguous() for name, t in network.state_dict().items()}


def offset_features(weight: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
    """Head inputs (K, D) from the head's gradient (C, D) and (C,); those of one class (K,) share their mean."""
    counts = torch.bincount(labels, minlength=len(bias))
    own = 1 - counts / len(labels)  # share of the other examples, whose part of a row is that of an absent class
    absent = counts == 0
    rows, entries = (t[absent].mean(0) if absent.any() else torch.zeros_like(t[0]) for t in (weight, bias))
    top, bottom = weight - own[:, None] * rows, bias - own * entries
    return (top / torch.where(bottom == 0, torch.inf, bottom)[:, None])[labels]


def refine(
    features: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, own: Tensor, own_bias: Tensor, iterations: int
) -> tuple[Tensor, tuple[float, ...]]:
    """The features (K, D) with the least error in explaining the head's gradient, and the errors.

    own, own_bias: the head's parameters, (C, D) and (C,). As the rows of P - Y sum to zero, K <= C - 2 is needed.
    """
    count, h = len(labels), features.double()
    target, hot = weight.double(), F.one_hot(labels, len(bias)).double()
    best, errors = features, []  # relative squared errors of dW and db
    for _ in range(iterations + 1 if count <= len(bias) - 2 and features.isfinite().all() else 0):
        d = ((h @ own.double().T + own_bias.double()).softmax(1) - hot) / count  # (K, C)
        error = (d.T @ h - target).square().sum() / target.square().sum()
        error = error + (d.sum(0) - bias).square().sum() / bias.double().square().sum()
        if not error.isfinite():
            break
        if error < min(errors, default=torch.inf):
            best = h.to(features)
        errors.append(error.item())
        h = torch.linalg.pinv(d.T, rtol=CUTOFF) @ target
    return best, tuple(errors)


class FeatureDecoder(nn.Module):
    """Features (N, D) -> images (N, C, H, W) in [0, 1]: a linear layer and two upsampling convolutions."""

    mean: Tensor  # (D,), of public features
    scale: Tensor

    def __init__(self, size: int, shape: tuple[int, ...], width: int) -> None:
        super().__init__()
        self.shape, self.start = shape, (2 * width, -(-shape[1] // 4), -(-shape[2] // 4))
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("scale", torch.ones(size))
        self.first = nn.Linear(size, self.start[0] * self.start[1] * self.start[2])
        self.layers = nn.Sequential(
            *(nn.LeakyReLU(), nn.ConvTranspose2d(2 * width, width, 4, 2, 1)),
            *(nn.LeakyReLU(), nn.ConvTranspose2d(width, width, 4, 2, 1)),
            *(nn.LeakyReLU(), nn.Conv2d(width, shape[0], 3, padding=1), nn.Sigmoid()),
        )

    def forward(self, features: Tensor) -> Tensor:
        z = ((features - self.mean) * self.scale).clamp(-10, 10)
        images: Tensor = self.layers(self.first(z).view(-1, *self.start))
        return images[..., : self.shape[1], : self.shape[2]]
