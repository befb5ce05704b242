"""Which reconstruction belongs to which true example, and which labels are right."""

from collections import Counter
from collections.abc import Sequence

from torch import Tensor


def pair(truth: Tensor, examples: Tensor) -> list[int | None]:
    """For each true example (N, *shape) the index of its reconstruction (M, *shape), or None if none is left.

    One to one, with the least total mean squared error (Hungarian algorithm).
    """
    if not len(examples):
        return [None] * len(truth)
    return assign(mse_matrix(truth, examples))


def mse_matrix(a: Tensor, b: Tensor) -> Tensor:
    """The mean squared error of every pair of examples (N, *shape) and (M, *shape), in float64: (N, M).

    |a - b|^2 = |a|^2 + |b|^2 - 2 a b is exact to about 1e-15 of the squares, far below the cap of 100 dB.
    """
    a, b = a.double().flatten(1) - 0.5, b.double().flatten(1) - 0.5
    squares = a.square().sum(1)[:, None] + b.square().sum(1) - 2 * (a @ b.T)
    return squares.clamp(min=0) / a.shape[1]


def correlations(truth: Tensor, sources: Tensor) -> tuple[list[float], Tensor, list[int | None]]:
    """Sources compared with the truth up to scale, sign and offset: an oracle, because the truth chooses all three.

    Args:
        truth: (N, *shape).
        sources: (M, *shape), paired one to one with the truth for the largest total absolute correlation.

    Returns:
        The absolute correlation of each true example with its source; each source (N, *shape) with the scale, sign
        and offset closest to its example; and the index of each source. Without a source: 0, a constant, and None.
    """
    a, b = (t.double().flatten(1) - t.double().flatten(1).mean(1, keepdim=True) for t in (truth, sources))
    norms = a.norm(dim=1)[:, None] * b.norm(dim=1)
    similarity = ((a @ b.T).abs() / norms.clamp(min=1e-300)).nan_to_num().clamp(max=1)  # (N, M)
    pairs = assign(-similarity)
    corr = [0.0 if j is None else similarity[i, j].item() for i, j in enumerate(pairs)]
    flat = truth.double().flatten(1)
    fitted = flat.mean(1, keepdim=True).expand_as(flat).clone()
    for i, j in enumerate(pairs):
        if j is not None:
            fitted[i] += (a[i] @ b[j]) / b[j].square().sum().clamp(min=1e-300) * b[j]
    return corr, fitted.view_as(truth), pairs


def has_right_sign(truth: Tensor, example: Tensor) -> bool:
    """Whether `example` (*shape) correlates positively with the truth, as its negative does not."""
    a, b = (t.double() - t.double().mean() for t in (truth, example))
    return (a * b).sum().item() > 0


def labels_right(truth: Tensor, predicted: Tensor | None, pairs: Sequence[int | None]) -> list[bool | None]:
    """For each true label (N,) whether the attack predicted it; None for an attack without labels.

    Labels (M,) count as a multiset: a label predicted k times is right for at most k examples. Examples whose own
    reconstruction has the right label come first.
    """
    if predicted is None:
        return [None] * len(truth)
    stock = Counter(predicted.tolist())
    right: list[bool | None] = [False] * len(truth)
    own = [j is not None and int(predicted[j]) == int(y) for y, j in zip(truth, pairs, strict=True)]
    for i in sorted(range(len(truth)), key=lambda i: not own[i]):
        label = int(truth[i])
        if stock[label] > 0:
            stock[label] -= 1
            right[i] = True
    return right


def assign(cost: Tensor) -> list[int | None]:
    """For each row of `cost` (N, M) its column, one to one, with the least total cost."""
    from scipy.optimize import linear_sum_assignment

    pairs: list[int | None] = [None] * len(cost)
    for i, j in zip(*linear_sum_assignment(cost.numpy()), strict=True):
        pairs[int(i)] = int(j)
    return pairs
