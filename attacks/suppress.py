"""Gradient suppression. Pasquini, Francati, Ateniese, CCS 2022. https://arxiv.org/abs/2111.07380

    u = sum_k (n_k / n) u_k,      u_k = 0 for all clients k but the victim v      =>      u_v = (n / n_v) u

Secure aggregation hides each update in a sum. A malicious server sends the victim the honest model and everybody else
one without a gradient: the last hidden layer is dead (bias -M before the activation, or a norm with zero weight), and
the head's weights are zero. Then the head receives zeros, W_head^T (p - y) = 0 reaches the body, and only the head's
bias, p - y, still has a gradient. Every parameter whose gradient is exactly zero on the silent model holds the victim's
update alone, and any other attack (`inner`) reads it from there. Parameters that others reach too become constants of
the model, so that the inner attack does without them.
"""

import copy
import dataclasses

import torch
from torch import Tensor, nn

from attacks.base import ATTACKS, Attack, register
from core.errors import UsageError
from core.hyperparameters import hp
from core.protocol import Observation, Recipe, Reconstruction, Task, Update
from models.inspection import head_layer
from models.meta import MetaModel

DEPTH = 1e3  # of a dead bias, in units of the largest sum of a row's absolute weights


@register("suppress")
class Suppress(Attack):
    """Gradient suppression: any attack on one client of a secure sum, whose other clients are silenced."""

    citation = "Pasquini, Francati, Ateniese: Eluding Secure Aggregation in Federated Learning. CCS 2022"
    link = "https://arxiv.org/abs/2111.07380"
    threat = "malicious-parameters"
    kinds = frozenset({"continuous", "tabular", "discrete"})
    isolates = True
    example_model = "lenet"

    inner: str = hp("ig_single", "attack on the victim's part of the sum", source="any attack of this suite")
    inner_iterations: int = hp(0, "iterations of the inner attack; 0: its own default", smoke=3, ge=0)

    @property
    def attack(self) -> Attack:
        """The inner attack."""
        cls = ATTACKS.find(self.inner)
        if cls is type(self) or cls.threat != "honest-but-curious":
            raise UsageError(f"`inner={self.inner}`: choose an honest-but-curious attack")
        fields = {field.name for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
        if not self.inner_iterations:
            return cls()
        if "iterations" not in fields:
            raise UsageError(f"`inner_iterations` does not apply to `inner={self.inner}`")
        return cls(iterations=self.inner_iterations)  # type: ignore[call-arg]

    def requirements(self) -> frozenset[str]:
        return self.attack.requirements()

    def needs_workers(self) -> bool:
        return self.attack.needs_workers()

    def check(self, model: nn.Module, task: Task, recipe: Recipe, kind: str, num_examples: int) -> None:
        super().check(model, task, recipe, kind, num_examples)
        is_kept, head = kept(model, task, recipe, kind), head_layer(model).weight
        in_head = {name: p is head for name, p in model.named_parameters()}
        if not any(is_kept[name] for name in is_kept if not in_head[name]):
            raise UsageError("suppress cannot silence clients that train this model by this recipe: all weights move")
        if self.attack.returns_labels and not any(is_kept[name] for name in is_kept if in_head[name]):
            raise UsageError(
                f"suppress: {self.inner} infers labels from the head's gradient, which in this model is mixed with "
                "that of other clients: choose `model=lenet`, `model=cnn`, `model=convnet64` or `model=fc2`"
            )

    def personalize(self, model: nn.Module, client: int) -> nn.Module:
        return silenced(model) if client else model

    def reconstruct(self, observation: Observation, rng: torch.Generator) -> Reconstruction:
        model, update, clients = observation.model, observation.update, observation.aggregate
        names = kept(model, observation.task, observation.recipe, update.kind)
        count = update.num_examples // clients
        tensors = {name: clients * t for name, t in update.tensors.items() if names[name]}
        batch_size = max(1, observation.recipe.batch_size // clients)
        recipe = dataclasses.replace(observation.recipe, batch_size=batch_size)
        alone = dataclasses.replace(
            observation,
            model=with_constants(model, {name for name, is_kept in names.items() if not is_kept}),
            update=Update(update.kind, tensors, count),
            recipe=recipe,
            aggregate=1,
        )
        attack = self.attack
        attack.check(alone.model, alone.task, recipe, update.kind, count)
        return attack.reconstruct(alone, rng)


@torch.no_grad()
def silenced(model: nn.Module) -> nn.Module:
    """A copy of the model whose body has no gradient: a dead layer before the head, and a head without weights."""
    silent = copy.deepcopy(model)
    head = head_layer(silent)
    layers = [m for m in silent.modules() if list(m.parameters(recurse=False))]
    before = layers[layers.index(head) - 1] if layers.index(head) else None
    head.weight.zero_()
    if isinstance(before, nn.Linear | nn.Conv2d):
        if before.bias is not None:
            before.bias.fill_(-DEPTH * (1 + before.weight.flatten(1).abs().sum(1).max().item()))
    elif before is not None:
        for parameter in before.parameters(recurse=False):
            parameter.zero_()
    return silent


def kept(model: nn.Module, task: Task, recipe: Recipe, kind: str) -> dict[str, bool]:
    """For each parameter whether a client with the silent model leaves it at exactly zero, on two sets of examples."""
    silent = MetaModel(silenced(model), recipe.model_mode, loss=recipe.loss)
    zero = {name: True for name, _ in model.named_parameters()}
    for seed in range(2):
        rng = torch.Generator().manual_seed(seed)
        count = 2
        inputs = task.domain.to_model(task.domain.init(count, rng))
        parameter = next(model.parameters())
        inputs = inputs.to(parameter) if inputs.is_floating_point() else inputs.to(parameter.device)
        labels = torch.randint(task.num_classes, (count,), generator=rng).to(parameter.device)
        targets = recipe.targets(inputs, labels)
        if kind == "gradient":
            sent: tuple[Tensor, ...] = silent.gradient(inputs, targets, create_graph=False)
        else:
            batches = [torch.arange(count)] * max(2, recipe.local_epochs)
            sent = silent.train(inputs, targets, batches, recipe, create_graph=False)
        for name, tensor in zip(zero, sent, strict=True):
            zero[name] &= not tensor.any().item()
    return zero


def with_constants(model: nn.Module, names: set[str]) -> nn.Module:
    """A copy of the model in which these parameters are buffers: no attack sees a gradient of them."""
    other = copy.deepcopy(model)
    for name in names:
        *path, own = name.split(".")
        layer = other.get_submodule(".".join(path))
        value = getattr(layer, own).detach()
        del layer._parameters[own]
        layer.register_buffer(own, value)
    return other
