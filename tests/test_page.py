"""The HTML page: every run on it with the numbers of its summary, nothing loaded, nothing private, nothing executed."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from attacks.base import ATTACKS
from evaluation.summary import summarize
from evaluation.verdict import outcome
from runner.flags import Fed, Grad
from runner.store import SEALED
from utils.files import seal, write_json

FLAGS = {"grad": Grad, "fed": Fed}


def fabricate(
    folder: Path,
    attack: str = "ig_single",
    mode: str = "grad",
    psnr: float = 25.0,
    images: int = 4,
    size: int = 8,
    config: dict[str, Any] | None = None,
    summary: dict[str, Any] | None = None,
    hyperparameters: dict[str, Any] | None = None,
    file: str = "",
    points: int = 20,
    **flags: Any,
) -> Path:
    """The folder of a finished run whose reconstructions have about this PSNR and whose null has 12 dB."""
    generator = torch.Generator().manual_seed(len(str(folder)))
    coarse = torch.rand(images, 3, 4, 4, generator=generator)
    above = torch.nn.functional.interpolate(coarse, size=(size, size), mode="bicubic").clamp(0, 1)
    scores = [psnr + 6 * ((i % 5) - 2) / 2 for i in range(images)]
    noise = torch.randn(above.shape, generator=generator)
    below = (above + noise * torch.tensor([10 ** (-s / 20) for s in scores]).view(-1, 1, 1, 1)).clamp(0, 1)
    rows = [
        {
            "trial": i,
            "image": 0,
            "match": 0 if score > 8 else None,
            "psnr": score,
            "ssim": 0.5,
            "lpips": None,
            "label_true": i,
            "label_ok": True,
            "baseline_psnr": 11.0,
            "class_baseline_psnr": 12.5,
            "null_psnr": 12.0 + i % 3,
            "identified": score > 18,
            "candidates_n": 256,
            "candidates_class": True,
            "seconds": 1.0,
            **({"round": i, "client": i} if mode == "fed" else {}),
            **({"file": file} if file else {}),
        }
        for i, score in enumerate(scores)
    ]
    trials = [
        {
            "trial": i,
            "seconds": 1.0,
            "status": "solved" if row["psnr"] >= 20 else "stuck",
            "trace": [[k, 2.0 * 0.8**k + 0.001 * (i + 1)] for k in range(points)],
            "objective": {"answer": 0.001, "truth": 0.0005, "baseline": 0.9},
            "null": {"psnr": [12.0, 13.0, 14.0], "recovered": 0.0, "labels": True},
        }
        for i, row in enumerate(rows)
    ]
    chosen = FLAGS[mode](**flags)
    hyper = dataclasses.asdict(ATTACKS.find(attack)()) | (hyperparameters or {})
    knows = ["number of images"] + (["training recipe"] if mode == "fed" else [])
    found = {
        "mode": mode,
        "attack": attack,
        "dataset": chosen.dataset,
        "model": chosen.model,
        **summarize(rows, trials),
        "oracle": [],
        "knows": knows,
        "threat": ATTACKS.find(attack).threat,
        "notes": [],
        **(summary or {}),
    }
    found["verdict"] = outcome(found)
    plain = {name: value for name, value in dataclasses.asdict(chosen).items() if name not in ("out", "base_datadir")}
    whole = {"attack": attack, "mode": mode, "hyperparameters": hyper, "flags": plain, "commit": "0123456789ab"}
    folder.mkdir(parents=True)
    save_file({"truth": above, "reconstruction": below}, folder / "reconstructions.safetensors")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "trials.jsonl").write_text("".join(json.dumps(trial) + "\n" for trial in trials))
    if mode == "fed":
        lines = [{"round": i, "loss": 2.0 - 0.1 * i, "accuracy": 0.1 + 0.05 * i} for i in range(images)]
        (folder / "rounds.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_json(folder / "summary.json", found)
    write_json(folder / "config.json", whole | (config or {}))
    seal(folder, SEALED, "done")
    return folder
