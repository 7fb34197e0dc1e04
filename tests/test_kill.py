"""Work that is killed goes on from where it was; `python tests/kill.py` is the long form."""

from __future__ import annotations

from pathlib import Path

import kill
import pytest


@pytest.mark.timeout(300)
def test_a_killed_training_ends_with_the_same_files(tmp_path: Path):
    assert kill.rounds("training", tmp_path, times=1) == []


def test_a_file_that_differs_is_missing_or_was_made_twice_is_told(tmp_path: Path):
    for folder in (tmp_path / "a", tmp_path / "b"):
        (folder / "cache").mkdir(parents=True)
        (folder / "cache" / "x.npy").write_bytes(b"1")
        (folder / "cache" / "y.json").write_text('{"J": 1, "seconds": 2}')
    a, b = tmp_path / "a", tmp_path / "b"
    whole, before = kill.made(a), kill.written(b)
    (b / "cache" / "y.json").write_text('{"J": 1, "seconds": 3}')
    assert kill.compare(b, whole, before) == []
    (b / "cache" / "x.npy").write_bytes(b"2")
    (b / "cache" / "y.json").unlink()
    (b / "cache" / "z.npy").write_bytes(b"3")
    told = kill.compare(b, whole, {**before, "cache/x.npy": 0})
    assert sorted(told) == [
        "cache/x.npy: differs", "cache/x.npy: made twice", "cache/y.json: missing",
        "cache/z.npy: left behind",
    ]  # fmt: skip
