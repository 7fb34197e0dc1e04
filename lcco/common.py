"""What every room shares: errors meant for people, places on disk, hashes, progress."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

T = TypeVar("T")

VOID = 255  # a mask's third value: neither object nor background (VOC's object borders)


class LCCoError(Exception):
    """A mistake that the user can mend: one line that names the file or setting and the mend."""


class Missing(LCCoError):
    """Data or weights that are not on this machine.

    kind: what is missing. name: a data set or a weights file. how: where it was looked for and
    how to get it. `status` is what a table says of a row that could not be run.
    """

    def __init__(self, kind: Literal["data", "weights"], name: str, how: str) -> None:
        super().__init__(f"{kind} `{name}` not found: {how}")
        self.kind, self.name, self.how = kind, name, how

    @property
    def status(self) -> str:
        """`not run: data not found (msrc7)`."""
        return f"not run: {self.kind} not found ({self.name})"


def project_root(start: Path | None = None) -> Path:
    """The repository: the nearest folder above `start`, or above this package, with `notebooks/`.

    An installed package without a checkout falls back to the working directory.
    """
    for base in (Path(start or Path.cwd()), Path(__file__).parent):
        for folder in (base.resolve(), *base.resolve().parents):
            if (folder / "pyproject.toml").is_file() and (folder / "notebooks").is_dir():
                return folder
    return Path.cwd()


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
    seconds = max(0, round(seconds))
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"


def progress(
    items: Iterable[T], what: str, total: int | None = None, every: float = 10.0
) -> Iterator[T]:
    """Yield `items` while telling how far it is.

    A terminal gets a tqdm bar. Elsewhere (a notebook, a log) a plain line is printed every `every`
    seconds, because widget bars are lost in saved notebooks; in a notebook to stdout, because
    stderr is shown there in red.
    """
    total = total if total is not None else (len(items) if hasattr(items, "__len__") else None)
    if sys.stderr.isatty():
        from tqdm import tqdm

        yield from tqdm(items, desc=what, total=total, leave=False, dynamic_ncols=True)
        return
    out = sys.stdout if "ipykernel" in sys.modules else sys.stderr
    start = last = time.monotonic()
    for n, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if now - last >= every:
            last = now
            left = f", {duration((now - start) / n * (total - n))} left" if total else ""
            print(f"{what}: {n}{f'/{total}' if total else ''}{left}", file=out, flush=True)
