"""The HTML page: every run on it with the numbers of its summary, nothing loaded, nothing private, nothing executed."""

import dataclasses
import html
import json
import re
import shlex
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import report.__main__
from attacks.base import ATTACKS
from core.errors import UsageError
from evaluation.summary import summarize
from evaluation.verdict import outcome
from report import style
from report.page import write_page
from report.page.images import png
from report.page.load import load_runs, strengths
from report.page.words import command
from runner import cli
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


def write(tmp_path: Path, *folders: Path, show_victims: bool = False) -> str:
    write_page(folders, tmp_path / "page.html", show_victims)
    return (tmp_path / "page.html").read_text(encoding="utf-8")


class Reader(HTMLParser):
    """Checks that elements are nested and closed, that ids are unique, and collects attributes and text."""

    VOID = frozenset({"meta", "img", "input", "link", "br"})
    DRAWN = frozenset({"path", "rect", "circle", "polyline"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(page)
        assert not self.open, f"not closed: {self.open}"
        ids = [attributes["id"] for _, attributes in self.found if "id" in attributes]
        assert len(ids) == len(set(ids))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in self.DRAWN, f"<{tag}/> is not closed in HTML"
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> at {self.getpos()}"

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("style", "script"):
            self.texts.append(data)

    def all(self, tag: str, name: str, value: str | None = None) -> list[dict[str, str | None]]:
        chosen = [attributes for found, attributes in self.found if found == tag and name in attributes]
        return chosen if value is None else [a for a in chosen if value in (a[name] or "").split()]


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve runs: attacks over local steps, one over the strength of a defence, one that learns nothing."""
    folder = tmp_path_factory.mktemp("study")
    for attack, psnr in (("ig_single", 26.0), ("sme", 24.0)):
        for steps in (1, 5, 20):
            name = folder / "fed" / attack / f"{steps:012d}"
            fabricate(name, attack, "fed", psnr - steps / 2, local_epochs=steps)
    for sigma, psnr, bound in ((0.01, 24.0, 0.9), (0.1, 15.0, 0.2), (1.0, 12.0, 0.01)):
        known = {"guarantee": {"unit": "record", "epsilon": 1 / sigma, "delta": 1e-5}, "identified_bound": bound}
        defense = f"dpsgd(bound=1.0,sigma={sigma})"
        fabricate(folder / "grad" / "ig_single" / f"{sigma}", psnr=psnr, defense=defense, summary=known)
    fabricate(folder / "grad" / "ig_single" / "plain", psnr=30.0)
    fabricate(folder / "grad" / "baseline" / "nothing", "baseline", psnr=11.0)
    fabricate(folder / "grad" / "dlg" / "leaves", "dlg", psnr=40.0, dataset="leaves", model="cnn")
    return folder


def test_every_run_is_there_with_the_numbers_of_its_summary(study: Path, tmp_path: Path) -> None:
    page = Reader(write(tmp_path, study))
    runs, left_out = load_runs([study])
    assert len(runs) == 12 and not left_out
    rows = {a["data-run"] for a in page.all("tr", "data-run")}
    articles = {a["data-run"] for a in page.all("article", "data-run")}
    assert rows == articles == {str(run.number) for run in runs}
    shown: dict[str, list[float]] = {}
    number = ""
    for tag, attributes in page.found:
        if tag == "tr":
            number = attributes.get("data-run") or ""
        if tag == "td" and attributes.get("data-label") in ("PSNR (dB)", "recovered", "above null (dB)", "identified"):
            shown.setdefault(number, []).append(float(attributes["data-value"] or "nan"))
    for run in runs:
        s = run.summary
        expected = [s["success_rate"], s["psnr"]["mean"], s["over_null"]["mean"], s["identified"]["share"]]
        assert shown[str(run.number)] == expected
    text = " ".join(page.texts)
    leaking = sum(run.verdict == "leaks" for run in runs)
    assert 0 < leaking < 12 and f"{leaking} of 12 runs leak" in text


def test_drawings_hold_exact_values_with_null_and_bound(study: Path, tmp_path: Path) -> None:
    page = Reader(write(tmp_path, study))
    series = {a["data-name"]: a for a in page.all("g", "data-texts")}
    for attributes in series.values():
        assert all((attributes["data-texts"] or "").split("\n"))
    drawn = "\n".join(a["data-texts"] or "" for a in page.all("g", "data-texts"))
    runs, _ = load_runs([study])
    for run in runs:
        if run.mode == "fed":
            assert f"local steps {run.local_steps}: {run.summary['psnr']['mean']:.6g} dB" in drawn
            assert f"local steps {run.local_steps}: null {run.summary['null']['psnr']['mean']:.6g}" in drawn
    assert "at most 0.01 by" in drawn and "none: " in drawn and "sigma=…" in " ".join(page.texts)
    assert "\n19: 0.0298" in drawn  # 2 * 0.8^19 + 0.001
    assert any("at the true images (oracle, median): 0.0005" in text for text in page.texts)


def test_an_objective_of_zero_is_said_below_a_logarithmic_axis(tmp_path: Path) -> None:
    run = fabricate(tmp_path / "runs" / "one")
    trials = [json.loads(line) for line in (run / "trials.jsonl").read_text().splitlines()]
    for trial in trials:
        trial["objective"]["truth"] = 0.0
        trial["trace"] = [[k, 10.0**-k] for k in range(6)]
    (run / "trials.jsonl").write_text("".join(json.dumps(trial) + "\n" for trial in trials))
    seal(run, SEALED, "done")
    text = " ".join(Reader(write(tmp_path, run)).texts)
    assert "Below this axis: at the true images (oracle, median): 0." in text and "1e-5" in text
    assert "at the mean public image (median): 0.9" in text


def test_the_page_says_who_attacked_and_what_to_switch_on(study: Path, tmp_path: Path) -> None:
    text = " ".join(Reader(write(tmp_path, study)).texts)
    assert "The server follows the protocol and looks at what it receives." in text
    assert "training recipe" in text and "number of images" in text
    assert "Without a defence: leaks (100% of the images recovered)." in text
    assert "No leak was found by this attack with dpsgd(bound=1.0,sigma=1.0)." in text
    assert "No attack identifies more than 0.010 of the victims." in text


def test_a_reader_finds_what_leaks_most_and_what_helps(tmp_path: Path) -> None:
    """By what the server sees: the attack that leaks most, the others, and the defences that end every leak."""
    for attack, psnr, with_noise, with_topk in (("sme", 30.0, 9.0, 28.0), ("dlg", 24.0, 9.0, 9.0), ("dlf", 8.0, 8, 8)):
        for defense, score in (("none", psnr), ("gauss(sigma=0.1)", with_noise), ("topk(share=0.5)", with_topk)):
            fabricate(tmp_path / "r" / attack / defense, attack, "fed", score, defense=defense, local_epochs=5)
    fabricate(tmp_path / "r" / "baseline", "baseline", "fed", 11.0, local_epochs=5)
    fabricate(tmp_path / "r" / "late", "sme", "fed", 9.0, local_epochs=20)
    fabricate(tmp_path / "r" / "batch", "dlg", psnr=33.0, batch_size=8)
    text = write(tmp_path, tmp_path / "r")
    Reader(text)
    rows = [
        Reader(row.split("</tr>")[0]).texts
        for row in text.split('class="cases"')[1].split("</table>")[0].split("<tr>")[2:]
    ]
    assert [row[0] for row in rows] == ["gradient of 8 images", "FedAvg, 5 local steps", "FedAvg, 20 local steps"]
    five = " ".join(rows[1])
    assert five.index("sme") < five.index("dlg leaks as well; no leak shown by dlf")
    assert "gauss(sigma=0.1): no leak found; topk(share=0.5): still leaks" in five
    assert "no defence was tried" in " ".join(rows[0]) and "nothing leaked without a defence" in " ".join(rows[2])
    assert "baseline" not in " ".join(" ".join(row) for row in rows)


def test_one_attack_needs_no_table_of_cases(tmp_path: Path) -> None:
    for steps in (1, 5):
        fabricate(tmp_path / "r" / f"{steps}", "sme", "fed", local_epochs=steps)
    assert 'class="cases"' not in write(tmp_path, tmp_path / "r")


def test_colours_and_fonts_come_from_the_one_style() -> None:
    css = (Path(report.__main__.__file__).parent / "page" / "style.css").read_text()
    used = set(re.findall(r"var\(--([\w-]+)\)", css)) - {"own", "side", "mark", "tint"}
    assert used <= set(re.findall(r"--([\w-]+):", style.css_variables()))
    assert not re.findall(r"#[0-9a-fA-F]{3,8}\b(?=[\s;])", css)


def test_nothing_is_loaded_and_nothing_but_the_own_script_runs(study: Path, tmp_path: Path) -> None:
    text = write(tmp_path, study)
    page = Reader(text)
    for tag, attributes in page.found:
        for name, value in attributes.items():
            assert not name.startswith("on"), f"{tag} {name}"
            if name in ("src", "href", "action", "srcset"):
                assert (value or "").startswith(("data:image/png;base64,", "#")), f"{tag} {name}={value}"
    policy = next(a["content"] for a in page.all("meta", "http-equiv"))
    assert policy is not None and policy.startswith("default-src 'none'; img-src data:;")
    assert (
        "url(" not in text and "@import" not in text and "http://" not in text.replace("http://www.w3.org/2000/svg", "")
    )


HOSTILE = "<script>alert(1)</script>\"'&><img src=x onerror=alert(1)>\u202e\n"


def test_hostile_names_are_text(tmp_path: Path) -> None:
    more = {"threat": HOSTILE, "knows": [HOSTILE], "notes": [HOSTILE], "dataset": HOSTILE, "model": HOSTILE}
    config = {"commit": HOSTILE, "paper": HOSTILE, "command": HOSTILE}
    for k in range(2):
        fabricate(
            tmp_path / "runs" / f"</style>{k}",
            summary=more,
            config=config,
            file=HOSTILE,
            defense=HOSTILE,
            seed=k,
            trials=3,
        )
    page = Reader(write(tmp_path, tmp_path / "runs"))
    assert [tag for tag, _ in page.found].count("script") == 1
    assert not [a for _, a in page.found if "onerror" in a]
    assert any("<script>alert(1)</script>" in text for text in page.texts)


def test_pictures_of_an_audit_need_a_switch(tmp_path: Path) -> None:
    run = fabricate(tmp_path / "runs" / "one", config={"audit": {"verdict": "red"}}, file="patient7.png")
    other = fabricate(tmp_path / "runs" / "two", file="cat.png")
    text = write(tmp_path, run)
    assert "data:image" not in text.split("<body>")[1] and "patient7" not in text and "--show-victims" in text
    both = write(tmp_path, run, other)
    assert "cat.png" in both and "patient7" not in both
    assert write(tmp_path, run, show_victims=True).count('alt="truth"') >= 4


def test_the_gallery_begins_with_the_extremes_and_stores_exact_pixels(tmp_path: Path) -> None:
    run = fabricate(tmp_path / "runs" / "one", images=9)
    page = Reader(write(tmp_path, run))
    own = [text for text in page.texts if text in ("most exposed", "median", "least exposed")]
    assert own[-3:] == ["most exposed", "median", "least exposed"]
    loaded, _ = load_runs([run])
    most = max(loaded[0].rows, key=lambda row: row["psnr"])
    above = load_file(run / "reconstructions.safetensors")["truth"][most["trial"]]
    sources = [a["src"] for a in page.all("img", "alt", "truth")]
    assert sources[0] == png(above)


def test_missed_images_and_missing_pictures_are_said(tmp_path: Path) -> None:
    run = fabricate(tmp_path / "runs" / "one", psnr=9.0, images=5)
    assert "no reconstruction" in write(tmp_path, run)
    old = fabricate(tmp_path / "runs" / "two")
    (old / "reconstructions.safetensors").write_bytes(b"")
    (old / "done").write_bytes(b"")  # as earlier versions left it
    assert "missing or damaged" in write(tmp_path, old)


def test_unfinished_and_damaged_folders_are_listed_and_left_out(tmp_path: Path) -> None:
    good = fabricate(tmp_path / "runs" / "good")
    unfinished = fabricate(tmp_path / "runs" / "unfinished")
    (unfinished / "done").unlink()
    damaged = fabricate(tmp_path / "runs" / "damaged")
    (damaged / "summary.json").write_text("{")
    old = fabricate(tmp_path / "runs" / "old")
    write_json(old / "summary.json", load_runs([old])[0][0].summary | {"identified": {"share": 1}})
    seal(old, SEALED, "done")
    _, left_out = write_page([tmp_path / "runs"], tmp_path / "page.html")
    assert {path.name for path in left_out} == {"unfinished", "damaged", "old"}
    text = (tmp_path / "page.html").read_text()
    assert all(str(path) in html.unescape(text) for path in (good, unfinished, damaged, old))
    with pytest.raises(UsageError, match="no finished run"):
        write_page([unfinished], tmp_path / "other.html")
    with pytest.raises(UsageError, match="no folder"):
        write_page([good], tmp_path / "missing" / "other.html")
    assert not (tmp_path / "other.html").exists()


@pytest.mark.parametrize(
    "summary", [{"psnr": None, "images": 0}, {"identified": None}, {"null": None, "over_null": None}]
)
def test_runs_with_less_to_show_have_a_page(summary: dict[str, Any], tmp_path: Path) -> None:
    images = 0 if summary.get("images") == 0 else 3
    run = fabricate(tmp_path / "runs" / "one", images=max(images, 1), summary=summary)
    if not images:
        for name in ("rows.jsonl", "trials.jsonl"):
            (run / name).write_text("")
        (run / "done").write_bytes(b"")
    Reader(write(tmp_path, run))


def test_two_hundred_runs_stay_under_fifteen_megabytes(tmp_path: Path) -> None:
    for k in range(200):
        folder = tmp_path / "runs" / f"{k:012x}"
        if k < 2:
            fabricate(folder, images=60, size=32, points=45, local_epochs=k + 1, mode="fed")
            continue
        folder.mkdir()
        for path in (tmp_path / "runs" / f"{k % 2:012x}").iterdir():
            if path.name != "config.json":
                (folder / path.name).hardlink_to(path)
        config = json.loads((tmp_path / "runs" / f"{k % 2:012x}" / "config.json").read_text())
        config["flags"] |= {"local_epochs": k + 1}
        write_json(folder / "config.json", config)
        (folder / "done").unlink()
        seal(folder, SEALED, "done")
    page = Reader(text := write(tmp_path, tmp_path / "runs"))
    assert len(page.all("article", "data-run")) == len(page.all("tr", "data-run")) == 200
    assert len(page.all("img", "alt", "truth")) >= 600
    assert len(text.encode()) < 15_000_000


@pytest.mark.parametrize(
    ("mode", "words"),
    [
        ("grad", ["dlg"]),
        ("grad", ["dlg", "--paper", "--seed", "3", "--thresholds", "15", "25.5"]),
        ("grad", ["ig_single", "--defense", "clip(bound=1.0)+gauss(sigma=0.01)", "--iterations", "7", "--no-signed"]),
        ("fed", ["sme", "--local-epochs", "5", "--believe", "local-lr=0.02", "defense=none", "--out", "elsewhere"]),
    ],
)
def test_the_command_repeats_the_run(mode: str, words: list[str]) -> None:
    (first,) = cli.parse(words, FLAGS[mode], ATTACKS, "python main.py")
    line = cli.command_line(mode, first)
    start, (again,) = shlex.split(line)[:2], cli.parse(shlex.split(line)[2:], FLAGS[mode], ATTACKS, "python main.py")
    assert start == ["python", f"main_{mode}.py"]
    same_place = dataclasses.replace(first.flags, out=again.flags.out)
    assert (again.attack, again.flags) == (first.attack, same_place)
    assert len(shlex.split(line)) <= len(words) + 2  # nothing but what differs


def test_a_run_that_does_not_name_its_command_gets_one_that_parses(tmp_path: Path) -> None:
    folder = fabricate(
        tmp_path / "one", mode="fed", local_epochs=5, hyperparameters={"iterations": 17, "signed": False}
    )
    (run,), _ = load_runs([folder])
    words = shlex.split(command(run))
    (again,) = cli.parse(words[2:], Fed, ATTACKS, "python main.py")
    assert words[:2] == ["python", "main_fed.py"]
    assert again.flags.local_epochs == 5 and again.attack.iterations == 17 and again.attack.signed is False


def test_strengths_of_defences() -> None:
    assert strengths("gauss(sigma=0.1)") == [("gauss(sigma=…)", 0.1)]
    assert strengths("topk(share=1e-3)") == [("topk(share=…)", 0.001)]
    assert strengths("none") == []
    assert strengths("clip(bound=2.0)+gauss(sigma=0.1)") == [
        ("clip(bound=…)+gauss(sigma=0.1)", 2.0),
        ("clip(bound=2.0)+gauss(sigma=…)", 0.1),
    ]


def test_the_command_line_writes_the_page_or_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = str(fabricate(tmp_path / "runs" / "one")), tmp_path / "page.html"
    monkeypatch.setattr(sys, "argv", ["report", run, "-o", str(out)])
    report.__main__.main()
    assert capsys.readouterr().out == f"The update leaks: {out}\n" and out.stat().st_size > 10_000
    monkeypatch.setattr(sys, "argv", ["report", run, "-o", str(tmp_path / "no" / "page.html")])
    with pytest.raises(SystemExit, match="2"):
        report.__main__.main()
    said = capsys.readouterr()
    assert not said.out and said.err == f"error: --output: there is no folder {tmp_path / 'no'}\n"
    monkeypatch.setattr(sys, "argv", ["report", run, "-o", ""])
    with pytest.raises(SystemExit, match="2"):
        report.__main__.main()
    assert capsys.readouterr().err == "error: --output: name a file, such as report.html\n"
    monkeypatch.setattr(sys, "argv", ["report", run, "--to", str(tmp_path / "to")])
    report.__main__.main()
    assert "PSNR (dB)" in capsys.readouterr().out and (tmp_path / "to" / "table.md").is_file()
