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
SURE = 0.002  # share of signs that do not fit: one wrong vector among a hundred would be more


class Search:
    """The sparsest independent vectors in the column space of a gradient (h, d) of n images.

    A zero counts for as much as it is likely: neurons that every image passes say nothing of one image, and with more
    images than classes there are vectors that vanish on all of them.
    """

    def __init__(self, layer: nn.Linear, gradient: Tensor, n: int, public: Tensor) -> None:
        """`public`: inputs (m, d) of `layer` that are of the kind the images' are."""
        self.layer, self.gradient = layer, gradient
        left, sizes, _ = factors(gradient)
        rounding = sizes[n] if n < len(sizes) else 1e-9 * sizes[0]  # from the (n + 1)th value on there is nothing else
        self.rank = int((sizes[:n] > 4 * rounding).sum())
        self.live = gradient.norm(dim=1) > 1e-6 * gradient.norm(dim=1).max()
        self.factor = left[self.live, : self.rank] * sizes[: self.rank]  # L (h, r)
        self.noise = (rounding / sum(side**0.5 for side in gradient.shape)).item()  # of an entry of L
        silent = (layer(public) <= 0)[:, self.live].double()  # (m, h)
        share = silent.mean(0)
        self.prior = (4 * share * (1 - share)).clamp(min=0.01)  # (h,)
        self.usual = (silent @ self.prior).quantile(0.02)  # zeros an image has at the least
        self.lengths = public.double().norm(dim=1).detach().quantile(torch.tensor([0.5, 0.1, 0.9]).to(gradient))
        self.white, self.root = torch.linalg.qr(self.factor)  # (h, r), (r, r)
        self.mixed = self.white.T @ gradient[self.live]  # (r, d)
        self.squares = (self.white[:, :, None] * self.white[:, None]).flatten(1)  # (h, r * r)
        self.found = self.factor.new_empty(0, len(self.factor))  # (m, h), of unit length
        self.zeros = self.factor.new_empty(0)  # (m,)
        self.names = torch.empty(0, dtype=torch.int64)  # (m,), one for each vector that was ever found
        self.count = 0
        self.best: tuple[Tensor, Tensor] | None = None  # images (r, d), and the columns of D (H, r) they come from
        self.doubt = 1.0
        self.tried: set[tuple[int, ...]] = set()

    def columns(self, chosen: list[int]) -> Tensor:
        """D (H, r), each column of unit length, all rows of the gradient."""
        slope = self.gradient.new_zeros(len(self.gradient), len(chosen))
        slope[self.live] = self.found[chosen].T
        return slope

    def rows(self, slope: Tensor) -> Tensor:
        """X (r, d) of columns D (H, r)."""
        return torch.linalg.lstsq(self.white.T @ slope[self.live], self.mixed).solution

    def certain(self) -> list[int]:
        """Which of the found are columns of D beyond doubt: as many zeros as images have, and none of them made."""
        return [i for i in self.chosen() if self.zeros[i] >= USUAL * self.usual]

    def follow(self, see: Callable[[Tensor], Tensor], rng: torch.Generator, rounds: int = 12) -> list[int]:
        """Vectors that fit images, those that ICA unmixes when it looks at `see(rows)`; the certain ones.

        Once d_i is found, rows without a trace of image i are mixed from the others alone, and unmixed anew. Where
        nothing certain comes of images, vectors that fit them still make better images.
        """
        idle, known = 0, self.certain()
        for _ in range(rounds):
            if len(known) == self.rank or idle == 2:
                break
            span, rows = self.others(known)
            sources = unmix(rows, len(rows), see, rng)
            anchors = self.anchors(span, rows, sources)
            for _ in range(TURNS):
                believed = self.silent(sources, self.lengths[: 3 if idle else 1])  # (s, m, h)
                q = self.toward(anchors.repeat(len(believed), 1), believed.flatten(0, 1)).view(-1, *anchors.shape)
                self.join(q.flatten(0, 1))
                sure = self.certain()
                if len(sure) > len(known):
                    break
                misfit = ((q @ self.white.T).abs() * believed).sum(2) / believed.sum(2)  # (s, m)
                anchors = q[misfit.argmin(0), torch.arange(len(anchors))]
                sources = torch.linalg.lstsq(span.T @ anchors.T, rows).solution
            idle = 0 if len(sure) > len(known) else idle + 1
            known = sure
        self.untangle()
        return self.certain()

    def untangle(self) -> None:
        """The sparsest vectors in the plane of any two of the chosen join the found.

        Of two images that pass nearly the same neurons, either d_i plus some of the other is nearly as sparse as d_i.
        """
        for _ in range(3):
            chosen = self.chosen()
            v = self.found[chosen]  # (m, h)
            if len(v) < 2:
                return
            full = v.abs() > 10 * self.rounding(v.T)[:, None]
            i, j = torch.cartesian_prod(*[torch.arange(len(v), device=v.device)] * 2).T
            i, j = i[i != j], j[i != j]
            # c that makes row k of v_i + c v_j zero; where several rows name one c, they have one reason
            c = torch.where(full[i] & full[j], -v[i] / v[j], torch.inf).sort(1).values  # (p, h)
            gap = ((c[:, 2:] - c[:, :-2]) / c[:, 1:-1].abs()).nan_to_num(torch.inf, torch.inf, torch.inf)
            least, at = gap.min(1)
            vectors = _unit(v[i] + c.gather(1, at[:, None] + 1) * v[j])[least < 1e-3]
            zeros = self.empty(vectors.T).T.double() @ self.prior  # (p,)
            sparser = zeros > self.zeros[chosen][i[least < 1e-3]] - 1
            if not sparser.any():
                return
            before = set(self.names[chosen].tolist())
            self.join(vectors[sparser] @ self.white)
            if set(self.names[self.chosen()].tolist()) == before:
                return

    def others(self, known: list[int]) -> tuple[Tensor, Tensor]:
        """Of the images whose d_i are not `known`: the span of q orthogonal to the known (r, m), rows that mix them."""
        q = self.white.T @ self.found[known].T  # (r, k)
        span = torch.linalg.qr(q, mode="complete")[0][:, len(known) :]
        return span, span.T @ self.mixed

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
        x = torch.linalg.lstsq(q.T, self.mixed).solution
        # x_i of a known d_i may still hold any multiple of the others: take what makes `see` of them uncorrelated
        mine, theirs = x[: len(known)], x[len(known) :]
        shared = torch.linalg.lstsq(see(theirs).T, see(mine).T).solution  # (m, k)
        return torch.cat([mine - shared.T @ theirs, theirs])

    def settle(self, measured: Callable[[Tensor], tuple[Tensor, Tensor]]) -> None:
        """The columns (H, r) whose images fit their zeros best become `best`: what `measured` makes of them.

        `doubt` is the share of outputs whose sign under these images does not fit. Near the end it may be one vector
        that stands in a sparser one's place: sets without each are tried as well, and then two columns at a time.
        """
        near = len(self.certain()) == self.rank
        for banned in [None, *self.chosen()]:
            chosen = self.chosen(banned)
            key = tuple(self.names[chosen].tolist())
            if banned is not None and (not self.doubt or (self.doubt >= 0.1 and not near)):
                break
            if not key or key in self.tried or (len(key) < self.rank and self.best is not None):
                continue
            self.tried.add(key)
            self.judge(measured(self.columns(chosen)))
        while self.best is not None and 0 < self.doubt < 0.1 and self.best[1].shape[1] == self.rank:
            if not self.judge(measured(self.mended(*self.best))):
                break

    def judge(self, answer: tuple[Tensor, Tensor]) -> bool:
        """Whether images (r, d) and their columns (H, r) fit better than the best, which they then are."""
        passed = self.layer(answer[0].to(self.layer.weight.dtype)).T[self.live] >= 0  # (h, r)
        doubt = (passed == self.empty(answer[1][self.live])).double().mean().item()
        better = self.best is None or doubt < self.doubt
        if better:
            self.best, self.doubt = answer, doubt
        return better

    def mended(self, x: Tensor, slope: Tensor) -> Tensor:
        """Columns (H, r) of which one, d_i, got rid of what it had of another.

        Where d_i - c d_j stands for d_i, x_j + c x_i stands for x_j, and no other image is wrong. Of all c that make
        one more entry zero, and all i and j, the best is the one under which the signs of both images fit best.
        """
        d = slope[self.live]
        z = self.layer(x.to(self.layer.weight.dtype)).T[self.live].to(d)  # (h, r)
        empty, full = self.empty(d), ~self.empty(10 * d)
        misfits = ((z < 0) != empty).double().mean(0)  # (r,)
        best, columns = 0.0, slope
        for j in misfits.argsort(descending=True)[:4].tolist():
            for i in (i for i in range(self.rank) if i != j):
                rows = full[:, i] & full[:, j]
                c = -d[rows, i] / d[rows, j]  # (k,)
                cleaned = d[:, i, None] + c * d[:, j, None]  # (h, k)
                signs = (z[:, j, None] - c * z[:, i, None]) * (1 - c) < 0
                theirs = (signs != empty[:, j, None]).double().mean(0)
                mine = (self.empty(cleaned) != (z[:, i, None] < 0)).double().mean(0)
                gain = misfits[i] + misfits[j] - theirs - mine
                if len(c) and gain.max() > best:
                    best, columns = gain.max().item(), slope.clone()
                    columns[self.live, i] = self.polish(_unit(cleaned[:, gain.argmax()][None]))[0]
        return columns

    def toward(self, anchors: Tensor, believed: Tensor, steps: int = 24) -> Tensor:
        """argmin_q |L q|_1 over rows `believed` (m, h) empty, with q a = 1 for `anchors` a (m, r): unit q (m, r)."""
        anchors = _unit(anchors)
        q, ridge = anchors, 1e-14 * torch.eye(self.rank).to(anchors)
        for step in range(steps):
            floor = 0.1 * 0.46**step
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
            if len(chosen) == self.rank:
                break
            rest = vector - basis @ (basis.T @ vector)
            if i != banned and rest.norm() > 1e-3:
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
        worth = self.worth(vectors)
        order = worth.argsort(descending=True, stable=True)
        # a cut before copies are gone would leave copies of the easiest image only
        order = order[_first(vectors[order], 1e-5)][: 4 * self.rank]
        self.keep(vectors[order], worth[order])

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

    def keep(self, vectors: Tensor, worth: Tensor) -> None:
        """Merge vectors (m, h) with those found before."""
        found, zeros = torch.cat([self.found, vectors]), torch.cat([self.zeros, worth])
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


def factors(gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U (h, k), s (k,), V (k, d) with gradient (h, d) = U diag(s) V; a QR first makes it three times faster."""
    if gradient.shape[0] > gradient.shape[1]:
        return torch.linalg.svd(gradient, full_matrices=False)
    directions, corner = torch.linalg.qr(gradient.T)
    left, sizes, right = torch.linalg.svd(corner.T)
    return left, sizes, right @ directions.T


def measure(
    model: nn.Module,
    search: Search,
    slope: Tensor,
    inputs: Callable[[Tensor], Tensor],
    public: Tensor,
    n: int,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Inputs X (r, d) of the layer and the columns of D (H, r), to their lengths.

    The columns `slope` are known up to their length, which the bias gradient (H,) gives, D s = dL/db, or else the
    head does. `inputs` makes of rows (r, d) what the model takes, `public` are such inputs of public images.
    """
    x = search.rows(slope)
    if bias is not None:
        length = torch.linalg.lstsq(slope, bias[:, None]).solution.squeeze(1)
        return x / length[:, None], slope * length
    scale, _ = head_scale(model, search.layer, search.gradient, x, public, n)
    for _ in range(ROUNDS):
        x, slope = x * scale[:, None], slope / scale
        scale, _ = explain(slope.T, slopes(model, search.layer, inputs(x)).double() / n)
    return x, slope


def named(
    model: nn.Module, layer: nn.Linear, x: Tensor, slope: Tensor, inputs: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Labels (r,) of images (r, d) whose columns of D are `slope` (H, r), and how well each class explains them."""
    guess = slopes(model, layer, inputs(x)).double()  # (r, classes, h)
    return explain(slope.T, guess)[1], F.cosine_similarity(guess, slope.T[:, None], dim=2)
