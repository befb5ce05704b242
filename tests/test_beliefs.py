"""The attacker's recipe may differ from the client's: nothing crashes, and the observation says what is believed."""

import json
from pathlib import Path

import pytest

from attacks import ATTACKS
from core.errors import UsageError
from core.protocol import Recipe
from runner import beliefs, cli
from runner.experiment import Experiment
from runner.flags import Fed
from runner.sources import federated_source
from tests.commands import in_process, only_run

BELIEFS = ("local-lr=0.5", "batch-size=1", "local-epochs=3", "defense=clip=0.1", "client-images=3", "model-mode=train")


def experiment(*words: str) -> Experiment:
    (command,) = cli.parse(["dlg", "--client-images", "2", "--image-size", "16", *words], Fed, ATTACKS, "page")
    return Experiment("fed", command, federated_source)


def test_beliefs_replace_fields_of_the_recipe_and_the_number_of_examples() -> None:
    believed = beliefs.parse(BELIEFS)
    recipe = believed.about(Recipe(2, lr=0.01))
    assert (recipe.lr, recipe.batch_size, recipe.local_epochs, recipe.model_mode) == (0.5, 1, 3, "train")
    assert recipe.defense == "clip(bound=0.1)"
    assert believed.num_examples == 3


def test_the_client_trains_by_the_true_recipe_and_the_observation_holds_the_believed_one() -> None:
    plain, wrong = experiment(), experiment("--believe", *BELIEFS)
    true, believed = (next(e.jobs_of(e.session(), set())).observation for e in (plain, wrong))
    assert all((true.update.tensors[k] == v).all() for k, v in believed.update.tensors.items())
    assert (true.recipe.lr, believed.recipe.lr) == (0.01, 0.5)
    assert (true.update.num_examples, believed.update.num_examples) == (2, 3)
    assert plain.folder != wrong.folder


@pytest.mark.parametrize(("attack", "belief"), [*(("dlg", b) for b in BELIEFS[1:]), ("sme", BELIEFS[4])])
def test_a_wrong_belief_ends_in_rows(attack: str, belief: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = [attack, "--model", "cnn", "--image-size", "16", "--trials", "1", "--jobs", "1", "--iterations", "4"]
    flags += ["--client-images", "2", "--local-epochs", "2", "--believe", belief, "--out", str(tmp_path)]
    assert in_process("main_fed.py", flags, monkeypatch) == 0
    assert json.loads((only_run(tmp_path) / "config.json").read_text())["flags"]["believe"] == [belief]


@pytest.mark.parametrize(
    "word", ["lr=1", "local-lr", "local-lr=-1", "local-lr=x", "client-optimizer=lion", "defense=blur=1"]
)
def test_an_impossible_belief_is_refused(word: str) -> None:
    with pytest.raises(UsageError):
        beliefs.parse([word])


def test_granted_labels_and_a_wrong_number_contradict_each_other() -> None:
    with pytest.raises(UsageError, match="grant=labels"):
        experiment("--believe", "client-images=3", "--grant", "labels")
