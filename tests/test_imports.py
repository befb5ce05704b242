"""Who may import whom. The threat model rests on it: an attack that cannot import the truth cannot peek."""

import ast
from pathlib import Path

import pytest

from tests.conftest import ROOT

ROOMS = ("attacks", "data", "defenses", "federated", "models", "utils")
LIBRARIES = {
    "attacks.adam",
    "attacks.base",
    "attacks.common",
    "attacks.features",
    "attacks.ica",
    "attacks.labels",
    "attacks.lbfgs",
    "attacks.latent",
    "attacks.linear",
    "attacks.sparsity",
}  # of the attacks' room, no attack themselves

ALLOWED = {
    "federated.wire": set(),
    "utils.cli": set(),
    "utils.results": set(),
    "utils.report": set(),
    "utils.evaluator": {"federated.wire"},
    "federated": {"federated.wire", "defenses"},
    "attacks": {*LIBRARIES, "federated.wire", "utils.cli", "models"},
    "models": {"federated.wire", "models"},
    "data": {"federated.wire", "data"},
    "defenses": {"federated.wire", "defenses"},
    "utils.backends": {"attacks.base", "federated.wire", "utils.cli", "utils.memory", "utils.results", "utils.workers"},
    "utils.workers": {"utils.cli"},
    "utils.run": set(ROOMS) - {"defenses"},
}


def modules() -> list[tuple[str, Path]]:
    files = [p for room in ROOMS for p in sorted((ROOT / room).rglob("*.py"))]
    return [(".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"), p) for p in files]


def imported(path: Path) -> set[str]:
    """Modules of ours a file names in an import, lazy ones included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
            if node.module in ROOMS:  # from attacks import dlg
                names = {f"{node.module}.{alias.name}" for alias in node.names}
                found |= {n if (ROOT / Path(*n.split("."))).with_suffix(".py").exists() else node.module for n in names}
            else:
                found.add(node.module)
    return {name for name in found if name.split(".")[0] in (*ROOMS, "main_grad", "main_fed")}


def rule(module: str) -> set[str]:
    return ALLOWED[module] if module in ALLOWED else ALLOWED[module.split(".")[0]]


@pytest.mark.parametrize(("module", "path"), modules(), ids=[name for name, _ in modules()])
def test_a_room_imports_only_what_it_may(module: str, path: Path) -> None:
    room = module.split(".")[0]
    for name in imported(path) - {module, room}:
        permitted = any(name == a or name.startswith(a + ".") for a in rule(module))
        assert permitted, f"{module} imports {name}"


def test_no_attack_imports_another() -> None:
    for module, path in modules():
        if module.startswith("attacks."):
            assert not {n for n in imported(path) if n.startswith("attacks.")} - LIBRARIES, module


def test_the_mains_differ_only_in_their_observations() -> None:
    """Neither page parses, attacks, scores or stores."""
    for page in ("main_grad.py", "main_fed.py"):
        names = imported(ROOT / page)
        assert not {n for n in names if n.startswith(("attacks", "utils.evaluator", "utils.results", "models"))}, names
