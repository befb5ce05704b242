"""The source of trials of each mode, from its flags."""

from core.errors import UsageError
from core.protocol import Recipe
from core.references import absolute
from data import Dataset
from federated.flower_engine import FlowerSource
from federated.simulation import FedAvgSource, GradientSource
from models import MODELS
from runner.flags import Common, Fed, Grad

DEALT = (
    *("trials", "seed", "clients", "client_images", "clients_per_round", "rounds"),
    *("lr_decay", "partition", "beta", "classes_per_client", "aggregate", "attack_rounds"),
)  # flags that are arguments of FedAvgSource.deal


def gradient_source(flags: Grad, dataset: Dataset) -> GradientSource:
    """One gradient of a private batch for each trial."""
    n, available = flags.batch_size, len(dataset.private)
    needed = n * flags.trials * flags.aggregate
    if needed > available:
        raise UsageError(
            f"{flags.trials} trials with `batch_size={n}` need {needed} private images, and {flags.dataset} "
            f"has {available}: lower `batch_size` or `trials`"
        )
    recipe = Recipe(batch_size=n, model_mode=flags.model_mode, loss=_loss(flags), defense=flags.defense)
    return GradientSource(dataset.private, recipe, flags.trials, flags.aggregate)


def federated_source(flags: Fed, dataset: Dataset) -> FedAvgSource:
    """Weight updates of simulated clients in rounds of FedAvg."""
    recipe = Recipe(
        batch_size=flags.batch_size or 0,
        local_epochs=flags.local_epochs,
        lr=flags.local_lr,
        momentum=flags.momentum,
        weight_decay=flags.weight_decay,
        optimizer=flags.client_optimizer,
        lr_schedule=flags.lr_schedule,
        model_mode=flags.model_mode,
        loss=_loss(flags),
        defense=flags.defense,
    )
    if flags.engine == "flower" and flags.backend == "ray":
        raise UsageError("`engine=flower` starts a Ray of its own: leave out `backend`")
    source = FlowerSource if flags.engine == "flower" else FedAvgSource
    return source.deal(dataset, recipe, **{name: getattr(flags, name) for name in DEALT})


def _loss(flags: Common) -> str:
    """The loss of the flags or, where they name none, that of the network."""
    if flags.loss == "cross_entropy" and flags.model in MODELS:
        return MODELS[flags.model].loss
    return absolute(flags.loss)  # worker processes may have another working directory
