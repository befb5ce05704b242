"""The drawings of the page, from the records of one run and from several runs that differ in one setting."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from evaluation.summary import RECOVERED_PSNR
from report.page.charts import Chart, Point, Series, exact
from report.page.load import Run, differing, strengths
from report.style import COLORS

TRACES, TRACE_POINTS = 4, 40  # curves of a run, points of a curve
MARKS = 60  # images or rounds of a run that are drawn
LINES = 6  # of a drawing of several runs
FAMILIES = 24  # lines over one setting that are drawn

Record = Mapping[str, Any]


def images_chart(run: Run) -> Chart | None:
    """PSNR of every image, most exposed first, beside its null."""
    rows = sorted(run.rows, key=lambda row: -row["psnr"])
    if not rows:
        return None
    shown = [rows[i] for i in _evenly(len(rows), MARKS)]
    own, nulls = [], []
    for place, row in zip(_evenly(len(rows), MARKS), shown, strict=True):
        where = f"trial {row.get('trial', 0)}, image {row.get('image', 0)}"
        missed = ", missed" if row.get("match") is None else ""
        own.append(Point(place + 1, row["psnr"], f"{where}: {exact(row['psnr'])} dB{missed}"))
        if row.get("null_psnr") is not None:
            nulls.append(Point(place + 1, row["null_psnr"], f"{where}: {exact(row['null_psnr'])} dB"))
    series = [Series("null of the same image", nulls, None, "dots"), Series("reconstruction", own, 1, "dots")]
    note = "" if len(shown) == len(rows) else f"{len(shown)} of {len(rows)} images, evenly spaced."
    recovered = [(RECOVERED_PSNR, f"recovered: {RECOVERED_PSNR:g} dB")]
    return Chart("PSNR of every image", "images, most exposed first", "PSNR (dB)", series, recovered, note=note)


def shares_chart(run: Run) -> Chart | None:
    """Recovered and identified shares with their intervals, beside the null, chance and the bound."""
    s = run.summary
    entries: list[tuple[str, Record, float | None, float | None]] = []
    for threshold, found in (s.get("recovered") or {}).items():
        null = s.get("null")
        known = null["recovered"] if null and float(threshold) == RECOVERED_PSNR else None
        entries.append((f"≥ {threshold} dB", found, known, None))
    if s.get("identified"):
        entries.append(("identified", s["identified"], s["identified"]["chance"], s.get("identified_bound")))
    if s.get("labels"):
        entries.append(("labels", s["labels"], None, None))
    if not entries:
        return None
    shares, nulls, bounds = [], [], []
    for x, (name, found, null, bound) in enumerate(entries):
        limits = f" [{exact(found['low'])}, {exact(found['high'])}]"
        shares.append(Point(x, found["share"], f"{name}: {exact(found['share'])}{limits}", found["low"], found["high"]))
        if null is not None:
            nulls.append(Point(x, null, f"{name}: {exact(null)} without the update"))
        if bound is not None:
            bounds.append(Point(x, bound, f"{name}: at most {exact(bound)} by differential privacy"))
    series = [
        Series("share of images, 95% interval", shares, 1, "dots"),
        Series("null or chance", nulls, None, "dots"),
        Series("bound", bounds, 2, "dots"),
    ]
    ticks = [(float(x), name) for x, (name, *_) in enumerate(entries)]
    return Chart("Shares of images", "", "share", series, ticks=ticks, y_range=(0, 1))


def objective_chart(run: Run) -> Chart | None:
    """The attack's own objective over its iterations, for some of the updates."""
    traced = [t for t in run.trials if len(_finite(t.get("trace"))) > 1]
    if not traced:
        return None
    shown = [traced[i] for i in _evenly(len(traced), TRACES)]
    series = []
    for k, trial in enumerate(shown):
        trace = _finite(trial["trace"])
        points = [
            Point(trace[i][0], trace[i][1], f"{trace[i][0]:g}: {exact(trace[i][1])}")
            for i in _evenly(len(trace), TRACE_POINTS)
        ]
        series.append(
            Series(f"update {trial.get('trial', k)} ({trial.get('status', '-')})", points, k, each=", iteration")
        )
    values = [p.y for s in series for p in s.points]
    references = []
    for key, name in (("truth", "the true images (oracle, median)"), ("baseline", "the mean public image (median)")):
        found = [t["objective"].get(key) for t in run.trials if t.get("objective")]
        if found and all(_is_number(value) for value in found):
            references.append((statistics.median(found), f"at {name}: {exact(statistics.median(found))}"))
    logarithmic = min(values) > 0 and max(values) / min(values) > 30
    notes = []
    if references:
        notes.append("The attack minimises this curve, which may contain its regulariser; dashed lines are without it.")
    if logarithmic:  # an exact match has no place on this axis
        notes += [f"Below this axis: {name}." for y, name in references if y <= min(values) / 1000]
        references = [(y, name) for y, name in references if y > min(values) / 1000]
    if len(shown) < len(traced):
        notes.append(f"{len(shown)} of {len(traced)} updates.")
    return Chart(
        "The attack's objective",
        "iteration",
        "objective",
        series,
        references,
        logarithmic=logarithmic,
        note=" ".join(notes),
    )


def rounds_chart(run: Run) -> Chart | None:
    """Mean PSNR and its null over the rounds of a federated run."""
    rounds: dict[int, list[Record]] = {}
    for row in run.rows:
        if isinstance(row.get("round"), int):
            rounds.setdefault(row["round"], []).append(row)
    if len(rounds) < 2:
        return None
    series = []
    numbers = sorted(rounds)
    drawn = [numbers[i] for i in _evenly(len(numbers), MARKS)]
    for key, name, color, look in (("psnr", "reconstruction", 1, "line"), ("null_psnr", "null", None, "dashed")):
        points = []
        for number in drawn:
            values = [row[key] for row in rounds[number] if row.get(key) is not None]
            if values:
                mean = sum(values) / len(values)
                points.append(Point(number + 1, mean, f"round {number + 1}: {exact(mean)} dB, {len(values)} images"))
        series.append(Series(name, points, color, look))
    together = [
        Point(entry["round"], found["psnr"], f"rounds 1 to {entry['round']}: {exact(found['psnr'])} dB")
        for entry in run.summary.get("over_rounds") or ()
        if (found := entry.get("accumulated"))
    ]
    series.append(Series("best update so far, by the attack's own objective", together, 2))
    return Chart("Leakage over rounds", "round", "mean PSNR (dB)", series)


def accuracy_chart(run: Run) -> Chart | None:
    """Test accuracy over the rounds."""
    points = [
        Point(r["round"] + 1, r["accuracy"], f"round {r['round'] + 1}: {exact(r['accuracy'])}")
        for r in run.rounds
        if _is_number(r.get("accuracy")) and isinstance(r.get("round"), int)
    ]
    if len(points) < 2:
        return None
    drawn = [points[i] for i in _evenly(len(points), MARKS)]
    return Chart("Test accuracy over rounds", "round", "accuracy", [Series("", drawn, 0)], y_range=(0, 1))


def comparison_charts(runs: Sequence[Run]) -> list[tuple[str, list[Chart]]]:
    """(setting, drawings) for each setting with numbers in which runs differ that are equal otherwise."""
    found = []
    names = dict.fromkeys(name for run in runs for name in run.settings if name != "defense")
    for name in names:
        if name in ("local-epochs", "client-images") and _lines_over(runs, "local steps"):
            continue  # the same lines, over local steps
        lines = _lines_over(runs, name)
        if lines:
            found.append((name, _drawings(name, lines)))
    for pattern, lines in _lines_over_defenses(runs).items():
        found.append((f"defence {pattern}", _drawings(f"strength in {pattern}", lines)))
    return found


Line = tuple[str, list[tuple[float, str, Run]]]  # name; x, its name, run


def _lines_over(runs: Sequence[Run], name: str) -> list[Line]:
    """Lines of runs that differ only in one setting, sorted by its value."""
    implied = {"local-epochs", "local steps", "client-images"} if name == "local steps" else {name}
    groups: dict[str, list[Run]] = {}
    for run in runs:
        if _is_number(run.settings.get(name)):
            others = {key: value for key, value in run.settings.items() if key not in implied}
            if name == "local steps":  # steps of equally many images
                others["client-images"] = run.settings.get("client-images")
            groups.setdefault(str(others), []).append(run)
    chosen = [group for group in groups.values() if len({run.settings[name] for run in group}) > 1]
    labels = _labels([group[0] for group in chosen], implied)
    return [
        (label, sorted(((float(r.settings[name]), str(r.settings[name]), r) for r in group), key=lambda p: p[0]))
        for label, group in zip(labels, chosen, strict=True)
    ]


def _lines_over_defenses(runs: Sequence[Run]) -> dict[str, list[Line]]:
    """By defence with one number left open: lines over this number, which start at the run without a defence.

    A defence with several numbers needs two runs that differ in one of them; a defence with one number needs one run.
    """
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(str({key: v for key, v in run.settings.items() if key != "defense"}), []).append(run)
    chosen: dict[str, list[list[tuple[float, str, Run]]]] = {}
    for group in groups.values():
        undefended = [(-math.inf, "none", run) for run in group if run.defense == "none"]
        families: dict[str, list[tuple[float, str, Run]]] = {}
        for run in group:
            for pattern, strength in strengths(run.defense):
                families.setdefault(pattern, []).append((strength, f"{strength:g}", run))
        for pattern, points in families.items():
            several = len({x for x, *_ in points}) > 1
            if several or (undefended and len(strengths(points[0][2].defense)) == 1):
                chosen.setdefault(pattern, []).append(undefended + sorted(points, key=lambda p: p[0]))
    return {
        pattern: list(zip(_labels([line[-1][2] for line in lines], {"defense"}), lines, strict=True))
        for pattern, lines in chosen.items()
    }


def _drawings(name: str, lines: Sequence[Line]) -> list[Chart]:
    """PSNR and shares over a setting, a few lines in each drawing."""
    charts = []
    for start in range(0, min(len(lines), FAMILIES), LINES):
        part = lines[start : start + LINES]
        values = sorted({(x, label) for _, points in part for x, label, _ in points})
        place = {x: float(k) for k, (x, _) in enumerate(values)}  # evenly spaced, as settings are chosen
        ticks = [(place[x], label) for x, label in values]
        note = f"{FAMILIES} of {len(lines)} lines." if len(lines) > FAMILIES and not start else ""
        charts.append(_psnr_drawing(name, part, place, ticks, note))
        charts.append(_share_drawing(name, part, place, ticks))
    return charts


def _psnr_drawing(
    name: str, lines: Sequence[Line], place: Mapping[float, float], ticks: Sequence[tuple[float, str]], note: str
) -> Chart:
    series = []
    for k, (label, points) in enumerate(lines):
        nulls, scores = [], []
        for x, value, run in points:
            null, psnr, at = run.summary.get("null"), run.summary["psnr"], place[x] + _shift(k, len(lines))
            where = f"{name} {value}"
            if null:
                nulls.append(Point(at, null["psnr"]["mean"], f"{where}: null {exact(null['psnr']['mean'])} dB"))
            if psnr:
                low, high = psnr.get("low"), psnr.get("high")
                limits = "" if low is None or high is None else f" [{exact(low)}, {exact(high)}]"
                text = f"{where}: {exact(psnr['mean'])} dB{limits}, {run.verdict}"
                scores.append(Point(at, psnr["mean"], text, low, high))
        series += [Series(f"null{f', {label}' if label else ''}", nulls, k, "dashed"), Series(label, scores, k)]
    means = [p.y for s in series for p in s.points]
    interval = (min(means), max(means)) if means else (0.0, 1.0)  # intervals of few units would hide the means
    spread = max(interval[1] - interval[0], 5.0)
    shown = (max(0.0, interval[0] - 0.6 * spread), min(100.0, interval[1] + 0.6 * spread))
    return Chart(f"PSNR over {name}", name, "PSNR (dB), 95%", series, ticks=ticks, note=note, y_range=shown)


def _share_drawing(
    name: str, lines: Sequence[Line], place: Mapping[float, float], ticks: Sequence[tuple[float, str]]
) -> Chart:
    """Identified shares with chance and bound where all runs have them, else recovered shares with their null."""
    runs = [run for _, points in lines for *_, run in points]
    key = "identified" if all(run.summary.get("identified") for run in runs) else f"{RECOVERED_PSNR:g}"
    series = []
    for k, (label, points) in enumerate(lines):
        shares, nulls, bounds = [], [], []
        for x, value, run in points:
            s, at, where = run.summary, place[x] + _shift(k, len(lines)), f"{name} {value}"
            found = s["identified"] if key == "identified" else (s.get("recovered") or {}).get(key)
            null = s.get("null")
            chance = null["recovered"] if null else None
            if found:
                chance = found.get("chance", chance)
                text = f"{where}: {exact(found['share'])} [{exact(found['low'])}, {exact(found['high'])}]"
                shares.append(Point(at, found["share"], text, found["low"], found["high"]))
            if chance is not None:
                nulls.append(Point(at, chance, f"{where}: {exact(chance)} without the update"))
            if key == "identified" and s.get("identified_bound") is not None:
                bounds.append(
                    Point(at, s["identified_bound"], f"{where}: at most {exact(s['identified_bound'])} by privacy")
                )
        after = f", {label}" if label else ""
        reference = "chance" if key == "identified" else "null"
        series += [Series(f"{reference}{after}", nulls, k, "dashed"), Series(label or "share", shares, k)]
        series.append(Series(f"bound{after}", bounds, (k + 2) % len(COLORS), "dots"))
    what = "Identified" if key == "identified" else f"Recovered (≥ {key} dB)"
    return Chart(f"{what} over {name}", name, "share, 95%", series, ticks=ticks, y_range=(0, 1))


def _shift(k: int, count: int) -> float:
    """How far line k of `count` stands beside its place, so that intervals do not hide each other."""
    return 0.0 if count == 1 else 0.1 * (2 * k / (count - 1) - 1)


def _labels(runs: Sequence[Run], without: set[str]) -> list[str]:
    """What sets these runs apart, except for some settings; hyperparameters only if they are all of one attack."""
    if not runs:
        return []
    several = len({run.attack for run in runs}) > 1
    own = {name.replace("_", "-") for run in runs for name in run.config["hyperparameters"]} if several else set()
    names = [name for name in differing(runs) if name not in without | own]
    parts = [
        [value if k in ("attack", "mode") else f"{k} {value}" for k in names if (value := r.settings[k])] for r in runs
    ]
    return [", ".join(map(str, part)) or run.attack for part, run in zip(parts, runs, strict=True)]


def _evenly(count: int, most: int) -> list[int]:
    """At most `most` of the numbers below `count`, evenly spaced, the first and the last among them."""
    if count <= most:
        return list(range(count))
    return [round(k * (count - 1) / (most - 1)) for k in range(most)]


def _finite(trace: Any) -> list[tuple[float, float]]:
    """The entries [iteration, value] of a trace whose value is a number."""
    return [(entry[0], entry[1]) for entry in trace or [] if _is_number(entry[1])]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
