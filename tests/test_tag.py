"""TAG: its objective is zero at the truth, its candidates are the words of the batch, and it finds their order."""

from pathlib import Path

import pytest
import torch

import data
from attacks import ATTACKS
from attacks.tag import candidates, token_embedding
from core.protocol import Batch, Observation, Recipe, by_name
from core.rng import stream
from federated.client import gradient
from models import MODELS, build

TEXT = data.load("text", base_datadir=Path("unused"), tokens=6, victims="tuning")


def observe(name: str, n: int) -> tuple[Batch, Observation]:
    words = len(TEXT.task.domain.words)
    model = build(name, (6,), 2, rng=stream(0, "model"), vocabulary=words, width=32)
    chosen = torch.randperm(len(TEXT.private), generator=stream(0, "data"))[:n]
    truth, recipe = TEXT.private.take(chosen), Recipe(n, loss=MODELS[name].loss)
    update = gradient(model, truth, TEXT.task, recipe, torch.Generator())
    return truth, Observation(TEXT.task, recipe, model, update, granted={"labels": truth.labels})


@pytest.mark.parametrize("name", ["gpt", "gpt_tied", "bert"])
def test_the_objective_is_zero_at_the_truth(name: str) -> None:
    truth, observation = observe(name, 2)
    tensors = observation.update.ordered(observation.model)
    named = by_name(observation.model, tensors)
    embedding = token_embedding(observation.model, TEXT.task.domain)
    words = torch.arange(embedding.num_embeddings)
    objective = ATTACKS["tag"]().objective(observation, embedding, named, tensors, words, torch.Generator())
    logits = 100 * torch.nn.functional.one_hot(truth.examples, len(words)).float()
    other = 100 * torch.nn.functional.one_hot(truth.examples.flip(1), len(words)).float()
    assert objective(logits) < 1e-4
    assert objective(other) > 1e-2


def test_candidates_are_the_words_of_the_batch() -> None:
    for name, inputs in (("gpt", slice(0, 5)), ("bert", slice(0, 6))):
        truth, observation = observe(name, 3)
        embedding = token_embedding(observation.model, TEXT.task.domain)
        found = candidates(observation.model, embedding, dict(observation.update.tensors))
        assert found.tolist() == truth.examples[:, inputs].unique().tolist()
    _, observation = observe("gpt_tied", 3)
    embedding = token_embedding(observation.model, TEXT.task.domain)
    assert len(candidates(observation.model, embedding, dict(observation.update.tensors))) == embedding.num_embeddings


def test_a_sentence_is_found() -> None:
    truth, observation = observe("gpt", 1)
    rec = ATTACKS["tag"](iterations=100).reconstruct(observation, torch.Generator().manual_seed(0))
    assert rec.trace[-1] < 0.5 * rec.trace[0]
    assert (rec.examples[0, :5] == truth.examples[0, :5]).sum() >= 4
