"""Sentences: the spans behind DAGER, what it reconstructs, what it refuses, and how sentences are scored."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

import data
from attacks import ATTACKS
from attacks.text.spans import Probe, adapter_of, row_space
from core.domain import UNKNOWN, TextDomain
from core.errors import UsageError
from core.protocol import Batch, Recipe, Reconstruction, Task, Update
from core.rng import stream
from evaluation.baselines import Baselines
from evaluation.candidates import Candidates, Pool
from evaluation.evaluator import ScoringContext
from evaluation.scoring import scoring_of
from evaluation.text import bag_recall, rouge1
from federated.client import gradient, train
from models import MODELS, build
from models.inspection import attention_layers
from tests.commands import in_process, lines, only_run

TEXT = data.load("text", base_datadir=Path("unused"), tokens=8, victims="tuning")
WORDS = len(TEXT.task.domain.words)


def client(
    name: str, n: int, seed: int = 0, recipe: dict[str, object] | None = None, width: int = 64, dtype=torch.float32
) -> tuple[Batch, torch.nn.Module, Recipe, Update]:
    """n private sentences of eight words, a small transformer, and what a client sends."""
    model = build(name, (8,), 2, rng=stream(seed, "model"), vocabulary=WORDS, width=width).to(dtype)
    chosen = torch.randperm(len(TEXT.private), generator=stream(seed, "data"))[:n]
    truth = TEXT.private.take(chosen)
    ordered = Recipe(n, loss=MODELS[name].loss, **(recipe or {}))
    rng = stream(seed, "client")
    if recipe and "lr" in recipe:
        return truth, model, ordered, train(model, truth, TEXT.task, ordered, rng)[0]
    return truth, model, ordered, gradient(model, truth, TEXT.task, ordered, rng)


def attacked(
    name: str, n: int, seed: int = 0, recipe=None, width: int = 64, **hyperparameters
) -> tuple[Tensor, Tensor]:
    """The true sentences and their reconstructions, without the last word of a language model."""
    truth, model, ordered, update = client(name, n, seed, recipe, width)
    rec = ATTACKS["dager"](**hyperparameters)(
        model, update.tensors, task=TEXT.task, num_examples=n, recipe=ordered, kind=update.kind
    )
    seen = 7 if ordered.loss == "next_token" else 8
    assert (rec.examples[:, seen:] == UNKNOWN).all()
    return truth.examples[:, :seen], rec.examples[:, :seen]


def exact(truth: Tensor, rec: Tensor) -> int:
    found = {tuple(row) for row in rec.tolist()}
    return sum(tuple(row) in found for row in truth.tolist())


# ---------------------------------------------------------------------------------------------- the networks


def test_a_decoder_is_causal_and_trained_on_next_tokens() -> None:
    truth, model, _, update = client("gpt", 3)
    ids = truth.examples
    logits = model(ids)
    assert logits.shape == (3, WORDS, 8)
    changed = ids.clone()
    changed[:, 5] = 0
    torch.testing.assert_close(model(changed)[..., :5], logits[..., :5])
    assert not torch.equal(model(changed)[..., 5:], logits[..., 5:])
    log_p = logits.log_softmax(1)
    by_hand = -sum(log_p[i, ids[i, p + 1], p] for i in range(3) for p in range(7)) / 21
    grads = torch.autograd.grad(by_hand, list(model.parameters()))
    for grad, sent in zip(grads, update.tensors.values(), strict=True):
        torch.testing.assert_close(grad, sent, rtol=1e-3, atol=1e-6)


def test_a_tied_head_is_the_embedding_and_the_default_size_is_a_million() -> None:
    tied, own = (build(name, (16,), 2, vocabulary=3000) for name in ("gpt_tied", "gpt"))
    assert tied.head.weight is tied.embedding.token.weight
    assert sum(p.numel() for p in tied.parameters()) + 3000 * 128 == sum(p.numel() for p in own.parameters())
    assert 0.7e6 < sum(p.numel() for p in tied.parameters()) < 1e6


@pytest.mark.parametrize("name", ["gpt", "gpt_tied", "bert"])
def test_transformers_are_twice_differentiable(name: str) -> None:
    truth, model, _, _ = client(name, 2)
    loss = model(truth.examples).square().mean()
    weight = attention_layers(model)[0].weight
    (grad,) = torch.autograd.grad(loss, weight, create_graph=True)
    (second,) = torch.autograd.grad(grad.square().sum(), weight)
    assert second.isfinite().all()
    assert second.abs().sum() > 0


# ---------------------------------------------------------------------------------------------- the spans


@pytest.mark.parametrize("name", ["gpt", "gpt_tied", "bert"])
def test_inputs_of_attention_layers_lie_in_the_row_spans_of_their_gradients(name: str) -> None:
    truth, model, _, update = client(name, 3, dtype=torch.float64)
    layers = attention_layers(model)
    probe = Probe(model, layers)
    weights = {id(p): update.tensors[key] for key, p in model.named_parameters()}
    last = 7 if name != "bert" else 8
    for index, layer in enumerate(layers):
        span = row_space(weights[id(layer.weight)], 3 * last, 1e-12)
        assert span.rank <= 3 * last
        assert span.distances(probe.inputs(truth.examples, index)[:, :last]).max() < 1e-6
        noise = torch.randn(500, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        expected = math.sqrt(1 - span.rank / 64)
        assert abs(span.distances(noise).mean().item() - expected) < 0.02
    if name != "bert":  # the last token has no gradient, so it is no part of the span
        span = row_space(weights[id(layers[1].weight)], 21, 1e-12)
        assert span.distances(probe.inputs(truth.examples, 1)[:, 7]).min() > 0.1


def test_a_span_keeps_what_lies_above_the_noise() -> None:
    rng = torch.Generator().manual_seed(0)
    rows = torch.randn(90, 3, generator=rng) @ torch.randn(3, 30, generator=rng)
    noisy = rows + 1e-3 * torch.randn(90, 30, generator=rng)
    assert row_space(noisy, 30, 1e-9).rank == 30
    assert row_space(noisy, 30, 1e-9, noise=1e-3).rank == 3
    assert row_space(rows, 30, 1e-6).rank == 3


# ---------------------------------------------------------------------------------------------- dager


@pytest.mark.parametrize(("name", "n"), [("gpt", 1), ("gpt", 4), ("gpt", 8), ("gpt_tied", 4), ("bert", 1), ("bert", 2)])
def test_dager_is_exact(name: str, n: int) -> None:
    for seed in range(2):
        truth, rec = attacked(name, n, seed)
        assert rec.shape == truth.shape
        assert exact(truth, rec) == n


@pytest.mark.parametrize("trained", [False, True])
def test_adapters_leak_as_much_while_their_rank_exceeds_the_tokens(trained: bool) -> None:
    """B != 0: dL/dA spans the inputs. B = 0: dL/dB spans their projections, which decide as well."""
    truth, model, ordered, _ = client("gpt_lora", 2, width=64, seed=1)
    layers = attention_layers(model)
    if trained:
        with torch.no_grad():
            for layer in layers:
                adapter = adapter_of(model, layer)
                adapter.b.copy_(0.02 * torch.randn(adapter.b.shape, generator=stream(0, "b")))
    update = gradient(model, truth, TEXT.task, ordered, stream(0, "client"))
    moved = {name for name, tensor in update.tensors.items() if tensor.any()}
    assert moved == {f"blocks.{i}.attention.qkv.{key}" for i in range(2) for key in ("ab" if trained else "b")}
    rec = ATTACKS["dager"]()(model, update.tensors, task=TEXT.task, num_examples=2, recipe=ordered)
    assert exact(truth.examples[:, :7], rec.examples[:, :7]) == 2
    with pytest.raises(UsageError, match="adapters of rank 32"):
        ATTACKS["dager"]().check(model, TEXT.task, ordered, "gradient", 5)


def test_dager_with_the_papers_thresholds_is_exact() -> None:
    truth, rec = attacked("gpt", 4, selection="threshold")
    assert exact(truth, rec) == 4


@pytest.mark.parametrize("lr", [1e-3, 1e-2])
def test_dager_is_exact_after_five_local_steps(lr: float) -> None:
    truth, rec = attacked("gpt", 3, recipe={"local_epochs": 5, "lr": lr})
    assert exact(truth, rec) == 3


def test_more_noise_leaves_fewer_tokens() -> None:
    right = []
    for sigma in (1e-6, 1e-3, 1.0):
        truth, rec = attacked("gpt", 2, recipe={"defense": f"gauss(sigma={sigma})"}, beams=2)
        right.append(max((truth == other).double().mean().item() for other in (rec, rec.flip(0))))
    assert right[0] == 1
    assert right[0] >= right[1] >= right[2]
    assert right[2] < 0.2


def test_a_shuffled_embedding_recovers_nothing() -> None:
    """The control: with another table the same gradient names other words."""
    truth, model, recipe, update = client("gpt", 4)
    table = model.embedding.token.weight.data
    model.embedding.token.weight.data = table[torch.randperm(len(table), generator=torch.Generator().manual_seed(1))]
    rec = ATTACKS["dager"]()(model, update.tensors, task=TEXT.task, num_examples=4, recipe=recipe)
    assert exact(truth.examples[:, :7], rec.examples[:, :7]) == 0
    assert max((truth.examples[i] == rec.examples[j]).sum() for i in range(4) for j in range(len(rec.examples))) <= 1


def test_dager_refuses_a_batch_that_spans_everything() -> None:
    model = build("gpt", (8,), 2, vocabulary=WORDS, width=64)
    attack = ATTACKS["dager"]()
    attack.check(model, TEXT.task, Recipe(9, loss="next_token"), "gradient", 9)
    with pytest.raises(UsageError, match=r"70 tokens.*all 64 dimensions.*`batch_size`"):
        attack.check(model, TEXT.task, Recipe(10, loss="next_token"), "gradient", 10)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("dlg --dataset text --model gpt", "does not reconstruct sentences; choose one of baseline, dager"),
        ("dager --model gpt", "--model gpt does not take images"),
        ("dager", "dager does not reconstruct images"),
        ("dager --dataset text", "--model lenet does not take sentences; choose one of bert, gpt, gpt_lora, gpt_tied"),
        ("dager --dataset text --model gpt --width 30", "--width 30 must be a multiple of 4"),
        ("dager --dataset text --model gpt --image-size 16", "--image-size does not apply to --dataset text"),
        ("dlg --tokens 16", "--tokens does not apply to --dataset photos"),
        ("dager --dataset text --model gpt --normalize half", "--normalize half applies to images"),
        ("dager --dataset text --model gpt --public noise", "--public noise applies to images"),
        ("dager --dataset textfile --model gpt --base-datadir /nowhere", "cannot read /nowhere"),
        ("dager --dataset text --model gpt --batch-size 9", "all 128 dimensions"),
        ("dager --dataset text --model gpt --tokens 20000", "too few words"),
    ],
)
def test_what_does_not_apply_to_sentences_is_one_line(
    flags: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert in_process("main_grad.py", [*flags.split(), "--out", str(tmp_path)], monkeypatch) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------- the data


def test_no_part_of_the_text_quotes_another() -> None:
    whole = data.load("text", base_datadir=Path("unused"))
    parts = {
        "tuning": data.load("text", base_datadir=Path("unused"), victims="tuning").private,
        "reporting": data.load("text", base_datadir=Path("unused"), victims="reporting").private,
        "public": whole.public,
        "test": whole.test,
    }
    assert len(whole.private) == len(parts["tuning"]) + len(parts["reporting"])
    seen: dict[tuple[int, ...], str] = {}
    for name, part in parts.items():
        assert len(part) > 300
        for row in part.take(range(len(part))).examples.tolist():
            for i in range(9):
                assert seen.setdefault(tuple(row[i : i + 8]), name) == name
    stop = whole.task.domain.encode(["."])
    batch = whole.private.take(range(50))
    assert torch.equal(batch.labels == 1, (batch.examples == stop).any(1))


def test_a_text_file_of_ones_own(tmp_path: Path) -> None:
    words = [f"w{chr(97 + i % 26)}{chr(97 + i // 26 % 26)}" for i in range(600)]
    (tmp_path / "mine.txt").write_text(" ".join(words).title())
    own = data.load("textfile", base_datadir=tmp_path / "mine.txt", tokens=10)
    assert own.task.domain.shape == (10,)
    assert own.task.domain.render(own.private.take([0]).examples[0]) == " ".join(words[:10])
    assert data.load("textfile", base_datadir=tmp_path).fingerprint != own.fingerprint


def test_a_python_without_its_topics_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(UsageError, match=r"libpython3-stdlib.*`dataset=textfile`"):
        data.load("text", base_datadir=Path("unused"))


def test_rendering_and_projection() -> None:
    domain = TextDomain((4,), (",", "a", "b"))
    assert domain.render(torch.tensor([1, 0, 2, UNKNOWN])) == "a, b …"
    assert domain.project(torch.tensor([[-3.0, 0.4, 1.6, 9.0]])).tolist() == [[UNKNOWN, 0, 2, 2]]
    assert torch.equal(domain.encode(["b", "a"]), torch.tensor([2, 1]))
    for method in (domain.project_, domain.regularizer, domain.smooth_regularizer, domain.from_unbounded):
        with pytest.raises(TypeError, match="discrete"):
            method(torch.zeros(1, 4))


# ---------------------------------------------------------------------------------------------- the scores

DOMAIN = TextDomain((5,), tuple("abcdefghij"))


def scored(truth: list[list[int]], guesses: list[list[int]], loss: str = "cross_entropy", candidates: int = 0):
    public = Batch(torch.tensor([[0, 1, 2, 3, 4], [0, 1, 2, 3, 5], [0, 9, 8, 3, 5]]), torch.tensor([0, 0, 1]))
    pool = Pool(
        torch.zeros(candidates).long(), lambda i: torch.stack([(i * 7 + k * i // 10) % 10 for k in range(5)], 1)
    )
    context = ScoringContext(
        Task(DOMAIN, 2),
        Baselines(public, DOMAIN.typical),
        candidates=Candidates([pool], 0) if candidates else None,
        recipe=Recipe(1, loss=loss),
    )
    batch = Batch(torch.tensor(truth), torch.zeros(len(truth)).long())
    return scoring_of(DOMAIN).score(batch, Reconstruction(torch.tensor(guesses).view(-1, 5)), context)


def test_rouge_and_bags_are_those_of_their_papers() -> None:
    truth = torch.tensor([1, 1, 2, 3])
    assert rouge1(truth, torch.tensor([3, 2, 1, 1])) == 1
    assert rouge1(truth, torch.tensor([1, 4, 4, 4])) == pytest.approx(2 * 1 / 8)
    assert rouge1(truth, torch.tensor([5, 4, 4, 4])) == 0
    assert bag_recall(truth, torch.tensor([[1, 7, 7, 7], [2, 7, 7, 7]])) == pytest.approx(2 / 3)


def test_sentences_are_paired_one_to_one_for_the_most_tokens() -> None:
    rows, rebuilt, _ = scored([[1, 2, 3, 4, 5], [1, 2, 3, 4, 9]], [[1, 2, 3, 4, 9], [1, 2, 0, 0, 0]])
    assert [row["match"] for row in rows] == [1, 0]
    assert [row["token_accuracy"] for row in rows] == [0.4, 1]
    assert [row["exact"] for row in rows] == [0, 1]
    assert rebuilt.tolist() == [[1, 2, 0, 0, 0], [1, 2, 3, 4, 9]]


def test_the_last_word_of_a_language_model_is_not_scored() -> None:
    for last, known in ((UNKNOWN, None), (5, True), (6, False)):
        (row,), _, _ = scored([[1, 2, 3, 4, 5]], [[1, 2, 3, 4, last]], loss="next_token")
        assert (row["exact"], row["tokens"], row["last_token"]) == (1, 4, known)
    (row,), _, _ = scored([[1, 2, 3, 4, 5]], [[1, 2, 3, 4, UNKNOWN]])
    assert (row["token_accuracy"], row["tokens"]) == (0.8, 5)


def test_a_missed_sentence_is_scored_with_the_most_frequent_words() -> None:
    rows, rebuilt, _ = scored([[0, 1, 2, 3, 9], [5, 5, 5, 5, 5]], [[5, 5, 5, 5, 5]])
    assert [row["match"] for row in rows] == [None, 0]
    assert rebuilt[0].tolist() == [0, 1, 2, 3, 5]
    assert rows[0]["token_accuracy"] == rows[0]["baseline_token_accuracy"] == 0.8
    rows, _, _ = scored([[0, 1, 2, 3, 9]], [])
    assert rows[0]["match"] is None


def test_who_never_looks_is_at_the_null() -> None:
    """Reconstructions that are candidates themselves identify nobody and stand no higher than the null."""
    _, _, record = scored([[1, 2, 3, 4, 5]], [[1, 2, 3, 4, 5]], candidates=200)
    assert record["null"]["token_accuracy"][0] < 0.4
    rows, _, record = scored([[9, 9, 9, 9, 9]], [[7, 7, 8, 9, 9]], candidates=200)
    assert rows[0]["identified"] is False
    assert rows[0]["token_accuracy"] == 0.4


@pytest.mark.parametrize(
    ("page", "flags"),
    [("main_grad.py", ["--batch-size", "2"]), ("main_fed.py", ["--client-images", "2", "--clients", "2"])],
)
def test_a_run_on_sentences(page: str, flags: list[str], tmp_path: Path, monkeypatch, capsys) -> None:
    common = ["--dataset", "text", "--model", "gpt", "--width", "32", "--tokens", "8", "--trials", "2", "--jobs", "1"]
    assert in_process(page, ["dager", *common, *flags, "--out", str(tmp_path)], monkeypatch) == 0
    run, out = only_run(tmp_path), capsys.readouterr().out
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["domain"], summary["images"], summary["exact"]["share"]) == ("text", 4, 1)
    assert summary["verdict"] == "leaks"
    assert summary["over_null"]["mean"] > 0.5
    assert [row["exact"] for row in lines(run / "rows.jsonl")] == [1] * 4
    page_text = (run / "rebuilt.md").read_text()
    assert page_text.count("- rebuilt: ") == 4
    assert "has no gradient" in page_text
    assert "4 of 4 sentences exact" in " ".join(out.split())
    assert not (run / "grid.png").exists()
