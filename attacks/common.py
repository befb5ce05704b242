"""Gradient matching: the part all optimisation attacks share.

An attack guesses images and labels, computes what the wire would have carried had they been the client's, and moves
them until that equals what the wire did carry.
"""

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from attacks.adam import Adam
from attacks.base import Attack, checkpoint, expect_update, progress
from attacks.lbfgs import Lbfgs
from federated.wire import Observation, Recipe, Reconstruction, Task, UsageError
from models.meta import MetaModel
from models.winograd import has_bfloat16
from utils.cli import hp, settings

CHUNK = 20  # L-BFGS iterations between two looks at the objective: one step of the authors' loop
TINY = 1e-30  # keeps 0 / 0 finite

Reading = Literal["auto", "average", "unrolled"]


class Matching:
    """What an update says, as a mean gradient per example, and what guessed images would have made it say.

    reading "average": the delta is taken for one gradient, divided by the mass with which the local gradients enter
    it (lr * T without momentum) and freed of weight decay's first-order share. "unrolled": the guess goes through the
    client's own local steps, minibatches in order, and both deltas are divided by the same mass. "auto" unrolls
    whenever there is more than one step. A gradient on the wire is read as it is.

    An unrolled client takes the steps of `batches` if they are given, else those of the recipe without its shuffling.
    What a defence does without drawing, such as clipping, the guess undergoes, unless a delta is read as a gradient.
    """

    def __init__(self, seen: Observation, reading: Reading = "auto", batches: Sequence[Tensor] | None = None) -> None:
        expect_update(seen.update, seen.model)
        self.task, self.recipe = seen.task, seen.recipe
        self.count = seen.update.num_examples
        self.device = seen.update.tensors[0].device
        self.meta = MetaModel(seen.model, seen.recipe.model_mode)
        steps = seen.recipe.steps(self.count)
        self.whole = seen.update.kind == "gradient"  # what a defence was applied to
        self.unrolled = seen.update.kind == "delta" and (reading == "unrolled" or (reading == "auto" and steps > 1))
        self.mean_gradient = mean_gradient(seen, seen.update.tensors)
        if self.unrolled:
            self.mass = seen.recipe.gradient_mass(self.count)
            schedule = seen.recipe.batches(self.count) if batches is None else batches
            self.batches = [b.to(self.device) for b in schedule]
            self.target = tuple(t / self.mass for t in seen.update.tensors)
        else:
            self.target = self.mean_gradient

    def simulate(self, pixels: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        """The reading of an update by a client with these images (N, C, H, W) in [0, 1] and labels.

        Labels are (N,) int64 or, to be differentiated, probabilities (N, num_classes).
        """
        inputs, recipe = self.task.to_model(pixels), self.recipe
        defended = recipe.defense or tuple
        if not self.unrolled:
            ours = self.meta.gradient(inputs, labels, create_graph=torch.is_grad_enabled())
            return defended(ours) if self.whole else self.as_delta(ours)
        delta = self.meta.train(inputs, labels, self.batches, recipe, create_graph=torch.is_grad_enabled())
        return tuple(d / self.mass for d in defended(delta))

    def as_delta(self, gradient: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """A gradient as it shows in a delta that is read as one: itself or, if Adam took the steps, evened out.

        Adam divides each entry by about its own size, which leaves signs, and a sign has no slope to follow. Divided
        by its size and the mean size in its layer, an entry keeps one: 5 to 10 dB on single images.
        """
        if self.recipe.optimizer == "sgd":
            return gradient
        return tuple(g / (g.abs() + g.abs().mean() + TINY) for g in gradient)

    def squared_distance(self, pixels: Tensor, labels: Tensor) -> Tensor:
        """DLG's objective, sum over layers of ||g^ - g*||^2.

        Adam's delta read as a gradient has a direction and no size: the cosine distance then, in the same units.
        """
        if self.recipe.optimizer == "adam" and not self.unrolled and not self.whole:
            return self.scale * self.cosine_distance(pixels, labels)
        pairs = zip(self.simulate(pixels, labels), self.target, strict=True)
        return torch.stack([(a - b).square().sum() for a, b in pairs]).sum()

    def cosine_distance(self, pixels: Tensor, labels: Tensor) -> Tensor:
        """Inverting Gradients' objective, 1 - <g^, g*> / (||g^|| ||g*||) over all layers as one vector."""
        return cosine_distance(self.simulate(pixels, labels), self.target)

    def hasten(self, count: int) -> None:
        """From here on the float32 convolutions of `count` images are computed with fewer products, where that pays."""
        count = max(map(len, self.batches)) if self.unrolled else count
        if self.target[0].dtype == torch.float32:
            self.meta.hasten(self.task.to_model(self.target[0].new_zeros(count, *self.task.image_shape)))
            self.target = self.meta.laid_out(self.target)

    @property
    def noise(self) -> float:
        """Deviation of what the recipe's defence has drawn onto an entry of the target; 0 without noise."""
        if self.recipe.defense is None:
            return 0.0
        return self.recipe.defense.noise / (1.0 if self.whole else self.recipe.gradient_mass(self.count))

    @cached_property
    def scale(self) -> float:
        """||g*||^2, the objective of a guess that moves nothing: what losses are relative to."""
        return sum(t.square().sum().item() for t in self.target)


def mean_gradient(seen: Observation, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """What the client of `seen` has sent, or would have sent, as a mean gradient per example; Adam's has no size."""
    if seen.update.kind == "gradient":
        return tuple(tensors)
    recipe = seen.recipe
    mass = recipe.gradient_mass(seen.update.num_examples)
    decay = recipe.weight_decay if recipe.optimizer == "sgd" else 0.0
    return tuple(t / mass - decay * w.detach() for t, w in zip(tensors, seen.model.parameters(), strict=True))


def note_adam(recipe: Recipe, kind: str) -> None:
    """One line where a delta of Adam's steps is about to be read as a gradient."""
    if kind == "delta" and recipe.optimizer == "adam":
        print(
            "note: Adam hides how large gradients are: this attack reads the update by its direction", file=sys.stderr
        )


def check_reading(reading: Reading, recipe: Recipe, kind: str, num_examples: int) -> None:
    """Of --reading: a UsageError where there is no delta to read, a line where it takes Adam's for a gradient."""
    if reading != "auto" and kind == "gradient":
        raise UsageError("--reading says how a weight delta is read: it belongs to main_fed.py")
    if reading == "average" or (reading == "auto" and recipe.steps(num_examples) == 1):
        note_adam(recipe, kind)


def inner(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """<a, b>, each all its layers as one vector."""
    return torch.stack([(p * q).sum() for p, q in zip(a, b, strict=True)]).sum()


def cosine_distance(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> Tensor:
    """1 - cosine of the angle between two gradients, each all its layers as one vector; constant in the second."""
    size = torch.stack([t.square().sum() for t in theirs]).sum()
    along, square = inner_and_square(ours, theirs)
    return 1 - along / (square * size).sqrt().clamp(min=TINY)


def inner_and_square(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """<ours, theirs> and <ours, ours>, constant in the second, with one derivative only."""
    return _Inner.apply(tuple(theirs), *ours)


class _Inner(torch.autograd.Function):
    """(theirs, *ours) -> <ours, theirs>, <ours, ours>, and both slopes in one pass over what may be millions."""

    @staticmethod
    def forward(ctx: Any, theirs: tuple[Tensor, ...], *ours: Tensor) -> tuple[Tensor, Tensor]:
        ctx.theirs = theirs
        ctx.save_for_backward(*ours)
        along = torch.stack([(a * t).sum() for a, t in zip(ours, theirs, strict=True)]).sum()
        return along, torch.stack([a.square().sum() for a in ours]).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        along, square = slopes
        pairs = zip(ctx.saved_tensors, ctx.theirs, strict=True)
        return None, *((t * along).addcmul_(a, 2 * square) for a, t in pairs)


def to_box(u: Tensor) -> Tensor:
    """From (-inf, +inf) onto pixels in [0, 1], with unit slope at mid-grey; 0 and 1 are reached, not approached."""
    return 0.5 + 0.5 * torch.sin(2 * u)


def from_box(pixels: Tensor) -> Tensor:
    """The inverse of `to_box`, for pixels a little inside [0, 1]: at its ends a sine has no slope."""
    return torch.asin((2 * pixels - 1).clamp(-0.98, 0.98)) / 2


def smooth_tv(pixels: Tensor) -> Tensor:
    """Isotropic total variation, mean over pixels: sqrt(dx^2 + dy^2 + 1e-4), which L-BFGS can follow through zero."""
    dx = pixels[..., :-1, 1:] - pixels[..., :-1, :-1]
    dy = pixels[..., 1:, :-1] - pixels[..., :-1, :-1]
    return (dx.square() + dy.square() + 1e-4).sqrt().mean()


def total_variation(x: Tensor) -> Tensor:
    """Anisotropic total variation, Inverting Gradients': mean |dx| + mean |dy|."""
    return (x[..., :, 1:] - x[..., :, :-1]).abs().mean() + (x[..., 1:, :] - x[..., :-1, :]).abs().mean()


@torch.no_grad()
def put(variables: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Values into variables, in place."""
    for v, value in zip(variables, values, strict=True):
        v.copy_(value)


@dataclass(frozen=True)
class Descent:
    """One run of the optimiser, at the lowest objective it saw."""

    pixels: Tensor  # (N, C, H, W) in [0, 1]
    labels: Tensor  # (N,) int64
    loss: float  # of the attack's own objective
    trace: tuple[float, ...]
    iterations: int
    stalled: bool


@settings
class LbfgsInversion(Attack):
    """Squared gradient distance by L-BFGS: what DLG and iDLG share, with the restarts and stops their code lacks.

    With our defaults the pixels of one image follow from the equations alone. A batch has too few of them for its
    pixels, and a total-variation prior, fading in three stages, chooses among the batches that fit.
    """

    threat = "honest-but-curious"
    reads_adam = True

    iterations: int = hp(800, "L-BFGS iterations at the most", least=1, paper=6000, source="300 steps of 20, main.py")
    restarts: int = hp(3, "runs at the most: another start only if one stalls", least=1, paper=1)
    lr: float = hp(1.0, "first step length L-BFGS tries", above=0, source="authors' main.py")
    line_search: Literal["strong_wolfe", "none"] = hp(
        "strong_wolfe", "without one L-BFGS diverges on some images", paper="none"
    )
    history: int = hp(200, "curvature pairs L-BFGS keeps", least=1, paper=100)
    start: Literal["grey", "normal"] = hp("grey", "mid-grey with a little noise, or N(0, 1)", paper="normal")
    box: bool = hp(True, "keep pixels in [0, 1], through a sine", paper=False)
    tv: float = hp(
        1e-2, "prior of a batch: total-variation weight, over ||g*||^2, of the first stage", least=0, paper=0.0
    )
    stall: float = hp(1e-2, "a run has stalled if its objective stays above this share of ||g*||^2", above=0)
    patience: int = hp(160, "iterations after which a stalled run is given up; 0: never", least=0, paper=0)
    tolerance: float = hp(1e-9, "converged when the objective is below this share of ||g*||^2", least=0, paper=0.0)
    reading: Reading = hp(
        "auto", "of a delta: average (as one gradient), unrolled (through the local steps), auto (unrolled if T > 1)"
    )

    def check(self, model: nn.Module, task: Task, recipe: Recipe, kind: str, num_examples: int) -> None:
        super().check(model, task, recipe, kind, num_examples)
        if num_examples > 1 and min(task.image_shape[1:]) < 2:
            raise UsageError("the prior of a batch needs images of at least 2x2 pixels")
        check_reading(self.reading, recipe, kind, num_examples)

    def invert(
        self,
        match: Matching,
        rng: torch.Generator,
        labels: Tensor | None = None,
        logits: Callable[[int], Tensor] | None = None,
    ) -> Reconstruction:
        """Descents from new starts until one does not stall; the lowest objective counts, and nothing else.

        Either `labels` (N,) are fixed, or `logits(run)` says where those of each run start (N, num_classes).
        """
        assert (labels is None) != (logits is None), "labels are fixed or optimised"
        if not 0 < match.scale < math.inf:  # nothing was sent, or training has blown up: no guess is better than grey
            grey = torch.full((match.count, *match.task.image_shape), 0.5)
            return Reconstruction(grey, labels, status="diverged")
        runs: list[Descent] = []
        while len(runs) < self.restarts and (not runs or runs[-1].stalled):
            first = logits(len(runs)) if logits is not None else None
            descend = partial(self._descend, match, rng, labels, first, len(runs))
            runs.append(checkpoint.stretch(Descent, rng, descend))
        best = min(runs, key=lambda run: run.loss)
        return Reconstruction(
            images=best.pixels,
            labels=best.labels,
            trace=best.trace,
            iterations=sum(run.iterations for run in runs),
            restarts=len(runs) - 1,
            status="diverged" if best.stalled else "ok",
        )

    def _descend(
        self, match: Matching, rng: torch.Generator, labels: Tensor | None, logits: Tensor | None, run: int
    ) -> Descent:
        """One run from a random start; stops when it has converged or stalled."""
        noise = torch.randn(match.count, *match.task.image_shape, generator=rng).to(match.device)
        pixels = noise if self.start == "normal" else 0.5 + 0.01 * noise
        u = (from_box(pixels) if self.box else pixels).requires_grad_()
        variables = [u] if logits is None else [u, logits.detach().clone().to(match.device).requires_grad_()]
        decode = to_box if self.box else lambda u: u
        best, kept = math.inf, [v.detach().clone() for v in variables]
        weight = 0.0

        def slopes() -> tuple[float, tuple[Tensor, ...]]:
            nonlocal best, kept
            images = decode(u)
            distance = match.squared_distance(images, variables[1].softmax(1) if labels is None else labels)
            objective = distance + weight * smooth_tv(images) if weight else distance
            if objective.item() < best:
                best, kept = objective.item(), [v.detach().clone() for v in variables]
                reached[0] = distance.item() / match.scale
            return objective.item(), torch.autograd.grad(objective, variables)

        reached = [math.inf]
        trace: list[float] = []
        done = 0
        stages = [0.0] if match.count == 1 or not self.tv else [self.tv, self.tv / 10, self.tv / 100]
        saved = checkpoint.resume(rng)
        for number, stage in enumerate(stages):
            if saved is not None and number < saved["number"]:
                continue
            weight, best, before = stage * match.scale, math.inf, math.inf
            put(variables, kept)
            optimizer = Lbfgs(variables, slopes, self.lr, self.history, self.line_search == "strong_wolfe")
            if saved is not None:
                put(variables, saved["variables"])
                optimizer.load(saved["optimizer"])
                best, before, kept, trace, done = (saved[k] for k in ("best", "before", "kept", "trace", "done"))
                reached[0], saved = saved["reached"], None
            end = self.iterations * (number + 1) // len(stages)
            while done < end:
                started = optimizer.step(min(CHUNK, end - done))
                done += min(CHUNK, end - done)
                trace.append(reached[0])
                progress(run * self.iterations + done, self.restarts * self.iterations, trace[-1])
                hopeless = 0 < self.patience <= done and reached[0] > self.stall
                # under the prior the distance does not go to zero: a stage has converged when its objective rests
                rested = before - best < 1e-4 * best if weight else reached[0] < self.tolerance
                before = best
                if not math.isfinite(started) or hopeless or rested:
                    break
                if checkpoint.due():
                    state = {"number": number, "variables": [v.detach() for v in variables], "kept": kept}
                    state |= {"optimizer": optimizer.state(), "best": best, "before": before}
                    checkpoint.save(rng, state | {"reached": reached[0], "trace": trace, "done": done})
            if not reached[0] <= self.stall and 0 < self.patience <= done:
                break
        return Descent(
            pixels=decode(kept[0]).clamp(0, 1),
            labels=kept[1].argmax(1) if labels is None else labels,
            loss=reached[0],
            trace=tuple(trace),
            iterations=done,
            stalled=not reached[0] <= self.stall,
        )


@settings
class SignedInversion(Attack):
    """Pixels by Adam on the sign of their slope, under a total-variation prior: what the attacks after DLG share.

    Signed steps see only how the prior's slope compares with the matching slope, and the best absolute weight differs
    a hundredfold between nets. With tv_scale "share" the weight is a share: before they are added, the prior's slope
    is scaled so that its mean over an image's pixels is `tv` times the matching slope's.
    """

    threat = "honest-but-curious"
    reads_adam = True

    iterations: int = hp(300, "steps at the most, of each run", least=1, paper=4800, source="rec_mult.py")
    restarts: int = hp(1, "runs; the lowest objective counts", least=1)
    lr: float = hp(0.1, "Adam's step in the model's units; x 0.1 at 3/8, 5/8 and 7/8", above=0, source="rec_mult.py")
    signed: bool = hp(True, "only the sign of the slope", source="rec_mult.py")
    tv: float = hp(0.6, "total-variation weight", least=0, paper=1e-4, source="options.py")
    tv_scale: Literal["share", "absolute"] = hp(
        "share", "of tv: a share of the matching slope, or as it stands in the objective", paper="absolute"
    )
    start: Literal["grey", "normal"] = hp("grey", "mid-grey with a little noise, or N(0, 1)", paper="normal")
    patience: int = hp(100, "steps without a gain of 1%, after which the step size falls early; 0: never", least=0)
    precision: Literal["auto", "float32", "bfloat16"] = hp(
        "auto", "of 3x3 convolutions; auto: bfloat16 where the hardware has it", paper="float32"
    )

    def descend(
        self,
        match: Matching,
        labels: Tensor,
        rng: torch.Generator,
        cost: Callable[..., Tensor],
        copies: int = 1,
        extra: Mapping[float, float] = MappingProxyType({}),
        correct: Callable[..., None] | None = None,
        every: int = 1,
    ) -> tuple[Descent, int]:
        """The best of all runs, and the iterations of all together.

        `cost(pixels, labels, *extra)` is the objective without the prior; pixels are (copies * N, C, H, W), and `extra`
        maps the start of each further variable, kept in [0, 1], to its step. `correct(pixels, labels, *extra)` is told
        the guess after a tenth of the iterations, `every` so many from there on, and at the end, when the cost may
        become another; `correct(None, labels)` has it forget.
        """
        match.hasten(copies * len(labels))
        y = labels.repeat(copies)
        runs = [
            checkpoint.stretch(Descent, rng, partial(self._run, match, y, rng, cost, extra, correct, every, run))
            for run in range(self.restarts)
        ]
        return min(runs, key=lambda run: run.loss), sum(run.iterations for run in runs)

    def answer(self, best: Descent, iterations: int, images: Tensor | None = None) -> Reconstruction:
        """The best run as what the attack claims; `images` if they are not simply its pixels."""
        return Reconstruction(
            images=best.pixels if images is None else images,
            labels=best.labels[: len(best.pixels if images is None else images)],
            trace=best.trace,
            iterations=iterations,
            restarts=self.restarts - 1,
            status="diverged" if best.stalled else "ok",
        )

    def _run(
        self,
        match: Matching,
        labels: Tensor,
        rng: torch.Generator,
        cost: Callable[..., Tensor],
        extra: Mapping[float, float],
        correct: Callable[..., None] | None,
        every: int,
        run: int,
    ) -> Descent:
        task = match.task
        noise = torch.randn(len(labels), *task.image_shape, generator=rng).to(match.target[0])
        low, high = (task.to_model(torch.full_like(noise, edge)) for edge in (0.0, 1.0))
        x = noise if self.start == "normal" else task.to_model(0.5 + 0.01 * noise)
        x = x.clamp(low, high).detach().requires_grad_()  # (N, C, H, W), as the model takes them
        more = [x.new_full((), v, requires_grad=True) for v in extra]
        steps = [self.lr, *extra.values()]
        optimizer = Adam((x, *more))
        best, lowest, kept, waited = math.inf, math.inf, x.detach().clone(), 0
        trace: list[float] = []
        corrections = range(self.iterations // 10, self.iterations, every) if correct else ()
        corrected_at: list[Tensor] | None = None

        def put_right(there: list[Tensor]) -> None:
            assert correct is not None
            correct(task.to_pixels(there[0]), labels, *there[1:])

        if correct:
            correct(None, labels)
        saved = checkpoint.resume(rng)
        ends = [round(self.iterations * share) for share in (3 / 8, 5 / 8, 7 / 8, 1)]
        half = self.precision == "bfloat16" or (self.precision == "auto" and has_bfloat16(match.device))
        match.meta.halve(half)
        for stage, length in enumerate(b - a for a, b in zip([0, *ends], ends, strict=False)):
            if saved is not None and stage < saved["stage"]:
                continue
            waited, first = 0, 0
            if saved is not None:
                put([x, *more], saved["variables"])
                optimizer.load(saved["optimizer"])
                first, waited, best, kept, trace = (saved[k] for k in ("step", "waited", "best", "kept", "trace"))
                lowest, corrected_at, saved = min(trace), saved["corrected_at"], None
                if corrected_at is not None:
                    put_right(corrected_at)
            for step in range(first, length):
                if len(trace) in corrections:
                    corrected_at, best = [v.detach().clone() for v in (x, *more)], math.inf
                    put_right(corrected_at)
                loss = cost(task.to_pixels(x), labels, *more)
                slope, *slopes = torch.autograd.grad(loss, [x, *more])
                trace.append(loss.item())
                waited = 0 if trace[-1] < 0.99 * lowest else waited + 1
                lowest = min(lowest, trace[-1])
                if trace[-1] < best:
                    best, kept = trace[-1], x.detach().clone()
                if not math.isfinite(trace[-1]) or 0 < self.patience <= waited:
                    break
                slopes = [self._with_prior(x, slope), *slopes]
                optimizer.step([g.sign() if self.signed else g for g in slopes], [lr * 0.1**stage for lr in steps])
                with torch.no_grad():
                    x.clamp_(low, high)
                    for v in more:
                        v.clamp_(0, 1)
                progress(run * self.iterations + len(trace), self.restarts * self.iterations, trace[-1])
                if checkpoint.due():
                    state = {"stage": stage, "step": step + 1, "variables": [v.detach() for v in (x, *more)]}
                    state |= {"optimizer": optimizer.state(), "waited": waited, "best": best}
                    checkpoint.save(rng, state | {"kept": kept, "trace": trace, "corrected_at": corrected_at})
        match.meta.halve(False)
        if correct:
            put_right([kept, *(v.detach() for v in more)])
        if half or correct:  # rounding, or an old correction, makes of the lowest objective a matter of luck
            with torch.no_grad():
                best, kept = min(
                    ((cost(task.to_pixels(end), labels, *more).item(), end) for end in (kept, x.detach())),
                    key=lambda found: found[0] if math.isfinite(found[0]) else math.inf,
                )
        return Descent(
            pixels=task.to_pixels(kept).clamp(0, 1),
            labels=labels,
            loss=best,
            trace=tuple(trace),
            iterations=len(trace),
            stalled=not best < trace[0],
        )

    def _with_prior(self, x: Tensor, slope: Tensor) -> Tensor:
        """The matching slope (N, C, H, W) and, at its weight, total variation's."""
        if not self.tv:
            return slope
        (prior,) = torch.autograd.grad(total_variation(x), x)
        if self.tv_scale == "absolute":
            return slope + self.tv * prior
        ours, its = (g.abs().flatten(1).mean(1).view(-1, 1, 1, 1) for g in (slope, prior))
        return slope + self.tv * ours / its.clamp(min=TINY) * prior
