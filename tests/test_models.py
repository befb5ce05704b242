"""Networks build and run at any sensible shape, MetaModel computes what torch does, weights load or are refused."""

import pickle

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from core.errors import UsageError
from core.protocol import Recipe
from models import MODELS, MetaModel, build, load_weights
from models.zoo.layers import ACTIVATIONS, NORMS

SHAPES = [(3, 32, 32), (1, 28, 28), (3, 64, 64), (3, 36, 48)]
OF_IMAGES = sorted(name for name, entry in MODELS.items() if entry.takes != "tokens")
EVERY_MODEL = pytest.mark.parametrize("name", OF_IMAGES)


@pytest.fixture(autouse=True)
def _fixed_stream():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def refused(*words):
    """A UsageError of one line with these words, given as regular expressions."""
    return pytest.raises(UsageError, match=r"\A(?=.*" + r")(?=.*".join(words) + r").*\Z")


def smallest(name):
    return MODELS[name].smallest


# ---------------------------------------------------------------------------------------------- the networks


@EVERY_MODEL
@pytest.mark.parametrize(("shape", "num_classes"), list(zip(SHAPES, [2, 10, 100, 10], strict=True)))
def test_every_model_takes_every_shape_and_ends_in_its_head(name, shape, num_classes):
    with torch.device("meta"):  # shapes without arithmetic
        shape = (shape[0], *(max(side, smallest(name)) for side in shape[1:]))
        net = build(name, shape, num_classes)
        assert net(torch.empty(2, *shape)).shape == (2, num_classes)
    weight, bias = list(net.parameters())[-2:]
    assert (weight.ndim, *weight.shape[:1], *bias.shape) == (2, num_classes, num_classes)


@settings(max_examples=30, deadline=None)
@given(
    name=st.sampled_from(OF_IMAGES),
    channels=st.sampled_from([1, 3]),
    extra=st.tuples(st.integers(0, 70), st.integers(0, 70)),
    num_classes=st.integers(2, 200),
    activation=st.sampled_from([None, *ACTIVATIONS]),
    norm=st.sampled_from([None, *NORMS]),
    dropout=st.sampled_from([None, 0.0, 0.5]),
)
def test_any_sensible_request_builds(name, channels, extra, num_classes, activation, norm, dropout):
    wanted = {"activation": activation, "norm": norm, "dropout": dropout}
    options = {key: value for key, value in wanted.items() if key in MODELS[name].options}
    shape = (channels, smallest(name) + extra[0], smallest(name) + extra[1])
    with torch.device("meta"):
        assert build(name, shape, num_classes, **options)(torch.empty(3, *shape)).shape == (3, num_classes)


@EVERY_MODEL
def test_one_real_step_is_finite_down_to_the_smallest_image(name):
    shape = (1, smallest(name), smallest(name))
    net = build(name, shape, 3).train()
    loss = F.cross_entropy(net(torch.randn(1, *shape)), torch.tensor([2]))
    grads = torch.autograd.grad(loss, list(net.parameters()))
    assert all(g.isfinite().all() for g in grads)
    assert grads[-2].abs().sum() > 0


@EVERY_MODEL
def test_images_that_are_too_small_are_refused_with_the_smallest_size(name):
    side = smallest(name)
    with refused(name, f"at least 3x{side}x{side}", f"3x{side - 1}x40"):
        build(name, (3, side - 1, 40), 10)
    with refused(name, "2 classes"):
        build(name, (3, 40, 40), 1)


@EVERY_MODEL
def test_an_option_the_model_does_not_take_is_refused(name):
    values = {"activation": "tanh", "norm": "batch", "dropout": 0.1}
    for option in values.keys() - set(MODELS[name].options):
        with refused(name, option, *(MODELS[name].options or ["no options"])):
            build(name, (3, 40, 40), 10, **{option: values[option]})


def test_unknown_names_are_refused_with_what_is_close():
    with refused("lenet55", "did you mean .*lenet5", *MODELS):
        build("lenet55", (3, 32, 32), 10)
    with refused("activation", "sigmoid"):
        build("lenet", (3, 32, 32), 10, activation="sigmoit")
    with refused("norm", "none", "batch", "group"):
        build("lenet", (3, 32, 32), 10, norm="layer")
    with refused("dropout", "1.5"):
        build("lenet", (3, 32, 32), 10, dropout=1.5)


def test_parameter_counts_are_the_papers():
    with torch.device("meta"):
        sizes = {
            ("cnn", (1, 28, 28), 10): 1_663_370,  # FedAvg, section 3
            ("vgg16", (3, 224, 224), 1000): 138_357_544,  # torchvision
            ("lenet5", (1, 28, 28), 10): 61_706,
        }
        for (name, shape, num_classes), size in sizes.items():
            assert sum(p.numel() for p in build(name, shape, num_classes).parameters()) == size
        assert build("lenet", (3, 32, 32), 100).head.in_features == 768
        assert build("vgg16", (3, 32, 32), 10).classifier[0].in_features == 512


def test_lenet_starts_in_dlgs_range_and_leaves_the_norm_alone():
    net = build("lenet", (3, 32, 32), 100, norm="batch")
    for layer in net.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            assert 0.45 < layer.weight.abs().max() <= 0.5
            assert layer.bias.abs().max() <= 0.5
        if isinstance(layer, nn.BatchNorm2d):
            assert (layer.weight == 1).all()
            assert (layer.bias == 0).all()


def test_options_change_the_network():
    def kinds(**options):
        return {type(layer) for layer in build("lenet", (3, 32, 32), 10, **options).modules()}

    assert {nn.Sigmoid, nn.Identity} <= kinds()
    assert {nn.GELU, nn.GroupNorm} <= kinds(activation="gelu", norm="group")
    assert build("lenet", (3, 32, 32), 10, dropout=0.3).dropout.p == 0.3
    assert build("lenet", (3, 32, 32), 10).dropout.p == 0


def test_rng_determines_the_weights_and_the_global_stream_is_not_changed():
    before = torch.get_rng_state()
    first, same = (build("lenet", (1, 8, 8), 2, rng=torch.Generator().manual_seed(7)) for _ in range(2))
    other = build("lenet", (1, 8, 8), 2, rng=torch.Generator().manual_seed(8))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.head.weight, same.head.weight)
    assert not torch.equal(first.head.weight, other.head.weight)


# ---------------------------------------------------------------------------------------------- MetaModel


class Irregular(nn.Module):
    """Functional operations, a branch, tied, frozen and unused weights, a layer with two names, dropout."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.again = self.conv2 = nn.Conv2d(4, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.5)
        self.fc1, self.fc2, self.head = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 3)
        self.fc2.weight = self.fc1.weight
        self.scale = nn.Parameter(torch.tensor(1.5), requires_grad=False)
        self.unused = nn.Parameter(torch.ones(2))

    def forward(self, x):
        x = torch.tanh(self.norm(self.conv(x)))
        x = F.softplus(self.again(x)) + self.scale * self.conv2(x)
        x = F.dropout(self.drop(F.adaptive_avg_pool2d(x, 2).flatten(1)), 0.5, self.training)
        x = self.fc1(x) if x.shape[0] == 1 else torch.sigmoid(self.fc1(x)) + self.fc2(x).relu()
        return self.head(x)


def without_dropout(net, mode):
    """The reference model: `net` in `mode`, without dropout, with batch statistics in "train"."""
    net.train(mode == "train")
    if isinstance(net, Irregular):
        net.eval()
        net.norm.train(mode == "train")
    return net


def specimen(name):
    shape = (2, 6, 6)
    net = Irregular() if name == "irregular" else build(name, shape, 3)
    return net.double(), torch.randn(5, *shape, dtype=torch.float64), torch.tensor([0, 2, 1, 1, 0])


def snapshot(net):
    state = {name: value.clone() for name, value in net.state_dict().items()}
    flags = [(layer.training, [p.requires_grad for p in layer.parameters()]) for layer in net.modules()]
    return state, flags


def assert_untouched(net, before):
    state, flags = before
    now, now_flags = snapshot(net)
    assert flags == now_flags
    assert all(torch.equal(state[name], now[name]) for name in state)
    assert all(p.grad is None for p in net.parameters())


CASES = pytest.mark.parametrize(
    ("name", "mode"), [(n, m) for n in ("lenet", "resnet20", "irregular") for m in ("eval", "train")]
)


@CASES
def test_meta_is_the_module(name, mode):
    net, x, y = specimen(name)
    meta, before = MetaModel(net, mode), snapshot(net)
    other = tuple(w + 0.01 for w in meta.weights)
    outputs = meta(x), meta(x, meta.weights), meta(x, other)
    grads = meta.gradient(x, y), meta.gradient(x, y, meta.weights, create_graph=False), meta.gradient(x, y, other)
    again = meta(x)
    assert_untouched(net, before)

    twin = without_dropout(net, mode)
    torch.testing.assert_close(outputs[0], twin(x))
    torch.testing.assert_close(outputs[1], outputs[0])
    assert torch.equal(again, outputs[0]), "a call changed the state of the model"

    def expected():
        trainable = [p for p in twin.parameters() if p.requires_grad]
        grads = iter(torch.autograd.grad(F.cross_entropy(twin(x), y), trainable, allow_unused=True))
        filled = ((next(grads) if p.requires_grad else None, p) for p in twin.parameters())
        return tuple(torch.zeros_like(p) if g is None else g for g, p in filled)

    torch.testing.assert_close(grads[0], expected())
    torch.testing.assert_close(grads[1], expected())
    with torch.no_grad():
        for p in twin.parameters():
            p += 0.01
    torch.testing.assert_close(outputs[2], twin(x))
    torch.testing.assert_close(grads[2], expected())


def torch_sgd(net, x, y, batches, lr, momentum, weight_decay):
    start = [p.detach().clone() for p in net.parameters()]
    optimizer = torch.optim.SGD(net.parameters(), lr=lr, momentum=momentum, weight_decay=weight_decay)
    for batch in batches:
        optimizer.zero_grad()
        F.cross_entropy(net(x[batch]), y[batch]).backward()
        optimizer.step()
    return tuple(w - p.detach() for w, p in zip(start, net.parameters(), strict=True))


@CASES
@pytest.mark.parametrize(
    ("steps", "momentum", "weight_decay"),
    [(1, 0, 0), (1, 0.9, 0.1), (5, 0.9, 0), (5, 0, 0.1), (20, 0, 0), (20, 0.9, 0.1)],
)
def test_the_unroll_is_torchs_sgd(name, mode, steps, momentum, weight_decay):
    net, x, y = specimen(name)
    epochs = Recipe(batch_size=2, local_epochs=7).batches(5, torch.Generator().manual_seed(3))  # 2, 2, 1 images
    meta, before, batches = MetaModel(net, mode), snapshot(net), epochs[:steps]
    delta = meta.sgd(x, y, batches, 0.05, momentum, weight_decay)
    assert_untouched(net, before)
    assert not any(d.requires_grad for d in delta), "neither images nor labels require a gradient"
    expected = torch_sgd(without_dropout(net, mode), x, y, batches, 0.05, momentum, weight_decay)
    torch.testing.assert_close(delta, expected, rtol=0, atol=1e-10)


@CASES
def test_a_graph_does_not_change_the_unroll_and_leads_to_images_and_labels(name, mode):
    net, x, y = specimen(name)
    meta, batches = MetaModel(net, mode), Recipe(batch_size=2, local_epochs=2).batches(5)
    plain = meta.sgd(x, y, batches, 0.1, 0.9, 0.01)
    x.requires_grad_()
    soft = F.one_hot(y, 3).double().requires_grad_()
    delta = meta.sgd(x, soft, batches, 0.1, 0.9, 0.01)
    torch.testing.assert_close(delta, plain, rtol=0, atol=1e-10)
    for grad in torch.autograd.grad(sum(d.square().sum() for d in delta), [x, soft]):
        assert grad.isfinite().all()
        assert (grad.flatten(1).abs().sum(1) > 0).all()
    assert not any(d.requires_grad for d in meta.sgd(x, soft, batches, 0.1, create_graph=False))


def test_outer_derivatives_are_the_finite_differences():
    shape = (1, 5, 5)
    meta = MetaModel(build("lenet", shape, 3, activation="tanh", norm="batch").double(), "train")
    x = torch.randn(3, *shape, dtype=torch.float64, requires_grad=True)
    y = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    batches = [torch.tensor([0, 1]), torch.tensor([2, 0])]

    def leak(x, y):
        tensors = meta.gradient(x, y.softmax(1)) + meta.sgd(x, y.softmax(1), batches, 0.2, 0.9, 0.1)
        return torch.stack([t.square().sum() for t in tensors])

    assert torch.autograd.gradcheck(leak, (x, y), fast_mode=True)


def test_frozen_weights_stay():
    net = build("lenet", (1, 8, 8), 3)
    net.body.requires_grad_(False)
    meta = MetaModel(net)
    x, y = torch.randn(4, 1, 8, 8), torch.tensor([0, 1, 2, 0])
    for change in (meta.gradient(x, y), meta.sgd(x, y, [torch.arange(4)] * 2, 0.1, weight_decay=0.5)):
        assert [bool(t.any()) for t in change] == [False] * (len(change) - 2) + [True, True]


# ---------------------------------------------------------------------------------------------- weights on disk


def tiny(**options):
    return build("lenet", (1, 8, 8), 3, norm="batch", **options)


@pytest.mark.parametrize("form", ["safetensors", "bare", "state_dict", "model"])
def test_saved_weights_are_loaded(tmp_path, form):
    source, target, path = tiny(), tiny(), tmp_path / "weights"
    state = source.state_dict()
    if form == "safetensors":
        save_file(state, path)
    else:
        torch.save(state if form == "bare" else {form: state, "epoch": 3}, path)
    load_weights(target, path)
    assert all(torch.equal(value, state[name]) for name, value in target.state_dict().items())


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (lambda: build("mlp", (1, 8, 8), 3), ["has no tensor body"]),
        (lambda: build("lenet", (1, 8, 8), 7, norm="batch"), ["head.weight", r"\(7, 48\)", r"\(3, 48\)"]),
        (lambda: nn.Sequential(tiny()), ["has no tensor body"]),
        (lambda: build("lenet", (3, 8, 8), 3), ["body.0.weight"]),
    ],
)
def test_weights_of_another_model_are_refused_and_nothing_is_loaded(tmp_path, other, words):
    target, path = tiny(), tmp_path / "weights.pt"
    before = snapshot(target)
    torch.save(other().state_dict(), path)
    with refused("weights.pt", *words):
        load_weights(target, path)
    assert_untouched(target, before)


def test_a_tensor_that_the_model_does_not_have_is_refused(tmp_path):
    save_file(tiny().state_dict() | {"extra": torch.ones(1)}, tmp_path / "more.safetensors")
    with refused("more.safetensors", "extra"):
        load_weights(tiny(), tmp_path / "more.safetensors")


def test_files_without_weights_are_refused(tmp_path):
    intact = tmp_path / "intact"
    save_file(tiny().state_dict(), intact)
    contents = {
        "empty": b"",
        "garbage": bytes(range(256)) * 4,
        "text": b"these are not the weights you are looking for",
        "objects": pickle.dumps(Recipe(batch_size=2)),
        "number": pickle.dumps(3),
        "cut.safetensors": intact.read_bytes()[:500],
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    torch.save(tiny(), tmp_path / "whole_model")
    torch.save({"epoch": 3}, tmp_path / "no_tensors")
    torch.save([torch.ones(2)], tmp_path / "a_list")
    for name in (*contents, "whole_model", "no_tensors", "a_list"):
        with refused(name, "not a weights file"):
            load_weights(tiny(), tmp_path / name)
    for name in ("absent", "."):
        with refused("cannot read `weights=", name):
            load_weights(tiny(), tmp_path / name)
