"""Files that are whole or absent, and the one cache: `kept(path, make)`."""

import contextlib
import json
import os
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import filelock
import numpy as np

from lcco.common import LCCoError, place

IN_A_FILE = 64  # pictures of a set whose arrays lie in one file: those of all outgrow the memory


@contextlib.contextmanager
def _writable(folder: Path) -> Iterator[None]:
    """Make a folder to write in; where that fails, say which setting names another."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        why = f"{folder}: cannot be written to ({error.strerror or error})"
        for kind in ("runs", "cache"):
            if folder.absolute().is_relative_to(place(kind).absolute()):
                raise LCCoError(f"{why}; set LCCO_{kind.upper()} to another") from None
        raise LCCoError(why) from None


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Give a file beside `path` to write; on success it is synced and renamed to `path`."""
    # A short name: `path.name` may already be as long as the disk allows.
    part = path.with_name(f".part-{uuid.uuid4().hex[:8]}{path.suffix[:12]}")
    with _writable(path.parent):
        try:
            yield part
            with open(part, "rb+") as f:
                os.fsync(f.fileno())
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    with atomic_path(path) as part:
        part.write_text(text, encoding="utf-8", errors="replace", newline="\n")


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file whole or not at all."""
    write_text(path, json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """The value in a JSON file. Raises: LCCoError naming a file that is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise LCCoError(f"{path}: damaged; delete it and it is made again") from None


@contextlib.contextmanager
def lock(path: Path, message: str = "") -> Iterator[None]:
    """Hold an exclusive lock on the file `path`; a second process says so and waits."""
    held = filelock.FileLock(path)
    with _writable(path.parent):
        try:
            taken = held.acquire(timeout=0)
        except filelock.Timeout:
            print(message or f"waiting for another process: {path}", file=sys.stderr, flush=True)
            taken = held.acquire()
    with taken:
        yield


def kept(path: Path, make: Callable[[], Any]) -> Any:
    """The value in the file `path`; where there is none, `make()`, written whole under a lock.

    By suffix: `.json` any JSON value, `.npy` an array, memory-mapped. A damaged file is made again.
    """
    array = path.suffix == ".npy"
    save = np.save if array else lambda part, value: part.write_text(json.dumps(value), "utf-8")
    if not path.is_file():
        with lock(path.with_name(f"{path.name}.lock")):
            if not path.is_file():  # nor made by another process in the meantime
                value = make()
                with atomic_path(path) as part:
                    save(part, value)
    try:
        return np.load(path, mmap_mode="r") if array else json.loads(path.read_text("utf-8"))
    except (ValueError, EOFError) as error:
        print(f"{path}: damaged ({error}), made again", file=sys.stderr)
        path.unlink(missing_ok=True)
        return kept(path, make)
