"""What differential privacy guarantees against any attack, to stand beside what an attack achieved.

mu = sqrt(T) / s for T releases of a Gaussian mechanism with noise multiplier s (Dong, Roth, Su, Gaussian Differential
Privacy, https://arxiv.org/abs/1905.02383):

    delta(eps) = Phi(mu / 2 - eps / mu) - e^eps Phi(-mu / 2 - eps / mu)
    P[success] <= Phi(Phi^-1(kappa) + mu)                  kappa: success of an attacker who never saw the update

The second is reconstruction robustness (Balle, Cherubin, Hayes, S&P 2022, https://arxiv.org/abs/2201.04845; Hayes,
Mahloujifar, Balle, NeurIPS 2023, https://arxiv.org/abs/2302.07225). For one candidate among N, kappa = 1 / N.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import special

from core.protocol import Recipe
from defenses.base import Defense, Pipeline, parse
from defenses.clip import Clip
from defenses.dpfedavg import DPFedAvg
from defenses.dpsgd import DPSGD
from defenses.gauss import Gauss

DELTA = 1e-5  # at which epsilon is reported
ORDERS = (*(1 + x / 10 for x in range(1, 100)), *range(12, 64))  # of Renyi divergences, as in Opacus


def gaussian_delta(epsilon: float, mu: float) -> float:
    """The exact delta of a Gaussian mechanism at `epsilon`."""
    second = math.exp(epsilon + special.log_ndtr(-mu / 2 - epsilon / mu))
    return float(special.ndtr(mu / 2 - epsilon / mu) - second)


def gaussian_epsilon(mu: float, delta: float = DELTA) -> float:
    """The exact epsilon of a Gaussian mechanism at `delta`; 0 if the mechanism is (0, delta)-private."""
    from scipy import optimize  # only here: its import takes a tenth of a second

    if gaussian_delta(0.0, mu) <= delta:
        return 0.0
    high = 1.0
    while gaussian_delta(high, mu) > delta:
        high *= 2
    return float(optimize.brentq(lambda epsilon: gaussian_delta(epsilon, mu) - delta, 0.0, high, xtol=1e-9))


def success_bound(kappa: float, mu: float) -> float:
    """The largest probability of success of any attack, where chance has probability `kappa`."""
    return float(special.ndtr(special.ndtri(kappa) + mu))


def subsampled_success_bound(
    kappa: float, sigma: float, rate: float, steps: int, draws: int = 200_000, seed: int = 0
) -> float:
    """As `success_bound`, for Poisson sampling at `rate`: Monte Carlo over the likelihood ratio (Hayes et al.)."""
    rng = np.random.default_rng(seed)

    def log_ratio(centers: Any) -> Any:
        x = rng.normal(scale=sigma, size=(draws, steps)) + centers
        return np.log1p(rate * np.expm1((x - 0.5) / sigma**2)).sum(1)

    threshold = np.quantile(log_ratio(0.0), 1 - kappa)
    return float((log_ratio(rng.random((draws, steps)) < rate) > threshold).mean())


def identification_rate(candidates: int, mu: float) -> float:
    """The success of the best attack among candidates whose clipped gradients are orthogonal and of norm C."""

    from scipy import integrate  # only here: its import takes half a second

    def integrand(u: float) -> float:
        return math.exp(-u * u / 2) / math.sqrt(2 * math.pi) * float(special.ndtr(u + mu)) ** (candidates - 1)

    return float(integrate.quad(integrand, -12, 12, limit=200)[0])


def psnr_bound(psnr: float, mean_square: float, pixels: int, mu: float) -> float:
    """P[PSNR >= psnr] of the best attack without a prior on an image with this mean squared pixel.

    It sees the image with noise of variance pixels * mean_square / mu^2 on each pixel (Riess et al.,
    https://arxiv.org/abs/2402.12861).
    """
    variance = pixels * mean_square / mu**2
    return float(special.gammainc(pixels / 2, pixels * 10 ** (-psnr / 10) / (2 * variance)))


def rdp_epsilon(
    sigma: float, steps: int, rate: float = 1.0, delta: float = DELTA, orders: Sequence[float] = ORDERS
) -> float:
    """Epsilon by Renyi divergences, as Opacus's RDPAccountant: an upper bound, also for Poisson sampling at `rate`."""
    candidates = [0.0] * len(orders)
    for i, order in enumerate(orders):
        divergence = steps * _renyi(rate, sigma, order)
        candidates[i] = divergence - (math.log(delta) + math.log(order)) / (order - 1) + math.log((order - 1) / order)
    return max(0.0, min(candidates))


def _renyi(rate: float, sigma: float, order: float) -> float:
    """The Renyi divergence of one step (Mironov, Talwar, Zhang, https://arxiv.org/abs/1908.10530, section 3.3)."""
    if rate == 1:
        return order / (2 * sigma**2)
    if float(order).is_integer():
        k = np.arange(int(order) + 1)
        binomial = special.gammaln(order + 1) - special.gammaln(k + 1) - special.gammaln(order - k + 1)
        terms = binomial + k * math.log(rate) + (order - k) * math.log1p(-rate) + (k * k - k) / (2 * sigma**2)
        return float(special.logsumexp(terms) / (order - 1))
    k = np.arange(400)
    z = sigma**2 * math.log(1 / rate - 1) + 0.5
    coefficient = special.binom(order, k)
    with np.errstate(divide="ignore"):
        size, sign = np.log(np.abs(coefficient)), np.sign(coefficient)
    total = []
    for powers, others, tail in ((k, order - k, (k - z)), (order - k, k, (z - (order - k)))):
        log_tail = special.log_ndtr(-tail / sigma)
        term = size + powers * math.log(rate) + others * math.log1p(-rate)
        total.append(term + (powers**2 - powers) / (2 * sigma**2) + log_tail)
    value = special.logsumexp(np.concatenate(total), b=np.concatenate([sign, sign]))
    return float(value / (order - 1))


def guarantee(
    recipe: Recipe, kind: str, rounds: int = 1, delta: float = DELTA, num_examples: int = 0
) -> dict[str, Any] | None:
    """What the defence of `recipe` guarantees about one update; None without a defence.

    rounds: rounds of training in which a client takes part. num_examples: of its smallest client; 0: one minibatch.
    unit: what is protected, "record" or "client"; None where there is no formal guarantee, and `reason` then says why.
    multiplier: noise multiplier s. releases: T in one update. rate: probability that a record enters a release.
    epsilon, total_epsilon: of one update and of all rounds at `delta`, exact or, for a rate below 1, RDP's upper bound;
    neighbours differ in one unit, which is left out. mu: of one update; None for a rate below 1.
    """
    defense = parse(recipe.defense)
    if not defense.steps:
        return None
    unit, multiplier, reason = _mechanism(defense)
    if unit is None:
        return {"unit": None, "reason": f"no formal guarantee: {reason}"}
    releases = recipe.local_epochs if unit == "record" and kind == "delta" else 1
    common = {"unit": unit, "multiplier": multiplier, "rounds": rounds, "delta": delta}
    poisson = unit == "record" and any(isinstance(s, DPSGD) and s.sampling == "poisson" for s in defense.steps)
    if poisson and kind == "delta" and recipe.batch_size < num_examples:
        rate, steps = recipe.batch_size / num_examples, recipe.steps(num_examples)
        one, all_rounds = (rdp_epsilon(multiplier, count, rate, delta) for count in (steps, rounds * steps))
        own = {"releases": steps, "rate": rate, "mu": None, "epsilon": one, "total_epsilon": all_rounds}
        return common | own
    mu = math.sqrt(releases) / multiplier
    return common | {
        "releases": releases,
        "rate": 1.0,
        "mu": mu,
        "epsilon": gaussian_epsilon(mu, delta),
        "total_epsilon": gaussian_epsilon(mu * math.sqrt(rounds), delta),
    }


def _mechanism(defense: Pipeline) -> tuple[str | None, float, str]:
    """The unit of privacy and the noise multiplier, or None and why there is none."""
    bound = math.inf  # of the norm of the update so far
    reason = f"{defense.steps[-1].name} bounds no probability"
    for position, step in enumerate(defense.steps):
        if isinstance(step, DPSGD):
            others = [*defense.steps[:position], *defense.steps[position + 1 :]]
            mixing = [s.name for s in others if _overrides(s, "on_batch") or _overrides(s, "on_gradient")]
            if mixing:
                reason = f"{mixing[0]} reads or mixes examples outside of what dpsgd clips"
            elif step.sigma:
                return "record", step.sigma, ""
            else:
                reason = "dpsgd without noise"
    for step in defense.steps:
        if isinstance(step, DPFedAvg):
            return "client", step.sigma, ""
        if isinstance(step, Clip):
            bound = min(bound, step.bound)
        elif isinstance(step, Gauss) and bound < math.inf:
            return "client", step.sigma / bound, ""
        elif isinstance(step, Gauss):
            reason = "noise on an update whose norm has no bound"
        elif _overrides(step, "on_update"):
            bound = math.inf  # quantisation, for one, can make a clipped update longer
    return None, 0.0, reason


def _overrides(step: Defense, hook: str) -> bool:
    return getattr(type(step), hook) is not getattr(Defense, hook)


def identified_bound(found: Mapping[str, Any], identified: Mapping[str, Any] | None) -> dict[str, float]:
    """{"identified_bound": ...}: the share of victims that any attack identifies at most; {} without a guarantee.

    found: a guarantee. identified: the entry of summary.json, among as many candidates. A measured share whose whole
    95% interval exceeds the bound is a mistake of the noise or of the accounting, and fails the run.
    """
    if found["unit"] is None or identified is None:
        return {}
    kappa = 1 / identified["candidates"]
    if found["mu"] is None:
        steps = found["releases"]
        draws = max(10_000, min(200_000, 5_000_000 // steps))
        bound = subsampled_success_bound(kappa, found["multiplier"], found["rate"], steps, draws)
    else:
        bound = success_bound(kappa, found["mu"])
    if identified["low"] > bound + 1e-9:
        raise AssertionError(
            f"{identified['share']:.3f} of the victims were identified among {identified['candidates']} candidates, "
            f"and {bound:.3f} is the bound: the noise or its accounting is wrong"
        )
    return {"identified_bound": bound}
