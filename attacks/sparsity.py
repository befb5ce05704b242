"""Zeros that ReLU leaves in a gradient: columns of D with  dL/dW = D X, each the gradient of one image at a layer.

    dL/dW = L R  of rank n,   D = L Q,   X = Q^-1 R :   column q_i of Q is one where L q_i is sparse

as in SPEAR, Dimitrov et al., NeurIPS 2024. Two ways lead there. Draws: n - 1 rows at random, and |L q|_1 brought down
from their null vector. Images: where ICA has an idea of image i, W x_i + b says which entries of d_i should be empty;
most are right, and |L q|_1 over these alone is least at the exact q_i as long as enough of them are.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attacks.ica import unmix
from attacks.linear import explain, head_scale, slopes

ZERO = 1e-6  # entries of a unit vector below this are zero
USUAL = 0.8  # of the zeros an image has at the least: the share it takes to be sure of a vector
TURNS = 4  # from images to vectors and back, where nothing certain comes of them
ROUNDS = 20  # in which lengths and the head's answer to them settle


class Search:
    """The sparsest independent vectors in the column space of a gradient (h, d) of n images.

    A zero counts for as much as it is likely: neurons that every image passes say nothing of one image, and with more
    images than classes there are vectors that vanish on all of them.
    """

    def __init__(self, layer: nn.Linear, gradient: Tensor, n: int, public: Tensor) -> None:
        """`public`: inputs (m, d) of `layer` that are of the kind the images' are."""
        self.layer, self.gradient = layer, gradient
        left, sizes, _ = torch.linalg.svd(gradient, full_matrices=False)
        self.rank = int((sizes[:n] > 4 * sizes[n]).sum())  # from the (n + 1)th value on there is nothing but rounding
        self.live = gradient.norm(dim=1) > 1e-6 * gradient.norm(dim=1).max()
        self.factor = left[self.live, : self.rank] * sizes[: self.rank]  # L (h, r)
        self.noise = (sizes[n] / sum(side**0.5 for side in gradient.shape)).item()  # of an entry of L
        silent = (layer(public) <= 0)[:, self.live].double()  # (m, h)
        share = silent.mean(0)
        self.prior = (4 * share * (1 - share)).clamp(min=0.01)  # (h,)
        self.usual = (silent @ self.prior).quantile(0.02)  # zeros an image has at the least
        self.lengths = public.double().norm(dim=1).detach().quantile(torch.tensor([0.5, 0.1, 0.9]).to(gradient))
        self.white, self.root = torch.linalg.qr(self.factor)  # (h, r), (r, r)
        self.squares = (self.white[:, :, None] * self.white[:, None]).flatten(1)  # (h, r * r)
        self.found = self.factor.new_empty(0, len(self.factor))  # (m, h), of unit length
        self.zeros = self.factor.new_empty(0)  # (m,)
        self.names = torch.empty(0, dtype=torch.int64)  # (m,), one for each vector that was ever found
        self.count = 0
        self.best: tuple[Tensor, Tensor] | None = None
        self.doubt = 1.0
        self.tried: set[tuple[int, ...]] = set()

    def columns(self, chosen: list[int]) -> Tensor:
        """D (H, r), each column of unit length, all rows of the gradient."""
        slope = self.gradient.new_zeros(len(self.gradient), len(chosen))
        slope[self.live] = self.found[chosen].T
        return slope

    def certain(self) -> list[int]:
        """Which of the found are columns of D beyond doubt: as many zeros as images have, and none of them made."""
        return [i for i in self.chosen() if self.zeros[i] >= USUAL * self.usual]

    def follow(self, see: Callable[[Tensor], Tensor], rng: torch.Generator, rounds: int = 12) -> list[int]:
        """Vectors that fit images, those that ICA unmixes when it looks at `see(rows)`; the certain ones.

        Once d_i is found, rows without a trace of image i are mixed from the others alone, and unmixed anew. Where
        nothing certain comes of images, vectors that fit them still make better images.
        """
        idle = 0
        for number in range(rounds):
            known = self.certain()
            if len(known) == self.rank or idle == 2:
                break
            span, rows = self.others(known)
            sources = unmix(rows, len(rows), see, rng)
            anchors = self.anchors(span, rows, sources)
            for _ in range(TURNS):
                believed = self.silent(sources, self.lengths[: 3 if number else 1])  # (s, m, h)
                q = self.toward(anchors.repeat(len(believed), 1), believed.flatten(0, 1)).view(-1, *anchors.shape)
                self.join(q.flatten(0, 1))
                if len(self.certain()) > len(known):
                    break
                misfit = ((q @ self.white.T).abs() * believed).sum(2) / believed.sum(2)  # (s, m)
                anchors = q[misfit.argmin(0), torch.arange(len(anchors))]
                sources = torch.linalg.lstsq(span.T @ anchors.T, rows).solution
            idle = 0 if len(self.certain()) > len(known) else idle + 1
        return self.certain()

    def others(self, known: list[int]) -> tuple[Tensor, Tensor]:
        """Of the images whose d_i are not `known`: the span of q orthogonal to the known (r, m), rows that mix them."""
        q = self.white.T @ self.found[known].T  # (r, k)
        span = torch.linalg.qr(q, mode="complete")[0][:, len(known) :]
        return span, span.T @ self.white.T @ self.gradient[self.live]

    def anchors(self, span: Tensor, rows: Tensor, sources: Tensor) -> Tensor:
        """q (m, r) of sources (m, d) unmixed from rows (m, d), but for what the true ones share with the known."""
        return (span @ torch.linalg.pinv(torch.linalg.lstsq(rows.T, sources.T).solution.T)).T

    def silent(self, sources: Tensor, lengths: Tensor) -> Tensor:
        """(2 s, m, h): 1 where images (m, d) of either sign and of `lengths` (s,) leave ReLU empty, else 0."""
        scales = torch.cat([lengths, -lengths])[:, None, None]
        outputs = scales * (F.normalize(sources, dim=1) @ self.layer.weight.detach().to(sources).T)[:, self.live]
        if self.layer.bias is not None:
            outputs = outputs + self.layer.bias.detach().to(sources)[self.live]
        return (outputs < 0).to(sources)

    def sources(self, known: list[int], see: Callable[[Tensor], Tensor], rng: torch.Generator) -> Tensor:
        """All images (r, d), up to sign and scale: the `known` as far as they can be told from the others."""
        span, rows = self.others(known)
        theirs = unmix(rows, len(rows), see, rng)
        q = torch.cat([self.found[known] @ self.white, self.anchors(span, rows, theirs)])
        x = torch.linalg.lstsq(q.T, self.white.T @ self.gradient[self.live]).solution
        # x_i of a known d_i may still hold any multiple of the others: take what makes `see` of them uncorrelated
        mine, theirs = x[: len(known)], x[len(known) :]
        shared = torch.linalg.lstsq(see(theirs).T, see(mine).T).solution  # (m, k)
        return torch.cat([mine - shared.T @ theirs, theirs])

    def settle(self, measured: Callable[[list[int]], tuple[Tensor, Tensor]]) -> None:
        """The set of vectors whose images fit its zeros best becomes `best`: what `measured` made of it, images first.

        `doubt` is the share of outputs whose sign under these images does not fit. Near the end it may be one vector
        that stands in a sparser one's place: sets without each are tried as well.
        """
        near = len(self.certain()) == self.rank
        for banned in [None, *self.chosen()]:
            chosen = self.chosen(banned)
            key = tuple(self.names[chosen].tolist())
            if banned is not None and self.doubt >= 0.1 and not near:
                break
            if not key or key in self.tried or (len(key) < self.rank and self.best is not None):
                continue
            self.tried.add(key)
            answer = measured(chosen)
            outputs = self.layer(answer[0].to(self.layer.weight.dtype)).T[self.live]  # (h, r)
            doubt = ((outputs < 0) != self.empty(self.found[chosen].T)).double().mean().item()
            if self.best is None or doubt < self.doubt:
                self.best, self.doubt = answer, doubt

    def toward(self, anchors: Tensor, believed: Tensor, steps: int = 40) -> Tensor:
        """argmin_q |L q|_1 over rows `believed` (m, h) empty, with q a = 1 for `anchors` a (m, r): unit q (m, r)."""
        anchors = _unit(anchors)
        q, ridge = anchors, 1e-14 * torch.eye(self.rank).to(anchors)
        for step in range(steps):
            floor = max(0.1 * 0.65**step, 1e-9)
            pull = believed / ((_unit(q) @ self.white.T).abs() + floor)
            moment = (pull / pull.sum(1, keepdim=True).clamp(min=1e-300)) @ self.squares
            q = torch.linalg.solve_ex(moment.view(-1, self.rank, self.rank) + ridge, anchors[:, :, None])[0].squeeze(2)
            q = q / (q * anchors).sum(1, keepdim=True)
        return _unit(q)

    def empty(self, vectors: Tensor) -> Tensor:
        """Where vectors (h, m) of the space are zero but for rounding."""
        return vectors.abs() <= self.rounding(vectors)

    def rounding(self, vectors: Tensor) -> Tensor:
        """What an entry that should be zero may be, in each of the vectors (h, m): (m,)."""
        q = torch.linalg.solve_triangular(self.root, self.white.T @ vectors, upper=True)  # vectors = L q
        return torch.maximum(ZERO * vectors.norm(dim=0), 10 * self.noise * q.norm(dim=0))

    def chosen(self, banned: int | None = None) -> list[int]:
        """Which of the found are D's columns: the sparsest, each outside the span of those before it, none `banned`."""
        chosen: list[int] = []
        basis = self.white.new_zeros(len(self.white), 0)
        for i, vector in enumerate(self.found):
            rest = vector - basis @ (basis.T @ vector)
            if i != banned and rest.norm() > 1e-3 and len(chosen) < self.rank:
                chosen.append(i)
                basis = torch.cat([basis, (rest / rest.norm())[:, None]], 1)
        return chosen

    def draw(self, count: int, descent: int, rng: torch.Generator) -> None:
        """Null vectors of `count` random sets of r - 1 rows, and what they come down to, join the found."""
        rows, like = self.rank - 1, {"generator": rng, "dtype": torch.float64}
        lean = torch.rand(count, 1, **like).round().to(self.prior)
        weight = self.prior**lean  # (count, h): half of the draws prefer neurons that tell images apart
        lots = torch.rand(count, len(self.white), **like).to(self.white).log() / weight
        subset = lots.argsort(1, descending=True)[:, :rows]
        extra = torch.randn(count, 1, self.rank, **like).to(self.white)
        system = torch.cat([self.white[subset], extra], 1)  # (count, r, r)
        target = system.new_zeros(count, self.rank, 1)
        target[:, -1] = 1
        q = _unit(torch.linalg.solve_ex(system, target)[0].squeeze(2))  # (count, r)
        # where the floor of |s_j| starts decides how far from its draw a vector may be taken
        floor = 0.1 ** (1 + 3 * torch.rand(count, 1, **like)).to(q)
        ridge, drawn = 1e-12 * torch.eye(self.rank).to(q), q
        for step in range(descent):  # |s|_1 = sum_j w_j s_j^2 with w_j = 1 / |s_j|: one inverse iteration for each w
            size = (q @ self.white.T).abs()  # (count, h)
            pull = weight / (size + (ZERO / floor) ** (step / descent) * floor)
            moment = (pull / pull.sum(1, keepdim=True)) @ self.squares
            cholesky, _ = torch.linalg.cholesky_ex(moment.view(-1, self.rank, self.rank) + ridge)
            q = _unit(torch.cholesky_solve(q[:, :, None], cholesky).squeeze(2))
        q = torch.cat([drawn, q]) if descent else q
        self.join(q)

    def join(self, q: Tensor) -> None:
        """The vectors that unit q (m, r) name, made as sparse as their neighbourhood allows, join the found."""
        vectors = self.polish((self.white @ q.T).T)
        order = self.worth(vectors).argsort(descending=True, stable=True)
        # a cut before copies are gone would leave copies of the easiest image only
        self.keep(vectors[order[_first(vectors[order], 1e-5)][: 4 * self.rank]])

    def polish(self, vectors: Tensor) -> Tensor:
        """Vectors (m, h) that are zero, as nearly as L's rounding allows, on all rows where these nearly are."""
        squares = (self.factor[:, :, None] * self.factor[:, None]).flatten(1)
        for slack in (10, 3):
            rows = vectors.abs() < slack * self.rounding(vectors.T)[:, None]
            enough = rows.sum(1) >= self.rank - 1
            moment = rows.double() @ squares
            _, directions = torch.linalg.eigh(moment.view(-1, self.rank, self.rank))
            better = _unit(directions[:, :, 0] @ self.factor.T)
            vectors = torch.where(enough[:, None], better, vectors)
        return vectors

    def keep(self, vectors: Tensor) -> None:
        """Merge vectors (m, h) with those found before."""
        found, zeros = torch.cat([self.found, vectors]), torch.cat([self.zeros, self.worth(vectors)])
        names = torch.cat([self.names, self.count + torch.arange(len(vectors))])
        self.count += len(vectors)
        order = zeros.argsort(descending=True, stable=True)
        order = order[_first(found[order], 1e-5)][: 8 * self.rank]
        self.found, self.zeros, self.names = found[order], zeros[order], names[order.cpu()]

    def worth(self, vectors: Tensor, slack: float = 1) -> Tensor:
        """How many zeros vectors (m, h) have: (m,). Negative if one of these zeros does not follow from the others.

        Then the vector was made to have it, whereas d_i has all of its zeros for one reason.
        """
        empty = (vectors.abs() <= slack * self.rounding(vectors.T)[:, None]).double()  # (m, h)
        values, directions = torch.linalg.eigh((empty @ self.squares).view(-1, self.rank, self.rank))
        spread = (self.white @ directions[:, :, 1:]).square()  # (m, h, r - 1)
        leverage = (spread / values[:, None, 1:].clamp(min=1e-12)).sum(2) * empty  # 1: follows from no other row
        count = empty @ self.prior
        # and two vectors with the same zeros are any two in their plane
        made = (leverage > 1 - 1e-6).any(1) | (values[:, 1:2] < 1e-8).any(1)
        return torch.where(made, count - len(self.white), count)


def _unit(vectors: Tensor) -> Tensor:
    return F.normalize(vectors.nan_to_num(0, 0, 0), dim=1)


def _first(vectors: Tensor, same: float) -> Tensor:
    """(m,) which of unit vectors (m, k) point another way than all before them."""
    alike = (vectors @ vectors.T).abs() > 1 - same
    return ~alike.tril(-1).any(1)


def measure(
    model: nn.Module,
    search: Search,
    chosen: list[int],
    inputs: Callable[[Tensor], Tensor],
    public: Tensor,
    n: int,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs X (r, d) of the layer, labels (r,), and how well every class would explain each (r, classes).

    D's columns, the vectors `chosen`, are known up to their length, which the bias gradient (H,) gives, D s = dL/db, or
    else the head does. `inputs` makes of rows (r, d) what the model takes, `public` are such inputs of public images.
    """
    layer, gradient, slope = search.layer, search.gradient, search.columns(chosen)
    x = torch.linalg.lstsq(slope, gradient).solution

    def said() -> Tensor:  # (r, classes, h)
        return slopes(model, layer, inputs(x)).double() / n

    if bias is not None:
        length = torch.linalg.lstsq(slope, bias[:, None]).solution.squeeze(1)
        x, slope = x / length[:, None], slope * length
    else:
        scale, _ = head_scale(model, layer, gradient, x, public, n)
        for _ in range(ROUNDS):
            x, slope = x * scale[:, None], slope / scale
            scale, _ = explain(slope.T, said())
    guess = said()
    return x, explain(slope.T, guess)[1], F.cosine_similarity(guess, slope.T[:, None], dim=2)
