"""Groups d, g and h: damaged folders of results, the report over them, and the world around a run."""

import contextlib
import functools
import io
import json
import os
import resource
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch

from experiments.abuses import damage
from experiments.abuses.harness import Case, run, start
from runner.store import Store

SMALL = ("--trials", "3", "--image-size", "16", "--jobs", "1", "--out", "@/out")
COMMANDS = {
    "grad": ("idlg", "--iterations", "5", "--restarts", "1", *SMALL),
    "fed": ("baseline", "--model", "cnn", "--client-images", "2", "--clients", "3", *SMALL),
}
HALF = ("config.json", "rows.jsonl", "trials.jsonl", "parts/00000.safetensors", "parts/00001.safetensors")
HALF += ("parts/00002.state", "reconstructions.safetensors.tmp", ".lock")
FINISHED = ("config.json", "rows.jsonl", "trials.jsonl", "reconstructions.safetensors", "summary.json", "grid.png")
FINISHED += ("done", ".lock")


class Prepared:
    """The same run twice, in both modes: finished, and stopped after two of its three trials."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.rows: dict[str, str] = {}
        add = Store.add_trial
        for mode, words in COMMANDS.items():
            for state in ("finished", "half"):
                Store.add_trial = _failing(add) if state == "half" else add  # type: ignore[method-assign]
                run_here(mode, words, root / f"{mode}-{state}")
        Store.add_trial = add  # type: ignore[method-assign]
        for mode in COMMANDS:
            self.rows[mode] = (self.folder(mode, "finished") / "rows.jsonl").read_text()

    def folder(self, mode: str, state: str, root: Path | None = None) -> Path:
        (config,) = (root or self.root / f"{mode}-{state}").glob("out/*/*/*/config.json")
        return config.parent

    def damaged(self, mode: str, state: str, edit: Callable[[Path], object]) -> Callable[[Path], None]:
        def prepare(folder: Path) -> None:
            shutil.copytree(self.root / f"{mode}-{state}" / "out", folder / "out")
            (found,) = (folder / "out").glob("*/*/*/config.json")
            edit(found.parent)

        return prepare

    def case(self, mode: str, state: str, name: str, edit: Callable[[Path], object]) -> Case:
        return Case(
            *("d", f"{mode} {state}: {name}", COMMANDS[mode], mode),
            prepare=self.damaged(mode, state, edit),
            rows=self.rows[mode],
            resumes=True,
        )

    def command(self, mode: str, name: str, inside: Callable[[], object]) -> Case:
        """A new run, in a process in which `inside` is called first."""
        return Case(
            *("d", f"{mode}: {name}", COMMANDS[mode], mode),
            rows=self.rows[mode],
            resumes=True,
            inside=inside,
        )


def warm(folder: Path) -> None:
    """Run a command of each mode in this process: forks then have its data set, its networks and its fonts."""
    for mode, words in COMMANDS.items():
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            run(mode, [word.replace("@", str(folder)) for word in words])


def run_here(mode: str, words: tuple[str, ...], folder: Path, environment: Mapping[str, str] | None = None) -> None:
    """A command in a fork of this process, in `folder`."""
    os.waitpid(start(Case("", "", words, mode, environment=environment or {}), folder), 0)


def _failing(add: Callable[..., None]) -> Callable[..., None]:
    def fail(store: Store, rows: list, record: dict, *tensors: torch.Tensor) -> None:
        if record["trial"] == 2:
            raise OSError(28, "No space left on device")
        add(store, rows, record, *tensors)

    return fail


def folders(prepared: Prepared) -> Iterator[Case]:
    """Group d."""
    for mode in COMMANDS:
        for state, files in (("half", HALF), ("finished", FINISHED)):
            for file in files:
                step = {"grad half": 1, "grad finished": 2}.get(f"{mode} {state}", 4)
                kinds = dict(list(damage.FILES.items())[::step])
                for name, how in kinds.items():
                    yield prepared.case(mode, state, f"{file} {name}", _file(file, how))
            edits = list(EDITS.items())[:: 1 if (mode, state) == ("grad", "half") else 4]
            for name, edit in edits:
                yield prepared.case(mode, state, name, edit)
        for size in (700, 1500, 3000, 5000, 9000, 20_000, 40_000):
            yield prepared.command(mode, f"no file beyond {size} bytes", limited(size))
            yield Case(
                *("d", f"{mode}: no file beyond {size} bytes, then mended", COMMANDS[mode], mode),
                prepare=_after_limit(mode, size),
                rows=prepared.rows[mode],
                codes=(0,),
            )
        yield Case("d", f"{mode}: out is a file", COMMANDS[mode], mode, prepare=lambda f: (f / "out").touch())
        yield Case("d", f"{mode}: out is a pipe", COMMANDS[mode], mode, prepare=lambda f: damage.pipe(f / "out"))
        yield Case("d", f"{mode}: out leads nowhere", COMMANDS[mode], mode, prepare=lambda f: damage.nowhere(f / "out"))


def _file(name: str, how: damage.Damage) -> Callable[[Path], None]:
    def edit(run: Path) -> None:
        if not (run / name).exists():
            (run / name).write_bytes(b"what another program wrote" * 20)
        how(run / name)

    return edit


def _lines(name: str, change: Callable[[list[dict]], list]) -> Callable[[Path], None]:
    def edit(run: Path) -> None:
        entries = change([json.loads(line) for line in (run / name).read_text().splitlines()])
        (run / name).write_text("".join(json.dumps(entry) + "\n" for entry in entries))

    return edit


def _each(name: str, key: str, value: object) -> Callable[[Path], None]:
    return _lines(name, lambda entries: [{**entries[0], key: value}, *entries[1:]])


EDITS: dict[str, Callable[[Path], object]] = {
    **{
        f"{name} with {key} {value!r}": _each(name, key, value)
        for name in ("rows.jsonl", "trials.jsonl")
        for key in ("trial", "image", "psnr", "checksum", "seconds")
        for value in (7, -1, None, "0", [0], {}, 1.5, True)
    },
    "rows reversed": _lines("rows.jsonl", lambda entries: entries[::-1]),
    "a row fewer": _lines("rows.jsonl", lambda entries: entries[1:]),
    "a row more": _lines("rows.jsonl", lambda entries: [*entries, {**entries[0], "image": 9}]),
    "rows of another trial": _lines("rows.jsonl", lambda entries: [{**row, "trial": 0} for row in entries]),
    "a record fewer": _lines("trials.jsonl", lambda entries: entries[1:]),
    "records swapped": _lines(
        "trials.jsonl", lambda entries: [{**r, "trial": 1 - r["trial"]} if r["trial"] < 2 else r for r in entries]
    ),
    "done by hand": lambda run: (run / "done").touch(),
    "nothing but done": lambda run: [
        shutil.rmtree(path) if path.is_dir() else path.unlink() for path in run.iterdir() if path.name != "done"
    ],
    "no parts": lambda run: shutil.rmtree(run / "parts", ignore_errors=True),
    "parts a file": lambda run: (shutil.rmtree(run / "parts", ignore_errors=True), (run / "parts").touch()),
    "parts elsewhere": lambda run: (
        shutil.rmtree(run / "parts", ignore_errors=True),
        (run / "parts").symlink_to("/tmp"),
    ),
    "strangers": lambda run: [(run / name).mkdir(exist_ok=True) for name in ("parts", "x", "rows.jsonl.tmp")],
}


def limited(size: int) -> Callable[[], None]:
    """As on a full disk, no file grows beyond this size."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def _after_limit(mode: str, size: int) -> Callable[[Path], None]:
    def prepare(folder: Path) -> None:
        os.waitpid(start(Case("", "", COMMANDS[mode], mode, inside=limited(size)), folder / "before"), 0)
        if (folder / "before" / "out").exists():
            (folder / "before" / "out").rename(folder / "out")
        shutil.rmtree(folder / "before")

    return prepare


def reports(prepared: Prepared) -> Iterator[Case]:
    """Group g."""
    for file in FINISHED[:-1]:
        for name, how in damage.FILES.items():
            yield Case(
                *("g", f"{file} {name}", ("@/out",), "report"),
                prepare=prepared.damaged("grad", "finished", _file(file, how)),
            )
    whole = prepared.damaged("grad", "finished", lambda run: None)
    lines: dict[str, tuple[str, ...]] = {
        "help": ("--help",),
        "nothing": (),
        "empty": ("",),
        "an unknown flag": ("--from", "x", "@/out"),
        "to a file": ("--to", "@/stdout", "@/out"),
        "to a folder below a file": ("--to", "/etc/hosts/x", "@/out"),
        "to a device": ("--to", "/dev/null", "@/out"),
        "to nothing": ("@/out", "--to"),
        "to an empty name": ("--to", "", "@/out"),
        "to a long name": ("--to", "x" * 5000, "@/out"),
        "to a folder": ("--to", "@/new/table", "@/out"),
        "to the run": ("--to", "@/out", "@/out"),
        "twice": ("--to", "@/t", "@/out", "@/out"),
        "a long name": ("x" * 5000,),
        "a device": ("/dev/zero",),
        "colours": ("\x1b[31mred",),
        "nowhere": ("@/nowhere",),
        "half a run": ("@/half",),
        "a whole and half a run": ("@/out", "@/half"),
        "both modes": ("--to", "@/t", "@/out", "@/fed"),
    }
    for name, words in lines.items():

        def prepare(folder: Path) -> None:
            whole(folder)
            shutil.copytree(prepared.root / "grad-half" / "out", folder / "half")
            shutil.copytree(prepared.root / "fed-finished" / "out", folder / "fed")

        yield Case("g", name, words, "report", prepare=prepare)


LOST = (0, 1, 2, 120)  # exit codes of a run that can say nothing: Python's own among them


def environments(prepared: Prepared) -> Iterator[Case]:
    """Group h."""
    words, rows = COMMANDS["grad"], prepared.rows["grad"]
    for encoding in ("ascii", "latin-1", "cp1252", "utf-16", "ascii:strict"):
        variables = {"PYTHONIOENCODING": encoding.partition(":")[0]}
        yield Case("h", f"a terminal of {encoding}", words, environment=variables, rows=rows)
        yield Case("h", f"help on {encoding}", ("dlg", "--help"), environment=variables)
        prepare = prepared.damaged("grad", "finished", lambda run: None)
        yield Case("h", f"report on {encoding}", ("@/out",), "report", prepare=prepare, environment=variables)
    variables = ({"HOME": "/nonexistent"}, {"HOME": ""}, {"TMPDIR": "/nonexistent"}, {"TMPDIR": "/proc"}, {"PATH": ""})
    variables += ({"COLUMNS": "1"}, {"COLUMNS": "x"}, {"OMP_NUM_THREADS": "7"}, {"CUDA_VISIBLE_DEVICES": ""})
    variables += ({"CHECKPOINTS": "/dev/null"}, {"RAY_ADDRESS": "nowhere"}, {"LANG": "C", "LC_ALL": "C"})
    for own in variables:
        yield Case("h", f"{own}", words, environment=own, rows=rows)
    for name in ("stdin", "stdout", "stderr"):
        yield Case("h", f"no {name}", words, inside=lambda name=name: setattr(sys, name, None), rows=rows)
    for name, inside in {"closed": os.close, "full": _full, "a broken pipe": _broken}.items():
        for stream in (1, 2):
            own = functools.partial(inside, stream)
            yield Case("h", f"stream {stream} {name}", words, inside=own, resumes=True, codes=LOST)
    yield Case("h", "a working directory that is gone", words, inside=_gone, codes=(2,))
    yield Case("h", "few open files", words, inside=_few_files, resumes=True)
    for limit in (1, 16, 64, 256):
        yield Case("h", f"{limit} MB of memory", words, inside=_little_memory(limit), codes=(0, 1, 2), resumes=True)
    for module in ("random.py", "torch.py", "data.py", "utils.py", "tempfile.py"):
        prepare = lambda folder, module=module: (folder / module).write_text("raise SystemExit(3)")  # noqa: E731
        yield Case("h", f"{module} in the working directory", words, prepare=prepare, rows=rows)


def _full(stream: int) -> None:
    os.dup2(os.open("/dev/full", os.O_WRONLY), stream)


def _broken(stream: int) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    os.dup2(writer, stream)


def _gone() -> None:
    (Path.cwd() / "gone").mkdir()
    os.chdir("gone")
    Path("../gone").rmdir()


def _few_files() -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (12, 12))


def _little_memory(megabytes: int) -> Callable[[], None]:
    def limit() -> None:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        allowed = used + (megabytes << 20)
        resource.setrlimit(resource.RLIMIT_AS, (allowed, allowed))

    return limit
