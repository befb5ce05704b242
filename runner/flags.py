"""The flags of both modes."""

from pathlib import Path
from typing import Literal

from core.hyperparameters import hp, hyperparameters
from core.paths import ROOT


@hyperparameters
class Common:
    """Flags of both modes."""

    dataset: str = hp("photos", "data set: {datasets}")
    base_datadir: Path = hp(
        ROOT / "datasets",
        "folder of the data sets; for folder, the <class>/<image> tree itself; for textfile and csv, a file",
    )
    victims: Literal["all", "tuning", "reporting"] = hp(
        "all",
        "private images that may be attacked: all, or one of two disjoint parts, tuning (for the choice of settings) "
        "and reporting (for published numbers)",
    )
    public: Literal["same", "other", "noise", "none"] = hp(
        "same", "public images of the attacker: same (the victims' classes), other (classes), noise, or none"
    )
    aggregate: int = hp(
        1, "number of clients whose mean update is all that the server sees, as behind secure aggregation", ge=1
    )
    believe: tuple[str, ...] = hp(
        (),
        "wrong beliefs of the attacker about the training: FLAG=VALUE, such as local-lr=0.02 batch-size=4 defense=none",
    )
    image_size: int | None = hp(None, "side of the images in pixels; default: the data set's own")
    tokens: int | None = hp(None, "length of a sentence (text, textfile); default: 16", ge=2)
    schema: str | None = hp(None, "columns of a table (csv): auto, or a JSON file; default: auto")
    normalize: Literal["none", "dataset", "half"] = hp(
        "none", "input of the model: pixels in [0, 1], the data set's mean and std, or mean 0.5 and std 0.5"
    )
    model: str = hp(
        "lenet", "network: {models}; or your own: package.module:factory, file.py:factory, torchvision:NAME"
    )
    loss: str = hp("cross_entropy", "loss: {losses}; or your own: package.module:function or file.py:function")
    activation: str | None = hp(None, "activation, such as relu, sigmoid or tanh; default: the network's own")
    norm: Literal["none", "batch", "group"] | None = hp(None, "normalisation layers; default: the network's own")
    dropout: float | None = hp(None, "dropout probability; default: the network's own", ge=0, lt=1)
    width: int | None = hp(None, "units of a hidden layer (mlp, fc2); default: the network's own", ge=1)
    model_mode: Literal["eval", "train"] = hp("eval", "mode of the client's model: BatchNorm statistics and dropout")
    weights: Path | None = hp(None, "file of initial weights: safetensors, or a torch state dict")
    defense: str = hp("none", "defence of the clients, such as clip(bound=1.0)+gauss(sigma=0.01): {defenses}")
    pretrain_epochs: int = hp(0, "epochs of training on public data before the first update", ge=0)
    trials: int = hp(10, "number of attacked updates", ge=1)
    seed: int = hp(0, "random seed for victims and model; the attack's own seed is (seed, trial)", ge=0)
    device: str = hp("auto", "device: auto, cpu, cuda or cuda:N")
    jobs: int = hp(0, "trials attacked at the same time; 0: one per core, or one on a GPU", ge=0)
    backend: Literal["local", "ray"] = hp(
        "local", "executor of the trials: worker processes, or Ray (the cluster of RAY_ADDRESS, if set)"
    )
    threads: int = hp(
        0, "CPU threads of a trial; 0: one, or all cores for a single trial of a large network", ge=0, lt=1025
    )
    out: Path = hp(ROOT / "results", "folder of the results")
    thresholds: tuple[float, ...] = hp(
        (20, 30, 60), "PSNRs in dB, for each of which the share of recovered images is reported"
    )
    grant: Literal["none", "labels"] = hp("none", "oracle fact handed to the attack and named in every row")
    paper: bool = hp(False, "the authors' hyperparameters instead of ours")
    force: bool = hp(False, "a new run even if this very run is finished")
    sweep: tuple[str, ...] = hp(
        (), "FLAG=V1,V2,... for a run with each value, then one table; several for each combination"
    )


@hyperparameters
class Grad(Common):
    """Flags of the gradient mode."""

    batch_size: int = hp(1, "number of images behind a gradient", ge=1)


@hyperparameters
class Fed(Common):
    """Flags of the federated mode."""

    client_images: int | None = hp(1, "number of images of a client; 0: the private split, shared out evenly", ge=0)
    batch_size: int | None = hp(None, "size of a client's minibatch; default: all its images", ge=1)
    local_epochs: int = hp(1, "passes of a client over its images in a round", ge=1)
    local_lr: float = hp(0.01, "learning rate of the clients", gt=0)
    lr_decay: float = hp(1.0, "factor on the learning rate from one round to the next", gt=0)
    lr_schedule: Literal["constant", "cosine", "step"] = hp(
        "constant", "learning rate within a round: constant, half a cosine, or x 0.1 at 1/2 and 3/4 of the local steps"
    )
    client_optimizer: Literal["sgd", "adam"] = hp("sgd", "optimiser of the clients")
    momentum: float = hp(0.0, "momentum of the clients' SGD", ge=0, lt=1)
    weight_decay: float = hp(0.0, "weight decay of the clients' optimiser", ge=0)
    clients: int = hp(10, "number of clients in the federation", ge=1)
    clients_per_round: int | None = hp(None, "number of clients that train in a round; default: all", ge=1)
    rounds: int | None = hp(None, "rounds of FedAvg; default: one for each trial", ge=1)
    attack_rounds: tuple[int, ...] = hp(
        (), "rounds, from 1, in which the same clients are attacked; default: all, and the clients attacked least"
    )
    accumulate: bool = hp(False, "one reconstruction from all updates of a client up to each of the `attack_rounds`")
    engine: Literal["own", "flower"] = hp(
        "own", "federation: this suite's own loop, or Flower's simulation (needs flwr and ray)"
    )
    partition: Literal["iid", "dirichlet", "classes"] = hp("iid", "distribution of the private images over clients")
    beta: float | None = hp(None, "concentration of the dirichlet partition; default: 0.5", gt=0)
    classes_per_client: int | None = hp(None, "classes of a client in the classes partition; default: 2", ge=1)


# these cannot change a number, so they are not part of a run's key
NOT_IN_KEY = frozenset({"out", "jobs", "backend", "force", "sweep", "base_datadir", "weights", "device", "paper"})
