"""audit.md: what an audit found, for the person who must decide. It reads audit.json and computes nothing."""

from collections.abc import Iterator, Mapping
from typing import Any

Result = Mapping[str, Any]

ENGINEER = (
    "An attack guesses the records, simulates the update that a client with them would have sent, and compares. Update "
    "mismatch is 1 - cosine between both updates. An attack whose mismatch is above the mismatch of the true records "
    "failed as an optimisation: the update may still determine them."
)
OFFICER = (
    "A record is recovered if its reconstruction has a PSNR of at least 20 dB; at this value small pictures are "
    "recognisable. The audit covers reconstruction by the attacks below. It does not cover membership or attribute "
    "inference, or what the finished model reveals. That no leak was found never shows that there is none."
)


def markdown(result: Result) -> str:
    """The page as Markdown, the worst case first."""
    return "\n".join(_lines(result)) + "\n"


def _lines(r: Result) -> Iterator[str]:
    verdict = r["verdict"]
    yield f"# Audit: {verdict['light']}"
    yield ""
    yield f"**{verdict['sentence']}**"
    yield ""
    share, allowed = f"{verdict['share']:.0%}", f"{verdict['threshold']:.0%}"
    yield f"Exit code {verdict['exit_code']}: {share} of the records; allowed are {allowed}."
    yield ""
    yield from _table(("light", "when"), verdict["thresholds"].items())
    yield from _worst(r)
    yield from _agreement(r.get("agreement"))
    yield from _recommendation(r["recommendation"])
    yield from _scope(r)
    yield from _attacks(r["attacks"])
    yield from _proof(r)
    yield "## Reproduce"
    yield ""
    yield f"```sh\n{r['reproduce']['command']}\n```"
    yield ""
    yield f"Raw rows: rows.json. Reconstructions: reconstructions.safetensors. {r['minutes']:g} minutes."
    yield ""
    yield "## What this means"
    yield ""
    yield f"*For the data protection officer.* {OFFICER}"
    yield ""
    yield f"*For the engineer.* {ENGINEER}"


def _worst(r: Result) -> Iterator[str]:
    worst = r["worst_case"]
    if worst is None:
        return
    yield "## Worst case"
    yield ""
    interval = worst["interval"]
    bounds = f", 95% [{interval['low']:.2f}, {interval['high']:.2f}]" if interval else ""
    yield f"- {worst['recovered']} of {worst['records']} records are recovered by some attack{bounds}"
    yield f"- highest PSNR {worst['max_psnr']:.1f} dB, mean {_number(worst['mean_psnr'])} dB"
    means = f"{_number(worst['mean_image_psnr'])} dB, mean image of the class {_number(worst['class_mean_psnr'])} dB"
    yield f"- an attacker who ignores the update: mean image {means}"
    for threat, best in worst["strongest"].items():
        yield f"- {threat}: {best['attack']} recovers {best['recovered']:.0%}"
    expected = r["harm"]["expected_recovered_per_update"]
    if expected is not None:
        yield f"- {expected:.1f} of {r['harm']['records_per_update']} records expected from each update"
    yield ""
    yield "The most exposed records:"
    yield ""
    rows = [(e["attack"], e["trial"], e["image"], f"{e['psnr']:.1f}") for e in worst["most_exposed"]]
    yield from _table(("attack", "update", "record", "PSNR dB"), rows)
    control = r["control"]
    if control is not None:
        yield (
            f"Without the defence {control['attack']} recovers {control['recovered']:.0%}, with it "
            f"{control['defended']:.0%}."
        )
        yield ""


def _agreement(found: Mapping[str, Any] | None) -> Iterator[str]:
    if found is None:
        return
    yield "## Without the truth"
    yield ""
    yield (
        f"Two attacks agree on {found['agreed_records']} record(s): at least 20 dB between their reconstructions, and "
        "6 dB more than to their mean colour. PSNR between the reconstructions of the first update:"
    )
    yield ""
    rows = [(" and ".join(p["attacks"]), ", ".join(f"{v:.1f}" for v in p["psnr"])) for p in found["between_attacks"]]
    restart = found["between_restarts"]
    if restart is not None:
        rows.append((f"{restart['attack']} from another start", ", ".join(f"{v:.1f}" for v in restart["psnr"])))
    yield from _table(("attacks", "dB"), rows)


def _recommendation(advice: Mapping[str, Any] | None) -> Iterator[str]:
    if advice is None:
        return
    yield "## Recommendation"
    yield ""
    if advice["setting"] is None:
        yield f"None: {advice['reason']}."
    else:
        weakest = "the weakest setting tried" if advice["weakest"] else "a setting, perhaps not the weakest,"
        yield (
            f'`--defense "{advice["setting"]}"` is {weakest} under which every attack that leaked now '
            "passes. The attacker knows the setting. Its cost in accuracy was not measured."
        )
    yield ""
    rows = [
        (entry["defense"], ", ".join(f"{name} {share:.0%}" for name, share in entry["recovered"].items()))
        for entry in advice["tried"]
    ]
    yield from _table(("defence", "recovered"), rows)


def _scope(r: Result) -> Iterator[str]:
    yield "## Scope"
    yield ""
    scope, threat = dict(r["scope"]), r["threat_model"]
    recipe = scope.pop("recipe")
    rows = [(key.replace("_", " "), _value(value)) for key, value in scope.items()]
    rows.append(("recipe", ", ".join(f"{key} {value}" for key, value in recipe.items())))
    rows.append(("strongest server assumed", threat["server"]))
    rows.append(("the attacker knows", ", ".join(threat["knows"])))
    rows.append(("granted to the attacker", f"**{', '.join(threat['granted'])}**" if threat["granted"] else "nothing"))
    rows.append(("wrong beliefs of the attacker", ", ".join(threat["beliefs"]) or "none"))
    yield from _table(("", ""), rows)


def _attacks(entries: list[Mapping[str, Any]]) -> Iterator[str]:
    yield "## Attacks"
    yield ""
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
                "-" if summary is None else _number(summary["label_accuracy"]),
                f"{_number(e['mismatch'], 4)} ({_number(e['mismatch_at_truth'], 4)})",
                e.get("verdict") or "not scored",
                changed,
                f"{e['seconds']:.0f}",
            )
        )
    head = ("attack", "server", "recovered", "PSNR dB", "labels", "mismatch (at the truth)", "verdict", "budget", "s")
    yield from _table(head, rows)
    diverged = sum(e["diverged"] for e in ran)
    if diverged:
        yield f"{diverged} run(s) diverged and are counted."
        yield ""
    failures = [f"{e['attack']}: {e['failure']}" for e in ran if e.get("failure")]
    if failures:
        yield "Why records were not recovered:"
        yield ""
        yield from (f"- {line}" for line in failures)
        yield ""
    left_out = [(e["attack"], e["status"], e["reason"]) for e in entries if e["status"] != "ran"]
    if left_out:
        yield "Not run:"
        yield ""
        yield from _table(("attack", "", "reason"), left_out)


def _proof(r: Result) -> Iterator[str]:
    inspection = r["inspection"]
    yield "## What is proven, and what leaks without an attack"
    yield ""
    yield f"- {r['formal']['text']}"
    yield f"- {inspection['ratio']:.1f} gradient entries for each unknown number of the update's records"
    for leak in inspection["leaks"]:
        yield f"- {leak['name']}: {leak['share']:.0%} of the {leak['of']} are expected to be alone on a neuron"
    for fact in inspection["facts"]:
        yield f"- {fact}"
    yield ""


def _table(head: tuple[str, ...], rows: Any) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield "|" + "---|" * len(head)
    for row in rows:
        yield f"| {' | '.join(str(cell).replace('|', '/') for cell in row)} |"
    yield ""


def _number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _value(value: Any) -> str:
    return ", ".join(map(str, value)) or "-" if isinstance(value, list) else str(value)
