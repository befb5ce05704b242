"""How well the truth explains an update, beside the attack's answer: why an attack failed, where it failed.

All three values of `Objectives` come from the attack's own distance between the observed update and a simulated one,
without its regulariser, with torch's own convolutions in the dtype of the update: a client's local steps through ReLU
are not repeatable in any other arithmetic. The truth's value is an oracle: no attack sees it.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from attacks.base import Attack
from core.protocol import Batch, Observation, Reconstruction

Status = Literal["solved", "stuck", "ambiguous", "diverged"]

MARGIN = 1.01  # a distance within 1% of the truth's counts as equal
ROUNDING = 1e-6  # of distances in float32: an answer closer than that is exact


@dataclass(frozen=True)
class Objectives:
    """The attack's distance, 0 for an exact match, at three places; None where it cannot be computed.

    answer: the reconstruction with its own labels. truth: the true examples and labels. baseline: the mean public
    example in the place of every example, with the answer's labels.
    """

    answer: float | None
    truth: float | None
    baseline: float | None


def objectives(
    attack: Attack, observation: Observation, truth: Batch, rec: Reconstruction, mean_example: Tensor
) -> Objectives | None:
    """The attack's objective at its answer, at the truth and at the mean public example (*shape).

    None for an attack that matches no update. The truth's is None if the attacker believes in another number of
    examples, the answer's if it has another number of examples than the attacker believes in.
    """
    distance = attack.matching_objective(observation)
    if distance is None:
        return None
    device, count = observation.update.device, observation.update.num_examples
    dtype = next(iter(observation.update.tensors.values())).dtype

    def at(examples: Tensor, labels: Tensor | None) -> float | None:
        if labels is None or len(examples) != count or len(labels) != count:
            return None
        with torch.no_grad():
            return float(distance(examples.to(device, dtype), labels.to(device)))

    return Objectives(
        at(rec.examples, rec.labels),
        at(truth.examples, truth.labels),
        at(mean_example.expand(len(rec.examples), *mean_example.shape), rec.labels),
    )


def status_of(rec: Reconstruction, found: Objectives | None, recovered: bool) -> Status:
    """What became of an attack on one update.

    diverged: the answer has no finite objective, or explains the update no better than the mean public example; for an
    attack that matches no update, it returned nothing. solved: every example that the update determines is recovered.
    ambiguous: the answer explains the update as well as the truth does, so the update does not decide between them.
    stuck: the truth explains the update better, so the attack failed.

    Args:
        rec: the attack's own result.
        found: its objectives, None for an attack that matches no update.
        recovered: whether every example that the update determines is recovered.
    """
    if found is None or found.answer is None:
        return "diverged" if rec.status == "diverged" else "solved" if recovered else "stuck"
    if not math.isfinite(found.answer):
        return "diverged"
    if recovered:
        return "solved"
    if found.truth is not None and found.answer <= max(MARGIN * found.truth, ROUNDING):
        return "ambiguous"
    return "stuck" if found.baseline is None or found.answer < found.baseline else "diverged"
