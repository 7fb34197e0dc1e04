"""What every room shares: errors meant for people, places on disk, atomic files, hashes, progress."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


class LCCoError(Exception):
    """A mistake the user can mend: one line that names the file or key and the mend.

    The command line prints it without a stack trace and exits with 2.
    """


def project_root(start: Path | None = None) -> Path:
    """The repository: the nearest folder above `start` (or this package) that holds `pyproject.toml` and `notebooks/`.

    An installed package without a checkout falls back to the working directory.
    """
    for base in (Path(start or Path.cwd()), Path(__file__).parent):
        for folder in (base.resolve(), *base.resolve().parents):
            if (folder / "pyproject.toml").is_file() and (folder / "notebooks").is_dir():
                return folder
    return Path.cwd()


def place(kind: str) -> Path:
    """Where a kind of file lives: `runs`, `cache` or `data`.

    `LCCO_RUNS`, `LCCO_CACHE` and `LCCO_DATA` move them; the default is a folder of that name in the repository.
    """
    env = os.environ.get(f"LCCO_{kind.upper()}")
    return Path(env).expanduser() if env else project_root() / kind


class NotWritable(LCCoError, OSError):
    """The run store or the cache cannot be written to; still an OSError for who can do without (a cache)."""


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Make a folder to write in. Raises: NotWritable where that, or the block's file in it, fails in one of the two."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        for kind in ("runs", "cache"):
            if folder.absolute().is_relative_to(place(kind).absolute()):
                why = "it is a file" if isinstance(error, FileExistsError) else error.strerror
                mend = f"set LCCO_{kind.upper()} to a folder that can be written to"
                raise NotWritable(f"{folder}: cannot be written to ({why}); {mend}") from None
        raise


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Give a path beside `path` to write to; on success it is synced and takes the name `path` in one step."""
    path = Path(path)
    with _writing(path.parent):
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    os.close(handle)
    part = Path(name)
    try:
        yield part
        with open(part, "rb") as f:
            os.fsync(f.fileno())
        os.chmod(part, 0o644)  # mkstemp makes it private; results are for reading
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    with atomic_path(path) as part:
        part.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file whole or not at all."""
    write_text(path, json.dumps(value, indent=1, sort_keys=True) + "\n")


def digest(value: Any, length: int = 12) -> str:
    """A short sha256 of a JSON-able value, bytes or text; equal values give equal digests on every machine."""
    if isinstance(value, str):
        value = value.encode()
    if not isinstance(value, bytes):
        value = json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
    return hashlib.sha256(value).hexdigest()[:length]


def file_digest(path: Path, length: int = 12) -> str:
    """A short sha256 of a file's content."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()[:length] if hasattr(hashlib, "file_digest") else digest(
            f.read(), length
        )


@contextlib.contextmanager
def file_lock(path: Path, message: str = "") -> Iterator[None]:
    """Hold an exclusive lock on `path`; a second process waits (and says so) until the first is done.

    The lock goes with the process, so a killed run leaves nothing to clean.
    """
    with _writing(path.parent):
        f = open(path, "a")  # noqa: SIM115
    with f:
        try:
            import fcntl
        except ImportError:  # Windows: last writer wins, files stay whole because writes are atomic
            yield
            return
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(message or f"waiting for another process: {path}", file=sys.stderr, flush=True)
            fcntl.flock(f, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(f, fcntl.LOCK_UN)


def one_line(text: object) -> str:
    """A text on one line, single spaces between its words: disks take newlines in names."""
    return " ".join(str(text).split())


def few(names: Sequence[str], n: int = 5) -> str:
    """`a, b and 3 more`: the first `n` names, each on one line."""
    more = f" and {len(names) - n} more" if len(names) > n else ""
    return ", ".join(map(one_line, names[:n])) + more


def duration(seconds: float) -> str:
    """`75` → `1 min 15 s`: a length of time for people."""
    seconds = max(0, round(seconds))
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"


def progress(items: Iterable[T], what: str, total: int | None = None, every: float = 10.0) -> Iterator[T]:
    """Yield `items` while telling how far it is and how long it will take.

    A terminal gets a tqdm bar. Anywhere else (papermill, a log, CI) one plain line is printed every
    `every` seconds, because widget bars are lost in saved notebooks. Work done within `every` stays silent.
    """
    total = total if total is not None else (len(items) if hasattr(items, "__len__") else None)
    if sys.stderr.isatty():
        from tqdm import tqdm

        yield from tqdm(items, desc=what, total=total, leave=False, dynamic_ncols=True)
        return
    start = last = time.monotonic()
    for n, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if now - last >= every:
            last = now
            left = f", {duration((now - start) / n * (total - n))} left" if total else ""
            print(f"{what}: {n}{f'/{total}' if total else ''}{left}", file=sys.stderr, flush=True)
