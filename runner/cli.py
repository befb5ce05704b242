"""The command line: parses words into commands, and prints one line for every mistake."""

import contextlib
import dataclasses
import re
import shlex
import signal
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from core.errors import UsageError
from core.hyperparameters import help_of, paper_values
from core.paths import ROOT
from core.registry import Registry
from runner.flags import Common
from utils.flags import FlagError, Parser, add_flags, as_flags, given
from utils.memory import is_out_of_memory
from utils.signals import Stopped, end_at_once, stopped_by_signals
from utils.terminal import prepare_streams, printable

F = TypeVar("F")

_MATCHING = {"--start": "--init", "--reading": "--update-model"}
_LBFGS = {**_MATCHING, "--box": "--bounded", "--stall": "--failure-threshold"}
_FEATURES = {f"--fi-{name}": f"--feature-inversion-{name}" for name in ("iterations", "lr", "tv")}
_LATENT = {
    "--generator-units": "--output-normalization",
    "--latents": "--latent-dim",
    "--spread": "--cma-std",
    "--matching": "--distance",
    "--prior": "--latent-weight",
    "--reading": "--update-model",
    "--pixels": "--comparison-iterations",
}
# flags that had another name, by attack
RENAMED: dict[str, dict[str, str]] = {
    "dlg": {**_LBFGS, "--label-start": "--label-init"},
    "idlg": _LBFGS,
    "ig_single": {"--start": "--init"},
    "ig_weight": {"--start": "--init"},
    "ig_multi": {"--start": "--init"},
    "sme": {"--start": "--init", "--correct": "--correction-interval"},
    "dlf": {"--start": "--init", "--order": "--order-prior"},
    "ggl": _LATENT,
    "gias": _LATENT,
    "trap": {
        "--rows": "--weight-init",
        "--target": "--expected-batch-size",
        "--spread": "--weight-scale",
        "--scale": "--positive-scale",
    },
    "rtf": {**_FEATURES, "--drift": "--threshold-drift", "--shift": "--brightness-shift"},
    "cpa": {
        **_FEATURES,
        "--start": "--unmixing",
        "--mi": "--independence-weight",
        "--nonneg": "--nonnegativity-weight",
        "--l1": "--l1-weight",
        "--cut": "--rank-tolerance",
    },
    "spear": {"--start": "--search", "--lengths": "--scale-from"},
}


NOT_REPEATED = ("out", "jobs", "backend", "force", "sweep")  # flags that neither change nor find a number


@dataclasses.dataclass(frozen=True)
class Command:
    """One run, fully specified: an attack with its hyperparameters, and the flags of the mode."""

    attack_name: str
    attack: Any
    flags: Any
    swept: tuple[tuple[str, str], ...] = ()


def parse(words: list[str], flags_cls: type, attacks: Registry[Any], program: str) -> list[Command]:
    """The runs a command line asks for: one, or one for each point of a sweep.

    Prints help and ends with code 0 for --help. Raises UsageError for a mistake.
    """
    if not words or words[0] in ("-h", "--help"):
        print(_overview(flags_cls, attacks, program))
        raise SystemExit(0 if words else 2)
    name, rest = words[0].replace("-", "_"), words[1:]
    first = _parse_run(name, rest, flags_cls, attacks, program)
    if sum(word == "--sweep" or word.startswith("--sweep=") for word in rest) != bool(first.flags.sweep):
        raise UsageError("`sweep` is given once, followed by FLAG=V1,V2,... [FLAG=...]")
    points = _sweep_points(first.flags.sweep)
    if points == [()]:
        return [first]
    rest = _without_sweep(rest)
    commands = []
    for point in points:
        own = dict(point).get("attack", name)
        extra = [_as_flag(key, value) for key, value in point if key != "attack"]
        command = _parse_run(own.replace("-", "_"), rest + extra, flags_cls, attacks, program)
        commands.append(dataclasses.replace(command, swept=point))
    return commands


def command_line(mode: str, command: Command) -> str:
    """The words that repeat one run: every flag and hyperparameter that is not at its default.

    Where results are written and how fast is left out. A value of None cannot be typed and is left out as well.
    """
    words = ["python", f"main_{mode}.py", command.attack_name]
    attack_cls, flags = type(command.attack), command.flags
    base = paper_values(attack_cls) if flags.paper else attack_cls()
    for values, defaults, skipped in ((command.attack, base, ()), (flags, type(flags)(), NOT_REPEATED)):
        for field in dataclasses.fields(values):
            value, flag = getattr(values, field.name), f"--{field.name.replace('_', '-')}"
            if value == getattr(defaults, field.name) or value is None or field.name in skipped:
                continue
            if isinstance(value, bool):
                words.append(flag if value else f"--no-{flag[2:]}")
            else:
                words += [flag, *map(str, value if isinstance(value, tuple) else [value])]
    return shlex.join(words)


def run_script(flags_cls: type[F], run: Any, description: str | None = None) -> None:
    """A script of experiments/: its flags are parsed and checked, and every mistake is one line."""
    with user_errors():
        parser = Parser(prog=sys.argv[0], description=description)
        add_flags(parser, flags_cls, _help, show=_show)
        try:
            found = given(flags_cls, parser.parse(sys.argv[1:]))
        except FlagError as error:
            raise UsageError(str(error)) from None
        run(flags_cls(**found))


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """End a command with one line: exit code 2 for a mistake of the user, 130 for Ctrl-C, 143 for SIGTERM."""
    prepare_streams()
    try:
        with stopped_by_signals():
            yield
    except UsageError as error:
        fail(as_flags(str(error)))
    except OSError as error:  # a full disk, a folder that was removed
        where = f" ({error.filename})" if error.filename else ""
        fail(f"{error.strerror or error}{where}; once this is mended, the same command continues the run")
    except BrokenProcessPool:
        line = "error: a worker process died (out of memory?); the same command continues the run, --jobs 1 needs less"
        print(line, file=sys.stderr)
        raise SystemExit(1) from None
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        fail("there is not enough memory: lower the size of what the flags ask for, or `jobs`")
    except KeyboardInterrupt as stop:
        with contextlib.suppress(OSError):  # the terminal is gone
            print("\ninterrupted: the same command continues the run", file=sys.stderr, flush=True)
        if isinstance(stop, Stopped):
            end_at_once(128 + stop.number)
        raise SystemExit(128 + signal.SIGINT) from None


def fail(message: str) -> NoReturn:
    """One line on standard error, exit code 2."""
    print(f"error: {printable(message)}", file=sys.stderr)
    raise SystemExit(2)


def choices(text: str) -> str:
    """A help text with the names that its placeholders stand for."""
    if "{" not in text:
        return text
    import data
    import models
    from core.protocol import LOSSES
    from defenses.base import DEFENSES

    names: dict[str, Any] = {
        "datasets": data.DATASETS,
        "models": models.MODELS,
        "losses": LOSSES,
        "defenses": DEFENSES,
    }
    for key, registry in names.items():
        text = text.replace("{" + key + "}", ", ".join(registry))
    return text


def _help(cls: type, field: Any) -> str:
    return choices(help_of(cls, field))


def _show(default: Any) -> str:
    """A default as --help prints it; a path below this repository is relative to it."""
    inside = isinstance(default, Path) and default.is_relative_to(ROOT)
    return str(default.relative_to(ROOT) if inside else default)


def _parser(name: str, flags_cls: type, attack_cls: type, program: str) -> Parser:
    parser = Parser(usage=f"{program} {name} [flags]", description=attack_cls.__doc__)
    add_flags(parser.add_argument_group(f"hyperparameters of {name}"), attack_cls, _help, show=_show)
    add_flags(parser.add_argument_group("experiment"), flags_cls, _help, switches_only=True, show=_show)
    return parser


def _parse_run(name: str, words: list[str], flags_cls: type, attacks: Registry[Any], program: str) -> Command:
    attack_cls = attacks.find(name)
    clash = {f.name for f in dataclasses.fields(flags_cls)} & {f.name for f in dataclasses.fields(attack_cls)}
    if clash:
        raise UsageError(f"attacks/{name}.py has hyperparameters named like flags: {', '.join(sorted(clash))}")
    _refuse_renamed(name, words)
    try:
        found = _parser(name, flags_cls, attack_cls, program).parse(words)
    except FlagError as error:
        raise UsageError(str(error)) from None
    flags: Common = flags_cls(**given(flags_cls, found))
    attack = paper_values(attack_cls) if flags.paper else attack_cls()
    return Command(name, dataclasses.replace(attack, **given(attack_cls, found)), flags)


def _refuse_renamed(attack: str, words: list[str]) -> None:
    """Raise UsageError for a flag that has a new name."""
    renamed = RENAMED.get(attack, {})
    for word in words:
        name = word.partition("=")[0].replace("_", "-")
        if name in renamed:
            raise UsageError(f"{name} is now {renamed[name]}")


def _sweep_points(sweep: tuple[str, ...]) -> list[tuple[tuple[str, str], ...]]:
    """("lr=1,2", "seed=0,1") -> every combination as (flag, value) pairs, in order; [()] without a sweep."""
    points: list[tuple[tuple[str, str], ...]] = [()]
    for axis in sweep:
        flag, equals, values = axis.partition("=")
        flag = flag.lstrip("-").replace("_", "-")
        each = _split_values(values)
        if not equals or not flag or not all(each):
            raise UsageError(f"`sweep` takes FLAG=V1,V2,..., not {axis!r}")
        if flag in ("sweep", "out", "jobs", "force", "paper", "help"):
            raise UsageError(f"`sweep` cannot take {flag}: it is not a number or choice of the experiment")
        if flag in (key for key, _ in points[0]):
            raise UsageError(f"`sweep` names {flag} twice: give all its values at once")
        points = [(*point, (flag, value)) for point in points for value in each]
    return points


def _split_values(values: str) -> list[str]:
    """Values at the commas outside parentheses."""
    return re.split(r",(?![^()]*\))", values)


def _as_flag(flag: str, value: str) -> str:
    """A point's flag; switches are swept by true and false."""
    if value.lower() in ("true", "false"):
        return f"--{flag}" if value.lower() == "true" else f"--no-{flag}"
    return f"--{flag}={value}"


def _without_sweep(words: list[str]) -> list[str]:
    """The words without --sweep and the FLAG=... that follow it."""
    rest, inside = [], False
    for word in words:
        inside = word == "--sweep" or (inside and not word.startswith("-"))
        if not inside and not word.startswith("--sweep="):
            rest.append(word)
    return rest


def _overview(flags_cls: type, attacks: Mapping[str, Any], program: str) -> str:
    width = max(map(len, attacks))
    parser = Parser(prog=program, usage=f"{program} ATTACK [flags]", add_help=False)
    add_flags(parser.add_argument_group("flags of every attack"), flags_cls, _help, switches_only=True, show=_show)
    lines = [
        f"Attacks in the {(flags_cls.__doc__ or '').removeprefix('Flags of the ').rstrip('.')}:",
        *(f"  {name:<{width}}  {cls.citation}" for name, cls in attacks.items()),
        "",
        f"`{program} ATTACK --help` also lists the attack's own hyperparameters.",
    ]
    broken = getattr(attacks, "broken", {})
    lines += [f"attacks/{name}.py cannot be imported: {error}" for name, error in broken.items()]
    usage, _, rest = parser.format_help().partition("\n\n")
    return "\n\n".join([usage, "\n".join(lines), rest.strip()])
