"""Says whether this Python meets a requirements file, and installs what is missing. env.sh calls it.

python requirements_met.py FILE                  exit code 0: met; 3: not met
python requirements_met.py --install FILE VENV   installs what is missing; prints the Python that has it; 2: refused

--install changes the environment that this Python belongs to. It never changes a system Python: it makes VENV from it.
The file needs the standard library only, and runs on Python 3.8, so that an old Python can say that it is too old.
"""

import os
import re
import subprocess
import sys

LEAST = (3, 10)
NOT_MET = 3
SAFE = {"PYTHONSAFEPATH": "1"}  # -m and -c import nothing from the current directory (Python 3.11 or newer)
LINE = re.compile(r"([\w.-]+)\s*((?:(?:>=|<=|==|!=|>|<)\s*\d[\d.]*[\s,]*)*)")
BOUND = re.compile(r"(>=|<=|==|!=|>|<)\s*([\d.]+)")


def say(line):
    print(line, file=sys.stderr, flush=True)


def refuse(line):
    say(line)
    sys.exit(2)


# ---- what is missing


def release(version):
    """The numbers of a version. A build such as 2.13.0+cpu or 2.9.0a0+git counts as its release."""
    numbers = [int(n) for n in re.match(r"\d+(?:\.\d+)*", version).group().split(".")]
    return numbers + [0] * (6 - len(numbers))


def requirements(path):
    """(name, [(operator, version), ...], line) for each line of a requirements file and of the files it includes."""
    with open(path, encoding="utf-8") as file:
        lines = [line.split("#")[0].strip() for line in file]
    for line in filter(None, lines):
        if line.startswith("-r "):
            yield from requirements(os.path.join(os.path.dirname(path), line[3:].strip()))
            continue
        read = LINE.fullmatch(line)
        if not read:
            refuse(f"{path}: {line!r} is not a name with bounds.")
        yield read.group(1), BOUND.findall(read.group(2)), line


def installed(name):
    """The version of a package, or None. Also None if pip was stopped while it wrote the package."""
    from importlib import metadata

    try:
        return metadata.version(name) or None
    except (metadata.PackageNotFoundError, KeyError):
        return None


def within(version, bounds):
    have = release(version)
    for operator, bound in bounds:
        than = release(bound)
        if not {
            ">=": have >= than,
            "<=": have <= than,
            "==": have == than,
            "!=": have != than,
            ">": have > than,
            "<": have < than,
        }[operator]:
            return False
    return True


def missing(path):
    """The lines of a requirements file that this Python does not meet."""
    versions = ((installed(name), bounds, line) for name, bounds, line in requirements(path))
    return [line for version, bounds, line in versions if version is None or not within(version, bounds)]


# ---- installation


def environment():
    """The folder of the virtual or conda environment that this Python belongs to; None for a system Python."""
    conda = os.path.isdir(os.path.join(sys.prefix, "conda-meta"))
    return sys.prefix if conda or sys.prefix != sys.base_prefix else None


def lock(path):
    """Waits until no other run installs. The lock ends with this process and those given it, however they end."""
    import fcntl

    file = os.open(path, os.O_RDWR)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        say("Another run is installing the requirements: waiting for it.")
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError:
        pass  # a file system without locks
    return file


def call(*command, held, **variables):
    """Runs a command that keeps the lock, with its output on standard error. True if it succeeds."""
    return subprocess.call(command, stdout=sys.stderr, pass_fds=[held], env={**variables, **os.environ, **SAFE}) == 0


def works(python, code=""):
    try:
        return subprocess.call([python, "-c", code], stderr=subprocess.DEVNULL, env={**os.environ, **SAFE}) == 0
    except OSError:
        return False


def make(venv, held):
    version = "{}.{}".format(*sys.version_info)
    if not works(sys.executable, "import ensurepip, venv"):
        refuse(
            f"{sys.executable} cannot make a virtual environment: it has no venv or no ensurepip (Debian and Ubuntu: "
            f"apt install python{version}-venv). Or run with PYTHON=/path/to/the/python of an environment you have."
        )
    base = os.path.realpath(sys.executable)  # sys.executable may be a link in the folder that --clear empties
    say(f"Making {venv} from {base} (Python {version}).")
    if not call(base, "-m", "venv", "--clear", venv, held=held):
        refuse(f"{base} could not make {venv}: its error is above. Running again starts afresh.")


def make_pip(home, held):
    import shutil
    import sysconfig

    site = sysconfig.get_paths()["purelib"]
    for name in os.listdir(site):  # ensurepip takes a half-written pip for a whole one
        if re.fullmatch(r"pip|pip-.*\.dist-info", name):
            shutil.rmtree(os.path.join(site, name))
    if not call(sys.executable, "-m", "ensurepip", "--default-pip", held=held):
        refuse(f"{home} has no pip and none could be put there: its error is above.")


def install(path, venv):
    root = os.path.dirname(venv)
    try:
        held = lock(os.path.join(root, "requirements.txt"))
    except OSError:
        refuse(f"{root} is not writable: run with PYTHON=/path/to/a/python that has {path}.")
    home = environment()
    if home is None:
        python = os.path.join(venv, "bin", "python")
        if not (os.path.exists(os.path.join(venv, "pyvenv.cfg")) and works(python)):
            make(venv, held)
        os.execv(python, [python, "-B", os.path.abspath(__file__), "--install", path, venv])  # it locks again
    lines = missing(path)  # none, if the run that this one waited for has installed them
    if lines:
        cuda = " (torch with CUDA, the default on Linux x86-64, is about 3 GB to download and 6 GB on disk)"
        size = cuda if any(line.startswith("torch") for line in lines) else ""
        say(f"Installing into {home}: {', '.join(lines)}{size}.")
        say("To use an environment you have instead, stop this and run with PYTHON=/path/to/its/python.")
        if not installed("pip") or not works(sys.executable, "import pip"):
            make_pip(home, held)
        bar = "on" if sys.stderr.isatty() and not os.environ.get("CI") else "off"
        pip = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "-r", path]
        if not call(*pip, held=held, PIP_PROGRESS_BAR=bar):
            refuse(f"pip could not install {path} into {home}: its last error is above. Running again continues.")
        say("Installed.")
    print(sys.executable)


def main():
    if sys.argv[1] != "--install":
        sys.exit(NOT_MET if sys.version_info < LEAST or missing(sys.argv[1]) else 0)
    if sys.version_info < LEAST:
        version, least = "{}.{}".format(*sys.version_info), "{}.{}".format(*LEAST)
        refuse(
            f"{sys.executable} is Python {version}, and {least} or newer is needed: install one and run again with "
            "PYTHON=/path/to/python3.12 (a .venv made from an old one has to be removed first)."
        )
    install(*sys.argv[2:])


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(2)
