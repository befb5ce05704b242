"""How far from this machine's limit: FLOPs of a matching gradient, counted, over its time and the rate of a matmul.

`useful` counts what plain convolutions would take, once each, for the loss, its gradient and the slope of the match;
`done` what was really multiplied. Useful work can go over the limit, as Winograd's convolutions multiply less.
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
from attacks.common import cosine_distance
from experiments.bench.speed import machine, write
from models.meta import MetaModel
from utils.cli import ROOT, hp, settings
from utils.memory import keep_pages
from utils.report import number
from utils.run import page


@settings
class Flags:
    """Achieved fraction of the machine's matmul rate."""

    model: tuple[str, ...] = hp(("convnet64", "resnet18"), "networks")
    batch_size: tuple[int, ...] = hp((1, 8), "images behind a gradient")
    image_size: int = hp(32, "side in pixels", least=9)
    threads: int = hp(0, "0: torch's default", least=0)
    repeats: int = hp(5, "timings of each; the middle one counts", least=1)
    matmul: int = hp(1536, "side of the matrices whose product is the limit", least=16)
    out: Path = hp(ROOT / "results" / "bench", "where limit.md and limit.csv go")


class Counter(TorchDispatchMode):
    """FLOPs of all that runs inside."""

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
    """Forward, both gradients, and the four products of their derivative: 7 for each product of a forward pass."""
    with Counter() as counter, torch.no_grad():
        net(x)
    return 7 * counter.total


def main(flags: Flags) -> None:
    keep_pages()
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
                meta = MetaModel(net)
                target = meta.gradient(1 - x, y, create_graph=False)
                if how != "plain":
                    meta.hasten(x)
                    meta.halve(how.endswith("bfloat16"))
                    target = meta.laid_out(target)
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
    told = ", ".join(f"{str(k).removeprefix('torch.')} {v / 1e9:.0f} GFLOP/s" for k, v in limits.items())
    notes = [f"{machine()}, {torch.get_num_threads()} threads", f"limit, a {flags.matmul}^2 matmul: {told}"]
    write(flags.out, "limit", header, rows, notes)


if __name__ == "__main__":
    page(Flags, main, __doc__)
