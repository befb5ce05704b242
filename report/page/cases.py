"""The questions of a reader: which attack leaks most from which update, and what should be switched on?

A case is what the server saw: the gradient of so many images, or FedAvg updates after so many local steps.
"""

from collections.abc import Iterator, Mapping, Sequence
from html import escape

from evaluation.summary import RECOVERED_PSNR
from report import tables
from report.page.article import BEST_PSNR, thumbnails
from report.page.charts import bar
from report.page.images import Pair
from report.page.load import Run
from report.page.words import badge, limits

NO_LEAK = "no leak found by this attack"
HEADS = ("the server sees", "leaks most", "looks like", "recovered", "verdict", "other attacks", "what to switch on")
NAMES = 4  # attacks or defences that a sentence lists


def case_of(run: Run) -> str:
    """What the server saw, in words."""
    flags = run.config["flags"]
    clients = flags.get("aggregate") or 1
    summed = f", sum of {clients} clients" if clients > 1 else ""
    if run.mode == "fed":
        steps = run.local_steps
        taken = "" if steps is None else f", {steps} local step{'' if steps == 1 else 's'}"
        return f"FedAvg{taken}{summed}"
    images = flags.get("batch_size") or 1
    return f"{'gradient of one image' if images == 1 else f'gradient of {images} images'}{summed}"


def cases(runs: Sequence[Run], pictures: Mapping[int, list[Pair]]) -> Iterator[str]:
    """For each case the attack that leaks most, its most exposed image, and the defences that end the leak."""
    groups: dict[str, list[Run]] = {}
    for run in sorted(runs, key=_order):
        if run.mode in ("grad", "fed") and run.attack != "baseline":  # baseline does not look at the update
            groups.setdefault(case_of(run), []).append(run)
    plain = {case: [run for run in group if run.defense == "none"] for case, group in groups.items()}
    if not any(len({run.attack for run in group}) > 1 for group in plain.values()):
        return
    yield '<section id="cases" aria-labelledby="cases-title"><h2 id="cases-title">What leaks most, and what helps</h2>'
    yield (
        "<p>Without a defence, by what the server sees, over all data sets and networks on this page. A defence helps "
        "if every attack that leaks without it was tried with it, and no leak was found.</p>"
        '<div class="scroll" tabindex="0" role="region" aria-label="Table of cases"><table class="cases"><thead><tr>'
    )
    heads = (
        "the server sees",
        "leaks most",
        "looks like",
        "recovered",
        "verdict",
        "other attacks",
        "what to switch on",
    )
    yield f"{''.join(f'<th scope=col>{head}</th>' for head in heads)}</tr></thead><tbody>"
    for case, group in groups.items():
        if not plain[case]:
            continue
        ranked = sorted(plain[case], key=lambda run: run.leakage, reverse=True)
        yield "".join(f"<td>{cell}</td>" for cell in _cells(case, ranked, group, pictures)).join(("<tr>", "</tr>"))
    yield "</tbody></table></div></section>"


def _cells(case: str, ranked: Sequence[Run], group: Sequence[Run], pictures: Mapping[int, list[Pair]]) -> list[str]:
    first = ranked[0]
    recovered = (first.summary.get("recovered") or {}).get(f"{RECOVERED_PSNR:g}")
    null, share = first.summary.get("null"), "-"
    if recovered:
        share = bar(recovered["share"], *limits(recovered), null["recovered"] if null else None, 1.0)
        share += f"<span>{escape(tables.share(recovered))}</span>"
    elif first.summary.get("psnr"):
        share = bar(first.summary["psnr"]["mean"], None, None, None, BEST_PSNR)
    return [
        f"<strong>{escape(case)}</strong>",
        f'<a href="#run-{first.number}">{escape(first.attack)}</a> <span>on {escape(first.model)}</span>',
        thumbnails(first, pictures.get(first.number)),
        share,
        badge(first.verdict),
        escape(_others(ranked)),
        escape(_defended(ranked, group)),
    ]


def _others(ranked: Sequence[Run]) -> str:
    """The other attacks, by whether they leak."""
    first = ranked[0].attack
    leaking = dict.fromkeys(run.attack for run in ranked if run.verdict == "leaks" and run.attack != first)
    quiet = dict.fromkeys(run.attack for run in ranked if run.attack != first and run.attack not in leaking)
    parts = [f"{_names(list(leaking))} {'leaks' if len(leaking) == 1 else 'leak'} as well"] if leaking else []
    parts += [f"no leak shown by {_names(list(quiet))}"] if quiet else []
    return "; ".join(parts) or "none tried"


def _defended(ranked: Sequence[Run], group: Sequence[Run]) -> str:
    """The defences under which no attack that leaks without one still does, and those that leak."""
    leaking = {run.attack for run in ranked if run.verdict == "leaks"}
    if not leaking:
        return "nothing leaked without a defence"
    tried: dict[str, list[Run]] = {}
    for run in group:
        if run.defense != "none":
            tried.setdefault(run.defense, []).append(run)
    if not tried:
        return "no defence was tried"
    helps, partly, fails = [], [], []
    for defense, runs in tried.items():
        quiet = {run.attack for run in runs} - {run.attack for run in runs if run.verdict != NO_LEAK}
        if any(run.verdict == "leaks" for run in runs):
            fails.append(defense)
        elif leaking <= quiet:
            helps.append(defense)
        else:
            partly.append(defense)
    parts = [f"{_names(helps)}: no leak found"] if helps else []
    parts += [f"{_names(partly)}: not decided for every attack"] if partly else []
    parts += [f"{_names(fails)}: still leaks"] if fails else []
    return "; ".join(parts)


def _names(names: Sequence[str]) -> str:
    shown = ", ".join(names[:NAMES])
    return shown if len(names) <= NAMES else f"{shown} and {len(names) - NAMES} more"


def _order(run: Run) -> tuple[int, int, int]:
    """Gradients before FedAvg, few images and steps first."""
    flags = run.config["flags"]
    size = run.local_steps or 0 if run.mode == "fed" else flags.get("batch_size") or 1
    return (int(run.mode == "fed"), int(flags.get("aggregate") or 1), int(size))
