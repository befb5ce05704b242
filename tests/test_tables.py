"""Records of tables: how they are read, encoded and scored, and that linear attacks are exact on them."""

import json
from pathlib import Path

import pytest
import torch

import data
from attacks import ATTACKS
from core.domain import Column, TabularDomain
from core.protocol import Batch, Observation, Recipe, Reconstruction, Task
from core.rng import stream
from evaluation.baselines import Baselines
from evaluation.candidates import Candidates, Pool
from evaluation.evaluator import ScoringContext
from evaluation.records import TOLERANCE, cells_right
from evaluation.scoring import scoring_of
from federated.client import gradient
from models import build
from tests.commands import in_process, only_run

STATS = data.load("photostats", base_datadir=Path("unused"), victims="tuning")
DOMAIN = TabularDomain((4,), (Column("age", (), 40.0, 10.0, 0.0, 100.0), Column("work", ("a", "b", "c"))))


def observe(n: int, trial: int) -> tuple[Batch, Observation]:
    model = build("fc2", STATS.task.domain.shape, 8, rng=stream(0, "model"))
    order = torch.randperm(len(STATS.private), generator=stream(0, "data"))
    truth, recipe = STATS.private.take(order[trial * n : (trial + 1) * n]), Recipe(n)
    update = gradient(model, truth, STATS.task, recipe, stream(0, "client"))
    return truth, Observation(STATS.task, recipe, model, update, STATS.public.take(range(300)))


@pytest.mark.parametrize(("name", "n"), [("analytic", 1), ("spear", 6), ("cpa", 6)])
def test_records_below_the_rank_are_exact_in_five_of_five_batches(name: str, n: int) -> None:
    for trial in range(5):
        truth, observation = observe(n, trial)
        rec = ATTACKS[name]().reconstruct(observation, torch.Generator().manual_seed(0))
        distances = torch.cdist(truth.examples.double(), rec.examples.double())
        assert distances.min(1).values.max() < 1e-2


def test_cells_are_rendered_and_compared_by_column() -> None:
    x = torch.tensor([[0.5, 0.0, 1.0, 0.0]])
    assert DOMAIN.render(x[0]) == ("45", "b")
    near = torch.tensor([[0.5 + 0.9 * TOLERANCE, 0.2, 0.4, 0.3], [0.5 + 1.1 * TOLERANCE, 0.6, 0.5, 0.0]])
    assert cells_right(DOMAIN, x, near).tolist() == [[[True, True], [False, False]]]
    assert DOMAIN.typical(torch.tensor([[1.0, 0, 1, 0], [3.0, 0, 1, 0], [2.0, 1, 0, 0]])).tolist() == [2, 0, 1, 0]


def test_a_tabular_domain_keeps_what_domains_promise() -> None:
    rng = torch.Generator().manual_seed(0)
    wild = 5 * torch.randn(50, 4, generator=rng, dtype=torch.float64)
    valid = DOMAIN.project(wild)
    assert torch.equal(DOMAIN.project(valid), valid)
    assert (valid[:, 0].min(), valid[:, 0].max()) == (-4, 6)
    mapped = DOMAIN.from_unbounded(wild)
    assert torch.equal(DOMAIN.project(mapped), mapped)
    torch.testing.assert_close(DOMAIN.from_unbounded(torch.zeros(4)), DOMAIN.middle(torch.zeros(4)))
    inside = 0.8 * valid + 0.2 * DOMAIN.middle(valid)
    torch.testing.assert_close(DOMAIN.from_unbounded(DOMAIN.to_unbounded(inside)), inside)
    start = DOMAIN.init(3, rng)
    assert (start - DOMAIN.middle(start)).abs().max() < 0.1
    assert DOMAIN.regularizer(DOMAIN.middle(start)[None]) == pytest.approx(0, abs=1e-12)


def test_records_are_scored_beside_mean_and_mode() -> None:
    public = Batch(torch.tensor([[0.0, 1, 0, 0], [0.2, 1, 0, 0]]), torch.tensor([0, 1]))
    pool = Pool(torch.zeros(150).long(), lambda i: torch.stack([i / 30 - 2, *(3 * [i * 0.0 + 1])], 1))
    context = ScoringContext(Task(DOMAIN, 2), Baselines(public, DOMAIN.typical), candidates=Candidates([pool], 0))
    truth = Batch(torch.tensor([[1.0, 0, 1, 0], [0.1, 1, 0, 0]]), torch.tensor([0, 0]))
    rec = Reconstruction(torch.tensor([[0.2, 0.9, 0, 0], [1.0, 0, 0.8, 0.1]]))
    rows, rebuilt, record = scoring_of(DOMAIN).score(truth, rec, context)
    assert [row["match"] for row in rows] == [1, 0]
    assert [row["cells_right"] for row in rows] == [1, 1]
    assert [row["baseline_cells_right"] for row in rows] == [0, 1]
    assert [row["identified"] for row in rows] == [True, True]
    assert torch.equal(rebuilt, rec.examples[[1, 0]])
    assert record["null"]["cells_right"][0] < 0.9
    summary = scoring_of(DOMAIN).summarize(
        [{**row, "trial": 0} for row in rows], [{**record, "trial": 0, "seconds": 0.0}]
    )
    assert summary["columns_right"] == [1, 1]
    assert summary["baseline_columns_right"] == [0.5, 0.5]
    rows, _, _ = scoring_of(DOMAIN).score(truth, Reconstruction(torch.full((1, 4), torch.nan)), context)
    assert [row["match"] for row in rows] == [None, None]
    assert [row["cells_right"] for row in rows] == [0, 1]


def csv_file(folder: Path) -> Path:
    rows = [f"{20 + i % 60},{'abc'[i % 3]},{i},{'yes' if i % 2 else 'no'}" for i in range(80)]
    (folder / "people.csv").write_text("\n".join(["age,work,number,rich", *rows, "1,,2,no", rows[0]]) + "\n")
    return folder / "people.csv"


def test_a_csv_file_and_its_schema(tmp_path: Path) -> None:
    path = csv_file(tmp_path)
    auto = data.load("csv", base_datadir=path)
    assert [c.name for c in auto.task.domain.columns] == ["age", "number", "work"]
    assert auto.class_names == ("no", "yes")
    assert len(auto.private) + len(auto.public) + len(auto.test) == 80  # no copies, no empty cells
    row = auto.private.take([0])
    age, number, work = auto.task.domain.render(row.examples[0])
    i = round(float(number))
    assert (round(float(age)), work) == (20 + i % 60, "abc"[i % 3])
    (tmp_path / "schema.json").write_text(json.dumps({"label": "work", "numbers": ["age"], "categories": ["rich"]}))
    own = data.load("csv", base_datadir=path, schema=str(tmp_path / "schema.json"))
    assert own.task.domain.shape == (3,)
    assert own.class_names == ("a", "b", "c")
    public = own.public.take(range(len(own.public))).examples[:, 0]
    assert abs(public.mean()) < 1e-5
    assert abs(public.std() - 1) < 1e-5


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("spear --dataset csv --model fc2 --base-datadir /nowhere.csv", "cannot read --base-datadir /nowhere.csv"),
        ("spear --dataset csv --model fc2 --base-datadir PATH --schema nothing.json", "write auto, or a JSON file"),
        ("spear --dataset csv --model lenet --base-datadir PATH", "--model lenet does not take rows of a table"),
        ("rtf --dataset photostats --model fc2", "rtf does not reconstruct records"),
        ("dager --dataset photostats --model fc2", "dager does not reconstruct records"),
        ("spear --dataset photos --model fc2 --schema auto", "--schema does not apply to --dataset photos"),
    ],
)
def test_what_does_not_apply_to_records_is_one_line(
    flags: str, message: str, tmp_path: Path, monkeypatch, capsys
) -> None:
    words = flags.replace("PATH", str(csv_file(tmp_path))).split()
    assert in_process("main_grad.py", [*words, "--out", str(tmp_path / "out")], monkeypatch) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_missing_scikit_learn_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.tables.find_spec", lambda name: None)
    with pytest.raises(data.base.UsageError, match="pip install scikit-learn"):
        data.load("cancer", base_datadir=Path("unused"))


def test_a_run_on_records(tmp_path: Path, monkeypatch) -> None:
    flags = [
        "spear",
        *["--dataset", "photostats", "--model", "fc2", "--batch-size", "4", "--trials", "2", "--jobs", "1"],
    ]
    assert in_process("main_grad.py", [*flags, "--out", str(tmp_path)], monkeypatch) == 0
    run = only_run(tmp_path)
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["domain"], summary["images"], summary["verdict"]) == ("table", 8, "leaks")
    assert summary["exact"]["share"] == 1
    assert len(summary["columns_right"]) == len(STATS.task.domain.columns)
    assert (run / "rebuilt.md").read_text().count("| red mean") == 1 + 8
