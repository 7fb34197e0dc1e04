"""What every room shares: errors meant for people, places on disk, hashes, progress."""

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
    """What is not on this machine, `how` to get it, and a table's `status`."""

    def __init__(self, kind: Literal["data", "weights", "training"], name: str, how: str) -> None:
        super().__init__(f"{kind} `{name}` not found: {how}")
        self.status = f"not run: {kind} not found ({name})"


def project_root() -> Path:
    """The repository around the working directory, this package, or else that directory."""
    for folder in (Path.cwd(), *Path.cwd().parents, *Path(__file__).resolve().parents):
        if (folder / "notebooks" / "profiles").is_dir():
            return folder
    return Path.cwd()


def place(kind: Literal["runs", "cache", "data"]) -> Path:
    """Where a kind of file lives: `LCCO_RUNS`, `LCCO_CACHE`, `LCCO_DATA`, or the repository."""
    env = os.environ.get(f"LCCO_{kind.upper()}")
    return Path(env).expanduser() if env else project_root() / kind


def digest(value: Any, length: int = 12) -> str:
    """A short sha256 of bytes, text or a JSON-able value; the same on every machine."""
    if not isinstance(value, (bytes, str)):
        value = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(value.encode() if isinstance(value, str) else value).hexdigest()[:length]


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


def progress(items: Iterable[T], what: str, total: int | None = None,
             every: float = 10.0) -> Iterable[T]:  # fmt: skip
    """The items, telling how far it is: a bar in a terminal, else a line in `every` seconds."""
    from tqdm import tqdm

    line = "{desc}: {n_fmt}/{total_fmt}, {remaining} left\n"
    how = {"bar_format": line, "mininterval": every, "miniters": 1, "delay": every}
    # Saved notebooks lose widgets, and show stderr in red.
    out = sys.stdout if type(sys.stdout).__module__ == "ipykernel.iostream" else sys.stderr
    return tqdm(items, what, total, leave=False, file=out, **({} if out.isatty() else how))
