"""Learning to Invert. Wu, Chen, Guo, Weinberger, UAI 2023. https://arxiv.org/abs/2210.10880

    phi* = argmin_phi  E ||phi(Q(g(x))) - x||^2          x: public examples, Q: the defence, g: gradient at W

One network learns to read the examples off a defended update, on simulated clients with public data. It needs no
derivative of Q. For several examples the loss is the least over their orders. As it regresses to the prior, its score
means nothing without the mean of the class beside it. Ours: each tensor of an update is hashed to a few numbers, and a
delta is simulated as one step.
"""

import copy
import inspect
import sys
from dataclasses import asdict
from functools import lru_cache

import torch
from torch import Tensor, nn

from attacks.base import Attack, register
from core.errors import UsageError
from core.hyperparameters import hp
from core.protocol import Batch, Observation, Recipe, Reconstruction, Task
from core.rng import seeded_global_rng, stream
from defenses.base import PlainStep, parse
from models.generators import store
from utils.files import digest

WEIGHT_DECAY = 1e-4
LARGEST_BATCH = 64  # examples in an update: the network has an output for each


@register("lti")
class LearningToInvert(Attack):
    """Learning to Invert: a network trained on defended updates of simulated clients with public data."""

    citation = "Wu, Chen, Guo, Weinberger: Learning to Invert. UAI 2023"
    link = "https://arxiv.org/abs/2210.10880"
    trains = True
    threat = "honest-but-curious"
    requires = frozenset({"public"})
    returns_labels = False
    paper = {
        "units": (3000, "authors' main_learn_dlg.py"),
        "epochs": (200, "authors' main_learn_dlg.py"),
        "lr": (1e-4, "authors' main_learn_dlg.py"),
        "batch": (256, "authors' main_learn_dlg.py"),
    }

    simulations: int = hp(4000, "number of simulated clients that the network learns from", ge=2, smoke=8)
    features: int = hp(2048, "number of inputs of the network; the tensors of an update share them", ge=1, smoke=32)
    units: int = hp(512, "units of each of the two hidden layers", ge=1, smoke=8)
    epochs: int = hp(40, "passes over the simulated clients", ge=1, smoke=1)
    lr: float = hp(1e-3, "largest learning rate of Adam; it falls to zero by a cosine", gt=0)
    batch: int = hp(64, "number of simulated clients in a step of training", ge=1)

    def check(self, model: nn.Module, task: Task, recipe: Recipe, kind: str, num_examples: int) -> None:
        super().check(model, task, recipe, kind, num_examples)
        if num_examples > LARGEST_BATCH:
            raise UsageError(f"lti reads at most {LARGEST_BATCH} examples off an update: lower `batch_size`")

    def reconstruct(self, observation: Observation, rng: torch.Generator) -> Reconstruction:
        state = self._load_or_train(observation)
        network = self._network(observation, state["mean"], state["std"])
        network.load_state_dict({name: t for name, t in state.items() if name not in ("mean", "std", "losses")})
        hashed = self._hash(observation.update.ordered(observation.model))
        with torch.no_grad():
            examples = network(hashed[None]).view(-1, *observation.task.domain.shape)
        return Reconstruction(observation.task.domain.project(examples), None, tuple(state["losses"].tolist()))

    def _load_or_train(self, observation: Observation) -> dict[str, Tensor]:
        """The trained network and the statistics of its inputs, from the folder of trained generators."""
        assert observation.public is not None, "lti needs public examples"
        update, code = observation.update, digest(inspect.getsource(sys.modules[__name__]))
        facts = [asdict(self), asdict(observation.recipe), update.kind, update.num_examples]
        facts += [store.model_digest(observation.model), store.data_digest(observation.public), code]
        return store.load_or_compute("lti", facts, lambda: self._train(observation), update.device)

    def _train(self, observation: Observation) -> dict[str, Tensor]:
        inputs, targets = self._simulate(observation, stream("lti", "clients"))
        network = self._network(observation, inputs.mean(0), inputs.std(0))
        optimizer = torch.optim.Adam(network.parameters(), self.lr, weight_decay=WEIGHT_DECAY)
        steps = self.epochs * -(-len(inputs) // self.batch)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        rng, losses = stream("lti", "order"), []
        for _ in range(self.epochs):
            for chosen in torch.randperm(len(inputs), generator=rng).split(self.batch):
                loss = matched_error(network(inputs[chosen]).view_as(targets[chosen]), targets[chosen])
                grads = torch.autograd.grad(loss, list(network.parameters()))
                for parameter, grad in zip(network.parameters(), grads, strict=True):
                    parameter.grad = grad
                optimizer.step()
                schedule.step()
            losses.append(loss.item())
        state = {name: t.detach().contiguous() for name, t in network.state_dict().items()}
        return {**state, "mean": inputs.mean(0), "std": inputs.std(0), "losses": torch.tensor(losses)}

    def _simulate(self, observation: Observation, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """Hashed updates (M, D) of clients with public examples, and these examples (M, N, d)."""
        public, task, recipe = observation.public, observation.task, observation.recipe
        assert public is not None, "lti needs public examples"
        defense, count = parse(recipe.defense), observation.update.num_examples
        model = defense.on_model(copy.deepcopy(observation.model)).train(recipe.model_mode == "train")
        scale = recipe.total_step_weight(count) if observation.update.kind == "delta" else 1.0
        inputs, targets = [], []
        for _ in range(self.simulations):
            chosen = torch.randint(len(public.labels), (count,), generator=rng).to(public.labels.device)
            own = Batch(public.examples[chosen], public.labels[chosen])
            if task.domain.name == "image" and torch.rand((), generator=rng) < 0.5:
                own = Batch(own.examples.flip(-1), own.labels)
            with seeded_global_rng(rng):
                examples, labels = defense.on_batch(own, task, rng)
                step = PlainStep(model, task.domain.to_model(examples), labels, recipe)
                grads = defense.on_gradient(step, rng)
            pairs = zip(model.parameters(), grads, strict=True)
            update = tuple(torch.zeros_like(p) if g is None else scale * g for p, g in pairs)
            inputs.append(self._hash(defense.on_update(update, rng)))
            targets.append(own.examples.flatten(1))
        return torch.stack(inputs), torch.stack(targets)

    def _hash(self, tensors: tuple[Tensor, ...]) -> Tensor:
        """(D,): every tensor, of norm 1, by itself or as random signed sums of its entries."""
        share, parts = max(1, self.features // len(tensors)), []
        for index, tensor in enumerate(tensors):
            flat = tensor.detach().flatten().float()
            flat = flat / flat.norm().clamp(min=1e-30)
            if len(flat) > share:
                places, signs = _hashing(index, len(flat), share)
                flat = flat.new_zeros(share).index_add_(0, places.to(flat.device), signs.to(flat) * flat)
            parts.append(flat)
        return torch.cat(parts)

    def _network(self, observation: Observation, mean: Tensor, std: Tensor) -> nn.Module:
        outputs = observation.update.num_examples * torch.Size(observation.task.domain.shape).numel()
        with seeded_global_rng(stream("lti", "network")):
            layers = (
                *(nn.Linear(len(mean), self.units), nn.ReLU()),
                *(nn.Linear(self.units, self.units), nn.ReLU(), nn.Linear(self.units, outputs)),
            )
        return nn.Sequential(_Standardize(mean, std), *layers).to(mean.device)


@lru_cache(maxsize=256)
def _hashing(index: int, entries: int, share: int) -> tuple[Tensor, Tensor]:
    """For each entry of tensor `index`, the sum that it belongs to, and its sign there."""
    rng = stream("lti", "hash", index)
    places = torch.randint(share, (entries,), generator=rng)
    return places, torch.randint(2, (entries,), generator=rng) * 2 - 1


class _Standardize(nn.Module):
    """Inputs (M, D) with mean 0 and deviation 1; one that never varies becomes 0."""

    def __init__(self, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.mean, self.scale = mean, torch.where(std > 1e-6 * std.max(), 1 / std.clamp(min=1e-30), 0.0)

    def forward(self, x: Tensor) -> Tensor:
        return ((x - self.mean) * self.scale).clamp(-10, 10)


def matched_error(outputs: Tensor, targets: Tensor) -> Tensor:
    """Mean squared error of groups (M, N, d), each in the order of its targets that has the least."""
    if targets.shape[1] > 1:
        costs = torch.cdist(outputs.detach(), targets).square().cpu()
        from scipy.optimize import linear_sum_assignment

        order = torch.stack([torch.as_tensor(linear_sum_assignment(cost)[1]) for cost in costs])
        targets = targets.gather(1, order.to(targets.device)[:, :, None].expand_as(targets))
    return (outputs - targets).square().mean()
