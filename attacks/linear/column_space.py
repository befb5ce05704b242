"""The column space of a layer's gradient, in which the d_i of single examples are the sparse vectors.

    dL/dW = L R  of rank n,      D = L Q,      X = Q^-1 R          D (h, n) = [d_1 ... d_n], X (n, d) the layer's inputs

ReLU leaves about half of each d_i empty, so column q_i of Q is one for which L q_i is sparse (SPEAR, Dimitrov et al.,
NeurIPS 2024). Here L is replaced by an orthonormal basis B of the same space, and a vector B q has coordinates q.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ZERO = 1e-6  # entries of a unit vector below this are zero


@dataclass(frozen=True)
class ColumnSpace:
    """The space spanned by d_1 ... d_n, restricted to the rows where the gradient is not zero: (h, r), r <= n.

    zero_weights: how much a zero counts on each neuron. Neurons that every example activates, or none does, say
    nothing about one example, and with more examples than classes some vectors vanish on all neurons of one kind.
    """

    layer: nn.Linear
    gradient: Tensor  # (H, d)
    active_rows: Tensor  # (H,) bool, h of them true
    factor: Tensor  # L (h, r), with columns as long as the gradient's singular values
    noise: float  # rounding error of an entry of L
    basis: Tensor  # B (h, r), orthonormal
    triangle: Tensor  # (r, r), L = B triangle
    mixtures: Tensor  # B^T dL/dW (r, d): mixtures of the layer's inputs
    products: Tensor  # (h, r * r), the outer product of each row of B with itself
    zero_weights: Tensor  # (h,), in [0.01, 1]
    min_zeros: Tensor  # (), weighted zeros that an example has at least, by public inputs
    input_norms: Tensor  # (3,), norms of public inputs: median, 10% and 90% quantile

    @classmethod
    def of(cls, layer: nn.Linear, gradient: Tensor, n: int, public: Tensor) -> "ColumnSpace":
        """The space of a gradient (H, d) of n examples; `public` (m, d) are inputs of `layer` of the same kind."""
        left, sizes, _ = economy_svd(gradient)
        # an exact gradient has n singular values: the next one is rounding error
        rounding = sizes[n] if n < len(sizes) else 1e-9 * sizes[0]
        rank = int((sizes[:n] > 4 * rounding).sum())
        active_rows = gradient.norm(dim=1) > 1e-6 * gradient.norm(dim=1).max()
        factor = left[active_rows, :rank] * sizes[:rank]
        inactive = (layer(public) <= 0)[:, active_rows].double()  # (m, h)
        share = inactive.mean(0)
        zero_weights = (4 * share * (1 - share)).clamp(min=0.01)
        norms = public.double().norm(dim=1).detach()
        basis, triangle = torch.linalg.qr(factor)
        return cls(
            layer=layer,
            gradient=gradient,
            active_rows=active_rows,
            factor=factor,
            noise=(rounding / sum(side**0.5 for side in gradient.shape)).item(),
            basis=basis,
            triangle=triangle,
            mixtures=basis.T @ gradient[active_rows],
            products=(basis[:, :, None] * basis[:, None]).flatten(1),
            zero_weights=zero_weights,
            min_zeros=(inactive @ zero_weights).quantile(0.02),
            input_norms=norms.quantile(torch.tensor([0.5, 0.1, 0.9]).to(gradient)),
        )

    @property
    def rank(self) -> int:
        return self.factor.shape[1]

    def columns(self, vectors: Tensor) -> Tensor:
        """Vectors (m, h) as columns over all rows of the gradient: (H, m)."""
        columns = self.gradient.new_zeros(len(self.gradient), len(vectors))
        columns[self.active_rows] = vectors.T
        return columns

    def inputs(self, columns: Tensor) -> Tensor:
        """X (r, d) with columns X = dL/dW, for r independent columns (H, r)."""
        return torch.linalg.lstsq(self.basis.T @ columns[self.active_rows], self.mixtures).solution

    def complement(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """What vectors d_i (k, h) leave over: coordinates (r, r - k) of a basis orthogonal to them, and rows
        (r - k, d) that mix the inputs of the other examples only."""
        q = self.basis.T @ vectors.T  # (r, k)
        span = torch.linalg.qr(q, mode="complete")[0][:, len(vectors) :]
        return span, span.T @ self.mixtures

    def anchors(self, span: Tensor, rows: Tensor, sources: Tensor) -> Tensor:
        """Coordinates (m, r) of the d_i that belong to `sources` (m, d), which were unmixed from `rows` (m, d).

        The part of the coordinates outside `span` is left out.
        """
        return (span @ torch.linalg.pinv(torch.linalg.lstsq(rows.T, sources.T).solution.T)).T

    def inactive_mask(self, sources: Tensor, norms: Tensor) -> Tensor:
        """(2 s, m, h): 1 where an input does not activate a neuron, else 0.

        The inputs are the sources (m, d), which are known up to scale, with either sign and with `norms` (s,).
        """
        scales = torch.cat([norms, -norms])[:, None, None]
        weight = self.layer.weight.detach().to(sources)
        outputs = scales * (F.normalize(sources, dim=1) @ weight.T)[:, self.active_rows]
        if self.layer.bias is not None:
            outputs = outputs + self.layer.bias.detach().to(sources)[self.active_rows]
        return (outputs < 0).to(sources)

    def rounding(self, vectors: Tensor) -> Tensor:
        """The largest absolute value that rounding can give to a zero entry of each vector (h, m): (m,)."""
        # vectors = L q
        q = torch.linalg.solve_triangular(self.triangle, self.basis.T @ vectors, upper=True)
        return torch.maximum(ZERO * vectors.norm(dim=0), 10 * self.noise * q.norm(dim=0))

    def is_zero(self, vectors: Tensor) -> Tensor:
        """Which entries of vectors (h, m) are zero up to rounding."""
        return vectors.abs() <= self.rounding(vectors)

    def sparsity_score(self, vectors: Tensor) -> Tensor:
        """The weighted number of zeros of vectors (m, h): (m,). Negative if some zero does not follow from the others.

        Such a vector was constructed to have that zero, whereas all zeros of a d_i have one cause.
        """
        zero = (vectors.abs() <= self.rounding(vectors.T)[:, None]).double()  # (m, h)
        values, directions = torch.linalg.eigh((zero @ self.products).view(-1, self.rank, self.rank))
        squares = (self.basis @ directions[:, :, 1:]).square()  # (m, h, r - 1)
        leverage = (squares / values[:, None, 1:].clamp(min=1e-12)).sum(2) * zero  # 1: follows from no other row
        score = zero @ self.zero_weights
        # with two small eigenvalues, a plane of vectors shares these zeros
        constructed = (leverage > 1 - 1e-6).any(1) | (values[:, 1:2] < 1e-8).any(1)
        return torch.where(constructed, score - len(self.basis), score)

    def refine(self, vectors: Tensor) -> Tensor:
        """Vectors (m, h) of the space, moved so that entries near zero are as close to zero as possible."""
        products = (self.factor[:, :, None] * self.factor[:, None]).flatten(1)
        for slack in (10, 3):
            rows = vectors.abs() < slack * self.rounding(vectors.T)[:, None]
            determined = rows.sum(1) >= self.rank - 1
            moment = rows.double() @ products
            _, directions = torch.linalg.eigh(moment.view(-1, self.rank, self.rank))
            better = unit(directions[:, :, 0] @ self.factor.T)
            vectors = torch.where(determined[:, None], better, vectors)
        return vectors

    def nearest_sparse(self, anchors: Tensor, mask: Tensor, steps: int = 24) -> Tensor:
        """argmin_q |B q|_1 over the rows of `mask` (m, h), with q a = 1 for anchors a (m, r): unit q (m, r).

        By iteratively reweighted least squares: |s|_1 = sum_j w_j s_j^2 with w_j = 1 / |s_j|.
        """
        anchors = unit(anchors)
        q, ridge = anchors, 1e-14 * torch.eye(self.rank).to(anchors)
        for step in range(steps):
            floor = 0.1 * 0.46**step
            weights = mask / ((unit(q) @ self.basis.T).abs() + floor)
            moment = (weights / weights.sum(1, keepdim=True).clamp(min=1e-300)) @ self.products
            q = torch.linalg.solve_ex(moment.view(-1, self.rank, self.rank) + ridge, anchors[:, :, None])[0].squeeze(2)
            q = q / (q * anchors).sum(1, keepdim=True)
        return unit(q)


def unit(vectors: Tensor) -> Tensor:
    """Vectors (m, k) scaled to length one, zeros for those that are not finite."""
    return F.normalize(vectors.nan_to_num(0, 0, 0), dim=1)


def is_first(vectors: Tensor, tolerance: float = 1e-5) -> Tensor:
    """(m,) which unit vectors (m, k) differ in direction, up to sign, from all before them."""
    equal = (vectors @ vectors.T).abs() > 1 - tolerance
    return ~equal.tril(-1).any(1)


def economy_svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U (h, k), s (k,), V (k, d) with matrix (h, d) = U diag(s) V, in a third of the time if h <= d."""
    if matrix.shape[0] > matrix.shape[1]:
        return torch.linalg.svd(matrix, full_matrices=False)
    directions, corner = torch.linalg.qr(matrix.T)
    left, sizes, right = torch.linalg.svd(corner.T)
    return left, sizes, right @ directions.T
