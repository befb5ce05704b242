"""Labels of a small batch, by solving the head's gradient for the features of every example. Ours.

    dW = (1/K) sum_i (p_i - e_{y_i}) h_i^T,    db = (1/K) sum_i (p_i - e_{y_i}),    p_i = softmax(W h_i + b)

If dW has rank K, the features lie in its row space,  h_i = V^T a_i,  with K^2 unknowns and (C - 1)(K + 1) equations.
With K < C there are more equations than unknowns: they have a solution for the right labels and in general for no
others. This holds for trained networks as well, where counts from the bias alone are off because the softmax of the
private examples is not known. Nearly parallel features lower the rank; nothing is returned then.
"""

import torch
from torch import Tensor

LARGEST = 8  # examples
LEAST_SINGULAR = 1e-4  # of the K-th singular value relative to the first, in float32
RANK_GAP = 0.01  # of the next singular value relative to the K-th
SOLVED = 1e-3  # squared residual, with each singular direction scaled to one
STARTS = 8  # for each assignment of labels
STEPS = 60  # of Levenberg and Marquardt
CHUNK = 64  # systems solved at the same time


def proven_labels(
    weight: Tensor, bias: Tensor, own_weight: Tensor, own_bias: Tensor, features: Tensor, first: Tensor
) -> Tensor | None:
    """Labels (K,) in ascending order for which the head's gradient has an exact solution; None if none were found.

    Args:
        weight, bias: the gradient of the head, (C, D) and (C,), of the mean loss.
        own_weight, own_bias: the head's parameters.
        features: (N, D), head inputs of any examples: where the search for the victims' starts.
        first: (K,), likely labels. The search changes one label at a time, as long as that lowers the residual.
    """
    count, classes = len(first), len(bias)
    if not 2 <= count <= min(LARGEST, classes - 1) or not (weight.isfinite().all() and bias.isfinite().all()):
        return None
    _, s, rows = torch.linalg.svd(weight.double(), full_matrices=False)
    if len(s) <= count or s[count - 1] < LEAST_SINGULAR * s[0] or s[count] > RANK_GAP * s[count - 1]:
        return None
    system = _System(weight.double(), bias.double(), own_weight.double(), own_bias.double(), rows[:count], s[:count])
    coordinates = features.double() @ rows[:count].T
    rng = torch.Generator().manual_seed(0)
    labels = first.sort().values
    best = system.residuals(labels[None], coordinates, rng)[0].item()
    while best > SOLVED:
        neighbours = _neighbours(labels, classes)
        found = system.residuals(neighbours, coordinates, rng)
        lowest = int(found.argmin())
        if not found[lowest] < best:
            return None
        labels, best = neighbours[lowest], found[lowest].item()
    return labels


def _neighbours(labels: Tensor, classes: int) -> Tensor:
    """All sorted labels (M, K) that differ from these in one place."""
    changed = labels.repeat(len(labels), classes, 1)
    for i in range(len(labels)):
        changed[i, :, i] = torch.arange(classes, device=labels.device)
    unique = changed.flatten(0, 1).sort(1).values.unique(dim=0)
    return unique[(unique != labels).any(1)]


class _System:
    """The equations of one head, whose unknowns are coordinates (K, K) of K examples in the row space."""

    def __init__(self, weight: Tensor, bias: Tensor, own: Tensor, own_bias: Tensor, rows: Tensor, s: Tensor) -> None:
        self.of_logits, self.own_bias, self.s = own @ rows.T, own_bias, s  # (C, K)
        self.target = torch.cat([weight @ rows.T / s, bias[:, None] / bias.norm()], 1)  # (C, K + 1)
        self.bias_scale = bias.norm()

    def residuals(self, labels: Tensor, coordinates: Tensor, rng: torch.Generator) -> Tensor:
        """The lowest squared residual (M,) for each of M assignments of labels (M, K)."""
        count, classes = labels.shape[1], len(self.target)
        chosen = torch.randint(len(coordinates), (len(labels) * STARTS, count), generator=rng)
        a = coordinates[chosen.to(labels.device)]
        hot = torch.nn.functional.one_hot(labels.repeat_interleave(STARTS, 0), classes).to(a)
        pairs = zip(a.split(CHUNK), hot.split(CHUNK), strict=True)
        return torch.cat([self._solve(*pair) for pair in pairs]).view(-1, STARTS).min(1).values

    def _solve(self, a: Tensor, hot: Tensor) -> Tensor:
        """Squared residuals (S,) after descents from a (S, K, K)."""
        damping = a.new_full((len(a),), 0.1)
        r, jacobian = self._linearised(a, hot)
        cost = r.square().sum(1)
        for _ in range(STEPS):
            normal = jacobian.transpose(1, 2) @ jacobian
            diagonal = normal.diagonal(dim1=1, dim2=2)
            ridge = damping[:, None] * diagonal + 1e-12 * diagonal.amax(1, keepdim=True).clamp(min=1e-30)
            step = torch.linalg.solve(normal + torch.diag_embed(ridge), jacobian.transpose(1, 2) @ r[..., None])
            moved = a - step.view_as(a)
            r_moved, jacobian_moved = self._linearised(moved, hot)
            cost_moved = r_moved.square().sum(1)
            better = cost_moved < cost
            a, cost = torch.where(better[:, None, None], moved, a), torch.where(better, cost_moved, cost)
            r = torch.where(better[:, None], r_moved, r)
            jacobian = torch.where(better[:, None, None], jacobian_moved, jacobian)
            damping = torch.where(better, damping * 0.3, damping * 4).clamp(1e-9, 1e6)
        return cost.nan_to_num(nan=torch.inf)

    def _linearised(self, a: Tensor, hot: Tensor) -> tuple[Tensor, Tensor]:
        """Residuals (S, C (K + 1)) and their derivatives (S, C (K + 1), K K)."""
        systems, count = a.shape[:2]
        p = (a @ self.of_logits.T + self.own_bias).softmax(2)  # (S, K, C)
        d = (p - hot) / count
        r = torch.cat([d.transpose(1, 2) @ a / self.s, d.sum(1)[..., None] / self.bias_scale], 2) - self.target
        slope = (
            p[..., None] * self.of_logits - p[..., None] * (p @ self.of_logits)[:, :, None]
        ) / count  # (S, K, C, K)
        eye = torch.eye(count).to(a)
        of_weight = torch.einsum("sicl,sik->sckil", slope, a) + torch.einsum("sic,kl->sckil", d, eye)
        of_bias = slope.permute(0, 2, 1, 3)[:, :, None] / self.bias_scale  # (S, C, 1, K, K)
        jacobian = torch.cat([of_weight / self.s[:, None, None], of_bias], 2)
        return r.flatten(1), jacobian.view(systems, -1, count * count)
