"""What every room shares: errors meant for people, places on disk, hashes, progress."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

T = TypeVar("T")

VOID = 255  # a mask's third value: neither object nor background (VOC's object borders)


class LCCoError(Exception):
    """A mistake that the user can mend: one line that names the file or setting and the mend."""


class Missing(LCCoError):
    """Data or weights that are not on this machine: `name` of them, and `how` to get them."""

    def __init__(self, kind: Literal["data", "weights"], name: str, how: str) -> None:
        super().__init__(f"{kind} `{name}` not found: {how}")
        self.kind, self.name, self.how = kind, name, how

    @property
    def status(self) -> str:
        """What a table says of the row: `not run: data not found (msrc7)`."""
        return f"not run: {self.kind} not found ({self.name})"


def project_root() -> Path:
    """The repository: the nearest folder above the working directory or this package.

    An installed package without a checkout falls back to the working directory.
    """
    bases = Path.cwd(), Path(__file__).resolve().parent
    folders = (folder for base in bases for folder in (base, *base.parents))
    marks = ("pyproject.toml", "notebooks")
    return next((f for f in folders if all((f / m).exists() for m in marks)), Path.cwd())


def place(kind: Literal["runs", "cache", "data"]) -> Path:
    """Where a kind of file lives: `LCCO_RUNS`, `LCCO_CACHE`, `LCCO_DATA`, or the repository."""
    env = os.environ.get(f"LCCO_{kind.upper()}")
    return Path(env).expanduser() if env else project_root() / kind


def digest(value: Any, length: int = 12) -> str:
    """A short sha256 of bytes, text or a JSON-able value; the same on every machine."""
    if isinstance(value, str):
        value = value.encode()
    if not isinstance(value, bytes):
        value = json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
    return hashlib.sha256(value).hexdigest()[:length]


def file_digest(path: Path, length: int = 12) -> str:
    """A short sha256 of a file's content."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()[:length]


def one_line(text: object) -> str:
    """A text on one line with single spaces: file names may hold newlines."""
    return " ".join(str(text).split())


def few(names: Sequence[object], n: int = 5) -> str:
    """`a, b and 3 more`: the first `n` names."""
    more = f" and {len(names) - n} more" if len(names) > n else ""
    return ", ".join(map(one_line, names[:n])) + more


def duration(seconds: float) -> str:
    """`75` → `1 min 15 s`."""
    minutes, s = divmod(max(0, round(seconds)), 60)
    h, m = divmod(minutes, 60)
    return f"{h} h {m:02d} min" if h else f"{m} min {s:02d} s" if m else f"{s} s"


def progress(
    items: Iterable[T], what: str, total: int | None = None, every: float = 10.0
) -> Iterable[T]:
    """The items, while telling how far it is: a bar in a terminal, else a line in `every` seconds.

    Widget bars are lost in saved notebooks, which show stderr in red: lines go to stdout there.
    """
    from tqdm import tqdm

    if sys.stderr.isatty():
        return tqdm(items, what, total, leave=False, dynamic_ncols=True)
    out = sys.stdout if "ipykernel" in sys.modules else sys.stderr
    line = "{desc}: {n_fmt}/{total_fmt}, {remaining} left\n"
    how = {"file": out, "bar_format": line, "mininterval": every, "miniters": 1, "delay": every}
    return tqdm(items, what, total, leave=False, **how)
