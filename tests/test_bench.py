"""The benchmarks run and write what they measured. No test depends on a speed."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from experiments.bench import limit, reference
from experiments.bench.limit import Counter
from models import build
from tests.conftest import ROOT


def bench(page: str, out: Path, *flags: str) -> list[dict[str, str]]:
    command = [sys.executable, str(ROOT / "experiments" / "bench" / page), "--out", str(out), *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd="/")
    assert done.returncode == 0, done.stderr
    assert (out / page).with_suffix(".md").read_text().split("\n")[0] in done.stdout
    with (out / page).with_suffix(".csv").open() as file:
        return list(csv.DictReader(file))


def test_speed_compares_engines_on_one_victim(tmp_path: Path) -> None:
    small = ["--turns", "8", "--iterations", "3", "--image-size", "9", "--no-long"]
    rows = bench("speed.py", tmp_path, "--cases", "ig_convnet64_1", *small)
    assert [r["engine"] for r in rows][:2] == ["ours", "reference"]
    for row in rows:
        assert float(row["ms/iteration"]) > 0
        assert float(row["peak MB"]) > 0
        assert row["s/victim"] == row["x ours, whole"] == "-", "runs cut short are not compared as if they were whole"
    turns = json.loads((tmp_path / "speed_ig_convnet64_1.json").read_text())["turns"]
    assert all(len(r["victims"][0]["times"]) == 10 for r in turns.values()), "as many iterations of each"


def test_a_loop_cut_short_shows_its_speed_and_no_picture(tmp_path: Path) -> None:
    ours, loop = bench("speed.py", tmp_path, "--cases", "cpa", "--iterations", "3", "--image-size", "9")
    assert float(ours["final PSNR dB"]) > 0
    assert loop["s/victim"].endswith(" (extrapolated)")
    assert loop["best PSNR dB"] == loop["final PSNR dB"] == loop["s to 20 dB"] == "-"


def test_limit_counts_and_times(tmp_path: Path) -> None:
    small = ["--model", "convnet64", "--batch-size", "1", "--repeats", "1", "--matmul", "64", "--image-size", "24"]
    rows = {r["convolutions"]: r for r in bench("limit.py", tmp_path, *small)}
    plain, fast = (float(rows[how]["done GFLOP"]) for how in ("plain", "winograd"))
    assert fast < 0.6 * plain, "Winograd's convolutions multiply less"
    assert plain >= float(rows["plain"]["useful GFLOP"]), (
        "plain ones do all that is needed, and a gradient nobody reads"
    )
    assert all(float(r["useful GFLOP/s"]) > 0 for r in rows.values())


def test_scale_has_a_row_for_every_point(tmp_path: Path) -> None:
    small = ["--model", "lenet", "--iterations", "3", "--batch-size", "1", "--image-size", "9", "--local-steps", "2"]
    rows = bench("scale.py", tmp_path, *small, "--trials", "1", "--jobs", "1", "--dlg-iterations", "1")
    assert [r["axis"] for r in rows] == ["batch", "image side", "local steps", "trials x jobs"]


def test_flops_are_counted_exactly() -> None:
    a = torch.randn(4, 5)
    with Counter() as counter:
        a @ a.T
    assert counter.total == 2 * 4 * 5 * 4
    net, x = build("fc2", (1, 4, 4), 3), torch.rand(2, 1, 4, 4)
    with Counter() as counter:
        net(x)
    assert limit.useful(net, x, torch.zeros(2, dtype=torch.long)) == 7 * counter.total


@pytest.mark.parametrize("name", ["dlg", "ig_single"])
def test_the_papers_loops_descend(name: str) -> None:
    rng = torch.Generator().manual_seed(0)
    net, truth, label = build("lenet", (1, 12, 12), 3, rng=rng), torch.rand(1, 1, 12, 12), torch.tensor([1])
    loss = torch.nn.functional.cross_entropy(net(truth), label)
    target = torch.autograd.grad(loss, list(net.parameters()))
    torch.manual_seed(0)
    start = 0.1 * torch.randn(1, 1, 12, 12)
    loop = (
        reference.dlg(net, target, start, torch.randn(1, 3))
        if name == "dlg"
        else reference.ig(lambda x: reference.gradient(net, x, label), target, start, 4800)
    )

    def distance(x: torch.Tensor) -> float:
        found = torch.autograd.grad(torch.nn.functional.cross_entropy(net(x), label), list(net.parameters()))
        a, b = (torch.cat([t.flatten() for t in side]) for side in (found, target))
        return 1 - torch.cosine_similarity(a, b, dim=0).item()

    for _, images in zip(range(20), loop, strict=False):
        last = images.clone()
    assert distance(last) < 0.5 * distance(start)


def test_a_case_that_is_not_there_is_one_line() -> None:
    command = [sys.executable, str(ROOT / "experiments" / "bench" / "speed.py"), "--cases", "nothing"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 2
    assert "no case nothing" in done.stderr and done.stderr.count("\n") == 1
