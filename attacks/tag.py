"""TAG. Deng, Wang, Li, Shang, Liu, Rajasekaran, Ding, Findings of EMNLP 2021. https://arxiv.org/abs/2103.06819

    min_u  sum_l ||g_l(u) - g_l*||^2 + a |g_l(u) - g_l*|_1,        x_p = sum_w softmax(u_p)_w E_w

For batches that dager refuses. The authors optimise any vectors x_p; here they are mixtures of words, so that the
targets of a language model, which are the words themselves, follow from u. Candidates are the words whose row of the
embedding's gradient is not zero: they are the words of the batch, which this gradient tells exactly. Where it tells
nothing (an embedding that is frozen, noisy, or shared with the output layer) all words are candidates.
"""

import copy
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from attacks.base import Attack, register
from attacks.labels.inference import infer_labels
from attacks.matching.matcher import mean_gradient
from attacks.matching.runs import Run, run_restarts, to_reconstruction
from attacks.optim.adam import Adam
from attacks.optim.loop import Function, Phase, descend
from core.domain import TextDomain
from core.hyperparameters import hp
from core.protocol import LOSSES, Observation, Reconstruction, by_name
from models.inspection import differentiable_attention

OURS = "ours, not tuned"


@register("tag")
class Tag(Attack):
    """TAG: sentences by matching gradients, in squares and absolute values."""

    citation = "Deng et al.: TAG, Gradient Attack on Transformer-based Language Models. EMNLP Findings 2021"
    link = "https://arxiv.org/abs/2103.06819"
    threat = "honest-but-curious"
    requires = frozenset({"attention"})
    uses = frozenset({"num_examples", "recipe"})
    kinds = frozenset({"discrete"})
    infers_labels = True
    returns_labels = False
    example_model = "gpt"
    paper = {"iterations": (2500, "LAMP's code, as its baseline"), "lr": (0.1, "LAMP's code")}

    iterations: int = hp(300, "number of steps in a run", source=OURS, ge=1, smoke=3)
    restarts: int = hp(1, "number of runs; the one with the lowest objective is the answer", ge=1)
    lr: float = hp(0.3, "Adam step of the logits, falling as half a cosine", source=OURS, gt=0)
    absolute: float = hp(0.01, "weight a of absolute differences", source="LAMP's code", ge=0)

    def reconstruct(self, observation: Observation, rng: torch.Generator) -> Reconstruction:
        domain, n = observation.task.domain, observation.update.num_examples
        assert isinstance(domain, TextDomain), domain
        embedding = token_embedding(observation.model, domain)
        gradient = mean_gradient(observation, observation.update.ordered(observation.model))
        named = by_name(observation.model, gradient)
        words = candidates(observation.model, embedding, named)
        objective = self.objective(observation, embedding, named, gradient, words, rng)

        def work(number: int) -> Run:
            start = torch.randn(n, *domain.shape, len(words), generator=rng)
            u = start.to(embedding.weight).requires_grad_()
            rates = [self.lr * (1 + math.cos(math.pi * i / self.iterations)) / 2 for i in range(self.iterations)]
            phase = Phase(rates=lambda i: rates[i : i + 1], steps=self.iterations)
            state = descend([u], Function(objective), Adam([u]), [phase], rng, run=(number, self.restarts))
            ids = words[state.best_variables[0].argmax(-1)]
            failed = not state.best < state.trace[0] and self.iterations > 1
            return Run(ids, torch.zeros(n).long(), state.best, tuple(state.trace), state.iterations, failed)

        found = to_reconstruction(run_restarts(self.restarts, rng, work))
        return Reconstruction(found.examples, None, found.trace, found.iterations, found.restarts, found.status)

    def objective(
        self,
        observation: Observation,
        embedding: nn.Embedding,
        named: dict[str, Tensor],
        gradient: tuple[Tensor, ...],
        words: Tensor,
        rng: torch.Generator,
    ) -> Callable[[Tensor], Tensor]:
        """The distance of gradients as a function of logits (N, L, candidates), in units of the target's square."""
        recipe = observation.recipe
        is_causal = recipe.loss == "next_token"
        labels = None if is_causal else infer_labels(gradient, observation, rng)
        place = next(name for name, m in observation.model.named_modules() if m is embedding)
        model = copy.deepcopy(observation.model).eval()
        given = Given()
        parent, _, own = place.rpartition(".")
        setattr(model.get_submodule(parent), own, given)
        matched = {name: p for name, p in model.named_parameters() if p.requires_grad and name in named}
        target = [named[name] for name in matched]
        scale = max(sum(t.square().sum().item() for t in target), 1e-30)
        vectors = embedding.weight.detach()[words]

        def distance(u: Tensor) -> Tensor:
            chosen = u.softmax(-1)  # (N, L, candidates)
            given.value = chosen @ vectors
            with differentiable_attention():
                logits = model(u.new_zeros(u.shape[:2], dtype=torch.int64))
            if is_causal:
                likely = logits.log_softmax(1)[:, words, :-1]  # (N, candidates, L - 1)
                loss = -(likely * chosen[:, 1:].transpose(1, 2)).sum(1).mean()
            else:
                loss = LOSSES[recipe.loss](logits, labels)
            grads = torch.autograd.grad(loss, list(matched.values()), create_graph=True)
            parts = [
                (g - t).square().sum() + self.absolute * (g - t).abs().sum() for g, t in zip(grads, target, strict=True)
            ]
            return torch.stack(parts).sum() / scale

        return distance


class Given(nn.Module):
    """In place of an embedding: `value` (N, L, d), whatever the ids are."""

    value: Tensor

    def forward(self, ids: Tensor) -> Tensor:
        return self.value


def token_embedding(model: nn.Module, domain: TextDomain) -> nn.Embedding:
    """The embedding of the vocabulary."""
    sizes = (m for m in model.modules() if isinstance(m, nn.Embedding) and m.num_embeddings == len(domain.words))
    return next(sizes)


def candidates(model: nn.Module, embedding: nn.Embedding, named: dict[str, Tensor]) -> Tensor:
    """The words (V',) whose row of the embedding's gradient is not zero; all of them if there are none, or most."""
    name = next(name for name, p in model.named_parameters() if p is embedding.weight)
    sizes = named[name].norm(dim=1)
    words = (sizes > 1e-6 * sizes.max()).nonzero().flatten()
    return words if 0 < len(words) < len(sizes) / 2 else torch.arange(len(sizes), device=sizes.device)
