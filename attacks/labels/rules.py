"""Published rules that infer labels from an update, before any example is reconstructed.

For mean cross-entropy over K examples the head's bias gradient is  db_j = mean_i p_ij - n_j / K  and its weight
gradient is  dW_j = (1/K) sum_i (p_ij - [y_i = j]) h_i,  with p the softmax, h the features and n_j the label counts.
experiments/fed/labels.sh compares the rules.
"""

import copy

import torch
from torch import Tensor

from attacks.labels.registry import RULES
from core.errors import UsageError
from core.protocol import Observation
from models.inspection import head_gradient, head_layer
from models.meta import MetaModel


def row_sum(weight: Tensor) -> int:
    """iDLG's rule (Zhao et al. 2020, https://arxiv.org/abs/2001.02610): the row with the smallest sum.

    Exact for one example whose features are not negative (ReLU, sigmoid).
    """
    return int(weight.sum(1).argmin())


def bias_sign(bias: Tensor) -> int:
    """The only negative entry of the bias gradient: exact for one example, whatever the activation."""
    return int(bias.argmin())


@RULES.register("iDLG")
def smallest_row_sums(mean_gradient: tuple[Tensor, ...], observation: Observation) -> Tensor:
    """iDLG's rule, extended to K examples by the K smallest row sums: no label twice."""
    weight, _ = head_gradient(mean_gradient, observation.task.num_classes)
    return _smallest(weight.sum(1), observation.update.num_examples)


@RULES.register("bias sign")
def negative_biases(mean_gradient: tuple[Tensor, ...], observation: Observation) -> Tensor:
    """Classes whose bias gradient is negative; after one step never wrong, as absent classes have db_j = pbar_j.

    May be fewer than K labels: counts are not inferred, and present classes with n_j < K pbar_j are missed.
    """
    return (bias_gradient(mean_gradient, observation) < 0).nonzero().flatten()


@RULES.register("GradInversion")
def smallest_columns(mean_gradient: tuple[Tensor, ...], observation: Observation) -> Tensor:
    """The K classes with the smallest entry in their row of the weight gradient, for labels that do not repeat.

    Yin et al., See through Gradients, CVPR 2021, eq. 7. https://arxiv.org/abs/2104.07586
    """
    weight, _ = head_gradient(mean_gradient, observation.task.num_classes)
    return _smallest(weight.min(1).values, observation.update.num_examples)


@RULES.register("LLG")
def largest_shares(mean_gradient: tuple[Tensor, ...], observation: Observation) -> Tensor:
    """A label for each negative row sum, then for the smallest sum until there are K.

    The mean contribution of a label is taken out of the row sum of each label found.

    Wainakh et al., User-Level Label Leakage from Gradients, PoPETs 2022. https://arxiv.org/abs/2105.09369
    """
    weight, _ = head_gradient(mean_gradient, observation.task.num_classes)
    count, sums = observation.update.num_examples, weight.sum(1)
    share = (1 + 1 / len(sums)) / count * sums[sums < 0].sum()
    labels = _smallest(sums, min(count, int((sums < 0).sum()))).tolist()
    sums = sums.clone()
    sums[labels] -= share
    while len(labels) < count:
        labels.append(int(sums.argmin()))
        sums[labels[-1]] -= share
    return torch.tensor(sorted(labels), device=weight.device)


@RULES.register("GDL")
def gdl_counts(mean_gradient: tuple[Tensor, ...], observation: Observation) -> Tensor:
    """n_j = K pbar_j - K sum_m dW_jm / Obar, with pbar and Obar = mean sum_m h_m measured on noise at W_t.

    Geng et al., Towards General Deep Leakage in Federated Learning, 2021. https://arxiv.org/abs/2110.09074
    """
    return _counts_by_weight(mean_gradient, observation, [0.0])


@RULES.register("DLF")
def dlf_counts(mean_gradient: tuple[Tensor, ...], observation: Observation) -> Tensor:
    """GDL's counts with pbar and Obar interpolated from W_t to W_t+1, step by step, and averaged.

    Dimitrov et al., Data Leakage in Federated Averaging, TMLR 2022. https://arxiv.org/abs/2206.12395
    """
    if observation.update.kind == "gradient":
        return gdl_counts(mean_gradient, observation)
    steps = observation.recipe.steps(observation.update.num_examples)
    return _counts_by_weight(mean_gradient, observation, [k / max(1, steps - 1) for k in range(steps)])


@RULES.register("iLRG")
def ilrg_counts(mean_gradient: tuple[Tensor, ...], observation: Observation) -> Tensor:
    """Class features h_j = dW_j / db_j give P_j = softmax(W h_j + b), and (P^T - 1) n / K = db with sum n = K gives n.

    Ma et al., Instance-wise Batch Label Restoration via Gradients, ICLR 2023.
    """
    weight, _ = head_gradient(mean_gradient, observation.task.num_classes)
    bias = bias_gradient(mean_gradient, observation)
    *_, own_weight, own_bias = (p.detach() for p in observation.model.parameters())
    safe = torch.where(bias.abs() < 1e-12, 1e-12, bias)
    outputs = (weight / safe[:, None]) @ own_weight.flatten(1).T + own_bias  # (C, C), one row for each class
    shares = outputs.nan_to_num().softmax(1).double()
    system = torch.cat([shares.T - torch.eye(len(bias), device=bias.device), torch.ones_like(shares[:1])])
    target = torch.cat([bias.double(), torch.ones(1, dtype=torch.float64, device=bias.device)])
    count = observation.update.num_examples
    return round_counts(count * (torch.linalg.pinv(system) @ target), count)


def bias_gradient(mean_gradient: tuple[Tensor, ...], observation: Observation) -> Tensor:
    """The head's bias gradient (C,). Raises UsageError for a head without bias."""
    _, bias = head_gradient(mean_gradient, observation.task.num_classes)
    if bias is None:
        raise UsageError("this label rule reads the bias of the last layer, which has none")
    return bias


def round_counts(counts: Tensor, total: int) -> Tensor:
    """Non-negative integers near `counts` (C,) that sum to `total`, as sorted labels (total,): largest remainder."""
    # nothing can be inferred from an update that is not finite: its entries count as zero
    counts = counts.double().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).clamp(0, total)
    rounded = counts.floor().long()
    while (left := total - int(rounded.sum())) > 0:
        largest = (counts - rounded).argsort(descending=True)[:left]
        rounded[largest] += 1
    while int(rounded.sum()) > total:
        rounded[torch.where(rounded > 0, counts - rounded, torch.inf).argmin()] -= 1
    return torch.repeat_interleave(torch.arange(len(rounded), device=rounded.device), rounded)


def _smallest(values: Tensor, count: int) -> Tensor:
    return values.argsort()[:count].sort().values


def _counts_by_weight(mean_gradient: tuple[Tensor, ...], observation: Observation, positions: list[float]) -> Tensor:
    """Counts from row sums, averaged over `positions` between W_t (0) and W_t+1 (1)."""
    weight, _ = head_gradient(mean_gradient, observation.task.num_classes)
    ends = [_noise_statistics(observation, 0.0)]
    ends.append(ends[0] if positions == [0.0] else _noise_statistics(observation, 1.0))
    (softmax, features), (last_softmax, last_features) = ends
    count, sums = observation.update.num_examples, weight.sum(1)
    counts = [
        count * (torch.lerp(softmax, last_softmax, s) - sums / torch.lerp(features, last_features, s))
        for s in positions
    ]
    return round_counts(torch.stack(counts).mean(0), count)


@torch.no_grad()
def _noise_statistics(observation: Observation, position: float, points: int = 256) -> tuple[Tensor, Tensor]:
    """Mean softmax (C,) and mean sum of the head's inputs (), over N(0, 1) inputs, between W_t (0) and W_t+1 (1)."""
    model, features = copy.deepcopy(observation.model), []
    head_layer(model).register_forward_pre_hook(lambda _, inputs: features.append(inputs[0].flatten(1).sum(1).mean()))
    meta = MetaModel(model, observation.recipe.model_mode)
    rng = torch.Generator().manual_seed(0)  # the same noise for every update
    inputs = torch.randn(points, *observation.task.domain.shape, generator=rng).to(meta.weights[0])
    update = observation.update.ordered(observation.model)
    weights = [w - position * d for w, d in zip(meta.weights, update, strict=True)] if position else None
    return meta(inputs, weights).softmax(1).mean(0), features[-1]
