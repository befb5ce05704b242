"""DAGER. Petrov, Dimitrov, Baader, Müller, Vechev, NeurIPS 2024. https://arxiv.org/abs/2405.15586

    Z = X W^T  =>  rowspan dL/dW = span(X),      dist(v) = | v/|v| - P v/|v| |      P: projector on the row span

X (n, d) are the inputs of an attention layer at all n tokens of the batch. If n < d, then a token whose input lies
outside the span was not there. The first layer's input depends on one token and its position. In a decoder the second
layer's input depends on a prefix, so that sentences are built from the left, and a wrong prefix is rejected at once; in
an encoder it depends on the whole sentence.

The authors accept what is nearer than fixed thresholds (`--paper`). Here candidates are ranked by their distance, and
what is much farther than the B-th nearest is dropped: local steps and noise lift all distances alike.

The last token of a sentence enters no loss of a language model: it has no gradient in these layers.
"""

import dataclasses
import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from attacks.base import Attack, register
from attacks.text.search import Rules, decode, distinct, encode, token_candidates
from attacks.text.spans import Probe, Span, adapter_of, row_space
from core.domain import UNKNOWN, TextDomain
from core.errors import UsageError
from core.hyperparameters import hp
from core.protocol import Observation, Recipe, Reconstruction, Task
from defenses.base import parse
from models.inspection import attention_layers

OURS = "ours, tuning victims"
SPARE = 8  # dimensions outside the span that a distance needs


@register("dager")
class Dager(Attack):
    """DAGER: sentences whose hidden states lie in the row spans of two attention layers' gradients."""

    citation = "Petrov et al.: DAGER, Exact Gradient Inversion for Large Language Models. NeurIPS 2024"
    link = "https://arxiv.org/abs/2405.15586"
    threat = "honest-but-curious"
    requires = frozenset({"attention"})
    kinds = frozenset({"discrete"})
    returns_labels = False
    example_model = "gpt"
    paper = {
        "selection": ("threshold", "authors' code"),
        "rank_tolerance": (1e-7, "authors' code, batches of 1 and 2"),
    }

    selection: Literal["ranked", "threshold"] = hp(
        "ranked", "choice of candidates: the nearest by rank, or all below two thresholds", source=OURS
    )
    token_threshold: float = hp(1e-5, "largest distance in the first layer, with thresholds", gt=0)
    sentence_threshold: float = hp(1e-3, "largest distance in the second layer, with thresholds", gt=0)
    margin: float = hp(
        30.0, "largest distance in units of the B-th nearest, with ranks, for B sentences", source=OURS, ge=1
    )
    beams: int = hp(8, "number of prefixes for each sentence, with ranks", source=OURS, smoke=2, ge=1)
    rank_tolerance: float = hp(1e-6, "least singular value of a span in units of the largest", gt=0, lt=1)
    extra_rank: int = hp(30, "dimensions of the span beyond the number of tokens, after local steps or noise", ge=0)
    restarts: int = hp(16, "number of starts for each sentence of an encoder", source=OURS, smoke=2, ge=1)

    def check(self, model: nn.Module, task: Task, recipe: Recipe, kind: str, num_examples: int) -> None:
        super().check(model, task, recipe, kind, num_examples)
        if recipe.model_mode == "train" and any(isinstance(m, nn.Dropout) and m.p > 0 for m in model.modules()):
            raise UsageError("dager needs hidden states without dropout: choose `model_mode=eval`")
        layer, tokens = attention_layers(model)[0], num_examples * _tokens(task, recipe)
        width, adapter = layer.in_features, adapter_of(model, layer)
        if adapter is not None and tokens >= len(adapter.a):
            raise UsageError(
                f"dager: {num_examples} sentences have {tokens} tokens with a gradient, and adapters of rank "
                f"{len(adapter.a)} show no more dimensions: lower `batch_size` or `tokens`, or raise `width`"
            )
        if tokens >= width:
            raise UsageError(
                f"dager: {num_examples} sentences have {tokens} tokens with a gradient, and these span all {width} "
                "dimensions of a hidden state, so that no token can be ruled out: lower `batch_size` or `tokens`, or "
                "raise `width`"
            )

    def reconstruct(self, observation: Observation, rng: torch.Generator) -> Reconstruction:
        domain, count = observation.task.domain, observation.update.num_examples
        assert isinstance(domain, TextDomain), domain
        length = _tokens(observation.task, observation.recipe)
        layers = attention_layers(observation.model)[:2]
        probe, spans = Probe(observation.model, layers), self.spans(observation, layers)
        thresholds = (self.token_threshold, self.sentence_threshold) if self.selection == "threshold" else None
        rules = Rules(max(40, count * length), self.beams, self.margin, thresholds)
        candidates = token_candidates(probe, spans[0], len(domain.words), length, count, rules)
        search: Any = decode if _is_causal(observation.recipe) else encode
        sentences, scores = search(probe, spans[1], candidates, count, rules, *self._starts(observation, rng))
        chosen = distinct(sentences, scores, count, self.sentence_threshold)
        examples = torch.full((len(chosen), *domain.shape), UNKNOWN)
        examples[:, : sentences.shape[1]] = sentences[chosen]
        found = len(chosen) == count and sentences.shape[1] == length
        return Reconstruction(
            examples,
            trace=tuple(scores[chosen].tolist()),
            iterations=length,
            status="ok" if found else "diverged",
        )

    def _starts(self, observation: Observation, rng: torch.Generator) -> tuple[Any, ...]:
        return () if _is_causal(observation.recipe) else (self.restarts, rng)

    def spans(self, observation: Observation, layers: list[nn.Linear]) -> list[Span]:
        """The row spans of the gradients of two layers; after local steps those of the mean gradient."""
        update, recipe = observation.update, observation.recipe
        tensors = dict(
            zip((id(p) for p in observation.model.parameters()), update.ordered(observation.model), strict=True)
        )
        tokens = update.num_examples * _tokens(observation.task, recipe)
        noise = parse(recipe.defense).counter().noise  # None: of unknown size
        exact = noise == 0 and (update.kind == "gradient" or recipe.steps(update.num_examples) == 1)
        found = []
        for layer in layers:
            weight, projection = _trained(observation.model, layer)
            width = weight.shape[1]
            most = min(tokens, width - 1) if exact else max(1, min(tokens + self.extra_rank, width - SPARE))
            rounding = _rounding(weight, recipe.steps(update.num_examples)) if update.kind == "delta" else 0.0
            size = math.hypot(noise or 0.0, rounding)
            span = row_space(tensors[id(weight)].cpu(), most, self.rank_tolerance, size)
            found.append(dataclasses.replace(span, projection=projection))
        return found


def _trained(model: nn.Module, layer: nn.Linear) -> tuple[nn.Parameter, Tensor | None]:
    """The weight of a layer that is trained, and what its rows see of the layer's inputs: None for all.

    With an adapter B A, dL/dA = B^T (dL/dZ)^T X; while B is zero, only dL/dB = (dL/dZ)^T (X A^T) is not.
    """
    adapter = adapter_of(model, layer)
    if adapter is None:
        return layer.weight, None
    if adapter.b.any():
        return adapter.a, None
    return adapter.b, adapter.a.detach().double().cpu()


def _rounding(weight: Tensor, steps: int) -> float:
    """The standard deviation of the rounding error of a difference of weights after so many steps."""
    return float(weight.detach().abs().mean()) * torch.finfo(weight.dtype).eps * math.sqrt(steps / 12)


def _is_causal(recipe: Recipe) -> bool:
    return recipe.loss == "next_token"


def _tokens(task: Task, recipe: Recipe) -> int:
    """The tokens of a sentence that have a gradient: all but the last of a language model."""
    return task.domain.shape[0] - int(_is_causal(recipe))
