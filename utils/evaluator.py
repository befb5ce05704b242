"""The only code that holds truth and reconstruction together.

Both sides lie in [0, 1], every metric is per image with data range 1, and reconstructions are paired with truths one
to one by the Hungarian algorithm on MSE. A truth no reconstruction is paired with counts as missed: it is scored with
the mean public image, which is what an attacker would show who found nothing, and never as a success.
"""

import contextlib
import io
import math
import pickle
import statistics
import threading
import urllib.request
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from federated.wire import Batch, Reconstruction, Task

SUCCESS_PSNR = 20.0  # dB; recognisable at 32x32
PSNR_CAP = 100.0  # dB; an exact copy would be infinite


def mse(truth: Tensor, other: Tensor) -> float:
    """Mean squared error of one image (C, H, W)."""
    return (truth.double() - other.double()).square().mean().item()


def psnr(truth: Tensor, other: Tensor) -> float:
    """Peak signal-to-noise ratio of one image (C, H, W) in dB, data range 1, capped at 100."""
    error = mse(truth, other)
    return PSNR_CAP if error == 0 else min(PSNR_CAP, -10 * math.log10(error))


def ssim(truth: Tensor, other: Tensor) -> float | None:
    """Structural similarity (Wang et al. 2004) of one image (C, H, W): Gaussian window, sigma 1.5, 11 pixels wide.

    None for images smaller than the window.
    """
    from skimage.metrics import structural_similarity

    if min(truth.shape[1:]) < 11:
        return None
    a, b = (t.double().numpy() for t in (truth, other))
    return float(
        structural_similarity(
            a, b, data_range=1.0, channel_axis=0, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
        )
    )


class Lpips:
    """LPIPS with the AlexNet backbone (Zhang et al., CVPR 2018), or None with the reason said once.

    The `lpips` package ships the linear heads only. The backbone is read from torch's hub cache, or fetched there
    when the machine has a network; a random backbone is never used in its place. Images under 31 pixels vanish in its
    poolings and score None as well.
    """

    SMALLEST = 31
    BACKBONE = "alexnet-owt-7be5be79.pth"
    URL = f"https://download.pytorch.org/models/{BACKBONE}"
    PATIENCE = 5.0  # seconds to find out whether there is a network

    def __init__(self, say: Callable[[str], None]) -> None:
        self.net: Any = None
        self.say, self.silent = say, False
        cached = Path(torch.hub.get_dir()) / "checkpoints" / self.BACKBONE
        if not cached.exists() and not self._reachable():
            say(f"LPIPS is left out (null): its backbone {self.BACKBONE} is not in {cached.parent}, and no network")
            return
        try:
            import lpips

            with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # lpips calls torchvision by an old name
                self.net = lpips.LPIPS(net="alex", verbose=False).eval()
        except (ImportError, OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as problem:
            say(f"LPIPS is left out (null): {' '.join(str(problem).split())[:160]}")

    def _reachable(self) -> bool:
        """Whether the backbone's server answers; name resolution can hang, so the question has its own thread."""
        answer: list[bool] = []

        def ask() -> None:
            with contextlib.suppress(OSError):
                request = urllib.request.Request(self.URL, method="HEAD")
                with urllib.request.urlopen(request, timeout=self.PATIENCE):
                    answer.append(True)

        thread = threading.Thread(target=ask, daemon=True)
        thread.start()
        thread.join(self.PATIENCE)
        return bool(answer)

    @torch.no_grad()
    def __call__(self, truth: Tensor, other: Tensor) -> float | None:
        if self.net is None:
            return None
        if min(truth.shape[1:]) < self.SMALLEST:
            if not self.silent:
                self.say(f"LPIPS is left out (null): it takes images of {self.SMALLEST} pixels or more")
                self.silent = True
            return None
        pair = [t.float().expand(3, -1, -1)[None] for t in (truth, other)]  # (1, 3, H, W)
        return self.net(*pair, normalize=True).item()


def match(truth: Tensor, images: Tensor) -> list[int | None]:
    """For each truth (N, C, H, W) the index of its reconstruction (M, C, H, W), one to one, least total MSE."""
    from scipy.optimize import linear_sum_assignment

    if not len(images):
        return [None] * len(truth)
    a, b = truth.double().flatten(1), images.double().flatten(1)
    cost = torch.stack([(row - b).square().mean(1) for row in a])  # (N, M)
    pairs: list[int | None] = [None] * len(truth)
    for i, j in zip(*linear_sum_assignment(cost.numpy()), strict=True):
        pairs[i] = int(j)
    return pairs


def correlations(truth: Tensor, sources: Tensor) -> tuple[list[float], Tensor, list[int | None]]:
    """For each truth (N, C, H, W): |corr| with its source (M, C, H, W), one to one, that source under the scale, sign
    and offset that suit it best, and which it is. Oracles: truth has chosen all three. 0 and a flat image without one.
    """
    from scipy.optimize import linear_sum_assignment

    a, b = (t.double().flatten(1) - t.double().flatten(1).mean(1, keepdim=True) for t in (truth, sources))
    norms = a.norm(dim=1)[:, None] * b.norm(dim=1)
    alike = ((a @ b.T).abs() / norms.clamp(min=1e-300)).nan_to_num().clamp(max=1)  # (N, M)
    corr, pairs = [0.0] * len(a), [None] * len(a)
    fitted = truth.double().mean((1, 2, 3), keepdim=True).expand_as(truth).clone()
    for i, j in zip(*linear_sum_assignment(-alike.numpy()), strict=True):
        corr[i], pairs[i] = alike[i, j].item(), int(j)
        fitted[i] += ((a[i] @ b[j]) / b[j].square().sum().clamp(min=1e-300) * b[j]).view_as(fitted[i])
    return corr, fitted, pairs


class Evaluator:
    """Scores reconstructions against truth, beside what knowing no pixel would have scored.

    Two baselines, both from the public split: its mean image, and its mean image of the victim's class (the worth of
    a leaked label alone).
    """

    def __init__(
        self,
        mean_image: Tensor,
        class_mean: Callable[[int], Tensor | None],
        lpips: Callable[[Tensor, Tensor], float | None],
        task: Task | None = None,
    ) -> None:
        self.task = task  # in whose model units sources are, if not in pixels
        self.mean_image = mean_image  # (C, H, W)
        self.class_mean = class_mean  # None for a class without public images, which is worth no more than no label
        self.lpips = lpips

    def score(
        self, truth: Batch, rec: Reconstruction, beside: Reconstruction | None = None, floor: Tensor | None = None
    ) -> tuple[list[dict[str, Any]], Tensor]:
        """One row per true image, and the reconstructions in the order of the truths (N, C, H, W).

        `beside` is what a companion made of the same update; `floor` (N, C, H, W), an oracle, the best of what was
        searched.
        """
        finite = torch.isfinite(rec.images).flatten(1).all(1)
        usable = finite.nonzero().flatten()
        images = rec.images[usable].clamp(0, 1)
        pairs = match(truth.images, images)
        right = _labels_right(truth.labels, rec.labels, [None if j is None else int(usable[j]) for j in pairs])
        rows, shown = [], []
        for i, (x, label, j) in enumerate(zip(truth.images, truth.labels.tolist(), pairs, strict=True)):
            guess = self.mean_image if j is None else images[j]
            shown.append(guess)
            source = None if j is None else int(usable[j])
            of_class = self.class_mean(label)
            row = {
                "image": i,
                "match": source,
                "psnr": psnr(x, guess),
                "ssim": ssim(x, guess),
                "lpips": self.lpips(x, guess),
                "mse": mse(x, guess),
                "label_true": label,
                "label_pred": None if rec.labels is None or source is None else int(rec.labels[source]),
                "label_ok": right[i],
                "baseline_psnr": psnr(x, self.mean_image),
                "class_baseline_psnr": psnr(x, self.mean_image if of_class is None else of_class),
            }
            rows.append(row)
        if rec.sources is not None:
            there, back = (self.task.to_model, self.task.to_pixels) if self.task else (torch.nn.Identity(),) * 2
            corr, fitted, pairs = correlations(there(truth.images.double()), rec.sources)
            for row, c, x, best, j in zip(rows, corr, truth.images, back(fitted), pairs, strict=True):
                row |= {"oracle_corr": c, "oracle_affine_psnr": psnr(x, best)}
                row["sign_ok"] = j is not None and _upright(x, rec.images[j])
        if beside is not None:
            for row, other in zip(rows, self.score(truth, beside)[0], strict=True):
                row["companion_psnr"] = other["psnr"]
        if floor is not None:
            for row, x, best in zip(rows, truth.images, floor, strict=True):
                row["oracle_floor_psnr"] = psnr(x, best)
        return rows, torch.stack(shown)

    def control(self, unrelated: Tensor, rec: Reconstruction) -> float:
        """Share of images (N, C, H, W) nobody has sent that the same reconstructions would be a success for."""
        images = rec.images[torch.isfinite(rec.images).flatten(1).all(1)].clamp(0, 1)
        pairs = match(unrelated, images)
        hits = [j is not None and psnr(x, images[j]) >= SUCCESS_PSNR for x, j in zip(unrelated, pairs, strict=True)]
        return sum(hits) / len(hits)


def _upright(truth: Tensor, image: Tensor) -> bool:
    """Whether an image (C, H, W) made of the truth's source is it, and not its negative."""
    a, b = (t.double() - t.double().mean() for t in (truth, image))
    return (a * b).sum().item() > 0


def _labels_right(truth: Tensor, predicted: Tensor | None, pairs: Sequence[int | None]) -> list[bool | None]:
    """Which true labels the attack named, as a multiset: a label predicted k times answers for k images at the most.

    Images whose own reconstruction carries the right label are served first.
    """
    if predicted is None:
        return [None] * len(truth)
    stock = Counter(predicted.tolist())
    right: list[bool | None] = [False] * len(truth)
    own = [j is not None and int(predicted[j]) == int(y) for y, j in zip(truth, pairs, strict=True)]
    for i in sorted(range(len(truth)), key=lambda i: not own[i]):
        label = int(truth[i])
        if stock[label] > 0:
            stock[label] -= 1
            right[i] = True
    return right


def succeeded(row: dict[str, Any]) -> bool:
    """A true image counts as recovered when its own reconstruction reaches 20 dB."""
    return row["match"] is not None and row["psnr"] >= SUCCESS_PSNR


def gain_over(rows: Sequence[dict[str, Any]], key: str) -> dict[str, float] | None:
    """PSNR minus another one, in dB, paired by image: mean and its 95% interval by Student's t; None for fewer than two
    updates. Over "class_baseline_psnr", the mean public image of the victim's class, it is what pixels gave away beyond
    the label. Images of one update, or of one client over the rounds, count as one: they are not independent."""
    from scipy.special import stdtrit

    apart: dict[Any, list[float]] = {}
    for number, r in enumerate(rows):
        apart.setdefault(r.get("client", r.get("trial", f"row {number}")), []).append(r["psnr"] - r[key])
    gains = [statistics.fmean(own) for own in apart.values()]
    if len(gains) < 2:
        return None
    mean = statistics.fmean(gains)
    half = float(stdtrit(len(gains) - 1, 0.975)) * statistics.stdev(gains) / math.sqrt(len(gains))
    return {"mean": mean, "low": mean - half, "high": mean + half}


def summarise(rows: Sequence[dict[str, Any]], trials: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The numbers of summary.json from the rows of all images and the records of all trials."""

    def spread(key: str) -> dict[str, float] | None:
        values = [r[key] for r in rows]
        if None in values:  # never a mean over some of the images
            return None
        return {
            "mean": statistics.fmean(values),
            "std": statistics.pstdev(values),
            "median": statistics.median(values),
        }

    def mean(entries: Sequence[dict[str, Any]], key: str) -> dict[str, float]:
        """Of an entry that only some attacks have."""
        values = [e[key] for e in entries if e.get(key) is not None]
        return {key: statistics.fmean(values)} if values else {}

    recovered = [r["psnr"] for r in rows if succeeded(r)]
    named = [r["label_ok"] for r in rows if r["label_ok"] is not None]
    return {
        "images": len(rows),
        "psnr": spread("psnr"),
        "ssim": spread("ssim"),
        "lpips": spread("lpips"),
        "label_accuracy": float(np.mean(named)) if named else None,
        "success_rate": float(np.mean([succeeded(r) for r in rows])),
        "baseline_psnr": statistics.fmean(r["baseline_psnr"] for r in rows),
        "class_baseline_psnr": statistics.fmean(r["class_baseline_psnr"] for r in rows),
        "over_class_mean": gain_over(rows, "class_baseline_psnr"),
        "seconds": sum(t["seconds"] for t in trials),
        "missed": sum(r["match"] is None for r in rows),
        "status": dict(sorted(Counter(t["status"] for t in trials).items())),
        "recovered_psnr": statistics.median(recovered) if recovered else None,
        **mean(rows, "ceiling"),
        **mean(trials, "candidates"),
        **mean(trials, "control"),
        **mean(rows, "oracle_corr"),
        **mean(rows, "oracle_affine_psnr"),
        **mean(rows, "oracle_floor_psnr"),
        **mean(rows, "companion_psnr"),
        **({"over_companion": gain_over(rows, "companion_psnr")} if "companion_psnr" in rows[0] else {}),
        **mean(rows, "sign_ok"),
    }
