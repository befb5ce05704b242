"""Ways to damage a file: what a kill, a full disk, a loss of power, a careless edit or a stranger may leave."""

import os
import random
import socket
from collections.abc import Callable
from pathlib import Path

Damage = Callable[[Path], object]


def cut(share: float) -> Damage:
    return lambda path: os.truncate(path, int(share * path.stat().st_size))


def flip(share: float) -> Damage:
    """One bit of the byte at this share of the file."""

    def damage(path: Path) -> None:
        content = bytearray(path.read_bytes())
        if content:
            content[min(int(share * len(content)), len(content) - 1)] ^= 1
        path.write_bytes(content)

    return damage


def content(data: bytes) -> Damage:
    return lambda path: path.write_bytes(data)


def repeated(path: Path) -> None:
    path.write_bytes(path.read_bytes() * 2)


def pipe(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def endless(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to("/dev/zero")


def plug(path: Path) -> None:
    path.unlink(missing_ok=True)
    before = os.getcwd()
    os.chdir(path.parent)  # a socket's path is short
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
    finally:
        os.chdir(before)


def folder(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.mkdir()


def nowhere(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to(path.parent / "nowhere")


def circle(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to(path.name)


def gone(path: Path) -> None:
    path.unlink(missing_ok=True)


EVIL = b"cos\nsystem\n(S'touch executed'\ntR."  # a pickle that runs a command

FILES: dict[str, Damage] = {
    **{f"cut at {share}": cut(share) for share in (0, 0.01, 0.3, 0.5, 0.9, 0.999)},
    **{f"a bit at {share}": flip(share) for share in (0, 0.02, 0.2, 0.5, 0.8, 0.999)},
    "doubled": repeated,
    "a pipe": pipe,
    "endless": endless,
    "a socket": plug,
    "a folder": folder,
    "a link to nothing": nowhere,
    "a link to itself": circle,
    "deleted": gone,
    "zeros": content(bytes(4096)),
    "no text": content(b"\xff\xfe\x00"),
    "an object": content(b"{}\n"),
    "a number": content(b"5\n"),
    "null": content(b"null\n"),
    "deep": content(b"[" * 200_000),
    "deep objects": content(b'{"a":' * 100_000),
    "infinite": content(b'{"trial": Infinity, "image": NaN}\n'),
    "a pickle that runs a command": content(EVIL),
}


def anything(rng: random.Random, path: Path) -> str:
    """Damage a file in a random way; returns in which."""
    size = path.stat().st_size if path.is_file() else 0
    kind = rng.choice(["cut", "flip", "flips", "zero", "repeat", "insert", "delete", "other"])
    if kind == "cut":
        os.truncate(path, rng.randrange(size + 1))
    elif kind == "delete":
        path.unlink()
    elif kind == "other":
        name = rng.choice(list(FILES))
        FILES[name](path)
        return name
    else:
        data = bytearray(path.read_bytes())
        for _ in range(20 if kind == "flips" else 1):
            if data and kind in ("flip", "flips"):
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        start = rng.randrange(len(data) + 1)
        stop = min(len(data), start + rng.randrange(1, 600))
        if kind == "zero":
            data[start:stop] = bytes(stop - start)
        elif kind == "repeat":
            data[stop:stop] = data[start:stop]
        elif kind == "insert":
            data[start:start] = rng.randbytes(rng.randrange(1, 30))
        path.write_bytes(data)
    return kind
