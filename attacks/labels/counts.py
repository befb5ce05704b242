"""Our own label rule: counts from the bias gradient, corrected by simulated clients with public examples."""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from attacks.labels.registry import RULES
from attacks.labels.rules import bias_gradient, round_counts
from attacks.matching import matcher
from core.protocol import Batch, Observation
from defenses.base import parse
from models.inspection import head_gradient, head_layer
from models.meta import MetaModel

NUM_SIMULATIONS = 8  # clients with other examples, labels and minibatch orders, in each round of simulation
RESAMPLE_SHARES = (0.5, 0.3, 0.2)  # share of the labels that a simulated client draws anew, in each round
CALIBRATION_EXAMPLES = 256  # public examples over which a mean softmax is taken
SIMULATION_EXAMPLES = 16  # likewise where simulations correct the error of a few
SYNTHETIC_EXAMPLES = 64  # where there is no public data
POSITIONS = 3  # models between W_t and W_t+1 over which the softmax is averaged
SCALE_STARTS = (1.0, 2.0, 4.0)  # factors of a defence at which its estimate starts, in units of the smallest possible
SCALE_ROUNDS, SCALE_CLIENTS = 4, 3  # rounds of simulation of this factor, and clients in each
SCALE_RANGE, SCALE_STD = 0.25, 0.1  # of its logarithm about that of the simulated clients
COUNT_STD = 0.1  # of the error of a count that is not rounded
RIDGE = 0.05  # penalty of the regression, in units of the features' deviation, on a sum over simulations and classes


@RULES.register("bias counts")
def bias_counts(mean_gradient: tuple[Tensor, ...], observation: Observation) -> Tensor:
    """Label counts n_j = K (pbar_j - db_j), rounded to sum to K, as labels (K,) in ascending order.

    pbar, the mean softmax over the private examples, is estimated on public ones, or on synthetic ones if there are
    none. A defence that scales one gradient is undone (`scaled_counts`). After several local steps pbar is averaged
    over models between the one broadcast and the one returned. The client's path is not straight, and its curvature
    depends on the order of its minibatches. So the counts are then corrected by simulation. Simulated clients, with
    labels near those inferred so far, train by the same recipe. A ridge regression predicts their true counts from
    features of their updates (`_features`) and is applied to the observed update. Adam's update does not show the size
    of db: initial counts are then proportional to -db_j over the classes with db_j < 0. Needs a head with bias.
    """
    count, recipe = observation.update.num_examples, observation.recipe
    update = observation.update.ordered(observation.model)
    if observation.update.kind == "gradient" or (recipe.steps(count) == 1 and recipe.optimizer == "sgd"):
        responses = _Responses(observation, CALIBRATION_EXAMPLES)
        if parse(recipe.defense).steps:
            return scaled_counts(mean_gradient, observation, responses)
        return round_counts(_straight_counts(mean_gradient, observation, update, responses), count)
    responses = _Responses(observation, SIMULATION_EXAMPLES, fast_convs=True)
    observed = _features(mean_gradient, observation, update, responses)
    labels = round_counts(observed[:, 0], count)
    simulated: list[tuple[Tensor, Tensor]] = []
    for number, share in enumerate(RESAMPLE_SHARES if observed.isfinite().all() else ()):
        for client in range(NUM_SIMULATIONS):
            seed = number * NUM_SIMULATIONS + client
            simulated += _simulate_client(labels, share, seed, observation, responses)
        before = labels
        if len(simulated) > 1:
            labels = round_counts(_regress(observed, *map(torch.stack, zip(*simulated, strict=True))), count)
        if number and labels.equal(before):
            break
    return labels


def synthetic_examples(observation: Observation) -> Batch:
    """A stand-in for public data: random mixtures of the domain's extremes, smooth within an example, without labels.

    For images these are coarse random patterns, enlarged. Labels are zero: no label rule reads them.
    """
    shape = observation.task.domain.shape
    rng = torch.Generator().manual_seed(0)
    values = torch.rand(SYNTHETIC_EXAMPLES, *shape, generator=rng)
    if len(shape) == 3:
        coarse = torch.rand(SYNTHETIC_EXAMPLES, shape[0], 4, 4, generator=rng)
        values = torch.nn.functional.interpolate(coarse, size=shape[1:], mode="bilinear", align_corners=False)
    examples = observation.task.domain.project(values).to(observation.update.device)
    return Batch(examples, torch.zeros(len(examples), dtype=torch.int64, device=examples.device))


def scaled_counts(mean_gradient: tuple[Tensor, ...], observation: Observation, responses: "_Responses") -> Tensor:
    """Labels (K,) of a client whose gradient a defence has scaled by an unknown factor c: n_j = K (pbar_j - db_j / c).

    The factor is that of simulated clients with public examples and the labels inferred so far, which the defence
    scales as it does the victim. It is then moved by at most a quarter to where the counts are nearest to whole
    numbers. This is repeated from several first factors, of which the smallest makes no count negative and is exact
    if a class is absent; the labels whose factor and counts agree best are returned.
    """
    count, classes = observation.update.num_examples, observation.task.num_classes
    bias = bias_gradient(mean_gradient, observation)
    expected = responses.at(mean_gradient, 0.0)[0].softmax(1).mean(0)
    smallest = (bias / expected.clamp(min=1e-12)).max().clamp(min=1e-12)
    found: list[tuple[float, Tensor]] = []
    for start in SCALE_STARTS if bias.isfinite().all() and bias.abs().max() > 0 else ():
        labels = round_counts(count * (expected - bias / (start * smallest)), count)
        for _ in range(SCALE_ROUNDS):
            simulated = [_simulate_scale(labels, seed, observation, responses) for seed in range(SCALE_CLIENTS)]
            center = torch.tensor(simulated, dtype=torch.float64).log().mean()
            candidates = (center + torch.linspace(-SCALE_RANGE, SCALE_RANGE, 101, dtype=torch.float64)).exp()
            counts = count * (expected - bias / candidates[:, None].to(bias))  # (101, C)
            rounded = [torch.bincount(round_counts(row, count), minlength=classes) for row in counts]
            penalties = ((counts - torch.stack(rounded)).square().sum(1) / COUNT_STD**2).double().cpu()
            penalties += ((candidates.log() - center) / SCALE_STD).square()
            best = int(penalties.argmin())
            before, labels = labels, round_counts(counts[best], count)
            if labels.equal(before):
                break
        found.append((penalties[best].item(), labels))
    return min(found, key=lambda pair: pair[0])[1] if found else round_counts(count * expected, count)


def _simulate_scale(labels: Tensor, seed: int, observation: Observation, responses: "_Responses") -> float:
    """The factor by which the defence scales the gradient of a client with public examples and these labels (K,)."""
    rng = torch.Generator().manual_seed(seed)
    public, recipe = responses.public.examples, observation.recipe
    chosen = torch.randint(len(public), (len(labels),), generator=rng)
    inputs = observation.task.domain.to_model(public[chosen.to(public.device)])
    gradient = responses.meta.gradient(inputs, labels, create_graph=False)
    weight = 1.0 if observation.update.kind == "gradient" else recipe.total_step_weight(len(labels))
    sent = parse(recipe.defense).on_update(tuple(weight * g for g in gradient), rng)
    product, square = (sum((a * b).sum().item() for a, b in zip(x, gradient, strict=True)) for x in (sent, gradient))
    return max(product / (weight * square), 1e-12) if square > 0 else 1.0


def public_head_inputs(observation: Observation) -> Tensor:
    """What the head receives for public or synthetic examples, (N, D)."""
    responses = _Responses(observation, SYNTHETIC_EXAMPLES)
    return responses.at(tuple(responses.meta.weights), 0.0)[1]


class _Responses:
    """Logits and head inputs of public examples, at any model between the one broadcast and the one returned."""

    def __init__(self, observation: Observation, examples: int, fast_convs: bool = False) -> None:
        model = copy.deepcopy(observation.model)
        self.captured: list[Tensor] = []
        self.at_start: tuple[Tensor, Tensor] | None = None  # computed once
        # a lambda, because a bound method would be copied with the model and capture into the copy
        head_layer(model).register_forward_pre_hook(lambda _, inputs: self._capture(inputs[0].detach()))
        self.public = observation.public or synthetic_examples(observation)
        available = len(self.public.examples)
        chosen = torch.linspace(0, available - 1, min(examples, available)).round().long()  # classes may come in order
        to_model = observation.task.domain.to_model
        inputs = to_model(self.public.examples[chosen.to(self.public.examples.device)])
        # in chunks, unless the model normalises by the batch
        mode = observation.recipe.model_mode
        self.chunks = inputs.split(32 if mode == "eval" else len(inputs))
        fast = fast_convs and next(model.parameters()).dtype == torch.float32
        self.meta = MetaModel(
            model, mode, loss=observation.recipe.loss, fast_convs=self.chunks[0][:8] if fast else None
        )

    def _capture(self, x: Tensor) -> None:
        self.captured.append(x.flatten(2).mean(2) if x.ndim == 4 else x)  # a head of 1x1 convolutions is pooled

    @torch.no_grad()
    def at(self, update: Sequence[Tensor], position: float) -> tuple[Tensor, Tensor]:
        """Logits (N, C) and the head's inputs (N, D), between W_t (position 0) and W_t+1 (1)."""
        if position == 0 and self.at_start is not None:
            return self.at_start
        self.captured.clear()
        weights = [w - position * d for w, d in zip(self.meta.weights, update, strict=True)]
        logits = torch.cat([self.meta(chunk, weights) for chunk in self.chunks])
        found = logits, torch.cat(self.captured)
        self.at_start = found if position == 0 else self.at_start
        return found


def _straight_counts(
    mean_gradient: tuple[Tensor, ...], observation: Observation, update: Sequence[Tensor], responses: _Responses
) -> Tensor:
    """Label counts (C,), not rounded, of a client whose weights moved in a straight line."""
    count, bias = observation.update.num_examples, bias_gradient(mean_gradient, observation)
    if observation.update.kind == "delta" and observation.recipe.optimizer == "adam":
        negative = (-bias).clamp(min=0)
        return count * negative / negative.sum().clamp(min=1e-12)
    steps = 1 if observation.update.kind == "gradient" else observation.recipe.steps(count)
    positions = torch.linspace(0, 1 - 1 / steps, min(steps, POSITIONS)).tolist()
    return count * (torch.stack([responses.at(update, s)[0].softmax(1).mean(0) for s in positions]).mean(0) - bias)


def _features(
    mean_gradient: tuple[Tensor, ...], observation: Observation, update: Sequence[Tensor], responses: _Responses
) -> Tensor:
    """Features of an update for each class, (C, E): its straight count, then what predicts the error of that count.

    The returned model's mean softmax is biased towards the labels of the last minibatches. Because hidden features
    drift during local training, weight rows and bias entries average the steps differently; projections of the head's
    gradient on the drift, and on the gradient of the loss with respect to the features, separate early from late steps.
    """
    weight, _ = head_gradient(mean_gradient, observation.task.num_classes)
    head, _ = head_gradient(tuple(w.detach() for w in responses.meta.weights), observation.task.num_classes)
    bias = bias_gradient(mean_gradient, observation)
    (_, before), (logits, after) = responses.at(update, 0.0), responses.at(update, 1.0)
    first, drift = before.mean(0), after.mean(0) - before.mean(0)
    plane, _ = torch.linalg.qr(torch.stack([first, drift], 1))
    pushed, shares = head.T @ bias, logits.softmax(1).mean(0)
    features = [_straight_counts(mean_gradient, observation, update, responses), bias, shares, shares.square()]
    features += [logits.mean(0) - logits.mean(), weight.sum(1), weight.norm(dim=1), weight @ first, weight @ drift]
    features += [weight @ pushed, (weight - weight @ plane @ plane.T) @ pushed]
    features += [head @ (weight.T @ (weight @ first)), (head * weight).sum(1)]
    return torch.stack(features, 1).double()


def _simulate_client(
    labels: Tensor, share: float, seed: int, observation: Observation, responses: _Responses
) -> list[tuple[Tensor, Tensor]]:
    """[(features (C, E), counts (C,))] of a client with public examples and labels near `labels` (K,), if finite.

    A `share` of the labels is drawn anew.
    """
    count, classes, recipe = len(labels), observation.task.num_classes, observation.recipe
    public = responses.public.examples
    rng = torch.Generator().manual_seed(seed)
    chosen = torch.randint(len(public), (count,), generator=rng)
    inputs = observation.task.domain.to_model(public[chosen.to(labels.device)])
    resampled, drawn = torch.rand(count, generator=rng) < share, torch.randint(classes, (count,), generator=rng)
    labels = torch.where(resampled.to(labels.device), drawn.to(labels.device), labels)
    labels = labels[torch.randperm(count, generator=rng).to(labels.device)]
    batches = [b.to(labels.device) for b in recipe.batches(count, rng)]
    delta = responses.meta.train(inputs, labels, batches, recipe, create_graph=False)
    sent = parse(recipe.defense).on_update(delta, rng)
    features = _features(matcher.mean_gradient(observation, sent), observation, sent, responses)
    return [(features, torch.bincount(labels, minlength=classes).double())] if features.isfinite().all() else []


def _regress(observed: Tensor, simulated: Tensor, counts: Tensor) -> Tensor:
    """Counts (C,) for features `observed` (C, E), from those of simulations (M, C, E) and their counts (M, C).

    Each class has its own mean over the simulations; all share the coefficients, which depend on the class's size.
    """
    mean, mean_counts = simulated.mean(0), counts.mean(0)
    centred = simulated - mean
    unit = centred.flatten(0, 1).std(0).clamp(min=1e-12)
    size = ((mean_counts - mean_counts.mean()) / mean_counts.std().clamp(min=1e-12))[:, None]
    size = size * (len(simulated) > NUM_SIMULATIONS)  # the first simulations are too few for interactions with size
    centred, target = (torch.cat([x, x * size], -1) for x in (centred / unit, (observed - mean) / unit))
    centred = centred.flatten(0, 1)
    ridge = RIDGE * torch.eye(centred.shape[1]).to(centred)
    coefficients = torch.linalg.solve(centred.T @ centred + ridge, centred.T @ (counts - mean_counts).flatten())
    return mean_counts + target @ coefficients
