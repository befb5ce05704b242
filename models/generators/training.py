"""The training of a generator to its last step, with checkpoints and a progress bar."""

import math
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from core.protocol import Batch
from models.generators.base import Generator
from models.generators.parts import KINDS, GeneratorConfig
from utils.states import load_state, save_state

SAVE_EVERY = 20.0  # seconds between two checkpoints of a training


class Trained(NamedTuple):
    """A generator in eval mode, the loss of its last step, and the seconds that all steps took."""

    generator: Generator
    last_loss: float  # nan if no step was left to do
    seconds: float


def train(config: GeneratorConfig, public: Batch, classes: int, checkpoint: Path) -> Trained:
    """The generator that `config` describes, trained on public images; continues from the file `checkpoint`.

    Trains on one thread: with more, sums are taken in another order and the result changes.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _train_on_one_thread(config, public, classes, checkpoint)
    finally:
        torch.set_num_threads(threads)


def _train_on_one_thread(config: GeneratorConfig, public: Batch, classes: int, checkpoint: Path) -> Trained:
    rng = torch.Generator().manual_seed(config.seed)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.seed)
        trainer = KINDS[config.kind].trainer(config, public, classes)
    stateful = trainer.stateful()
    done, seconds_before = 0, 0.0
    # training starts from the beginning if there is no checkpoint or it is damaged
    if saved := load_state(checkpoint, checkpoint.parent.name, public.examples.device):
        for name, part in stateful.items():
            part.load_state_dict(saved[name])
        done, seconds_before = saved["done"], saved["seconds"]
        rng.set_state(saved["rng"].cpu())
    started = last_save = time.monotonic()
    loss = math.nan
    pause = 0.2 if sys.stderr.isatty() else 20  # seconds between two lines of progress
    with tqdm(
        total=config.steps, initial=done, desc=f"{config.kind} generator", unit="step", mininterval=pause, ncols=80
    ) as bar:
        for loss in trainer.steps(done, rng):
            done += 1
            bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
            bar.update()
            if time.monotonic() - last_save > SAVE_EVERY and done < config.steps:
                last_save = time.monotonic()
                state: dict[str, Any] = {name: part.state_dict() for name, part in stateful.items()}
                state |= {"done": done, "seconds": seconds_before + last_save - started, "rng": rng.get_state()}
                save_state(checkpoint, checkpoint.parent.name, state)
    trainer.finish()
    return Trained(trainer.generator.eval(), loss, seconds_before + time.monotonic() - started)
