"""Every defence does exactly what its equation says, and where a real client would do it."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from core.errors import UsageError
from core.protocol import Batch, Recipe, image_task
from defenses.base import DEFENSES, Memory, parse
from defenses.mixup import beta
from defenses.precode import Bottleneck, find_bottleneck
from defenses.soteria import feature_sensitivity
from federated.client import gradient, train
from federated.server import aggregate
from models import build
from models.inspection import head_layer

TASK = image_task((3, 8, 8), 4, (0.5,) * 3, (0.5,) * 3)
ALL = [f"{name}()" for name in sorted(DEFENSES)]


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def batch_of(n: int, seed: int = 1) -> Batch:
    return Batch(torch.rand(n, 3, 8, 8, generator=rng(seed)), torch.arange(n) % TASK.num_classes)


def network(defense: str = "none", name: str = "lenet") -> nn.Module:
    model = build(name, TASK.domain.shape, TASK.num_classes, rng=rng(3))
    return parse(defense).on_architecture(model, rng(4))


def entries(seed: int = 0) -> tuple[Tensor, ...]:
    return tuple(torch.randn(shape, generator=rng(seed)) for shape in ((20, 10), (30,), (4, 5, 5)))


def flat(tensors: tuple[Tensor, ...]) -> Tensor:
    return torch.cat([t.flatten() for t in tensors])


# --- equations ---


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_topk_sends_the_largest_entries_unchanged(share: float, scope: str) -> None:
    tensors = entries()
    sent = parse(f"topk(share={share}, scope={scope})").on_update(tensors, rng())
    groups = [(flat(tensors), flat(sent))] if scope == "global" else list(zip(tensors, sent, strict=True))
    for before, after in groups:
        chosen = after != 0
        assert chosen.sum() == math.ceil(share * before.numel())
        assert torch.equal(after[chosen], before[chosen])
        assert chosen.all() or before[chosen].abs().min() >= before[~chosen].abs().max()


@pytest.mark.parametrize("norm", ["max", "l2"])
def test_qsgd_sends_levels_and_its_mean_is_the_update(norm: str) -> None:
    tensors, defense, draws = entries(), parse(f"qsgd(levels=4, norm={norm})"), rng()
    sent = [defense.on_update(tensors, draws) for _ in range(400)]
    for index, t in enumerate(tensors):
        size = t.abs().max() if norm == "max" else t.norm()
        levels = torch.stack([s[index] for s in sent]) * 4 / size
        assert torch.allclose(levels, levels.round(), atol=1e-4)
        assert (levels * t.sign() >= 0).all()
        error = levels.mean(0) - t * 4 / size
        assert error.abs().max() < 5 * 0.5 / math.sqrt(400)  # Bernoulli draws have a deviation of at most 1/2


def test_sign_sends_one_bit_for_each_entry() -> None:
    tensors = entries()
    for size in (0.0, 0.3):
        for t, s in zip(tensors, parse(f"sign(size={size})").on_update(tensors, rng()), strict=True):
            assert torch.allclose(s, t.sign() * (size or t.abs().mean()))


def test_laplace_noise_has_its_law() -> None:
    (noise,) = parse("laplace(scale=0.3)").on_update((torch.zeros(200, 200),), rng())
    assert noise.abs().mean().item() == pytest.approx(0.3, rel=0.02)
    assert noise.std().item() == pytest.approx(0.3 * math.sqrt(2), rel=0.03)
    assert (noise.abs() > 0.9).float().mean().item() == pytest.approx(math.exp(-3), rel=0.1)
    assert parse("laplace(scale=0.3)").counter().noise == pytest.approx(0.3 * math.sqrt(2))


def test_dpfedavg_bounds_the_update_and_adds_noise_in_units_of_the_bound() -> None:
    tensors, defense = entries(), parse("dpfedavg(bound=0.5, sigma=0.2)")
    sent = torch.stack([flat(defense.on_update(tensors, rng(seed))) for seed in range(200)])
    assert sent.std(0).mean().item() == pytest.approx(0.1, rel=0.03)
    expected = 0.5 * flat(tensors) / flat(tensors).norm()
    assert (sent.mean(0) - expected).abs().max() < 5 * 0.1 / math.sqrt(200)


def test_dpsgd_clips_every_example_and_divides_the_noise_by_their_number() -> None:
    net, batch = network(), batch_of(3)
    one_by_one = [flat(gradient(net, Batch(x, y), TASK, Recipe(1), rng()).ordered(net)) for x, y in rows(batch)]
    bound = sorted(g.norm().item() for g in one_by_one)[1]  # one gradient is shorter
    expected = torch.stack([g * min(1.0, bound / g.norm().item()) for g in one_by_one]).mean(0)

    def sent(sigma: float, seed: int = 0) -> Tensor:
        recipe = Recipe(3, defense=f"dpsgd(bound={bound}, sigma={sigma})")
        return flat(gradient(net, batch, TASK, recipe, rng(seed)).ordered(net))

    assert (sent(0.0) - expected).abs().max() < 1e-6
    assert (sent(2.0) - expected).std().item() == pytest.approx(2 * bound / 3, rel=0.05)
    assert flat(gradient(net, batch, TASK, Recipe(3), rng()).ordered(net)).norm() > expected.norm()


def rows(batch: Batch) -> list[tuple[Tensor, Tensor]]:
    return list(zip(batch.examples.split(1), batch.labels.split(1), strict=True))


def test_dpsgd_refuses_batchnorm() -> None:
    with pytest.raises(UsageError, match="`norm=group`"):
        network("dpsgd()", "resnet20")


def test_soteria_removes_the_columns_of_the_least_sensitive_features() -> None:
    net, batch = network(), batch_of(2)
    head = head_layer(net)
    x = TASK.domain.to_model(batch.examples)
    sensitivity = feature_sensitivity(net, head, x)

    def features(one: Tensor) -> Tensor:
        return net.get_submodule("body")(one[None])[0]

    slow = torch.zeros_like(sensitivity)
    for one in x:
        jacobian = torch.autograd.functional.jacobian(features, one).flatten(1)
        slow += jacobian.norm(dim=1) / (features(one).detach().abs() + 1e-10) / len(x)
    assert torch.allclose(sensitivity, slow, rtol=1e-3)
    plain = gradient(net, batch, TASK, Recipe(2), rng()).tensors
    sent = gradient(net, batch, TASK, Recipe(2, defense="soteria(share=0.75)"), rng()).tensors
    gone = sensitivity.argsort()[: int(0.75 * len(sensitivity))]
    expected = plain["head.weight"].clone()
    expected[:, gone] = 0
    assert torch.equal(sent["head.weight"], expected)
    assert all(torch.equal(sent[name], plain[name]) for name in plain if name != "head.weight")


def test_mixup_mixes_images_and_labels_with_the_same_weights() -> None:
    batch = batch_of(4)
    mixed = parse("mixup(alpha=1.0)").on_batch(batch, TASK, rng())
    weights = mixed.labels  # four images of four classes: row i holds the weights of mixture i
    assert torch.allclose(weights.sum(1), torch.ones(4))
    assert ((weights > 0).sum(1) <= 2).all()
    expected = (weights @ batch.examples.flatten(1)).view_as(batch.examples)
    assert torch.allclose(mixed.examples, expected, atol=1e-6)
    draws = torch.tensor([beta(0.4, generator) for generator in [rng()] for _ in range(500)])
    assert draws.mean().item() == pytest.approx(0.5, abs=0.06)
    assert draws.var().item() == pytest.approx(0.25 / 1.8, rel=0.1)


def test_instahide_is_a_mixture_up_to_the_signs_of_pixels() -> None:
    batch = batch_of(4)
    hidden = parse("instahide(images=3)").on_batch(batch, TASK, rng())
    assert torch.allclose(hidden.labels.sum(1), torch.ones(4))
    assert ((hidden.labels > 0).sum(1) == 3).all()
    assert (hidden.labels <= 0.65).all()
    mixture = (hidden.labels @ batch.examples.flatten(1)).view_as(batch.examples) - 0.5
    flipped = (hidden.examples - 0.5) * mixture < 0
    assert torch.allclose((hidden.examples - 0.5).abs(), mixture.abs(), atol=1e-6)
    assert flipped.float().mean().item() == pytest.approx(0.5, abs=0.1)


def test_oasis_appends_rotated_copies_with_the_same_labels() -> None:
    batch = batch_of(2)
    more = parse("oasis()").on_batch(batch, TASK, rng())
    assert torch.equal(more.labels, batch.labels.repeat(4))
    for quarter in range(4):
        own = more.examples[2 * quarter : 2 * quarter + 2]
        assert torch.equal(own.rot90(-quarter, (-2, -1)), batch.examples)
    assert torch.allclose(more.examples.mean((1, 2, 3)), batch.examples.mean((1, 2, 3)).repeat(4))
    assert len(parse("oasis(copies=both)").on_batch(batch, TASK, rng()).labels) == 12


def test_ats_applies_one_of_its_policies_to_each_image() -> None:
    batch = batch_of(6)
    changed = parse("ats(policy=invert:1/flip:1-invert:1)").on_batch(batch, TASK, rng())
    assert torch.equal(changed.labels, batch.labels)
    options = (1 - batch.examples, 1 - batch.examples.flip(-1))
    same = torch.stack([(changed.examples - o).abs().amax((1, 2, 3)) < 1e-6 for o in options])
    assert same.any(0).all()
    assert same.any(1).all()


def test_the_divergence_of_precode_enters_the_gradient() -> None:
    """The backward pass of the bottleneck adds the gradient of b KL(N(mu, exp v) || N(0, I))."""
    plain, penalised = Bottleneck(5, 3, 0.0).double(), Bottleneck(5, 3, 0.7).double()
    penalised.load_state_dict(plain.state_dict())
    h = torch.randn(4, 5, generator=rng(), dtype=torch.float64)
    mu, log_var = plain.encoder(h).chunk(2, dim=1)
    divergence = (mu.square() + log_var.exp() - 1 - log_var).sum(1).mean() / 2
    (plain(h).square().sum() + 0.7 * divergence).backward()
    penalised(h).square().sum().backward()
    for a, b in zip(plain.parameters(), penalised.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, atol=1e-10)


def test_precode_is_part_of_every_copy_and_only_the_client_draws() -> None:
    net = network("precode(units=6)")
    assert find_bottleneck(parse("precode(units=6)").on_architecture(net, rng())) is find_bottleneck(net)
    x = torch.rand(2, 3, 8, 8)
    assert torch.equal(net(x), net(x))
    client = parse("precode(units=6)").on_model(copy.deepcopy(net))
    assert not torch.equal(client(x), client(x))


@pytest.mark.parametrize("version", ["paper", "code"])
def test_censor_sends_the_norms_of_layers_and_is_orthogonal_as_published_alone(version: str) -> None:
    net, batch = network().double(), batch_of(3)
    batch = Batch(batch.examples.double(), batch.labels)
    plain = gradient(net, batch, TASK, Recipe(3), rng()).ordered(net)
    before = copy.deepcopy(net.state_dict())
    sent = gradient(net, batch, TASK, Recipe(3, defense=f"censor(version={version}, trials=3)"), rng()).ordered(net)
    for g, s in zip(plain, sent, strict=True):
        assert s.norm().item() == pytest.approx(g.norm().item(), rel=1e-9)
    cosines = torch.stack([(g * s).sum() / g.norm().square() for g, s in zip(plain, sent, strict=True)])
    assert all(torch.equal(before[name], t) for name, t in net.state_dict().items())
    assert (cosines.abs().max() < 1e-12) == (version == "paper")


def test_the_projection_of_censors_program_has_a_cosine_that_grows_with_the_norm() -> None:
    """o = r - c ||g|| u, c = <r, u>, ||r|| = 1: cos = c (1 - ||g||) / ||o||,  ||o||^2 = 1 - c^2 + c^2 (1 - ||g||)^2."""
    defense = parse("censor(version=code)").steps[0]
    for norm in (0.5, 1.0, 10.0):
        g = torch.randn(8000, generator=rng(1), dtype=torch.float64)
        g *= norm / g.norm()
        r = torch.randn(8000, generator=rng(2), dtype=torch.float64)
        c = ((r / r.norm()) @ (g / norm)).item()
        o = defense.direction(g, rng(2))
        expected = c * (1 - norm) / math.sqrt(1 - c**2 + (1 - norm) ** 2 * c**2)
        assert (o @ g / norm**2).item() == pytest.approx(expected, abs=1e-12)


def test_censor_sends_the_trial_with_the_lowest_loss() -> None:
    net, batch = network(), batch_of(3)
    x = TASK.domain.to_model(batch.examples)

    def loss_after(sent: tuple[Tensor, ...]) -> float:
        moved = copy.deepcopy(net)
        with torch.no_grad():
            for p, g in zip(moved.parameters(), sent, strict=True):
                p -= 1e-4 * g
            return torch.nn.functional.cross_entropy(moved(x), batch.labels).item()

    plain = gradient(net, batch, TASK, Recipe(3), rng()).ordered(net)
    sent = gradient(net, batch, TASK, Recipe(3, defense="censor(trials=5, version=code)"), rng()).ordered(net)
    draws, own = _inside(rng()), parse("censor(version=code)").steps[0]
    trials = [tuple(own.direction(g, draws) for g in plain) for _ in range(5)]
    best = min(trials, key=loss_after)
    assert torch.equal(flat(sent), flat(best))


def _inside(stream: torch.Generator) -> torch.Generator:
    """The stream as a defence sees it: the client has seeded the global stream from it first."""
    torch.randint(2**62, (), generator=stream)
    return stream


def test_outpost_prunes_layers_and_adds_noise_to_the_columns_of_the_largest_fisher_information() -> None:
    net, batch = network(), batch_of(3)
    plain = gradient(net, batch, TASK, Recipe(3), rng()).ordered(net)
    defense = "outpost(decay=0.0, noise=1e-3, phi=0.3, prune=0.8)"
    sent = gradient(net, batch, TASK, Recipe(3, defense=defense), rng()).ordered(net)
    own = parse(defense).steps[0]
    fisher = torch.cat([g.square().mean(0).flatten() for g in plain])
    threshold = fisher.sort(descending=True).values[int(0.3 * len(fisher)) - 1]
    noise = []
    for w, g, s in zip(net.parameters(), plain, sent, strict=True):
        pruned = own.pruned(g)
        assert (pruned == 0).sum() == int(0.8 * g.numel())
        assert torch.equal(pruned[pruned != 0], g[pruned != 0])
        noisy = (g.square().mean(0) >= threshold).expand_as(g)
        assert torch.equal(s[~noisy], pruned[~noisy])
        if noisy.any() and w.numel() > 1:
            noise.append((s - pruned)[noisy] / (1e-3 * min(w.var().item(), 1.0)))
    assert torch.cat(noise).std().item() == pytest.approx(1.0, rel=0.05)
    assert torch.cat(noise).mean().item() == pytest.approx(0.0, abs=0.05)


def test_outpost_acts_with_a_probability_that_falls_with_the_clients_steps() -> None:
    class Fixed:
        model = nn.Linear(2, 2)

        def __call__(self) -> tuple[Tensor, ...]:
            return tuple(torch.ones_like(p) for p in self.model.parameters())

    own, draws, memory = parse("outpost(decay=1.0, noise=0)").steps[0], rng(), Memory()
    client = own.for_client(memory)
    for step, expected in ((1, 1 / 2), (4, 1 / 5), (19, 1 / 20)):
        memory.steps = step - 1
        acted = [not flat(client.on_gradient(Fixed(), draws)).all().item() for _ in range(600)]
        assert sum(acted) / 600 == pytest.approx(expected, abs=3 * math.sqrt(expected / 600))
    program = parse("outpost(version=code)").steps[0].for_client(Memory())
    assert all(flat(program.on_gradient(Fixed(), draws)).eq(1).all() for _ in range(20))


def test_what_topk_with_a_residual_sends_adds_up_to_the_updates() -> None:
    memory, draws, sums, updates = Memory(), rng(), 0.0, 0.0
    defense = parse("topk(share=0.1, residual=true)+topk(share=0.5, residual=true)")
    for number in range(5):
        update = tuple(t.double() for t in entries(number))
        sent = defense.for_client(memory).on_update(update, draws)
        assert all((s != 0).sum() <= math.ceil(0.1 * s.numel()) for s in sent)
        updates, sums = updates + flat(update), sums + flat(sent)
        assert (sums + sum(flat(kept) for kept in memory.kept.values()) - updates).abs().max() < 1e-12
    assert set(memory.kept) == {0, 1}
    once = [parse("topk(share=0.1)").on_update(entries(4), draws)]
    assert torch.equal(flat(once[0]), flat(parse("topk(share=0.1, residual=true)").on_update(entries(4), draws)))


def test_a_client_remembers_its_rounds_and_a_residual_through_training() -> None:
    net, memory = network(), Memory()
    recipe, plain = (Recipe(2, 2, lr=0.1, defense=text) for text in ("topk(residual=true)", "none"))
    for number in range(3):
        train(net, batch_of(4), TASK, recipe, rng(number), memory)
    assert (memory.rounds, memory.steps) == (3, 12)
    total = sum(flat(train(net, batch_of(4), TASK, plain, rng(number))[0].ordered(net)) for number in range(3))
    again = Memory()
    sent = sum(flat(train(net, batch_of(4), TASK, recipe, rng(number), again)[0].ordered(net)) for number in range(3))
    assert torch.allclose(sent + flat(again.kept[0]), total, atol=1e-6)
    last = Recipe(2, 2, lr=0.1, defense="censor(rounds=3)")
    undefended = train(net, batch_of(4), TASK, plain, rng(0))[0].ordered(net)
    assert torch.equal(flat(train(net, batch_of(4), TASK, last, rng(0), memory)[0].ordered(net)), flat(undefended))


def test_poisson_minibatches_have_their_law_and_the_size_of_the_recipe() -> None:
    recipe, own = Recipe(2, 300), parse("dpsgd(sampling=poisson)")
    schedule = own.on_schedule(recipe.batches(10, rng()), 10, rng(1))
    assert len(schedule) == recipe.steps(10)
    sizes = torch.tensor([len(s) for s in schedule]).double()
    assert sizes.mean().item() == pytest.approx(2.0, abs=0.1)
    assert sizes.var().item() == pytest.approx(10 * 0.2 * 0.8, rel=0.1)
    counts = torch.bincount(torch.cat(schedule), minlength=10).double() / len(schedule)
    assert (counts - 0.2).abs().max() < 0.05
    whole = Recipe(10).batches(10, rng())
    assert all(map(torch.equal, own.on_schedule(whole, 10, rng()), whole))


def test_a_poisson_step_divides_by_the_expected_size_and_an_empty_one_sends_noise() -> None:
    net = network()
    three = {"batch": batch_of(3), "task": TASK, "rng": rng()}
    fixed = gradient(net, recipe=Recipe(6, defense="dpsgd(sigma=0)"), **three).ordered(net)
    sampled = gradient(net, recipe=Recipe(6, defense="dpsgd(sigma=0, sampling=poisson)"), **three).ordered(net)
    assert torch.allclose(flat(sampled), flat(fixed) / 2, atol=1e-8)
    recipe = Recipe(4, defense="ats()+dpsgd(bound=2.0, sigma=0.5, sampling=poisson)")
    empty = flat(gradient(net, batch_of(0), TASK, recipe, rng()).ordered(net))
    assert empty.std().item() == pytest.approx(0.25, rel=0.03)


# --- where a client applies them ---


@pytest.mark.parametrize("defense", ALL)
def test_a_delta_after_one_step_is_made_from_the_same_gradient(defense: str) -> None:
    """FedAvg with one full-batch step: the delta is on_update(lr * g) with the g of the gradient mode."""
    net, batch, own = network(defense), batch_of(4), parse(defense)
    bare = "none" if _acts_on_updates(defense) else defense
    first = rng(7)
    order = Recipe(4).batches(4, first)[0]  # a client shuffles first: draw the same from the stream
    shuffled = Batch(batch.examples[order], batch.labels[order])
    plain = gradient(net, shuffled, TASK, Recipe(4, defense=bare), first).ordered(net)
    second = rng(7)
    delta = train(net, batch, TASK, Recipe(4, lr=0.5, defense=bare), second)[0].ordered(net)
    assert torch.allclose(flat(delta), 0.5 * flat(plain), rtol=1e-4, atol=1e-7)
    assert torch.equal(first.get_state(), second.get_state())
    sent = train(net, batch, TASK, Recipe(4, lr=0.5, defense=defense), rng(7))[0].ordered(net)
    expected = own.on_update(delta, second) if _acts_on_updates(defense) else delta
    assert torch.allclose(flat(sent), flat(expected), atol=1e-7)


def _acts_on_updates(defense: str) -> bool:
    marker = tuple(torch.linspace(-1, 1, 20 * (i + 1)) for i in range(2))
    return not torch.equal(flat(parse(defense).on_update(marker, rng())), flat(marker))


@pytest.mark.parametrize("defense", ALL)
def test_a_round_of_fedavg_stays_finite_and_changes_only_the_server_model(defense: str) -> None:
    net = network(defense)
    before = copy.deepcopy(net.state_dict())
    updates = [
        train(net, batch_of(n, seed=n), TASK, Recipe(2, 2, lr=0.01, defense=defense), rng(n))[0] for n in (2, 3, 4)
    ]
    assert all(torch.equal(before[name], t) for name, t in net.state_dict().items())
    aggregate(net, parse(defense).on_aggregate(updates))
    assert all(t.isfinite().all() for t in net.state_dict().values())
    assert any(not torch.equal(before[name], t) for name, t in net.state_dict().items())


@pytest.mark.parametrize("defense", ALL)
def test_equal_streams_give_equal_updates(defense: str) -> None:
    net, state = network(defense), torch.random.get_rng_state()
    first, second = (
        gradient(net, batch_of(3), TASK, Recipe(3, defense=defense), rng(5)).ordered(net) for _ in range(2)
    )
    assert torch.equal(flat(first), flat(second))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_gradients_of_examples_pass_through_the_defences_before_dpsgd() -> None:
    """Soteria before DP-SGD masks each example's gradient; the whole norm stays bounded."""
    net, batch = network(), batch_of(3)
    recipe = Recipe(3, defense="soteria(share=0.5)+dpsgd(bound=0.1, sigma=0.0)")
    sent = gradient(net, batch, TASK, recipe, rng()).ordered(net)
    assert flat(sent).norm() <= 0.1 + 1e-6


@pytest.mark.parametrize(
    "text",
    [
        "censor(version=mine)",
        "outpost(version=1)",
        "dpsgd(sampling=all)",
        "topk(scope=all)",
        "topk(share=0)",
        "qsgd(norm=l3)",
        "oasis(copies=zoom)",
        "ats(policy=blur:3)",
        "sign(size=-1)",
    ],
)
def test_impossible_parameters_are_refused(text: str) -> None:
    with pytest.raises(UsageError) as refusal:
        parse(text)
    assert str(refusal.value).startswith("`defense`: ")
    assert "\n" not in str(refusal.value)
