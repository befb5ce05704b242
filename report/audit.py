"""What an audit found, for the person who must decide: audit.md, and the sections that the HTML page shares with it.

It reads audit.json and computes nothing.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Result = Mapping[str, Any]

ENGINEER = (
    "An attack guesses the records, simulates the update that a client with them would have sent, and compares. Update "
    "mismatch is 1 - cosine between both updates. An attack whose mismatch is above the mismatch of the true records "
    "failed as an optimisation: the update may still determine them."
)
OFFICER = (
    "A record is recovered if its reconstruction has a PSNR of at least 20 dB; at this value small pictures are "
    "recognisable. The audit covers reconstruction by the attacks above. It does not cover membership or attribute "
    "inference, or what the finished model reveals. That no leak was found never shows that there is none."
)


@dataclass(frozen=True)
class Table:
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Points:
    """A list."""

    lines: Sequence[str]


@dataclass(frozen=True)
class Section:
    """A heading and what stands below it. A text is a paragraph; **, * and ` mark words as in Markdown."""

    name: str
    title: str
    blocks: Sequence[str | Table | Points]


def sections(result: Result) -> list[Section]:
    """What the audit found, the worst case first; without the verdict and the command that repeats the audit."""
    found = [
        Section("worst", "Worst case", [*_worst(result)]),
        Section("agreement", "Without the truth", [*_agreement(result.get("agreement"))]),
        Section("attacks", "Attacks: what was tried, and what failed", [*_attacks(result["attacks"])]),
        Section("proof", "What is proven, and what leaks without an attack", [*_proof(result)]),
        Section("advice", "Recommendation", [*_recommendation(result["recommendation"])]),
        Section("scope", "Scope", [*_scope(result)]),
        Section("lights", "How the verdict is decided", [Table(("light", "when"), [*_thresholds(result)])]),
        Section(
            "meaning",
            "What this means",
            [f"*For the data protection officer.* {OFFICER}", f"*For the engineer.* {ENGINEER}"],
        ),
    ]
    return [section for section in found if section.blocks]


def exit_line(verdict: Mapping[str, Any]) -> str:
    """The exit code and why."""
    share, allowed = f"{verdict['share']:.0%}", f"{verdict['threshold']:.0%}"
    return f"Exit code {verdict['exit_code']}: {share} of the records; allowed are {allowed}."


def markdown(result: Result) -> str:
    """The audit as Markdown."""
    verdict = result["verdict"]
    lines = [f"# Audit: {verdict['light']}", "", f"**{verdict['sentence']}**", "", exit_line(verdict), ""]
    for section in sections(result):
        lines += [f"## {section.title}", ""]
        for block in section.blocks:
            lines += [*_markdown_of(block), ""]
    lines += ["## Reproduce", "", f"```sh\n{result['reproduce']['command']}\n```", ""]
    lines.append(f"Raw rows: rows.json. Reconstructions: reconstructions.safetensors. {result['minutes']:g} minutes.")
    return "\n".join(lines) + "\n"


def _markdown_of(block: str | Table | Points) -> Iterator[str]:
    if isinstance(block, Points):
        yield from (f"- {line}" for line in block.lines)
    elif isinstance(block, Table):
        yield f"| {' | '.join(block.head)} |"
        yield "|" + "---|" * len(block.head)
        for row in block.rows:
            yield f"| {' | '.join(cell.replace('|', '/') for cell in row)} |"
    else:
        yield block


def _worst(r: Result) -> Iterator[str | Table | Points]:
    worst = r["worst_case"]
    if worst is None:
        return
    interval = worst["interval"]
    bounds = f", 95% [{interval['low']:.2f}, {interval['high']:.2f}]" if interval else ""
    means = f"{number(worst['mean_image_psnr'])} dB, mean image of the class {number(worst['class_mean_psnr'])} dB"
    lines = [
        f"{worst['recovered']} of {worst['records']} records are recovered by some attack{bounds}",
        f"highest PSNR {worst['max_psnr']:.1f} dB, mean {number(worst['mean_psnr'])} dB",
        f"an attacker who ignores the update: mean image {means}",
    ]
    for threat, best in worst["strongest"].items():
        lines.append(f"{threat}: {best['attack']} recovers {best['recovered']:.0%}")
    expected = r["harm"]["expected_recovered_per_update"]
    if expected is not None:
        lines.append(f"{expected:.1f} of {r['harm']['records_per_update']} records expected from each update")
    yield Points(lines)
    yield "The most exposed records:"
    exposed = [(e["attack"], str(e["trial"]), str(e["image"]), f"{e['psnr']:.1f}") for e in worst["most_exposed"]]
    yield Table(("attack", "update", "record", "PSNR dB"), exposed)
    control = r["control"]
    if control is not None:
        yield (
            f"Without the defence {control['attack']} recovers {control['recovered']:.0%}, with it "
            f"{control['defended']:.0%}."
        )


def _agreement(found: Mapping[str, Any] | None) -> Iterator[str | Table]:
    if found is None:
        return
    yield (
        f"Two attacks agree on {found['agreed_records']} record(s): at least 20 dB between their reconstructions, and "
        "6 dB more than to their mean colour. PSNR between the reconstructions of the first update:"
    )
    rows = [(" and ".join(p["attacks"]), ", ".join(f"{v:.1f}" for v in p["psnr"])) for p in found["between_attacks"]]
    restart = found["between_restarts"]
    if restart is not None:
        rows.append((f"{restart['attack']} from another start", ", ".join(f"{v:.1f}" for v in restart["psnr"])))
    yield Table(("attacks", "dB"), rows)


def _recommendation(advice: Mapping[str, Any] | None) -> Iterator[str | Table]:
    if advice is None:
        return
    if advice["setting"] is None:
        yield f"None: {advice['reason']}."
    else:
        weakest = "the weakest setting tried" if advice["weakest"] else "a setting, perhaps not the weakest,"
        yield (
            f'`--defense "{advice["setting"]}"` is {weakest} under which every attack that leaked now '
            "passes. The attacker knows the setting. Its cost in accuracy was not measured: `main_fed.py baseline`, "
            "with this defence and without it, prints the test accuracy of a training."
        )
    shares = (", ".join(f"{name} {share:.0%}" for name, share in e["recovered"].items()) for e in advice["tried"])
    rows = [(entry["defense"], share or "-") for entry, share in zip(advice["tried"], shares, strict=True)]
    yield Table(("defence", "recovered"), rows)


def _scope(r: Result) -> Iterator[str | Table]:
    scope, threat = dict(r["scope"]), r["threat_model"]
    recipe = scope.pop("recipe")
    rows = [(key.replace("_", " "), _value(value)) for key, value in scope.items()]
    rows.append(("recipe", ", ".join(f"{key} {value}" for key, value in recipe.items())))
    rows.append(("strongest server assumed", threat["server"]))
    rows.append(("the attacker knows", ", ".join(threat["knows"])))
    rows.append(("granted to the attacker", f"**{', '.join(threat['granted'])}**" if threat["granted"] else "nothing"))
    rows.append(("wrong beliefs of the attacker", ", ".join(threat["beliefs"]) or "none"))
    yield Table(("", ""), rows)


def _thresholds(r: Result) -> Iterable[tuple[str, str]]:
    return r["verdict"]["thresholds"].items()


def _attacks(entries: Sequence[Mapping[str, Any]]) -> Iterator[str | Table | Points]:
    ran = [e for e in entries if e["status"] == "ran"]
    rows = []
    for e in sorted(ran, key=lambda e: -(e.get("recovered") or 0)):
        summary = e.get("summary")
        changed = ", ".join(f"{key} {value}" for key, value in e["changed"].items()) or "defaults"
        rows.append(
            (
                e["attack"],
                e["threat"],
                "-" if summary is None else f"{e['recovered']:.0%} of {summary['images']}",
                "-" if summary is None or summary["psnr"] is None else f"{summary['psnr']['mean']:.1f}",
                "-" if summary is None else number(summary["label_accuracy"]),
                f"{number(e['mismatch'], 4)} ({number(e['mismatch_at_truth'], 4)})",
                e.get("verdict") or "not scored",
                changed,
                f"{e['seconds']:.0f}",
            )
        )
    head = ("attack", "server", "recovered", "PSNR dB", "labels", "mismatch (at the truth)", "verdict", "budget", "s")
    if rows:
        yield Table(head, rows)
    diverged = sum(e["diverged"] for e in ran)
    if diverged:
        yield f"{diverged} run(s) diverged and are counted."
    failures = [f"{e['attack']}: {e['failure']}" for e in ran if e.get("failure")]
    if failures:
        yield "Why records were not recovered:"
        yield Points(failures)
    others: dict[tuple[str, str], list[str]] = {}
    for e in entries:
        if e["status"] != "ran":
            others.setdefault((e["status"], e["reason"]), []).append(e["attack"])
    if others:
        yield "Not run:"
        yield Table(("attacks", "", "reason"), [(", ".join(names), *why) for why, names in others.items()])


def _proof(r: Result) -> Iterator[str | Points | Table]:
    inspection, formal = r["inspection"], r["formal"]
    yield formal["text"]
    if formal["bounds"]:
        yield "No attack, known or unknown, finds the true one among so many candidates more often than this:"
        rows = [(str(b["candidates"]), f"{b['chance']:.3f}", f"{b['bound']:.3f}") for b in formal["bounds"]]
        yield Table(("candidates", "chance", "bound"), rows)
    if formal["identified"]:
        yield "Measured: records whose reconstruction is nearer to them than to every candidate that nobody sent:"
        head = ("attack", "identified, 95%", "candidates", "chance", "bound")
        yield Table(head, [_identified(entry) for entry in formal["identified"]])
    lines = [f"{inspection['ratio']:.1f} gradient entries for each unknown number of the update's records"]
    for leak in inspection["leaks"]:
        lines.append(f"{leak['name']}: {leak['share']:.0%} of the {leak['of']} are expected to be alone on a neuron")
    yield Points([*lines, *inspection["facts"]])


def _identified(entry: Mapping[str, Any]) -> tuple[str, ...]:
    limits = f"{entry['share']:.2f} [{number(entry['low'])}, {number(entry['high'])}]"
    bound = "none" if entry["bound"] is None else f"{entry['bound']:.3f}"
    return entry["attack"], limits, str(entry["candidates"]), f"{entry['chance']:.3f}", bound


def number(value: float | None, digits: int = 2) -> str:
    """A value with so many digits; a dash for none."""
    return "-" if value is None else f"{value:.{digits}f}"


def _value(value: Any) -> str:
    return ", ".join(map(str, value)) or "-" if isinstance(value, list) else str(value)
