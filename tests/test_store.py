"""Files are whole or absent; what is kept is made once, and made again where it is damaged."""

import multiprocessing
import os
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from lcco.common import LCCoError, Missing, digest, duration, few, place, progress, project_root
from lcco.store import atomic_path, kept, lock, read_json, write_json, write_text


@pytest.mark.parametrize(
    ("name", "value"),
    [("a.json", {"é": [1, 2.5, None]}), ("a.npy", np.arange(6.0).reshape(2, 3))],
)
def test_kept_is_made_once_and_again_when_damaged(tmp_path, name, value):
    calls = []

    def make():
        calls.append(1)
        return value

    def same(found):
        return np.array_equal(found, value) if name.endswith("npy") else found == value

    path = tmp_path / "deep" / name
    assert same(kept(path, make)) and same(kept(path, make)) and len(calls) == 1
    path.write_bytes(path.read_bytes()[: len(path.read_bytes()) // 2])
    assert same(kept(path, make)) and len(calls) == 2
    assert [p.name for p in path.parent.iterdir() if p.name.startswith(".part")] == []


def test_a_failure_in_making_is_not_laid_on_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LCCO_CACHE", str(tmp_path))
    with pytest.raises(PermissionError, match="secret"):
        kept(tmp_path / "a.json", lambda: (_ for _ in ()).throw(PermissionError("secret")))
    assert not list(tmp_path.glob("*.json")) and not list(tmp_path.glob(".part*"))


def test_a_failed_write_leaves_the_old_file(tmp_path):
    write_text(tmp_path / "a.txt", "old")
    with pytest.raises(ZeroDivisionError), atomic_path(tmp_path / "a.txt") as part:
        part.write_text("half")
        raise ZeroDivisionError
    assert (tmp_path / "a.txt").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_names_as_long_as_a_disk_allows(tmp_path):
    path = tmp_path / ("x" * 251 + ".txt")
    write_text(path, "here")
    assert path.read_text() == "here"


def _slow(path, log):
    def make():
        with open(log, "a") as f:
            f.write("made\n")
        time.sleep(0.5)
        return 1

    kept(path, make)


def test_two_processes_make_it_once(tmp_path):
    spawn = multiprocessing.get_context("spawn")
    args = (tmp_path / "x.json", tmp_path / "log")
    both = [spawn.Process(target=_slow, args=args) for _ in range(2)]
    for one in both:
        one.start()
    for one in both:
        one.join()
    assert (tmp_path / "log").read_text() == "made\n" and kept(args[0], lambda: 2) == 1


def test_a_waiting_process_says_so(tmp_path, capsys):
    import threading

    held, out = threading.Event(), []

    def second():
        with lock(tmp_path / "l", "waiting for the other"):
            out.append("in")

    with lock(tmp_path / "l"):
        thread = threading.Thread(target=second)
        thread.start()
        held.wait(0.3)
        assert out == []
    thread.join()
    assert out == ["in"] and "waiting for the other" in capsys.readouterr().err


def test_a_damaged_json_is_one_line(tmp_path):
    write_json(tmp_path / "a.json", {"a": 1})
    assert read_json(tmp_path / "a.json") == {"a": 1}
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(LCCoError, match="a.json: damaged"):
        read_json(tmp_path / "a.json")


@pytest.mark.skipif(os.name == "nt", reason="folders are made read-only otherwise on Windows")
def test_a_place_that_cannot_be_written_names_its_variable(tmp_path, monkeypatch):
    (tmp_path / "cache").write_text("a file")
    monkeypatch.setenv("LCCO_CACHE", str(tmp_path / "cache"))
    with pytest.raises(LCCoError, match="set LCCO_CACHE"):
        kept(place("cache") / "a.json", lambda: 1)


def test_missing_says_what_a_table_says():
    missing = Missing("data", "msrc7", "set LCCO_DATA")
    assert str(missing) == "data `msrc7` not found: set LCCO_DATA"
    assert missing.status == "not run: data not found (msrc7)"


def test_another_project_with_notebooks_is_not_the_repository(tmp_path, monkeypatch):
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "pyproject.toml").write_text("")
    monkeypatch.chdir(tmp_path)
    assert project_root() == Path(__file__).parents[1]


def test_small_words():
    assert duration(59.6) == "1 min 00 s" and duration(3700) == "1 h 01 min"
    assert few("abcdefg", 2) == "a, b and 5 more" and few(["a\n b"]) == "a b"
    assert digest({"b": 1, "a": 2}) == digest({"a": 2, "b": 1}) != digest({"a": 1})


def test_progress_is_plain_lines_without_a_terminal(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "ipykernel", None)  # imported, but this is no kernel
    assert list(progress(range(3), "counting", every=0)) == [0, 1, 2]
    assert "counting: 3/3" in capsys.readouterr().err
