"""The audit: what it runs, what it says, and with which exit code it ends."""

import itertools
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torchvision.utils import save_image

from attacks import ATTACKS
from federated.capture import MANIFEST, UPDATE, export, load_capture, read_update
from federated.simulation import GradientSource
from report.page import images
from runner import battery as battery_module
from runner import cli
from runner.battery import Battery
from runner.experiment import Experiment
from runner.flags import Grad
from runner.sources import gradient_source
from runner.subjects import Audit, subject_of
from tests.commands import in_process, lines, only_run
from tests.conftest import ROOT

TINY = ("--image-size", "16", "--device", "cpu")
# an auditor's budget in a test: attacks that take no iterations
FAST = ("--attacks", "analytic", "spear", "--minutes", "5")
KEYS = ("match", "psnr", "ssim", "mse", "label_true", "label_pred", "baseline_psnr", "class_baseline_psnr")


def audited(out: Path) -> dict[str, Any]:
    (path,) = out.glob("audit/*/audit.json")
    return json.loads(path.read_text())


def test_an_undefended_recipe_fails_and_the_recommended_one_passes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--model", "fc2", "--client-images", "4", "--trials", "2", *TINY, "--attacks", "analytic"]
    assert in_process("main_audit.py", [*flags, "--out", str(tmp_path / "a")], monkeypatch) == 1
    found = audited(tmp_path / "a")
    assert found["verdict"]["light"] == "red"
    assert "analytic" in found["verdict"]["sentence"]
    assert capsys.readouterr().out.splitlines()[0] == found["verdict"]["sentence"]
    assert found["worst_case"]["records"] == 8
    assert found["worst_case"]["recovered"] >= 6
    advice = found["recommendation"]
    assert advice["setting"] is not None
    page = next((tmp_path / "a").glob("audit/*/report.html")).read_text()
    assert found["verdict"]["sentence"] in page.split("<main>")[0], "the verdict comes first"
    order = [page.index(f'<section id="{name}"') for name in ("pictures", "worst", "attacks", "proof", "advice")]
    assert order == sorted(order)
    assert "<img" not in page, "private pictures"
    again = [*flags, "--show-victims", "--defense", advice["setting"], "--out", str(tmp_path / "b")]
    assert in_process("main_audit.py", again, monkeypatch) == 0
    defended = audited(tmp_path / "b")
    assert "safe" not in defended["verdict"]["sentence"]
    assert defended["worst_case"]["recovered"] == 0
    assert defended["control"] is None or defended["control"]["recovered"] > 0
    page = next((tmp_path / "b").glob("audit/*/report.html")).read_text()
    shown = len(re.findall(r'<span class="truth"><img src="data:image/png', page))
    assert shown == min(8, images.MOST) + 1, "each record, and the most exposed one at the top"
    assert "No leak found" in page.split("<main>")[0]
    text = next((tmp_path / "a").glob("audit/*/audit.md")).read_text()
    for heading in ("Worst case", "Recommendation", "Scope", "Attacks", "What is proven", "Reproduce"):
        assert f"## {heading}" in text
    assert "## Worst case" in text.split("## Scope")[0], "the worst case comes first"
    assert {entry["attack"] for entry in found["attacks"]} == set(ATTACKS) - {"baseline"}


def test_a_private_recipe_has_its_epsilon_beside_what_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from evaluation.guarantees import gaussian_epsilon, success_bound

    sigma = 2.0
    flags = ["--model", "fc2", "--kind", "gradient", "--trials", "2", *TINY, "--attacks", "analytic"]
    flags += ["--defense", f"dpsgd(bound=1,sigma={sigma})", "--out", str(tmp_path), "--verdict-only"]
    assert in_process("main_audit.py", flags, monkeypatch) == 0
    found = audited(tmp_path)["formal"]
    assert found["guarantee"]["epsilon"] == pytest.approx(gaussian_epsilon(1 / sigma))
    assert [b["bound"] for b in found["bounds"]] == [
        pytest.approx(success_bound(1 / n, 1 / sigma)) for n in (2, 10, 100)
    ]
    (measured,) = found["identified"]
    assert measured["bound"] == pytest.approx(success_bound(1 / measured["candidates"], 1 / sigma))
    page = next(tmp_path.glob("audit/*/report.html")).read_text().split('<section id="proof"')[1]
    assert f"epsilon {gaussian_epsilon(1 / sigma):.3g}" in page
    assert f"{success_bound(0.1, 1 / sigma):.3f}" in page


def test_the_threshold_decides_the_exit_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ["--model", "fc2", "--kind", "gradient", "--trials", "1", *TINY, "--attacks", "analytic"]
    assert in_process("main_audit.py", [*flags, "--out", str(tmp_path), "--threshold", "1"], monkeypatch) == 0
    assert audited(tmp_path)["verdict"]["light"] == "amber"


def test_a_check_that_checked_nothing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ["--model", "cnn", "--trials", "1", *TINY, "--attacks", "analytic", "--out", str(tmp_path)]
    assert in_process("main_audit.py", flags, monkeypatch) == 1
    assert "No attack ran" in audited(tmp_path)["verdict"]["sentence"]


def test_a_server_that_changes_the_model_is_assumed_on_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ["--model", "cnn", "--kind", "gradient", "--batch-size", "4", "--trials", "1", *TINY, "--attacks", "rtf"]
    flags += ["--verdict-only", "--grant", "labels"]
    assert in_process("main_audit.py", [*flags, "--out", str(tmp_path / "a")], monkeypatch) == 1
    assert "No attack ran" in audited(tmp_path / "a")["verdict"]["sentence"]
    flags += ["--threat", "malicious-architecture"]
    assert in_process("main_audit.py", [*flags, "--out", str(tmp_path / "b")], monkeypatch) == 1
    found = audited(tmp_path / "b")
    assert found["verdict"]["sentence"].startswith("A server that changes the model recovers")
    assert set(found["worst_case"]["strongest"]) == {"malicious-architecture"}
    assert found["threat_model"]["granted"] == ["labels"]
    assert found["recommendation"] is None


def test_the_time_limit_shortens_an_attack_and_then_leaves_it_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that advances one second each time it is read: twice an iteration or so."""
    seconds = itertools.count()
    flags = Audit(model="lenet", kind="gradient", trials=1, image_size=16, device="cpu")
    battery = Battery(flags, subject_of(flags))
    monkeypatch.setattr(battery_module.time, "monotonic", lambda: float(next(seconds)))
    attack = ATTACKS["ig_single"](restarts=2)
    jobs = battery._jobs(attack)
    same, changed = battery._fit(attack, jobs[0], 1e5, 1)
    assert (same, changed) == (attack, {})
    shorter, changed = battery._fit(attack, jobs[0], 100.0, 1)
    assert {k: changed[k] for k in ("iterations", "restarts")} == {"iterations": shorter.iterations, "restarts": 1}
    assert 20 <= shorter.iterations < 100
    outcome = battery.run(attack, jobs, 10.0)
    assert outcome.status == "out of time"
    assert "20 iterations need" in outcome.reason or "when its time was over" in outcome.reason
    assert battery.run(shorter, jobs, 1e5).status == "ran"


def test_an_attack_that_breaks_does_not_cost_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    flags = Audit(model="fc2", kind="gradient", trials=1, image_size=16, device="cpu", attacks=("analytic", "spear"))
    battery = Battery(flags, subject_of(flags))

    def broken(self: Any, observation: Any, rng: Any) -> Any:
        raise torch.linalg.LinAlgError("singular")

    monkeypatch.setattr(ATTACKS["spear"], "reconstruct", broken)
    found = {outcome.attack.name: outcome for outcome in battery.all()}
    assert (found["spear"].status, found["spear"].rows) == ("failed", [])
    assert "singular" in found["spear"].reason
    assert found["analytic"].status == "ran"


@pytest.fixture(scope="module")
def captured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first update of a run of main_grad.py, as files, and the images behind it."""
    folder = tmp_path_factory.mktemp("captured")
    (command,) = cli.parse(["analytic", "--model", "fc2", "--batch-size", "3", *TINY], Grad, ATTACKS, "page")
    experiment = Experiment("grad", command, gradient_source)
    assert isinstance(experiment.source, GradientSource)
    trial = next(experiment.source.trials(experiment.session()))
    export(folder / "update", trial.model, trial.update, experiment.task, trial.recipe)
    assert trial.truth is not None
    for i, (image, label) in enumerate(zip(trial.truth.examples, trial.truth.labels.tolist(), strict=True)):
        (folder / "truth" / str(label)).mkdir(parents=True, exist_ok=True)
        save_image(image, folder / "truth" / str(label) / f"{i}.png")
    return folder


def test_an_exported_update_gives_the_rows_of_the_run_in_a_fresh_process(
    captured: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ["analytic", "--model", "fc2", "--batch-size", "3", "--trials", "1", *TINY, "--out", str(tmp_path / "run")]
    assert in_process("main_grad.py", flags, monkeypatch) == 0
    expected = lines(only_run(tmp_path / "run") / "rows.jsonl")
    command = [sys.executable, str(ROOT / "main_audit.py"), "--update", str(captured / "update"), "--model", "fc2"]
    command += ["--truth", str(captured / "truth"), "--attacks", "analytic", "--out", str(tmp_path / "audit")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 1, done.stderr  # it leaks
    (path,) = (tmp_path / "audit").glob("audit/*/rows.json")
    found = json.loads(path.read_text())
    assert len(found) == len(expected) == 3
    by_victim = [sorted(([row[k] for k in KEYS] for row in side), key=str) for side in (found, expected)]
    assert by_victim[0] == by_victim[1]


def test_without_truth_reconstructions_and_agreement_are_written(
    captured: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ["--update", str(captured / "update"), "--model", "fc2", *FAST, "--out", str(tmp_path)]
    assert in_process("main_audit.py", flags, monkeypatch) == 1  # two attacks agree
    found = audited(tmp_path)
    assert found["worst_case"] is None
    assert found["agreement"]["agreed_records"] >= 2
    assert all("recovered" not in entry for entry in found["attacks"])
    (folder,) = tmp_path.glob("audit/*")
    assert {"reconstructions.safetensors", "audit.md", "rows.json"} <= {p.name for p in folder.iterdir()}
    page = (folder / "report.html").read_text()
    returned = sum(min(len(t), 16) for t in load_file(folder / "reconstructions.safetensors").values())
    assert page.count("<img") == returned > 0
    assert "2 of 3 records exposed" in page or "3 of 3 records exposed" in page
    assert '<section id="agreement"' in page
    assert 'class="truth"' not in page


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--update", "nowhere", "--model", "fc2"], ["--update", "No such file"]),
        (["--truth", "x"], ["--truth", "--update"]),
        (["--sweep", "seed=1,2"], ["--sweep", "does not apply"]),
        (["--attacks", "dgl"], ["unknown attack", "dlg"]),
        (["--model", "nofile.py:Net"], ["no file"]),
        (["--minutes", "0"], ["--minutes", "above 0"]),
        (["--threat", "evil"], ["--threat", "invalid choice"]),
    ],
)
def test_mistakes_cost_one_line(
    flags: list[str],
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert in_process("main_audit.py", [*flags, "--out", str(tmp_path / "o")], monkeypatch) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert all(word in line for word in words)
    assert not (tmp_path / "o").exists()


def test_a_capture_of_another_model_or_server_is_refused(
    captured: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    update = ["--update", str(captured / "update"), "--out", str(tmp_path)]
    assert in_process("main_audit.py", [*update, "--model", "mlp"], monkeypatch) == 2
    assert "does not fit the model" in capsys.readouterr().err
    assert (
        in_process("main_audit.py", [*update, "--model", "fc2", "--threat", "malicious-parameters"], monkeypatch) == 2
    )
    assert "broadcast already" in capsys.readouterr().err


def test_unknown_fields_are_reported_and_beliefs_replace_them(
    captured: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "unknown"
    folder.mkdir()
    for path in (captured / "update").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest |= {"num_examples": None, "recipe": {}}
    (folder / MANIFEST).write_text(json.dumps(manifest))
    flags = ["--update", str(folder), "--model", "fc2", "--attacks", "analytic", "--out", str(tmp_path / "out")]
    assert in_process("main_audit.py", [*flags, "--believe", "client-images=3"], monkeypatch) == 0
    scope = audited(tmp_path / "out")["scope"]
    assert set(scope["unknown"]) == {"model_mode", "loss", "defense", "num_examples"}
    assert scope["records_per_update"] == 3
    torch.manual_seed(0)
    assert (folder / UPDATE).exists()
    assert read_update(load_capture(folder), _fc2()).num_examples == 1


def _fc2() -> torch.nn.Module:
    from models import build

    return build("fc2", (3, 16, 16), 8)
