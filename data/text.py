"""`text`: English sentences of CPython's own documentation (`pydoc_data.topics`), and `textfile`: yours.

Words are runs of the letters a to z and the marks . , ; : in lower case. A sentence is a window of L words in a row,
and the vocabulary all words of the set: like a tokeniser, it is public. The class of a sentence says whether it has a
full stop; language models do not use it.

`text` assigns whole topics to the tuning victims, the reporting victims, the public and the test data. `textfile` cuts
each file into four pieces. A window that shares eight words in a row with an earlier one of these parts is left out: no
part quotes another.
"""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from core.domain import TextDomain
from core.errors import UsageError
from data.base import register
from data.splits import Split, Splits
from utils.files import require_regular

LENGTH = 16  # tokens
WORD = re.compile(r"[a-z]+|[.,;:]")
SHARES = {"reporting": 0.25, "tuning": 0.25, "test": 0.15, "public": 0.35}  # of all words
QUOTE = 8  # words in a row that count as a quotation
CLASSES = ("no full stop", "full stop")

Pieces = dict[str, list[list[str]]]  # part -> texts, as words


@register
def text(base_datadir: Path, tokens: int | None) -> Splits:
    """Sentences of 16 words; `base_datadir` is not used. Raises UsageError if Python was installed without its help."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise UsageError(
            "`dataset=text` reads pydoc_data.topics, which this Python was installed without: install all of Python's "
            "standard library (Debian and Ubuntu: apt install libpython3-stdlib), or choose `dataset=textfile`"
        ) from None
    texts = sorted((_words(topics[name]) for name in sorted(topics)), key=len, reverse=True)
    total = sum(map(len, texts))
    pieces: Pieces = {part: [] for part in SHARES}
    for words in texts:  # the longest first, each to the part that lacks most
        lacking = {part: share * total - sum(map(len, pieces[part])) for part, share in SHARES.items()}
        pieces[max(lacking, key=lambda part: lacking[part])].append(words)
    return _splits("text", pieces, tokens)


@register
def textfile(base_datadir: Path, tokens: int | None) -> Splits:
    """Your own text: a file, or all .txt files of a folder. Raises UsageError for files without enough words."""
    is_folder = base_datadir.is_dir()
    files = sorted(p for p in base_datadir.rglob("*.txt") if p.is_file()) if is_folder else [base_datadir]
    if not files:
        raise UsageError(f"`base_datadir={base_datadir}` holds no .txt file")
    pieces: Pieces = {part: [] for part in SHARES}
    for file in files:
        try:
            require_regular(file)
            words = _words(file.read_text(encoding="utf-8", errors="replace"))
        except OSError as error:
            raise UsageError(f"cannot read {file}: {error.strerror}; `base_datadir` takes a file or a folder") from None
        start, share = 0, 0.0
        for part in SHARES:
            share += SHARES[part]
            end = round(share * len(words))
            pieces[part].append(words[start:end])
            start = end
    return _splits("textfile", pieces, tokens)


def _words(content: str) -> list[str]:
    return WORD.findall(content.lower())


def _splits(name: str, pieces: Pieces, tokens: int | None) -> Splits:
    length = tokens or LENGTH
    vocabulary = tuple(sorted({word for texts in pieces.values() for words in texts for word in words}))
    index = {word: i for i, word in enumerate(vocabulary)}
    quotes: set[tuple[str, ...]] = set()
    parts: dict[str, Split] = {}
    dropped = 0
    for part, texts in pieces.items():
        windows = [w for words in texts for w in _windows(words, length)]
        kept = [w for w in windows if not any(q in quotes for q in _quotes(w))]
        dropped += len(windows) - len(kept)
        quotes.update(q for words in texts for q in _quotes(words))
        parts[part] = _split(kept, index, length)
    if not all(map(len, parts.values())):
        raise UsageError(f"{name}: too few words for sentences of {length} tokens: lower `tokens`, or add text")
    private = Split(
        *(torch.cat(both) for both in zip(*map(_tensors, (parts["reporting"], parts["tuning"])), strict=True))
    )
    note = f"{name}: {len(private)} private and {len(parts['public'])} public sentences of {length} words out of "
    return Splits(
        private=private,
        public=parts["public"],
        test=parts["test"],
        class_names=CLASSES,
        notes=(f"{note}{len(vocabulary)}; {dropped} left out because they quote another part",),
        tuning=parts["tuning"],
        reporting=parts["reporting"],
        domain=TextDomain((length,), vocabulary),
    )


def _windows(words: Sequence[str], length: int) -> Iterable[Sequence[str]]:
    """The windows of `length` words that do not overlap; a shorter rest is left out."""
    return (words[i : i + length] for i in range(0, len(words) - length + 1, length))


def _quotes(words: Sequence[str]) -> Iterable[tuple[str, ...]]:
    """All runs of QUOTE words; the words themselves if there are fewer."""
    return (tuple(words[i : i + QUOTE]) for i in range(max(1, len(words) - QUOTE + 1)))


def _split(windows: list[Sequence[str]], index: dict[str, int], length: int) -> Split:
    ids = torch.tensor([[index[word] for word in window] for window in windows], dtype=torch.int64)
    labels = torch.tensor(["." in window for window in windows], dtype=torch.int64)
    return Split(labels, ids.view(-1, length))


def _tensors(split: Split) -> tuple[Tensor, Tensor]:
    assert isinstance(split.pixels, Tensor)
    return split.labels, split.pixels
