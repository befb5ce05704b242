"""Files are written whole or not at all, and digests depend on content alone."""

import json
import os
from pathlib import Path

import pytest

from utils.files import digest, write_atomically, write_json


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    write_atomically(path, lambda temporary: temporary.write_bytes(b"old"))

    def fail(temporary: Path) -> None:
        temporary.write_bytes(b"half of the n")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, fail)
    assert path.read_bytes() == b"old"
    write_atomically(path, lambda temporary: temporary.write_bytes(b"new"))
    assert path.read_bytes() == b"new"
    assert [p.name for p in tmp_path.iterdir()] == ["state.pt"]


def test_the_path_holds_the_old_content_while_the_new_is_written(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def write(temporary: Path) -> None:
        temporary.write_text("new")
        assert path.read_text() == "old"

    write_atomically(path, write)
    assert path.read_text() == "new"


def test_a_device_or_a_pipe_is_not_replaced(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(OSError, match="Not a regular file"):
        write_json(pipe, {})
    assert pipe.is_fifo()
    assert list(tmp_path.iterdir()) == [pipe]


def test_json_holds_paths_as_strings(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"b": [1, None], "a": Path("x") / "y"})
    text = (tmp_path / "a.json").read_text()
    assert json.loads(text) == {"b": [1, None], "a": str(Path("x/y"))}
    assert text.endswith("}\n")


def test_a_digest_depends_on_values_and_not_on_the_order_of_keys() -> None:
    first = digest({"a": 1, "b": {"c": 2.5, "d": Path("x")}})
    assert first == digest({"b": {"d": Path("x"), "c": 2.5}, "a": 1})
    assert len(first) == 12
    assert set(first) <= set("0123456789abcdef")
    assert len({first, digest({"a": 1}), digest({"a": "1"}), digest([1]), digest(None)}) == 5
