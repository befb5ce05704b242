"""The tables of one run and of several, and the sentence that sums a run up.

Everything is read from summaries, as in summary.json. The words here are those of the README and of `--help`.
"""

import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from evaluation.summary import RECOVERED_PSNR
from evaluation.verdict import identifies, outcome

Summary = Mapping[str, Any]
Gain = Mapping[str, Any]  # mean, and the limits low and high of its 95% interval

WIDTH = 80  # characters of a terminal
ENOUGH_FOR_QUANTILES = 5  # images
STATUSES = ("solved", "ambiguous", "stuck", "diverged")
RECOVERED = f"recovered (PSNR >= {RECOVERED_PSNR:g} dB)"


def number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def mean_std(values: Mapping[str, Any] | None, digits: int = 2) -> str:
    """mean ± standard deviation of an entry of a summary, with the interval of the mean if it has one."""
    if values is None:
        return "-"
    text = f"{values['mean']:.{digits}f} ± {values['std']:.{digits}f}"
    known = values.get("low") is not None
    return f"{text} [{values['low']:.{digits}f}, {values['high']:.{digits}f}]" if known else text


def interval(gain: Gain | None) -> str:
    """mean [low, high] of a paired difference, with its 95% interval; the mean alone for a single unit."""
    if gain is None:
        return "-"
    mean, low, high = (None if gain[key] is None else round(gain[key], 2) + 0.0 for key in ("mean", "low", "high"))
    return f"{mean:+.2f}" if low is None else f"{mean:+.2f} [{low:+.2f}, {high:+.2f}]"


def share(found: Mapping[str, Any] | None) -> str:
    """share [low, high], with its 95% interval."""
    return "-" if found is None else f"{found['share']:.2f} [{found['low']:.2f}, {found['high']:.2f}]"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns also line up in a terminal."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.ljust(w) for cell, w in zip(cells, widths, strict=True)) + " |"

    return "\n".join([line(header), "|" + "|".join("-" * (w + 2) for w in widths) + "|", *map(line, rows)])


def sort_key(value: str) -> tuple[float, str]:
    """Orders values as they stand in a table: numbers by size, before words."""
    try:
        return float(value), ""
    except ValueError:
        return math.inf, value


@dataclass(frozen=True)
class Entry:
    """One row of the table of a run, and one column of a comparison.

    key: the entry of summary.json that it shows. Without `always` it is left out of tables of runs without this entry.
    compared: whether it is a column of comparisons too.
    """

    label: str
    key: str
    show: Callable[[Summary], str]
    help: str
    always: bool = False
    compared: bool = True


def counted(records: str, units: str = "") -> Entry:
    """The number of what was scored: `records`, such as images. `units`: what their units are, for the help."""
    return Entry(
        records,
        "images",
        lambda s: f"{s['images']} ({plural(s['units'], s['unit'])})" if s.get("units") else str(s["images"]),
        f"number of true {records} that were scored, and of independent units for the intervals{units}",
        always=True,
    )


ENTRIES = (
    counted("images", ": photographs, clients or trials"),
    Entry(
        "PSNR (dB)",
        "psnr",
        lambda s: mean_std(s["psnr"]),
        "peak signal-to-noise ratio of each reconstruction, capped at 100 dB, which an exact copy has",
        always=True,
    ),
    Entry(
        "PSNR, median (dB)",
        "psnr",
        lambda s: number(s["psnr"]["median"]),
        "PSNR that half of the images reach",
        compared=False,
    ),
    Entry(
        "5, 25, 75, 95% below (dB)",
        "psnr_quantiles",
        lambda s: ", ".join(number(s["psnr_quantiles"][p], 1) for p in ("5", "25", "75", "95")),
        "quantiles of PSNR over images; left out for fewer than five images",
        compared=False,
    ),
    Entry(
        "most exposed image (dB)",
        "most_exposed",
        lambda s: "{psnr:.2f} (trial {trial}, image {image})".format(**s["most_exposed"]),
        "PSNR of the image that was reconstructed best: the worst case for a victim",
        compared=False,
    ),
    Entry(
        "SSIM",
        "ssim",
        lambda s: mean_std(s["ssim"], 3),
        "structural similarity, 1 for an exact copy; left out for images under 11 pixels",
    ),
    Entry(
        "LPIPS",
        "lpips",
        lambda s: mean_std(s["lpips"], 3),
        "learned perceptual distance, 0 for an exact copy; left out without AlexNet's weights",
    ),
    Entry(
        RECOVERED,
        "success_rate",
        lambda s: (
            share(s["recovered"][key])
            if (key := f"{RECOVERED_PSNR:g}") in s.get("recovered", {})
            else number(s["success_rate"])
        ),
        f"share of images whose own reconstruction reaches {RECOVERED_PSNR:g} dB",
        always=True,
    ),
    Entry(
        "at other thresholds",
        "recovered",
        lambda s: ", ".join(f"{number(s['recovered'][t]['share'])} ({t} dB)" for t in _others(s)),
        "share of images whose own reconstruction reaches other PSNRs (`thresholds`)",
        compared=False,
    ),
    Entry(
        "identified",
        "identified",
        lambda s: share(s["identified"]) + (f", chance {s['identified']['chance']:.3f}"),
        "share of images that are nearer to their reconstruction than all candidates of their class, which nobody sent",
    ),
    Entry(
        "certified",
        "certified",
        lambda s: f"{share(s['certified'])}, {s['certified']['wrong']} wrong",
        "share of images whose reconstruction the update proves to be one image alone, and the number of wrong proofs",
    ),
    Entry(
        "recoverable (oracle)",
        "ceiling",
        lambda s: number(s["ceiling"], 3),
        "share of images that the attack can tell apart exactly; more may be recovered where others are similar",
    ),
    Entry(
        "median PSNR of recovered (dB)",
        "recovered_psnr",
        lambda s: number(s["recovered_psnr"], 1),
        "median over the recovered images alone",
    ),
    Entry(
        "labels right",
        "label_accuracy",
        lambda s: share(s["labels"]) if s.get("labels") else number(s["label_accuracy"]),
        "share of true labels that the attack predicted; left out if it predicts none",
    ),
    Entry(
        "null (dB)",
        "null",
        lambda s: (
            f"{number(s['null']['psnr']['mean'])}, 95% below {number(s['null']['psnr']['p95'])}, "
            f"{number(s['null']['recovered'])} recovered"
        ),
        "PSNR of the same reconstructions for other images of the same labels, paired by the same rule, and the share "
        "of these images that would count as recovered",
        compared=False,
    ),
    Entry(
        "above null (dB)",
        "over_null",
        lambda s: interval(s["over_null"]),
        "PSNR minus the null, image by image: mean [95% interval]",
    ),
    Entry(
        "mean image (dB)",
        "baseline_psnr",
        lambda s: number(s["baseline_psnr"]),
        "baseline: PSNR of the mean public image, from someone who never looked at the update",
        always=True,
    ),
    Entry(
        "class mean (dB)",
        "class_baseline_psnr",
        lambda s: number(s["class_baseline_psnr"]),
        "baseline: PSNR of the mean public images of the true classes, paired as reconstructions are: what the labels "
        "are worth",
        always=True,
    ),
    Entry(
        "above class mean (dB)",
        "over_class_mean",
        lambda s: interval(s["over_class_mean"]),
        "PSNR minus that of the class mean, image by image: mean [95% interval]",
    ),
    Entry(
        "comparison attack (dB)",
        "companion_psnr",
        lambda s: number(s["companion_psnr"]),
        "PSNR of another attack on the same updates",
    ),
    Entry(
        "oracle projection (dB)",
        "oracle_floor_psnr",
        lambda s: number(s["oracle_floor_psnr"]),
        "oracle: PSNR of the best images that the attack's generator can make, found with the true images",
    ),
    Entry(
        "correlation (oracle)",
        "oracle_corr",
        lambda s: number(s["oracle_corr"], 3),
        "oracle: absolute correlation of each unmixed source with its image, paired by the true images",
    ),
    Entry(
        "PSNR, rescaled (oracle, dB)",
        "oracle_affine_psnr",
        lambda s: number(s["oracle_affine_psnr"], 1),
        "oracle: PSNR of each source with the sign, scale and offset that the true image chooses",
    ),
    Entry(
        "sign right",
        "sign_ok",
        lambda s: number(s["sign_ok"], 3),
        "share of sources shown as an image rather than as its negative",
    ),
    Entry(
        "candidates",
        "candidates",
        lambda s: number(s["candidates"], 1),
        "number of reconstructions that the attack returns for an update",
    ),
    Entry(
        "false-positive rate",
        "control",
        lambda s: number(s["control"], 3),
        f"share of unrelated images, held by no client, that these reconstructions reach {RECOVERED_PSNR:g} dB for",
    ),
    Entry(
        "missed",
        "missed",
        lambda s: str(s["missed"]),
        "number of images without a reconstruction, scored with the mean public image",
        compared=False,
    ),
    Entry(
        "objective: answer, truth",
        "objective",
        lambda s: ", ".join("-" if (v := s["objective"][k]) is None else f"{v:.1e}" for k in ("answer", "truth")),
        "distance between the observed update and that of the answer, and of the true images (oracle), as the attack "
        "measures it: 0 for an exact match; medians over updates",
    ),
    Entry(
        "status",
        "status",
        lambda s: ", ".join(f"{s['status'][word]} {word}" for word in STATUSES if word in s["status"]),
        "number of updates that are solved (all images recovered), ambiguous (the answer explains the update as well "
        "as the true images do), stuck (the true images explain it better: the attack failed) or diverged (no usable "
        "result)",
        always=True,
    ),
    Entry(
        "epsilon",
        "guarantee",
        lambda s: (
            "{epsilon:.3g} (delta {delta:g}, per {unit})".format(**s["guarantee"])
            if s["guarantee"]["unit"]
            else "no formal guarantee"
        ),
        "differential privacy of one update, and the unit that it protects",
    ),
    Entry(
        "identified at most",
        "identified_bound",
        lambda s: number(s["identified_bound"], 3),
        "bound by differential privacy on the share of victims that any attack identifies among as many candidates",
    ),
    Entry(
        "PSNR at most (dB)",
        "van_trees",
        lambda s: number(s["van_trees"]["psnr"]) + (" (exceeded)" if s["van_trees"]["exceeded"] else ""),
        "PSNR of the least mean squared error behind this noise if images were Gaussian, by van Trees' inequality; "
        "exceeded where an attack knows more of images",
    ),
    Entry(
        "test accuracy",
        "accuracy",
        lambda s: number(s["accuracy"], 3),
        "accuracy of the trained model on held-out images, after the last round",
    ),
    Entry(
        "training loss",
        "training_loss",
        lambda s: number(s["training_loss"], 3),
        "mean training loss of the clients that trained, over all rounds",
    ),
    Entry(
        "seconds",
        "seconds",
        lambda s: number(s["seconds"], 1),
        "computing time of the attack, summed over updates, without set-up",
        always=True,
    ),
    Entry(
        "granted (oracle)",
        "oracle",
        lambda s: ", ".join(s["oracle"]),
        "facts about the victims that the attacker was given",
    ),
)

METRIC_HELP: dict[str, str] = {
    **{entry.label: f"{entry.help} (`{entry.key}` in summary.json)" for entry in ENTRIES},
    "±": "standard deviation over images",
    "[low, high]": "95% interval over independent units (`units` and `unit` in summary.json)",
    "oracle": "a number that needs the true images, so that no attacker could compute it, or a fact about them",
}


@dataclass(frozen=True)
class View:
    """How the runs of a domain are shown.

    verdict: a summary as one sentence. picture: the file with true examples beside their reconstructions, which `draw`
    writes. score: the entry of a summary that plots show, with the name of its axis and that of its baseline, which is
    the entry "baseline_" + score.
    """

    entries: tuple[Entry, ...]
    verdict: Callable[[Summary], str]
    picture: str
    draw: Callable[..., None]
    score: str = "psnr"
    score_label: str = "PSNR (dB), mean ± std over images"
    baseline_label: str = "mean public image"


VIEWS: dict[str, View] = {}  # by Domain.name, filled by the modules of this folder


def entries_of(summaries: Sequence[Summary], compared: bool = False) -> list[Entry]:
    """The entries that some of these runs have a value for, and those that every table shows."""
    domains = dict.fromkeys(s.get("domain", "image") for s in summaries)
    entries = [e for domain in domains for e in VIEWS[domain].entries]
    shown = [e for e in dict.fromkeys(entries) if e.always or any(_has(s, e) for s in summaries)]
    return [e for e in shown if e.compared] if compared else shown


def cell(summary: Summary, entry: Entry) -> str:
    return entry.show(summary) if _has(summary, entry) else "-"


def _has(summary: Summary, entry: Entry) -> bool:
    if entry.key == "missed":  # worth a row only if there are any
        return bool(summary.get("missed"))
    if entry.key == "psnr_quantiles" and summary["images"] < ENOUGH_FOR_QUANTILES:
        return False
    if entry.key == "recovered":
        return bool(_others(summary))
    if entry.key == "recovered_psnr":  # the median of everything says the same where attacks are not all or nothing
        return summary.get("recovered_psnr") is not None and "ceiling" in summary
    return summary.get(entry.key) not in (None, [])


def _others(summary: Summary) -> list[str]:
    """The thresholds other than that of `success_rate`."""
    return [t for t in summary.get("recovered") or {} if t != f"{RECOVERED_PSNR:g}"]


def one_run(summary: Summary) -> str:
    """The text at the end of a run: what ran, remarks on the data, a table that fits 80 columns, and one sentence."""
    title = f"{summary['attack']} ({summary['mode']}) on {summary['dataset']}, model {summary['model']}"
    remarks = (*attacker(summary), *summary.get("notes", ()))
    head = "\n".join([title, *(textwrap.fill(remark, WIDTH) for remark in remarks)])
    shown = entries_of([summary])
    rows = [[entry.label, cell(summary, entry)] for entry in shown]
    sentence = textwrap.fill(verdict(summary), WIDTH, break_on_hyphens=False)
    return f"{head}\n{table(['metric', 'value ± SD over images [95% interval]'], rows)}\n{sentence}"


def attacker(summary: Summary) -> list[str]:
    """What the attacker was assumed to do and to know, in one sentence; no sentence where the summary does not say."""
    if "knows" not in summary:
        return []
    return [f"attacker: {summary['threat']}, with model, update{''.join(f', {fact}' for fact in summary['knows'])}"]


def verdict(summary: Summary) -> str:
    """One sentence: whether the update leaks, and the numbers that say so."""
    return VIEWS[summary.get("domain", "image")].verdict(summary)


def image_verdict(summary: Summary) -> str:
    images = summary["images"]
    if not images:
        return "Nothing was scored, because the true images are unknown."
    found = outcome(summary)
    count = round(summary["success_rate"] * images)
    parts = [f"{count} of {plural(images, 'image')} recovered (PSNR >= {RECOVERED_PSNR:g} dB)"]
    identified = summary.get("identified")
    if identified is not None:
        others = "its class" if identified["by_class"] else "all classes"
        parts.append(identified_in_words(summary, f" of {others}"))
    compared = [
        f"PSNR {interval(gain)} dB over {baseline}"
        for gain, baseline in (
            (summary.get("over_null"), "the null"),
            (summary.get("over_class_mean"), "the means of the true classes"),
        )
        if gain is not None
    ]
    if summary["attack"] == "baseline":
        start = "No attack ran, and every image was scored with a mean public image"
    elif found is None:
        start = "Nothing to compare with: there are no public images and no candidates"
    else:
        start = found[0].upper() + found[1:]
        if found == "too few updates to tell":
            start += f" ({plural(summary['units'], summary['unit'])})"
    return f"{start}: {'; '.join([*parts, *compared])}{_comparison_in_words(summary)}{_why_not(summary, found)}."


def identified_in_words(summary: Summary, kind: str = "") -> str:
    """How many victims are identified. kind: which candidates, such as " of its class"."""
    found = summary["identified"]
    hits = round(found["share"] * summary["images"])
    sure = f", p = {found['p_value']:.1g}" if identifies(summary) else ""
    return f"{hits} identified among {found['candidates']} candidates{kind} (chance {found['chance']:.3f}{sure})"


def _why_not(summary: Summary, found: str | None) -> str:
    """Whether the attack failed or the update does not tell, where no leak was found."""
    if found != "no leak found by this attack" or summary.get("objective") is None:
        return ""
    updates, status = sum(summary["status"].values()), summary["status"]
    stuck, ambiguous = status.get("stuck", 0), status.get("ambiguous", 0)
    reasons = []
    if stuck:
        reasons.append(
            f"the attack was stuck in {stuck} of {plural(updates, 'update')}, where the true images explain the "
            "update better than its answer, and another attack may recover them"
        )
    if ambiguous:
        reasons.append(f"the answer explains {ambiguous} of {plural(updates, 'update')} as well as the true images do")
    return "".join(f"; {reason}" for reason in reasons)


def _comparison_in_words(summary: Summary) -> str:
    """How PSNR compares with that of another attack on the same updates; empty without one."""
    gain = summary.get("over_companion")
    if gain is None:
        return ""
    difference = f"{abs(gain['mean']):.2f} dB {'better' if gain['mean'] >= 0 else 'worse'} than"
    compared = f"; {difference} {summary.get('companion', 'another attack')} on the same updates"
    if gain["low"] is None:
        return compared
    decided = "" if gain["low"] > 0 or gain["high"] < 0 else ", which may be chance"
    return f"{compared} {_limits(gain)}{decided}"


def _limits(gain: Gain) -> str:
    return f"(95% interval {gain['low']:+.2f} to {gain['high']:+.2f})"


def plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
