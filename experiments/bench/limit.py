"""Achieved share of this machine's matmul rate: counted FLOPs of a matching gradient over its time.

`useful` counts what plain convolutions need, once each, for the loss, its gradient and the gradient of the distance;
`done` counts what was multiplied. Useful work can exceed the limit, because Winograd's convolutions multiply less.
"""

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import models
from attacks.matching.distances import cosine_distance
from core.hyperparameters import hp, hyperparameters
from core.paths import ROOT
from experiments.bench.speed import machine, write
from models.meta import MetaModel
from report.tables import number
from runner.cli import run_script
from utils.memory import disable_malloc_trim


@hyperparameters
class Flags:
    model: tuple[str, ...] = hp(("convnet64", "resnet18"), "networks")
    batch_size: tuple[int, ...] = hp((1, 8), "numbers of images behind a gradient")
    image_size: int = hp(32, "side in pixels", ge=9)
    threads: int = hp(0, "CPU threads; 0: torch's default", ge=0)
    repeats: int = hp(5, "number of timings, whose median counts", ge=1)
    matmul: int = hp(1536, "side of the matrices whose product sets the limit", ge=16)
    out: Path = hp(ROOT / "results" / "bench", "folder of limit.md and limit.csv")


class Counter(TorchDispatchMode):
    """FLOPs of everything that runs inside the block."""

    def __enter__(self) -> "Counter":
        self.total = 0
        return super().__enter__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            self.total += count(*args, **(kwargs or {}), out_val=out)
        return out


def seconds(work: Callable[[], Any], repeats: int) -> float:
    work()
    found = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def rate(kind: torch.dtype, side: int, repeats: int) -> float:
    """FLOP/s of a square matrix product."""
    a = torch.randn(side, side).to(kind)
    return 2 * side**3 / seconds(lambda: a @ a, repeats)


def useful(net: torch.nn.Module, x: torch.Tensor, y: torch.Tensor) -> int:
    """The forward pass, both gradients, and the four products of their derivative: 7 per product of a forward pass."""
    with Counter() as counter, torch.no_grad():
        net(x)
    return 7 * counter.total


def main(flags: Flags) -> None:
    disable_malloc_trim()
    if flags.threads:
        torch.set_num_threads(flags.threads)
    limits = {k: rate(k, flags.matmul, flags.repeats) for k in (torch.float32, torch.bfloat16)}
    rows = []
    for name in flags.model:
        for batch in flags.batch_size:
            rng = torch.Generator().manual_seed(0)
            net = models.build(name, (3, flags.image_size, flags.image_size), 10, rng=rng).eval()
            x, y = torch.rand(batch, 3, flags.image_size, flags.image_size, generator=rng), torch.arange(batch) % 10
            need = useful(net, x, y)
            for how in ("plain", "winograd", "winograd, bfloat16"):
                dtype = torch.bfloat16 if how.endswith("bfloat16") else None
                meta = MetaModel(net, fast_convs=None if how == "plain" else x, conv_dtype=dtype)
                target = meta.to_memory_format(MetaModel(net).gradient(1 - x, y, create_graph=False))
                guess = x.clone().requires_grad_()

                def step(meta: MetaModel = meta, guess: Any = guess, target: Any = target, y: Any = y) -> Any:
                    return torch.autograd.grad(cosine_distance(meta.gradient(guess, y), target), guess)

                took = seconds(step, flags.repeats)
                with Counter() as counter:
                    step()
                limit = limits[torch.bfloat16 if how.endswith("bfloat16") else torch.float32]
                shares = [number(f / took / limit, 2) for f in (need, counter.total)]
                sizes = [f"{need / 1e9:.1f}", f"{counter.total / 1e9:.1f}", f"{1e3 * took:.1f}"]
                rows.append([name, str(batch), how, *sizes, f"{need / took / 1e9:.0f}", *shares])
    header = ["net", "batch", "convolutions", "useful GFLOP", "done GFLOP", "ms", "useful GFLOP/s"]
    header += ["useful / limit", "done / limit"]
    flags.out.mkdir(parents=True, exist_ok=True)
    rates = ", ".join(f"{str(k).removeprefix('torch.')} {v / 1e9:.0f} GFLOP/s" for k, v in limits.items())
    notes = [f"{machine()}, {torch.get_num_threads()} threads", f"limit, a {flags.matmul}^2 matmul: {rates}"]
    write(flags.out, "limit", header, rows, notes)


if __name__ == "__main__":
    run_script(Flags, main, __doc__)
