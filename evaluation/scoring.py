"""How the examples of a domain are scored: the functions that a run calls, by `Domain.name`."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from core.domain import Domain
from core.registry import Registry
from evaluation.evaluator import TrialScore, score_trial
from evaluation.summary import summarize


@dataclass(frozen=True)
class Scoring:
    """What a domain's examples are scored with.

    score: as `evaluator.score_trial`. summarize: as `summary.summarize`. key: the entry of a row that is shown while a
    run goes on, `label` its name, `unit` its unit and `digits` its decimals.
    """

    score: Callable[..., TrialScore]
    summarize: Callable[..., dict[str, Any]]
    key: str
    label: str
    unit: str = ""
    digits: int = 2

    def progress(self, values: list[float]) -> str:
        """The mean of the entries `key` of all rows so far."""
        if not values:
            return ""
        return f"{self.label} {sum(values) / len(values):.{self.digits}f}{self.unit}"


SCORINGS: Registry[Scoring] = Registry("scoring", package="evaluation")


def scoring_of(domain: Domain) -> Scoring:
    """The scoring of a domain's examples."""
    return SCORINGS[domain.name]


SCORINGS.add("image", Scoring(score_trial, summarize, "psnr", "PSNR", " dB", 1))
