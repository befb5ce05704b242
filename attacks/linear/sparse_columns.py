"""The search for d_1 ... d_n, the sparse vectors of a gradient's column space: candidates, and strategies to find them.

Two strategies lead to a d_i. From random rows: r - 1 random rows are set to zero, and from their null vector q, |B q|_1
is minimised. From ICA: if x_i is known roughly, W x_i + b says which entries of d_i should be zero; most of these are
right, and |B q|_1 over them alone is least at the exact q_i as long as enough of them are.
"""

import torch
from torch import Tensor

from attacks.linear.column_space import ZERO, ColumnSpace, is_first, unit
from attacks.linear.ica import View, unmix

CERTAIN_SHARE = 0.8  # a vector whose score reaches this share of `min_zeros` counts as a d_i
MAX_PASSES = 4  # from sources to vectors and back, while no certain vector is found


class Candidates:
    """Sparse unit vectors of a column space, in descending order of their sparsity score, without copies."""

    def __init__(self, space: ColumnSpace) -> None:
        self.space = space
        self.vectors = space.factor.new_empty(0, len(space.factor))  # (m, h)
        self.scores = space.factor.new_empty(0)  # (m,)
        self.ids = torch.empty(0, dtype=torch.int64)  # (m,), unique among all vectors ever added
        self._next_id = 0

    def add(self, q: Tensor) -> None:
        """Add the vectors with unit coordinates q (m, r), after `ColumnSpace.refine`."""
        vectors = self.space.refine((self.space.basis @ q.T).T)
        scores = self.space.sparsity_score(vectors)
        order = scores.argsort(descending=True, stable=True)
        # copies go before the list is cut, or copies of the easiest example would fill it
        order = order[is_first(vectors[order])][: 4 * self.space.rank]
        self._merge(vectors[order], scores[order])

    def independent(self, excluded: int | None = None) -> list[int]:
        """Indices of up to r linearly independent vectors, the sparsest first, without the vector `excluded`."""
        chosen: list[int] = []
        basis = self.space.basis.new_zeros(len(self.space.basis), 0)
        for i, vector in enumerate(self.vectors):
            if len(chosen) == self.space.rank:
                break
            rest = vector - basis @ (basis.T @ vector)
            if i != excluded and rest.norm() > 1e-3:
                chosen.append(i)
                basis = torch.cat([basis, (rest / rest.norm())[:, None]], 1)
        return chosen

    def certain(self) -> list[int]:
        """The independent vectors that are certainly a d_i: as many zeros as examples have, none constructed."""
        return [i for i in self.independent() if self.scores[i] >= CERTAIN_SHARE * self.space.min_zeros]

    def _merge(self, vectors: Tensor, scores: Tensor) -> None:
        vectors, scores = torch.cat([self.vectors, vectors]), torch.cat([self.scores, scores])
        new = len(vectors) - len(self.vectors)
        ids = torch.cat([self.ids, self._next_id + torch.arange(new)])
        self._next_id += new
        order = scores.argsort(descending=True, stable=True)
        order = order[is_first(vectors[order])][: 8 * self.space.rank]
        self.vectors, self.scores, self.ids = vectors[order], scores[order], ids[order.cpu()]


def search_from_ica(candidates: Candidates, view: View, rng: torch.Generator, rounds: int = 12) -> list[int]:
    """Add vectors that fit the sources of FastICA on `view`; returns the certain candidates.

    When more d_i are certain, the rest is unmixed again without these examples. Otherwise the vectors that fit best
    give new sources, up to MAX_PASSES times.
    """
    space = candidates.space
    failures, certain = 0, candidates.certain()
    for _ in range(rounds):
        if len(certain) == space.rank or failures == 2:
            break
        span, rows = space.complement(candidates.vectors[certain])
        sources = unmix(rows, len(rows), view, rng)
        anchors = space.anchors(span, rows, sources)
        for _ in range(MAX_PASSES):
            inactive = space.inactive_mask(sources, space.input_norms[: 3 if failures else 1])  # (s, m, h)
            q = space.nearest_sparse(anchors.repeat(len(inactive), 1), inactive.flatten(0, 1)).view(-1, *anchors.shape)
            candidates.add(q.flatten(0, 1))
            found = candidates.certain()
            if len(found) > len(certain):
                break
            misfit = ((q @ space.basis.T).abs() * inactive).sum(2) / inactive.sum(2)  # (s, m)
            anchors = q[misfit.argmin(0), torch.arange(len(anchors))]
            sources = torch.linalg.lstsq(span.T @ anchors.T, rows).solution
        failures = 0 if len(found) > len(certain) else failures + 1
        certain = found
    split_pairs(candidates)
    return candidates.certain()


def split_pairs(candidates: Candidates, rounds: int = 3) -> None:
    """Add the sparsest vectors in the plane of any two independent candidates.

    If two examples activate nearly the same neurons, d_i plus some multiple of d_j is nearly as sparse as d_i.
    """
    space = candidates.space
    for _ in range(rounds):
        chosen = candidates.independent()
        v = candidates.vectors[chosen]  # (m, h)
        if len(v) < 2 or v.shape[1] < 3:  # no three rows that could agree
            return
        nonzero = v.abs() > 10 * space.rounding(v.T)[:, None]
        i, j = torch.cartesian_prod(*[torch.arange(len(v), device=v.device)] * 2).T
        i, j = i[i != j], j[i != j]
        # the c for which row k of v_i + c v_j is zero; several rows with the same c have one cause
        c = torch.where(nonzero[i] & nonzero[j], -v[i] / v[j], torch.inf).sort(1).values  # (p, h)
        gap = ((c[:, 2:] - c[:, :-2]) / c[:, 1:-1].abs()).nan_to_num(torch.inf, torch.inf, torch.inf)
        least, at = gap.min(1)
        agree = least < 1e-3
        vectors = unit(v[i] + c.gather(1, at[:, None] + 1) * v[j])[agree]
        zeros = space.is_zero(vectors.T).T.double() @ space.zero_weights  # (p,)
        sparser = zeros > candidates.scores[chosen][i[agree]] - 1
        if not sparser.any():
            return
        before = set(candidates.ids[chosen].tolist())
        candidates.add(vectors[sparser] @ space.basis)
        if set(candidates.ids[candidates.independent()].tolist()) == before:
            return


def search_from_random_rows(candidates: Candidates, count: int, descent: int, rng: torch.Generator) -> None:
    """Add the null vectors of `count` random sets of r - 1 rows, before and after `descent` steps on |B q|_1."""
    space = candidates.space
    basis, options = space.basis, {"generator": rng, "dtype": torch.float64}
    exponent = torch.rand(count, 1, **options).round().to(space.zero_weights)
    weights = space.zero_weights**exponent  # (count, h): half of the sets prefer neurons that tell examples apart
    keys = torch.rand(count, len(basis), **options).to(basis).log() / weights
    rows = keys.argsort(1, descending=True)[:, : space.rank - 1]
    extra = torch.randn(count, 1, space.rank, **options).to(basis)
    system = torch.cat([basis[rows], extra], 1)  # (count, r, r)
    target = system.new_zeros(count, space.rank, 1)
    target[:, -1] = 1
    start = q = unit(torch.linalg.solve_ex(system, target)[0].squeeze(2))  # (count, r)
    # the first floor of |s_j| decides how far a vector may move from its start
    floor = 0.1 ** (1 + 3 * torch.rand(count, 1, **options)).to(q)
    ridge = 1e-12 * torch.eye(space.rank).to(q)
    for step in range(descent):  # |s|_1 = sum_j w_j s_j^2 with w_j = 1 / |s_j|: one inverse iteration for each w
        size = (q @ basis.T).abs()  # (count, h)
        pull = weights / (size + (ZERO / floor) ** (step / descent) * floor)
        moment = (pull / pull.sum(1, keepdim=True)) @ space.products
        cholesky, _ = torch.linalg.cholesky_ex(moment.view(-1, space.rank, space.rank) + ridge)
        q = unit(torch.cholesky_solve(q[:, :, None], cholesky).squeeze(2))
    candidates.add(torch.cat([start, q]) if descent else q)


def unmix_beside(candidates: Candidates, certain: list[int], view: View, rng: torch.Generator) -> Tensor:
    """Sources (r, d) of all examples, up to sign and scale, from ICA on what the `certain` candidates leave over."""
    space, vectors = candidates.space, candidates.vectors[certain]
    span, rows = space.complement(vectors)
    sources = unmix(rows, len(rows), view, rng)
    q = torch.cat([vectors @ space.basis, space.anchors(span, rows, sources)])
    x = torch.linalg.lstsq(q.T, space.mixtures).solution
    # x_i of a certain d_i may still hold any multiple of the others: take the one whose view is
    # uncorrelated with theirs
    known, others = x[: len(certain)], x[len(certain) :]
    shared = torch.linalg.lstsq(view(others).T, view(known).T).solution  # (m, k)
    return torch.cat([known - shared.T @ others, others])
