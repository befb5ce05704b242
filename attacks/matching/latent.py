"""The latent of a generator whose image explains an update: what attacks with a generative prior share.

Such an image looks like its class whatever the update is. So three scores stand beside the attack's: the mean image of
the class (the best guess from the label alone), the best image in the generator's range (an oracle, computed in
evaluation/), and Inverting Gradients on the same update, whose only prior is smoothness.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from attacks.base import ATTACKS, Attack, MatchingDistance
from attacks.labels.inference import infer_labels
from attacks.matching.matcher import UPDATE_MODEL_HELP, GradientMatcher, UpdateModel, check_update_model
from attacks.optim.adam import Adam
from attacks.optim.cma import minimize_cma
from attacks.optim.loop import DECAY_AT, Function, Phase, State, descend
from attacks.optim.tracker import current_tracker
from core.errors import UsageError
from core.hyperparameters import hp, hyperparameters
from core.protocol import Batch, Observation, Recipe, Task
from models.generators import store
from models.generators.base import ClassPCA, Generator

Objective = Callable[..., Tensor]  # images (N, C, H, W), latents (N, latent_dim), unknowns of the defence -> ()


@dataclass(frozen=True)
class Search:
    """One search, at the lowest objective it found."""

    values: tuple[Tensor, ...]  # of what was optimised
    loss: float
    trace: tuple[float, ...]

    @classmethod
    def of(cls, state: State) -> "Search":
        return cls(state.best_variables, state.best, tuple(state.trace))


@hyperparameters
class LatentInversion(Attack):
    """z* = argmin_z D(g(G(z, y)), g*) + r R(z), by Adam, or without gradients by CMA-ES."""

    threat = "honest-but-curious"
    trains = True
    requires = frozenset({"public", "double_backward"})
    example_model = "cnn"
    supports_adam = True

    generator: Literal["class_pca", "vae", "wgan"] = hp(
        "class_pca", "generator G of public images: fitted in a second, trained in minutes (vae), or in hours (wgan)"
    )
    generator_file: Path | None = hp(None, "folder of a generator made by experiments/prior.sh, used as G")
    generator_steps: int = hp(0, "training steps of a vae or wgan; 0: its own default", ge=0, smoke=3)
    output_normalization: Literal["half", "dataset"] = hp(
        "half",
        "units of the last layer of a G to be trained: tanh about mid-grey (half), or mean and std of public images",
    )
    latent_dim: int = hp(32, "number of latents of an image", ge=1, smoke=4)
    optimizer: Literal["adam", "cma"] = hp("adam", "optimiser of the latents: Adam, or CMA-ES, which uses no gradients")
    iterations: int = hp(300, "Adam steps in each run", ge=1, smoke=3)
    evaluations: int = hp(3000, "evaluations of the objective in each run of CMA-ES", ge=1, smoke=8)
    restarts: int = hp(1, "number of runs; the one with the lowest objective is the answer", ge=1)
    lr: float = hp(0.1, "Adam step of the latents", gt=0, source="GGL's reconstructor.py")
    schedule: Literal["ramp", "step"] = hp(
        "ramp",
        "schedule of that step: rising over the first 5% and falling over the last 25% of a run, or x 0.1 at 3/8, 5/8 "
        "and 7/8",
        source="GGL's reconstructor.py",
    )
    init_std: float = hp(0.01, "standard deviation of the start of the latents about zero", ge=0)
    cma_std: float = hp(0.5, "standard deviation of CMA-ES's first draws about z = 0", gt=0)
    distance: Literal["cosine", "l2"] = hp(
        "cosine", "distance D: cosine, or squared distance over the number of tensors"
    )
    latent_weight: float = hp(
        1e-5, "weight r of R, the divergence of the distribution of z's entries from N(0, 1)", ge=0
    )
    noise: float | None = hp(
        None,
        "assumed standard deviation of noise on an entry of the matched gradient; if not 0, the objective is the "
        "negative log posterior, and distance and latent weight have no effect; default: the noise of the defence",
        ge=0,
    )
    update_model: UpdateModel = hp("auto", UPDATE_MODEL_HELP)
    comparison_iterations: int = hp(
        1000,
        "iterations of Inverting Gradients on the same update, whose score is reported beside this attack's; "
        "0: no such run",
        ge=0,
        smoke=0,
    )

    def check(self, model: nn.Module, task: Task, recipe: Recipe, kind: str, num_examples: int) -> None:
        super().check(model, task, recipe, kind, num_examples)
        trained = self.generator != "class_pca" and self.generator_file is None
        if self.generator_file is not None:
            dim = store.check_compatible(self.generator_file, task)["config"].latent_dim
            if self.latent_dim != dim:
                raise UsageError(f"the generator in {self.generator_file} has {dim} latents: `latent_dim={dim}`")
        if not trained and (self.generator_steps or self.output_normalization != "half"):
            raise UsageError(
                "`generator_steps` and `output_normalization` belong to training a generator: `generator=vae`"
            )
        check_update_model(self.update_model, recipe, kind, num_examples)

    def prepare(self, task: Task, public: Batch, metadata: Mapping[str, Any]) -> None:
        if self.generator_file is not None:
            store.check_compatible(self.generator_file, task, public)
        elif self.generator != "class_pca":
            self.build_generator(public, task.num_classes, metadata)

    def build_generator(self, public: Batch, classes: int, metadata: Mapping[str, Any] | None = None) -> Generator:
        """G, fitted to or trained on these public images, or loaded if that has been done."""
        if self.generator_file is not None:
            return store.load(self.generator_file, public.examples.device)
        if self.generator == "class_pca":
            return ClassPCA(public, self.latent_dim)
        config = store.make_config(
            self.generator,
            latent_dim=self.latent_dim,
            steps=self.generator_steps,
            output_normalization=self.output_normalization,
        )
        return store.load_or_train(config, public, classes, metadata)[0]

    def comparison_attack(self, kind: str) -> Attack | None:
        if not self.comparison_iterations:
            return None
        single = kind == "gradient" or self.update_model == "single_step"  # as this attack models the update
        return ATTACKS["ig_single" if single else "ig_multi"](iterations=self.comparison_iterations)

    def matching_objective(self, observation: Observation) -> MatchingDistance | None:
        matcher = GradientMatcher(observation, self.update_model)
        if matcher.counter.variables:
            return None
        squared = self.distance == "l2" or matcher.noise or self.noise
        return matcher.relative_squared_distance if squared else matcher.cosine_distance

    def start(self, observation: Observation, rng: torch.Generator) -> tuple[GradientMatcher, Tensor, Generator]:
        """The update, the labels (N,), and G."""
        assert observation.public is not None, "an attack with a generator needs public examples"
        matcher = GradientMatcher(observation, self.update_model)
        labels = infer_labels(matcher.mean_gradient, observation, rng)
        return matcher, labels, self.build_generator(observation.public, observation.task.num_classes)

    def objective(self, matcher: GradientMatcher, generator: Generator, labels: Tensor) -> Objective:
        """D + r R or, where the noise's deviation s is known, D / (2 s^2) - log p(z) = -log p(z | g*), scaled."""
        tensors = len(matcher.target)
        noise = matcher.noise if self.noise is None else self.noise

        def objective(images: Tensor, z: Tensor, *unknowns: Tensor) -> Tensor:
            if noise:
                penalty = 2 * noise**2 * generator.negative_log_prior(z).sum()
                return (matcher.squared_distance(images, labels, *unknowns) + penalty) / tensors
            if self.distance == "l2":
                distance = matcher.squared_distance(images, labels, *unknowns) / tensors
            else:
                distance = matcher.cosine_distance(images, labels, *unknowns)
            return distance + self.latent_weight * divergence(z)

        return objective

    def search(
        self, matcher: GradientMatcher, generator: Generator, labels: Tensor, rng: torch.Generator
    ) -> tuple[tuple[Tensor, ...], tuple[float, ...], int]:
        """The best run's latents (N, latent_dim) and unknowns of the defence, its trace, and all runs' evaluations.

        CMA-ES leaves the unknowns at their initial values.
        """
        objective = self.objective(matcher, generator, labels)
        center = torch.zeros(len(labels), generator.latent_dim, device=labels.device)
        unknowns = [v.init.clone().to(center) for v in matcher.counter.variables]

        def of_latents(z: Tensor, *values: Tensor) -> Tensor:
            return objective(generator.decode(z, labels), z, *(values or unknowns))

        def search(number: int) -> Search:
            run = (number, self.restarts)
            if self.optimizer == "cma":
                return Search.of(minimize_cma(of_latents, center, self.cma_std, self.evaluations, rng, run))
            return Search.of(self._adam(of_latents, matcher, center, rng, run))

        runs = [current_tracker().run_segment(Search, rng, partial(search, n)) for n in range(self.restarts)]
        best = min(runs, key=lambda run: run.loss)
        return best.values, best.trace, sum(len(run.trace) for run in runs)

    def _adam(
        self, objective: Objective, matcher: GradientMatcher, center: Tensor, rng: torch.Generator, run: tuple[int, int]
    ) -> State:
        z = (self.init_std * torch.randn(center.shape, generator=rng)).to(center).requires_grad_()
        unknowns = matcher.counter.variables
        variables = [z, *(v.init.clone().to(center).requires_grad_() for v in unknowns)]

        @torch.no_grad()
        def project() -> None:
            for value, unknown in zip(variables[1:], unknowns, strict=True):
                value.copy_(unknown.project(value))

        factor = ramp if self.schedule == "ramp" else steps

        def rates(step: int) -> list[float]:
            return [self.lr * factor(step, self.iterations), *(v.step for v in unknowns)]

        phases = [Phase(rates, steps=self.iterations)]
        return descend(variables, Function(objective), Adam(variables), phases, rng, project=project, run=run)


def ramp(step: int, total: int) -> float:
    """The factor on a learning rate at `step`: linear over the first 5%, half a cosine over the last 25%."""
    done = step / total
    return (0.5 - 0.5 * math.cos(math.pi * min(1.0, (1 - done) / 0.25))) * min(1.0, done / 0.05)


def steps(step: int, total: int) -> float:
    """The factor on a learning rate at `step`: 0.1 after 3/8, 5/8 and 7/8 each."""
    return float(0.1 ** sum(step >= round(total * share) for share in DECAY_AT))


def divergence(z: Tensor) -> Tensor:
    """R: KL(N(m, s^2) || N(0, 1)), with m, s mean and deviation of an image's latents (N, latent_dim); mean over N."""
    if z.shape[1] < 2:
        return z.square().mean() / 2
    m, s2 = z.mean(1), z.var(1, correction=0) + 1e-12
    return (s2 + m.square() - 1 - s2.log()).mean() / 2
