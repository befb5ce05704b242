"""python killer.py KILLS OUT page.py flags: runs a command to its end, then again, killed KILLS times on the way.

States are saved after every step, and each kill comes shortly after a save. Runs are forked from a process that has
run the command before, so that a kill costs no start-up. Results go to OUT/whole and OUT/killed. Prints the number of
kills that hit a run under way.
"""

import contextlib
import os
import random
import runpy
import signal
import sys
import time
from pathlib import Path

from runner import store


def run(page: str, flags: list[str]) -> None:
    sys.argv = [page, *flags]
    with contextlib.suppress(SystemExit):
        runpy.run_path(page, run_name="__main__")


def stamps(folder: Path) -> set[tuple[Path, int]]:
    """Saved states, and when they were written."""
    found = set()
    for path in folder.rglob("*.state"):
        with contextlib.suppress(FileNotFoundError):
            found.add((path, path.stat().st_mtime_ns))
    return found


def killed(page: str, flags: list[str], out: Path, wait: float) -> bool:
    """Kill a run `wait` seconds after it has saved a state; whether it had not finished before."""
    before = stamps(out)
    child = os.fork()
    if not child:
        run(page, flags)
        os._exit(0)
    while not stamps(out) - before:
        if os.waitpid(child, os.WNOHANG)[0]:
            return False
        time.sleep(0.005)
    time.sleep(wait)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return True


def main() -> None:
    kills, out, page, *flags = sys.argv[1:]
    store.SAVE_EVERY = 0.0
    run(page, [*flags, "--out", f"{out}/whole"])
    rng = random.Random(0)
    again = [*flags, "--out", f"{out}/killed"]
    print(sum(killed(page, again, Path(out, "killed"), rng.uniform(0, 0.05)) for _ in range(int(kills))))
    run(page, again)


if __name__ == "__main__":
    main()
