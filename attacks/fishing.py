"""Fishing for User Data. Wen, Geiping, Fowl, Goldblum, Goldstein, ICML 2022. https://arxiv.org/abs/2202.00580

    dL/dW = (1/n) sum_i b (p_c(x_i) - [y_i = c]) ds(x_i)/dW,        s(x) = u . h(x),    u = 1 / d

The server zeroes the head but for row c, which is b u. A large bias of the other classes makes p_c = 0, so that only
examples of class c reach the body; the head's bias gradient tells how many there are of each class. If one class has a
single example, that is the answer. Otherwise the server asks the same clients again, with p_c rising from 0 to 1 where
s(x) passes a cutoff v. The number of examples above v follows from the bias gradient, and their mean s from the
weight gradient. Cutoffs are placed at the mean of the examples between the last two, until there is one alone.

The paper reads its gradient from one query, where examples of other classes above v remain. Here two queries are
subtracted: what is left are examples between the two cutoffs, of any class. Then `inner` attacks this one gradient.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from attacks.base import ATTACKS, Attack, register
from attacks.linear.layer import failed_reconstruction
from attacks.matching.matcher import mean_gradient
from core.errors import UsageError
from core.hyperparameters import hp
from core.protocol import Batch, Observation, Recipe, Reconstruction, Task, Update, by_name
from models.implants.fishing import chosen_class, class_query, cutoff_query, mark
from models.inspection import head_layer

SHARPEST = 1e6  # largest sharpness b, in units of 1 / s: rounding of s is 1e-7

Ask = Callable[[nn.Module], Update]


@dataclass(frozen=True)
class Answer:
    """The mean gradient that a query brought, with the body's divided by the sharpness b."""

    tensors: dict[str, Tensor]
    weight: Tensor  # (d,) of row c of the head
    bias: float  # of class c

    @classmethod
    def of(cls, tensors: dict[str, Tensor], chosen: int, sharpness: float = 1.0) -> "Answer":
        *body, weight, bias = tensors
        scaled = {name: tensors[name] / sharpness for name in body}
        scaled |= {name: tensors[name] for name in (weight, bias)}
        return cls(scaled, tensors[weight][chosen], tensors[bias][chosen].item())

    def minus(self, other: "Answer") -> dict[str, Tensor]:
        return {name: t - other.tensors[name] for name, t in self.tensors.items()}


@register("fishing")
class Fishing(Attack):
    """Fishing: one example of a batch is singled out by the head, and any attack reads its gradient."""

    citation = "Wen et al.: Fishing for User Data in Large-Batch Federated Learning. ICML 2022"
    link = "https://arxiv.org/abs/2202.00580"
    threat = "malicious-parameters"
    uses = frozenset({"num_examples", "recipe"})
    kinds = frozenset({"continuous", "tabular"})
    requires = frozenset({"linear_head"})
    returns_labels = False
    singles_out = True
    example_model = "lenet"

    inner: str = hp("ig_single", "attack on the gradient of the example that is alone", source="any attack here")
    inner_iterations: int = hp(0, "iterations of the inner attack; 0: its own default", smoke=3, ge=0)
    queries: int = hp(32, "largest number of queries of a batch; 2: classes alone", smoke=4, ge=1)
    sharpness: float = hp(1e5, "slope b of the head at a cutoff, in units of 1 / s", gt=0)

    @property
    def attack(self) -> Attack:
        """The inner attack."""
        cls = ATTACKS.find(self.inner)
        if cls is type(self) or cls.threat != "honest-but-curious":
            raise UsageError(f"`inner={self.inner}`: choose an honest-but-curious attack")
        if not self.inner_iterations:
            return cls()
        if "iterations" not in {field.name for field in dataclasses.fields(cls)}:  # type: ignore[arg-type]
            raise UsageError(f"`inner_iterations` does not apply to `inner={self.inner}`")
        return cls(iterations=self.inner_iterations)  # type: ignore[call-arg]

    def requirements(self) -> frozenset[str]:
        return self.requires | self.attack.requirements()

    def needs_workers(self) -> bool:
        return self.attack.needs_workers()

    def check(self, model: nn.Module, task: Task, recipe: Recipe, kind: str, num_examples: int) -> None:
        super().check(model, task, recipe, kind, num_examples)
        if recipe.loss != "cross_entropy":
            raise UsageError("fishing reads counts off the gradient of cross-entropy: choose `loss=cross_entropy`")
        norms = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
        if recipe.model_mode == "train" and norms:
            raise UsageError("fishing: BatchNorm in train mode mixes all examples of a batch: choose `model_mode=eval`")

    def implant(self, model: nn.Module, task: Task, public: Batch, recipe: Recipe | None = None) -> nn.Module:
        return class_query(model, 0)

    def query(self, model: nn.Module, ask: Ask, task: Task, recipe: Recipe) -> tuple[nn.Module, Update]:
        first = ask(model)
        n, classes = first.num_examples, task.num_classes
        tensors = self.mean(model, first, task, recipe)
        *_, bias = tensors.values()
        # p_j = 1 / (C - 1) for all but the first class
        counts = (n * (1 / (classes - 1) - bias)).round()
        counts[0] = (-n * bias[0]).round()
        rarest = int(torch.where(counts >= 1, counts, math.inf).argmin())
        single = first.kind == "gradient" or recipe.steps(n) == 1
        if self.queries == 1 or counts.max() < 1:
            return model, first
        query = class_query(model, rarest)
        update = ask(query)
        own = Update("gradient", self.mean(query, update, task, recipe), n)
        if counts[rarest] > 1 and self.queries > 2 and single:
            query, own = self.between_cutoffs(query, own, ask, task, recipe)
        mark(query, own)
        return query, own

    def between_cutoffs(
        self, top: nn.Module, highest: Update, ask: Ask, task: Task, recipe: Recipe
    ) -> tuple[nn.Module, Update]:
        """The model and gradient of one example, or of as few as the queries allow, by cutoffs."""
        chosen, n = chosen_class(top), highest.num_examples
        head_bias = highest.tensors[next(reversed(highest.tensors))]
        own = -n * head_bias[chosen].item()  # examples of class c

        def answer(cutoff: float, sharpness: float) -> Answer:
            query = cutoff_query(top, chosen, cutoff, sharpness)
            return Answer.of(self.mean(query, ask(query), task, recipe), chosen, sharpness)

        high = Answer.of(dict(highest.tensors), chosen)
        low = answer(-math.inf, 1.0)
        u = head_layer(top).weight[chosen].detach()
        asked, sharpness = 3, self.sharpness
        while round(n * (low.bias - high.bias)) > 1 and asked < self.queries:
            between = n * (low.bias - high.bias)
            mean = (n * (low.weight - high.weight) @ u / between).item()
            slope = sharpness / max(abs(mean), 1e-12)
            # beside the mean: two examples on the slope would count as one if they lay symmetrically
            middle = answer(mean + 1 / slope, slope)
            asked += 1
            above = n * middle.bias + own
            upper = round(above - n * high.bias - own)
            if abs(above - round(above)) > 0.005 or upper in (0, round(between)):
                if sharpness >= SHARPEST:
                    break  # their s are equal
                sharpness = min(8 * sharpness, SHARPEST)
                continue
            low, high = (middle, high) if 2 * upper <= between else (low, middle)  # the side with fewer
        return top, Update("gradient", high.minus(low), n)

    def mean(self, model: nn.Module, update: Update, task: Task, recipe: Recipe) -> dict[str, Tensor]:
        """The mean gradient by parameter name; a delta counts as one.

        Row c and its bias follow from the others, which are small and so not rounded: sum_j (p_j - [y = j]) = 0.
        """
        observation = Observation(task, recipe, model, update)
        *body, weight, bias = mean_gradient(observation, update.ordered(model))
        weight, bias, chosen = weight.clone(), bias.clone(), chosen_class(model)
        for tensor in (weight, bias):
            tensor[chosen] = 0
            tensor[chosen] = -tensor.sum(0)
        return by_name(model, (*body, weight, bias))

    def reconstruct(self, observation: Observation, rng: torch.Generator) -> Reconstruction:
        model, n = observation.model, observation.update.num_examples
        tensors = self.mean(model, observation.update, observation.task, observation.recipe)
        chosen, (*_, weight_name, bias_name) = chosen_class(model), tensors
        if not all(t.isfinite().all() for t in tensors.values()):
            return failed_reconstruction(observation)
        count = round(-n * tensors[bias_name][chosen].item())
        if count < 1:
            return failed_reconstruction(observation)
        scaled = {name: n / count * t for name, t in tensors.items()}
        # the head's other rows hold the gradient of all examples; that of class c follows from p_j = 1 / (C - 1)
        for name in (weight_name, bias_name):
            own = scaled[name][chosen]
            scaled[name] = (-own / (len(scaled[name]) - 1)).expand_as(scaled[name]).clone()
            scaled[name][chosen] = own
        recipe = Recipe(count, model_mode=observation.recipe.model_mode, loss=observation.recipe.loss)
        labels = torch.full((count,), chosen, device=observation.update.device)
        alone = dataclasses.replace(
            observation, recipe=recipe, update=Update("gradient", scaled, count), granted={"labels": labels}
        )
        self.attack.check(model, alone.task, recipe, "gradient", count)
        found = self.attack.reconstruct(alone, rng)
        return dataclasses.replace(found, labels=None)
