"""What an attacker who knows a defence does: its objective vanishes at the truth, where the plain one does not."""

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from attacks import ATTACKS
from attacks.matching.matcher import GradientMatcher
from core.errors import UsageError
from core.protocol import Batch, Observation, Recipe, image_task
from defenses.base import parse
from defenses.dropout import Masked
from defenses.precode import find_bottleneck
from evaluation.metrics import psnr
from experiments.defenses import frontier
from federated.client import gradient, train
from models import build
from models.inspection import head_layer
from tests.test_attacks import smooth_pictures

TASK = image_task((3, 8, 8), 4, (0.5,) * 3, (0.5,) * 3)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def batch_of(n: int, seed: int = 1) -> Batch:
    return Batch(torch.rand(n, 3, 8, 8, generator=rng(seed)).double(), torch.arange(n) % TASK.num_classes)


def network(defense: str = "none", name: str = "lenet") -> nn.Module:
    model = build(name, TASK.domain.shape, TASK.num_classes, rng=rng(3)).double()
    return parse(defense).on_architecture(model, rng(4))


def observe(net: nn.Module, batch: Batch, recipe: Recipe, known: str, kind: str = "gradient") -> GradientMatcher:
    """The update of a client as an attacker sees it who believes in the defence `known`."""
    update = (
        gradient(net, batch, TASK, recipe, rng()) if kind == "gradient" else train(net, batch, TASK, recipe, rng())[0]
    )
    believed = Recipe(recipe.batch_size, recipe.local_epochs, recipe.lr, defense=known)
    return GradientMatcher(Observation(TASK, believed, net, update))


def relative(matcher: GradientMatcher, batch: Batch, *unknowns: Tensor) -> float:
    return matcher.squared_distance(*batch, *unknowns).item() / matcher.target_norm_sq


@pytest.mark.parametrize(
    ("defense", "kind"),
    [
        ("clip(bound=0.1)", "gradient"),
        ("dpsgd(bound=0.5, sigma=0.0)", "gradient"),
        ("dpsgd(bound=0.5, sigma=0.0)", "delta"),
        ("topk(share=0.1)", "gradient"),
        ("topk(share=0.05, scope=global)", "delta"),
        ("soteria(share=0.8)", "gradient"),
        ("oasis()", "gradient"),
        ("oasis(copies=both)", "delta"),
        ("oasis()+clip(bound=0.1)+topk(share=0.1)", "delta"),
        ("censor(trials=2)", "gradient"),
        ("censor(trials=2)", "delta"),
        ("outpost(decay=0.0, prune=0.5)", "gradient"),
    ],
)
def test_the_objective_vanishes_at_the_truth_for_who_knows_the_defence(defense: str, kind: str) -> None:
    net, batch, recipe = network(), batch_of(3), Recipe(3, lr=0.1, defense=defense)
    assert relative(observe(net, batch, recipe, defense, kind), batch) < 1e-16
    assert relative(observe(net, batch, recipe, "none", kind), batch) > 1e-4
    elsewhere = Batch(1 - batch.examples, batch.labels)
    assert relative(observe(net, batch, recipe, defense, kind), elsewhere) > 1e-3


def test_copies_of_oasis_follow_their_minibatch_through_several_steps() -> None:
    net, batch, recipe = network(), batch_of(4), Recipe(2, 2, lr=0.1, defense="oasis()")
    update = train(net, batch, TASK, recipe, rng(8))[0]
    order = recipe.batches(4, rng(8))
    matcher = GradientMatcher(Observation(TASK, recipe, net, update), "unrolled", order)
    assert relative(matcher, batch) < 1e-16


@pytest.mark.parametrize("defense", ["sign()", "qsgd(levels=7)", "qsgd(levels=7, norm=l2)", "censor(version=code)"])
def test_the_truth_is_likelier_than_another_example(defense: str) -> None:
    net, batch = network(), batch_of(1)
    matcher = observe(net, batch, Recipe(1, defense=defense), defense)
    for seed in range(5):
        other = Batch(batch_of(1, seed=50 + seed).examples, batch.labels)
        assert relative(matcher, batch) < relative(matcher, other)
        assert matcher.cosine_distance(*batch) < matcher.cosine_distance(*other)


def test_the_code_of_precode_is_a_variable() -> None:
    net, batch, defense = network("precode(units=5)"), batch_of(2), "precode(units=5)"
    noise = torch.randn(2, 5, generator=rng()).double()
    client = copy.deepcopy(net)
    find_bottleneck(client).noise = noise
    update = gradient(client, batch, TASK, Recipe(2, defense=defense), rng())
    matcher = GradientMatcher(Observation(TASK, Recipe(2, defense=defense), net, update))
    (unknown,) = matcher.counter.variables
    assert unknown.init.shape == noise.shape
    assert relative(matcher, batch, noise) < 1e-16
    assert relative(matcher, batch, torch.zeros_like(noise)) > 1e-4
    assert find_bottleneck(net).noise is None


def test_the_mask_of_dropout_is_a_variable() -> None:
    net, batch = network(), batch_of(2)
    features = head_layer(net).in_features
    mask = torch.randint(2, (2, features), generator=rng()).double()
    client = copy.deepcopy(net)
    head_layer(client).register_forward_pre_hook(Masked(0.5, mask))
    update = gradient(client, batch, TASK, Recipe(2), rng())
    matcher = GradientMatcher(Observation(TASK, Recipe(2, defense="dropout()"), net, update))
    (unknown,) = matcher.counter.variables
    assert unknown.init.shape == mask.shape
    assert relative(matcher, batch, mask) < 1e-16
    assert relative(matcher, batch, unknown.init.double()) > 1e-4
    assert unknown.project(2 * mask).max() == 1


def test_the_weights_of_mixup_are_a_variable() -> None:
    net, batch = network(), batch_of(2)
    recipe = Recipe(2, defense="mixup()")
    update = gradient(net, batch, TASK, recipe, rng(2))
    labels = parse("mixup()").on_batch(batch, TASK, _inside(rng(2))).labels[:, :2]
    matcher = GradientMatcher(Observation(TASK, recipe, net, update))
    assert relative(matcher, batch, (labels + 1e-300).log()) < 1e-12
    assert relative(matcher, batch, matcher.counter.variables[0].init.double()) > 1e-8


def test_the_weights_of_instahide_are_a_variable_and_the_guess_is_what_it_encodes() -> None:
    net, batch = network(), batch_of(3)
    recipe = Recipe(3, defense="instahide(images=2)")
    update = gradient(net, batch, TASK, recipe, rng(2))
    encoded = parse(recipe.defense).on_batch(batch, TASK, _inside(rng(2)))
    matcher = GradientMatcher(Observation(TASK, recipe, net, update))
    guess, weights = Batch(encoded.examples, batch.labels), (encoded.labels[:, :3] + 1e-300).log()
    assert relative(matcher, guess, weights) < 1e-12
    assert relative(matcher, guess, matcher.counter.variables[0].init.double()) > 1e-6
    assert relative(observe(net, batch, recipe, "none"), guess) > 1e-6


def _inside(stream: torch.Generator) -> torch.Generator:
    """The stream as on_batch sees it: the client has seeded the global stream from it first."""
    torch.randint(2**62, (), generator=stream)
    return stream


@pytest.mark.parametrize("defense", ["precode(units=6)", "soteria(share=0.9)", "clip(bound=0.01)"])
def test_a_fully_connected_network_gives_the_example_away_all_the_same(defense: str) -> None:
    net = network(defense, "mlp").float()
    truth = Batch(smooth_pictures(1, 8, seed=0), torch.tensor([1]))
    recipe = Recipe(1, defense=defense)
    update = gradient(net, truth, TASK, recipe, rng())
    rec = ATTACKS["analytic"]().reconstruct(Observation(TASK, recipe, net, update), rng())
    assert psnr(truth.examples[0], rec.examples[0]) > 60


def test_a_random_direction_separates_the_copies_of_oasis() -> None:
    public = Batch(smooth_pictures(200, 8, seed=3), torch.arange(200) % 4)
    truth, recipe = Batch(smooth_pictures(6, 8, seed=4), torch.arange(6) % 4), Recipe(6, defense="oasis()")
    found = {}
    for direction in ("brightness", "random"):
        attack = ATTACKS["rtf"](direction=direction, bins=256)
        net = attack.implant(network().float(), TASK, public, recipe)
        update = gradient(net, truth, TASK, recipe, rng())
        rec = attack.reconstruct(Observation(TASK, recipe, net, update, public), rng())
        found[direction] = sum(max(psnr(t, e) for e in rec.examples) > 30 for t in truth.examples)
    assert found["brightness"] <= 1
    assert found["random"] >= 5


def test_the_likelihood_is_that_of_the_last_step_that_changes_the_update() -> None:
    last = parse("topk()+sign()").counter().misfit
    assert getattr(last, "__self__", None) == parse("sign()").steps[0]
    assert parse("sign()+dropout()").counter().misfit is not None
    assert parse("censor()").counter().misfit is not None
    last = parse("topk()+censor()").counter().misfit  # a client defends its gradient first
    assert getattr(last, "__self__", None) == parse("topk()").steps[0]
    assert parse("topk()+gauss()").counter().misfit is None  # noise leaves no entry at zero
    with pytest.raises(UsageError, match="`believe=defense=none`"):
        parse("soteria()+soteria()").counter()


# --- commands ---


def summary(share: float, p_value: float = 1.0, **more: object) -> dict[str, object]:
    identified = {"p_value": p_value, "by_class": True}
    return {"attack": "dlg", "success_rate": share, "psnr": {"mean": 20.0}, "identified": identified, **more}


def test_no_verdict_counts_unless_its_control_succeeded() -> None:
    assert frontier.verdict(summary(0.4), [summary(0.0), summary(0.0)]) == "control failed"
    assert frontier.verdict(summary(1.0), [summary(0.0), summary(0.6)]) == "broken"
    assert frontier.verdict(summary(1.0), [summary(0.2), summary(0.0)]) == "weak"
    assert frontier.verdict(summary(1.0), [summary(0.0), summary(0.0, 0.001)]) == "weak"
    assert frontier.verdict(summary(1.0), [summary(0.0), summary(0.0)]) == "holds"
    null = {"recovered": 0.15}
    assert frontier.verdict(summary(1.0), [summary(0.2, null=null)]) == "holds"
    assert frontier.verdict(summary(0.5, null={"recovered": 0.5}), [summary(0.5)]) == "control failed"
    assert frontier.verdict(summary(1.0), [{"refused": "why"}, {"refused": "why"}]) == "does not apply"


def test_the_pareto_front_holds_what_nothing_else_beats() -> None:
    points = {"a": ("x", 0.9, 1.0), "b": ("x", 0.8, 0.2), "c": ("y", 0.7, 0.2), "d": ("y", 0.5, 0.0)}
    assert frontier.pareto(points) == {"a", "b", "d"}


def test_the_frontier_writes_table_csv_and_picture_and_repeats_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = []

    def run_cell(words: tuple[str, ...]) -> dict[str, object]:
        runs.append(words)
        defended = "none" not in words[words.index("--defense") + 1]
        return summary(0.2 if defended else 1.0, attack=words[0], accuracy=0.5)

    monkeypatch.setattr(frontier, "run_all", lambda found, jobs: [run_cell(cell.words) for cell in found])
    frontier.main(frontier.Flags(out=tmp_path, attacks=("dlg", "rtf"), defenses=("oasis",), quick=True))
    assert len(set(runs)) == len(runs) == 4 + 2 + 2 * 3 * 2
    adaptive = [w for w in runs if w[0] == "rtf" and "--direction" in w]
    assert len(adaptive) == 3
    assert all("--believe" not in w for w in adaptive)
    text = (tmp_path / "table.md").read_text()
    assert text.count("weak") == 6
    assert len((tmp_path / "frontier.csv").read_text().splitlines()) == 7
    assert (tmp_path / "frontier.png").stat().st_size > 5000
    assert json.dumps(text.strip())[1:-1] in json.dumps(capsys.readouterr().out)


def test_a_frontier_that_was_killed_and_goes_on_writes_the_same_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ("--model", "lenet", "--iterations", "2", "--restarts", "1")
    monkeypatch.setattr(frontier, "CELLS", {"dlg": (1, flags, {})})
    monkeypatch.setattr(frontier, "BUDGETS", {})
    monkeypatch.setattr(frontier, "DEFENSES", {"clip": ("clip(bound=0.5)",)})
    left = [3, 100, 100]  # runs before each command is killed

    def run_all(found: list[frontier.Cell], jobs: int) -> list[dict[str, object]]:
        done, most = [], left.pop(0)
        for cell in found:
            if len(done) == most:
                raise KeyboardInterrupt
            done.append(frontier.run_cell(cell.words))
        return done

    monkeypatch.setattr(frontier, "run_all", run_all)
    small = {"attacks": ("dlg",), "defenses": ("clip",), "trials": 1, "image_size": 8, "rounds": 1}

    def run(out: Path) -> None:
        frontier.main(frontier.Flags(out=out, pretrain_epochs=(0,), **small))

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed")
    assert not (tmp_path / "killed" / "table.md").exists()
    finished = {path: path.stat().st_mtime_ns for path in (tmp_path / "killed").rglob("done")}
    assert len(finished) == 3
    run(tmp_path / "killed")
    assert all(path.stat().st_mtime_ns == time for path, time in finished.items())
    run(tmp_path / "whole")
    for name in ("table.md", "frontier.csv"):
        assert (tmp_path / "killed" / name).read_text() == (tmp_path / "whole" / name).read_text()
