"""Independent random streams, one for each purpose."""

import contextlib
import hashlib
from collections.abc import Iterator

import torch


def stream(*path: int | str) -> torch.Generator:
    """A random generator seeded by its path, such as stream(seed, "model") or stream(seed, "client", round, k)."""
    seed = int.from_bytes(hashlib.sha256(repr(path).encode()).digest()[:8], "big") >> 1
    return torch.Generator().manual_seed(seed)


@contextlib.contextmanager
def seeded_global_rng(rng: torch.Generator) -> Iterator[None]:
    """Seed torch's global stream from `rng` inside the block and restore it afterwards.

    Dropout and weight initialisation draw from the global stream; this makes them a function of `rng`.
    """
    with torch.random.fork_rng():
        torch.manual_seed(int(torch.randint(2**62, (), generator=rng)))
        yield
