"""Random damage to every file of a results folder and to every input file, from a seed."""

import functools
import random
from collections.abc import Iterator
from pathlib import Path

from experiments.abuses import damage, inputs
from experiments.abuses.harness import Case
from experiments.abuses.runs import Prepared

STATES = (("grad", "half"), ("grad", "finished"), ("fed", "half"), ("fed", "finished"))


def cases(prepared: Prepared, count: int, seed: int) -> Iterator[Case]:
    """`count` damaged folders of results, and half as many damaged inputs."""
    for number in range(count):
        mode, state = STATES[number % len(STATES)]
        edit = functools.partial(damage_some, seed=f"{seed} {number}")
        yield prepared.case(mode, state, f"fuzz {seed} {number}", edit)
    for number in range(count // 2):
        how = functools.partial(_anything, seed=f"{seed} input {number}")
        yield INPUTS[number % len(INPUTS)](f"fuzz {seed} {number}", how)


def damage_some(folder: Path, seed: str) -> list[str]:
    """Damage one to three files below a folder; returns which, and how."""
    rng = random.Random(seed)
    done = []
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
        if files:
            path = rng.choice(files)
            done.append(f"{path.name}: {damage.anything(rng, path)}")
    return done


def _anything(path: Path, seed: str) -> str:
    return damage.anything(random.Random(seed), path)


def _image(name: str, how: damage.Damage) -> Case:
    def prepare(folder: Path) -> None:
        how(inputs.tree(folder))

    return Case("b", name, inputs.TREE, prepare=prepare)


def _jpeg(name: str, how: damage.Damage) -> Case:
    return Case("b", name, inputs.TREE, prepare=functools.partial(inputs._image, form="JPEG", mode="RGB", how=how))


def _tiff(name: str, how: damage.Damage) -> Case:
    return Case("b", name, inputs.TREE, prepare=functools.partial(inputs._image, form="TIFF", mode="RGB", how=how))


def _weights(name: str, how: damage.Damage, suffix: str) -> Case:
    words = (*inputs.BASE, "--weights", f"@/w.{suffix}")
    return Case("c", name, words, prepare=functools.partial(inputs._weights, suffix=suffix, how=how))


def _cifar(name: str, how: damage.Damage) -> Case:
    words = (*inputs.BASE, "--dataset", "cifar10", "--base-datadir", "@/data")
    return Case("c", name, words, prepare=functools.partial(inputs._cifar, how=how))


def _generator(name: str, how: damage.Damage) -> Case:
    words = ("ggl", *inputs.BASE[1:], "--iterations", "3", "--restarts", "1", "--comparison-iterations", "0")
    words += ("--latent-dim", "4", "--generator-file", "@/g")

    def edit(folder: Path) -> None:
        how(sorted(folder.iterdir())[hash(name) % 2 + 1])

    return Case("e", name, words, prepare=functools.partial(inputs._generator, edit=edit))


INPUTS = (
    *(_image, _jpeg, _tiff, _cifar, _generator),
    functools.partial(_weights, suffix="pt"),
    functools.partial(_weights, suffix="safetensors"),
)
