"""What an update says about labels, before any pixel is touched.

For mean cross-entropy over K images the head's bias gradient is  db_j = mean_i p_ij - n_j / K  and its weight
gradient is  dW_j = (1/K) sum_i (p_ij - [y_i = j]) h_i,  with p the softmax, h the features and n_j the label counts.
METHODS holds one function for each published way to read labels off these two, all of the same form:
(mean gradient, observation) -> labels in ascending order. experiments/fed/labels.sh compares them.
"""

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from attacks import common
from federated.wire import Observation, UsageError
from models.meta import MetaModel


def head_gradient(tensors: tuple[Tensor, ...], num_classes: int) -> tuple[Tensor, Tensor | None]:
    """The last layer's weight gradient (C, D) and bias gradient (C,), None for a head without bias."""
    *_, last = tensors
    if last.ndim == 1 and len(last) == num_classes and len(tensors) > 1:
        return tensors[-2].flatten(1), last
    if last.ndim == 2 and len(last) == num_classes:
        return last, None
    raise UsageError(
        f"labels are read off the last layer, which must have {num_classes} rows, not shape {tuple(last.shape)}"
    )


Rule = Callable[[tuple[Tensor, ...], Observation], Tensor]
METHODS: dict[str, Rule] = {}
CASTS = 8  # of public images, labels and minibatch orders in each rehearsal
RECAST = (0.5, 0.3, 0.2)  # share of the labels that a cast draws anew, in each rehearsal: ever nearer to those found
WITNESSES, FEWER = 256, 16  # public images a mean softmax is of, and where rehearsals make up for what few get wrong
POINTS = 3  # on the way from W_t to W_t+1
RIDGE = 0.05  # on slopes in units of the evidence's deviation, added to a sum over casts and classes


def method(name: str) -> Callable[[Rule], Rule]:
    """Enter a rule under the name the comparison prints."""

    def enter(rule: Rule) -> Rule:
        assert name not in METHODS, f"two label rules called {name}"
        METHODS[name] = rule
        return rule

    return enter


def row_sum(weight: Tensor) -> int:
    """iDLG's rule (Zhao et al. 2020, https://arxiv.org/abs/2001.02610): the row with the smallest sum.

    Exact for one image whose features are not negative (ReLU, sigmoid).
    """
    return int(weight.sum(1).argmin())


def bias_sign(bias: Tensor) -> int:
    """The only negative entry of the bias gradient: exact for one image, whatever the activation."""
    return int(bias.argmin())


@method("bias counts")
def bias_counts(mean_gradient: tuple[Tensor, ...], seen: Observation) -> Tensor:
    """Label counts n_j = K (pbar_j - db_j), rounded to sum to K, as labels (K,) in ascending order.

    pbar, the mean softmax over the private images, is estimated on public ones; after several local steps it is
    averaged over models between the one broadcast and the one returned. That path is no straight line, and a client
    turns off it as its minibatches happen to fall, so the count is then learned: clients with public images and labels
    about like those found train by the same recipe, a ridge regression tells their true counts from what their updates
    show of each class (`_evidence`), and the client's own evidence goes through it. Needs a head with bias. Adam hides
    how large db is: classes with db_j < 0 share the labels by it, before the rehearsal.
    """
    count, recipe = seen.update.num_examples, seen.recipe
    if seen.update.kind == "gradient" or (recipe.steps(count) == 1 and recipe.optimizer == "sgd"):
        return round_counts(_straight_counts(mean_gradient, seen, seen.update.tensors, _Public(seen, WITNESSES)), count)
    public = _Public(seen, FEWER)
    public.hasten()
    told = _evidence(mean_gradient, seen, seen.update.tensors, public)
    found = round_counts(told[:, 0], count)
    rehearsed: list[tuple[Tensor, Tensor]] = []
    for number, share in enumerate(RECAST if told.isfinite().all() else ()):
        for cast in range(CASTS):
            rehearsed += _rehearse(found, share, number * CASTS + cast, seen, public)
        before = found
        if len(rehearsed) > 1:
            found = round_counts(_regress(told, *map(torch.stack, zip(*rehearsed, strict=True))), count)
        if number and found.equal(before):
            break
    return found


@method("iDLG")
def smallest_row_sums(mean_gradient: tuple[Tensor, ...], seen: Observation) -> Tensor:
    """iDLG's rule, and for K images its extension to the K smallest row sums: never the same label twice."""
    weight, _ = head_gradient(mean_gradient, seen.task.num_classes)
    return _smallest(weight.sum(1), seen.update.num_examples)


@method("bias sign")
def negative_biases(mean_gradient: tuple[Tensor, ...], seen: Observation) -> Tensor:
    """Classes whose bias gradient is negative: after one step never a wrong one, for an absent class has db_j = pbar_j.

    May be fewer than K labels: present classes with n_j < K pbar_j go unseen, and counts are not told.
    """
    bias = _bias(mean_gradient, seen)
    return (bias < 0).nonzero().flatten()


@method("GradInversion")
def smallest_columns(mean_gradient: tuple[Tensor, ...], seen: Observation) -> Tensor:
    """The K classes with the smallest entry in their row of the weight gradient, for labels that do not repeat.

    Yin et al., See through Gradients, CVPR 2021, eq. 7. https://arxiv.org/abs/2104.07586
    """
    weight, _ = head_gradient(mean_gradient, seen.task.num_classes)
    return _smallest(weight.min(1).values, seen.update.num_examples)


@method("LLG")
def largest_shares(mean_gradient: tuple[Tensor, ...], seen: Observation) -> Tensor:
    """Each label takes its share m out of the row sums: negative rows first, then the smallest until K are found.

    Wainakh et al., User-Level Label Leakage from Gradients, PoPETs 2022. https://arxiv.org/abs/2105.09369
    """
    weight, _ = head_gradient(mean_gradient, seen.task.num_classes)
    count, sums = seen.update.num_examples, weight.sum(1)
    share = (1 + 1 / len(sums)) / count * sums[sums < 0].sum()
    found = _smallest(sums, min(count, int((sums < 0).sum()))).tolist()
    sums = sums.clone()
    sums[found] -= share
    while len(found) < count:
        found.append(int(sums.argmin()))
        sums[found[-1]] -= share
    return torch.tensor(sorted(found), device=weight.device)


@method("GDL")
def gdl_counts(mean_gradient: tuple[Tensor, ...], seen: Observation) -> Tensor:
    """n_j = K pbar_j - K sum_m dW_jm / Obar, with pbar and Obar = mean sum_m h_m from inputs of noise at W_t.

    Geng et al., Towards General Deep Leakage in Federated Learning, 2021. https://arxiv.org/abs/2110.09074
    """
    return _counts_by_weight(mean_gradient, seen, [0.0])


@method("DLF")
def dlf_counts(mean_gradient: tuple[Tensor, ...], seen: Observation) -> Tensor:
    """GDL's counts with pbar and Obar interpolated from W_t to W_t+1, step by step, and averaged.

    Dimitrov et al., Data Leakage in Federated Averaging, TMLR 2022. https://arxiv.org/abs/2206.12395
    """
    if seen.update.kind == "gradient":
        return gdl_counts(mean_gradient, seen)
    steps = seen.recipe.steps(seen.update.num_examples)
    return _counts_by_weight(mean_gradient, seen, [k / max(1, steps - 1) for k in range(steps)])


@method("iLRG")
def ilrg_counts(mean_gradient: tuple[Tensor, ...], seen: Observation) -> Tensor:
    """Class features h_j = dW_j / db_j give P_j = softmax(W h_j + b), and (P^T - 1) n / K = db with sum n = K gives n.

    Ma et al., Instance-wise Batch Label Restoration via Gradients, ICLR 2023.
    """
    weight, bias = head_gradient(mean_gradient, seen.task.num_classes)
    bias = _bias(mean_gradient, seen)
    *_, own_weight, own_bias = (p.detach() for p in seen.model.parameters())
    safe = torch.where(bias.abs() < 1e-12, 1e-12, bias)
    outputs = (weight / safe[:, None]) @ own_weight.flatten(1).T + own_bias  # (C, C), one row for each class
    shares = outputs.nan_to_num().softmax(1).double()
    system = torch.cat([shares.T - torch.eye(len(bias), device=bias.device), torch.ones_like(shares[:1])])
    wanted = torch.cat([bias.double(), torch.ones(1, dtype=torch.float64, device=bias.device)])
    count = seen.update.num_examples
    return round_counts(count * (torch.linalg.pinv(system) @ wanted), count)


def settle_labels(mean_gradient: tuple[Tensor, ...], seen: Observation, rng: torch.Generator) -> Tensor:
    """Labels (K,) an attack may hold fixed: those granted or, without a grant, those the update betrays, shuffled.

    Counts come in ascending order, and minibatches are cut in order: shuffled, no minibatch is all of one class.
    """
    granted = seen.granted.get("labels")
    if granted is not None:
        return granted
    found = guess_labels(mean_gradient, seen)
    if found is None:
        single = seen.update.num_examples == 1
        found = (smallest_row_sums if single else dlf_counts)(mean_gradient, seen)
    return found[torch.randperm(len(found), generator=rng).to(found.device)]


def guess_labels(mean_gradient: tuple[Tensor, ...], seen: Observation) -> Tensor | None:
    """Labels (K,) of the private images from the bias gradient; None for a head without bias."""
    _, bias = head_gradient(mean_gradient, seen.task.num_classes)
    if bias is None:
        return None
    if seen.update.num_examples == 1:
        return torch.tensor([bias_sign(bias)], device=bias.device)
    return bias_counts(mean_gradient, seen)


def round_counts(wanted: Tensor, total: int) -> Tensor:
    """Non-negative integers near `wanted` (C,) that sum to `total`, as sorted labels (total,): largest remainder."""
    # an update that is not finite says nothing of labels
    wanted = wanted.double().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).clamp(0, total)
    counts = wanted.floor().long()
    while (left := total - int(counts.sum())) > 0:
        best = (wanted - counts).argsort(descending=True)[:left]
        counts[best] += 1
    while int(counts.sum()) > total:
        counts[torch.where(counts > 0, wanted - counts, torch.inf).argmin()] -= 1
    return torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)


class _Public:
    """What public images make of a model anywhere between the one broadcast and the one returned."""

    def __init__(self, seen: Observation, images: int) -> None:
        model = copy.deepcopy(seen.model)
        self.heard: list[Tensor] = []
        self.start: tuple[Tensor, Tensor] | None = None  # the first look, always the same
        # a bound method would be copied with the model, and hear for a copy of this
        _head(model).register_forward_pre_hook(lambda _, inputs: self._hear(inputs[0].detach()))
        self.meta = MetaModel(model, seen.recipe.model_mode)
        there = len(seen.public.images)
        spread = torch.linspace(0, there - 1, min(images, there)).round().long()  # they may come class by class
        inputs = seen.task.to_model(seen.public.images[spread.to(seen.public.images.device)])
        # in lots, unless what is normalised by the batch would change
        self.lots = inputs.split(32 if seen.recipe.model_mode == "eval" else len(inputs))

    def _hear(self, x: Tensor) -> None:
        self.heard.append(x.flatten(2).mean(2) if x.ndim == 4 else x)  # what a head of 1x1 convolutions pools

    def hasten(self) -> None:
        """Before many steps are taken from here."""
        if self.meta.weights[0].dtype == torch.float32:
            self.meta.hasten(self.lots[0][:8])

    @torch.no_grad()
    def look(self, sent: Sequence[Tensor], share: float) -> tuple[Tensor, Tensor]:
        """Logits (N, C) and the head's inputs (N, D), `share` of the way along the update."""
        if share == 0 and self.start is not None:
            return self.start
        self.heard.clear()
        weights = [w - share * d for w, d in zip(self.meta.weights, sent, strict=True)]
        logits = torch.cat([self.meta(lot, weights) for lot in self.lots])
        found = logits, torch.cat(self.heard)
        self.start = found if share == 0 else self.start
        return found


def _straight_counts(
    mean_gradient: tuple[Tensor, ...], seen: Observation, sent: Sequence[Tensor], public: _Public
) -> Tensor:
    """Label counts (C,), not rounded, of a client that sent these tensors and went straight."""
    count, bias = seen.update.num_examples, _bias(mean_gradient, seen)
    if seen.update.kind == "delta" and seen.recipe.optimizer == "adam":
        falling = (-bias).clamp(min=0)
        return count * falling / falling.sum().clamp(min=1e-12)
    steps = 1 if seen.update.kind == "gradient" else seen.recipe.steps(count)
    shares = torch.linspace(0, 1 - 1 / steps, min(steps, POINTS)).tolist()
    return count * (torch.stack([public.look(sent, s)[0].softmax(1).mean(0) for s in shares]).mean(0) - bias)


def _evidence(mean_gradient: tuple[Tensor, ...], seen: Observation, sent: Sequence[Tensor], public: _Public) -> Tensor:
    """What an update shows of each class, (C, E): its straight count, then what betrays how that count errs.

    The last minibatches weigh on the returned model's own opinion of a class. Rows of the head's gradient weigh steps
    otherwise than the bias does, for features move on the way: where they end up, and where errors push them through
    the head that was sent. A row along such a direction tells early steps from late ones.
    """
    weight, bias = head_gradient(mean_gradient, seen.task.num_classes)
    head, _ = head_gradient(tuple(w.detach() for w in public.meta.weights), seen.task.num_classes)
    bias = _bias(mean_gradient, seen)
    (_, before), (logits, after) = public.look(sent, 0.0), public.look(sent, 1.0)
    first, grown = before.mean(0), after.mean(0) - before.mean(0)
    plane, _ = torch.linalg.qr(torch.stack([first, grown], 1))
    pushed, shares = head.T @ bias, logits.softmax(1).mean(0)
    shown = [_straight_counts(mean_gradient, seen, sent, public), bias, shares, shares.square()]
    shown += [logits.mean(0) - logits.mean(), weight.sum(1), weight.norm(dim=1), weight @ first, weight @ grown]
    shown += [weight @ pushed, (weight - weight @ plane @ plane.T) @ pushed]
    shown += [head @ (weight.T @ (weight @ first)), (head * weight).sum(1)]
    return torch.stack(shown, 1).double()


def _rehearse(
    labels: Tensor, share: float, cast: int, seen: Observation, public: _Public
) -> list[tuple[Tensor, Tensor]]:
    """[(evidence (C, E), counts (C,))] of a client with public images and these labels (K,), if it is finite.

    A `share` of the labels is drawn anew.
    """
    count, classes, recipe = len(labels), seen.task.num_classes, seen.recipe
    rng = torch.Generator().manual_seed(cast)
    chosen = torch.randint(len(seen.public.images), (count,), generator=rng)
    inputs = seen.task.to_model(seen.public.images[chosen.to(labels.device)])
    anew, drawn = torch.rand(count, generator=rng) < share, torch.randint(classes, (count,), generator=rng)
    labels = torch.where(anew.to(labels.device), drawn.to(labels.device), labels)
    labels = labels[torch.randperm(count, generator=rng).to(labels.device)]
    batches = [b.to(labels.device) for b in recipe.batches(count, rng)]
    sent = public.meta.train(inputs, labels, batches, recipe, create_graph=False)
    sent = recipe.defense(sent, rng) if recipe.defense is not None else sent
    shown = _evidence(common.mean_gradient(seen, sent), seen, sent, public)
    return [(shown, torch.bincount(labels, minlength=classes).double())] if shown.isfinite().all() else []


def _regress(told: Tensor, shown: Tensor, counts: Tensor) -> Tensor:
    """Counts (C,) for evidence `told` (C, E), from casts' evidence (M, C, E) and counts (M, C).

    Each class has its own mean over the casts; all share the slopes, which bend with how large a class is.
    """
    middle, about = shown.mean(0), counts.mean(0)
    apart = shown - middle
    unit = apart.flatten(0, 1).std(0).clamp(min=1e-12)
    size = ((about - about.mean()) / about.std().clamp(min=1e-12))[:, None]
    size = size * (len(shown) > CASTS)  # a first few casts do not tell how slopes bend
    apart, off = (torch.cat([x, x * size], -1) for x in (apart / unit, (told - middle) / unit))
    apart = apart.flatten(0, 1)
    ridge = RIDGE * torch.eye(apart.shape[1]).to(apart)
    slopes = torch.linalg.solve(apart.T @ apart + ridge, apart.T @ (counts - about).flatten())
    return about + off @ slopes


def _head(model: nn.Module) -> nn.Module:
    """The last layer with weights that may be one."""
    *_, head = (m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d))
    return head


def _bias(mean_gradient: tuple[Tensor, ...], seen: Observation) -> Tensor:
    _, bias = head_gradient(mean_gradient, seen.task.num_classes)
    if bias is None:
        raise UsageError("this label rule reads the bias of the last layer, and this head has none")
    return bias


def _smallest(values: Tensor, count: int) -> Tensor:
    return values.argsort()[:count].sort().values


def _counts_by_weight(mean_gradient: tuple[Tensor, ...], seen: Observation, shares: list[float]) -> Tensor:
    weight, _ = head_gradient(mean_gradient, seen.task.num_classes)
    ends = [_noise_statistics(seen, 0.0)]
    ends.append(ends[0] if shares == [0.0] else _noise_statistics(seen, 1.0))
    (softmax, features), (last_softmax, last_features) = ends
    count, sums = seen.update.num_examples, weight.sum(1)
    wanted = [
        count * (torch.lerp(softmax, last_softmax, s) - sums / torch.lerp(features, last_features, s)) for s in shares
    ]
    return round_counts(torch.stack(wanted).mean(0), count)


@torch.no_grad()
def _noise_statistics(seen: Observation, share: float, points: int = 256) -> tuple[Tensor, Tensor]:
    """Mean softmax (C,) and mean sum of the head's input (), over N(0, 1) images, `share` of the way to W_t+1."""
    model, features = copy.deepcopy(seen.model), []
    _head(model).register_forward_pre_hook(lambda _, inputs: features.append(inputs[0].flatten(1).sum(1).mean()))
    meta = MetaModel(model, seen.recipe.model_mode)
    rng = torch.Generator().manual_seed(0)  # the same noise for every update
    inputs = torch.randn(points, *seen.task.image_shape, generator=rng).to(meta.weights[0])
    weights = [w - share * d for w, d in zip(meta.weights, seen.update.tensors, strict=True)] if share else None
    return meta(inputs, weights).softmax(1).mean(0), features[-1]
