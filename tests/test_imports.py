"""Who may import whom. The threat model rests on it: an attack that cannot import the truth cannot use it."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from runner.experiment import SOURCE_DIRS
from tests.conftest import ROOT

# An import points to a lower line or to the right on its own line, so no two folders can import each other.
LINES = (
    ("main_audit", "main_fed", "main_grad"),
    ("experiments",),
    ("runner",),
    ("report", "evaluation"),
    ("attacks",),
    ("federated",),
    ("defenses",),
    ("data", "models"),
    ("core",),
    ("utils",),
)
DOORS = LINES[0]
FOLDERS = tuple(folder for line in LINES[1:] for folder in line)
WITHOUT_TRUTH = ("attacks", "defenses", "models")
SCORING = ("evaluation", "runner")  # what may hold the truth and a reconstruction together


def modules() -> dict[str, Path]:
    """Every module of the project by its dotted name, tests excepted."""
    files = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
    files += sorted(ROOT.glob("main_*.py"))
    names = (".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for p in files)
    return dict(zip(names, files, strict=True))


MODULES = modules()
TREES = {name: ast.parse(path.read_text()) for name, path in MODULES.items()}


def is_ours(name: str) -> bool:
    return name.split(".")[0] in (*FOLDERS, *DOORS)


def imports(module: str) -> set[str]:
    """Modules of ours that a module imports: at its top, inside functions, or by name."""
    return {name for name in _imports(TREES[module], module) if is_ours(name)}


def _imports(tree: ast.AST, module: str) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module}: relative import"
            assert node.module is not None
            for alias in node.names:  # `from attacks import dlg` names a module, `from attacks import ATTACKS` does not
                full = f"{node.module}.{alias.name}"
                yield full if full in MODULES else node.module
        elif isinstance(node, ast.Call):
            yield from _imported_by_name(node)


def _imported_by_name(call: ast.Call) -> Iterator[str]:
    """importlib.import_module("x"), __import__("x"), and Registry("kind", package="x"), which imports modules of x."""
    called = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    named = {keyword.arg: keyword.value for keyword in call.keywords}
    if called in ("import_module", "__import__"):
        argument = call.args[0] if call.args else named.get("name")
    elif called == "Registry":
        argument = call.args[1] if len(call.args) > 1 else named.get("package")
    else:
        return
    if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
        yield argument.value


def place(name: str) -> tuple[int, int]:
    """(line, position in the line) of a module's folder."""
    folder = name.split(".")[0]
    return next((i, line.index(folder)) for i, line in enumerate(LINES) if folder in line)


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_point_down_or_to_the_right(module: str) -> None:
    own = place(module)
    for name in imports(module):
        if name.split(".")[0] != module.split(".")[0]:
            assert place(name) > own, f"{module} imports {name}"


def test_core_and_utils_import_nothing_of_ours() -> None:
    for module in MODULES:
        folder = module.split(".")[0]
        if folder in ("core", "utils"):
            others = {name for name in imports(module) if name.split(".")[0] != folder}
            assert not others, f"{module} imports {others}"


def test_imports_by_name_are_read_too() -> None:
    tree = ast.parse(
        "import importlib\nimportlib.import_module('runner.run')\nR = Registry('x', package='data')\n"
        "def f():\n    from evaluation import metrics\n    import federated.client as c\n"
    )
    found = {name for name in _imports(tree, "toy") if is_ours(name)}
    assert found == {"runner.run", "data", "evaluation.metrics", "federated.client"}
    assert "attacks" in imports("attacks.base")  # its registry


def test_every_folder_with_code_has_a_line() -> None:
    tracked = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"tests"}
    assert tracked <= set(FOLDERS)


# --- attacks: one file per paper ---


def attack_files() -> list[Path]:
    return [path for path in sorted((ROOT / "attacks").glob("*.py")) if path.stem not in ("__init__", "base")]


def test_no_attack_is_imported_by_another_or_by_machinery() -> None:
    papers = {f"attacks.{path.stem}" for path in attack_files()}
    assert len(papers) > 10
    for module in MODULES:
        if module.startswith("attacks."):
            assert not imports(module) & papers - {module}, module


def test_attack_files_are_short_and_open_with_citation_link_and_equation() -> None:
    lengths = sorted(len(path.read_text().splitlines()) for path in attack_files())
    assert lengths[3 * len(lengths) // 4] <= 180 and lengths[-1] <= 200
    for path in attack_files():
        docstring = ast.get_docstring(ast.parse(path.read_text())) or ""
        assert path.stem == "baseline" or "https://" in docstring, f"{path.name} opens without a link"


# --- honesty: no attack sees truth ---


@pytest.mark.parametrize("module", [m for m in sorted(MODULES) if m.split(".")[0] in WITHOUT_TRUTH])
def test_attacks_models_and_defenses_neither_take_nor_import_truth(module: str) -> None:
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.arg):
            assert not re.fullmatch(r"truths?|true_\w+|victims?", node.arg), f"{module}, line {node.lineno}: {node.arg}"
    forbidden = {
        name for name in imports(module) if name.split(".")[0] in ("evaluation", "runner", "data", "federated")
    }
    assert not forbidden, f"{module} imports {forbidden}"


def scopes(tree: ast.Module) -> Iterator[tuple[str, set[str]]]:
    """(name, identifiers) of every function and class body that is not inside another function."""
    todo: list[ast.AST] = list(tree.body)
    while todo:
        node = todo.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield getattr(node, "name", "lambda"), _identifiers(node)
        elif isinstance(node, ast.ClassDef):
            todo += node.body
        else:
            yield "module", _identifiers(node)


def _identifiers(tree: ast.AST) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        names |= {getattr(node, key, None) for key in ("id", "arg", "attr")}
    return {name for name in names if isinstance(name, str)}


def test_only_evaluation_and_runner_hold_truth_and_reconstruction_together() -> None:
    for module, tree in TREES.items():
        if module.split(".")[0] in SCORING:
            continue
        for scope, names in scopes(tree):
            truth = {n for n in names if re.search(r"(^|_)truths?($|_)|^true_", n)}
            reconstructions = {n for n in names if re.search(r"reconstruct|^rec$", n, re.IGNORECASE)}
            assert not (truth and reconstructions), f"{module}.{scope}: {sorted(truth | reconstructions)}"


def test_evaluation_and_runner_do_hold_both() -> None:
    """The search finds what it is for."""
    together = {
        module.split(".")[0]
        for module, tree in TREES.items()
        for _, names in scopes(tree)
        if {"truth"} & names and {"reconstruction", "Reconstruction", "rec"} & names
    }
    assert "evaluation" in together


# --- one list of folders ---


def test_the_lists_of_folders_agree() -> None:
    """What a run's digest covers, what isort counts as ours, and what this test reads."""
    text = re.search(r"known-first-party = \[([^]]*)\]", (ROOT / "pyproject.toml").read_text())
    assert text is not None
    first_party = re.findall(r'"(\w+)"', text[1])
    assert sorted(first_party) == sorted(FOLDERS)
    assert sorted(SOURCE_DIRS) == sorted(set(FOLDERS) - {"experiments"})  # which change no number of a run


def test_the_doors_differ_only_in_their_sources() -> None:
    """No door parses, attacks, scores or stores."""
    for door in DOORS:
        if door in MODULES:
            used = {name.split(".")[0] for name in imports(door)}
            assert not used & {"attacks", "evaluation", "models", "report"}, f"{door}: {used}"
            assert "runner.store" not in imports(door)
            assert len(MODULES[door].read_text().splitlines()) <= 40
