"""Kill work at random moments and start it again: the same files, and nothing made twice.

    python tests/kill.py [training embedding scoring graph] [--times 20] [--seed 0]

Each round starts with an empty store, ends the work by SIGKILL once, starts it again, and compares
run store and cache with those of undisturbed work, byte for byte.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lcco.store import read_json

ROOT = Path(__file__).resolve().parents[1]
SMOKE = ["--profile", "smoke", "--set", "train.steps=12", "--set", "train.eval_every=2"]
TRAIN = [sys.executable, "-m", "lcco", "train", *SMOKE]
GRAPH = [sys.executable, "-m", "snakemake", "-s", str(ROOT / "workflow" / "Snakefile"), "--cores",
         "2", "--quiet", "all", "--config", "profile=smoke", "results=out"]  # fmt: skip
WORK = {
    "training": TRAIN,
    "embedding": [*GRAPH, "notebooks=05", "--until", "embed"],
    "scoring": [*GRAPH, "notebooks=05", "--until", "train"],
    "graph": [*GRAPH, "notebooks=05"],
}
TIMES = ("seconds", "environment", "scored_by", "begun_on")


def start(kind: str, folder: Path) -> subprocess.Popen:
    """Begin a kind of work, with its store in a folder."""
    stores = {"LCCO_RUNS": str(folder / "runs"), "LCCO_CACHE": str(folder / "cache")}
    here = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    keep = {k: v for k, v in os.environ.items() if k not in ("LCCO_DATA", "LCCO_CALLER")}
    how = {"cwd": folder, "env": keep | stores | here, "start_new_session": True}
    with open(folder / "said.txt", "a") as said:
        return subprocess.Popen(WORK[kind], stdout=said, stderr=said, **how)


def finish(kind: str, folder: Path) -> None:
    """Do the work to its end."""
    if code := start(kind, folder).wait():
        raise SystemExit(f"{kind} ended with {code}: {(folder / 'said.txt').read_text()[-2000:]}")


def kill(work: subprocess.Popen) -> None:
    """End the work and all that it has started, as the system does when memory runs out."""
    os.killpg(work.pid, signal.SIGKILL)
    work.wait()


def timeless(value: Any) -> Any:
    """A JSON value without what two runs of the same work may differ in."""
    if isinstance(value, dict):
        return sorted((k, timeless(v)) for k, v in value.items() if k not in TIMES)
    return value


def made(folder: Path) -> dict[str, str]:
    """File of a store → hash of what it holds; of json without times and machines."""
    out = {}
    for file in sorted(f for part in ("runs", "cache") for f in (folder / part).rglob("*")):
        if file.name.startswith(".part-"):  # what was being written, under no name of its own
            continue
        if file.suffix in (".json", ".jsonl", ".npy", ".safetensors"):
            data = file.read_bytes()
            if file.suffix == ".json":
                data = repr(timeless(read_json(file))).encode()
            out[str(file.relative_to(folder))] = hashlib.sha256(data).hexdigest()
    return out


def written(folder: Path) -> dict[str, int]:
    """Whole file of a store → when it was written; none of them may be written again."""
    files = [*folder.glob("cache/**/*.npy"), *folder.glob("runs/*/record.json")]
    files += folder.glob("runs/*/evaluations/*.json")
    return {str(f.relative_to(folder)): f.stat().st_mtime_ns for f in files}


def compare(folder: Path, undisturbed: Mapping[str, str], before: Mapping) -> list[str]:
    """What differs from undisturbed work after a kill and a second start."""
    now, after = made(folder), written(folder)
    out = [f"{name}: missing" for name in undisturbed.keys() - now.keys()]
    out += [f"{name}: differs" for name in undisturbed.keys() & now.keys()
            if now[name] != undisturbed[name]]  # fmt: skip
    out += [f"{name}: left behind" for name in now.keys() - undisturbed.keys()]
    return out + [f"{name}: made twice" for name in before if after.get(name) != before[name]]


def rounds(kind: str, base: Path, times: int, seed: int = 0) -> list[str]:
    """Kill a kind of work `times` times, each at a random moment. Returns: what went wrong."""
    (folder := base / f"{kind}-undisturbed").mkdir()
    began = time.monotonic()
    finish(kind, folder)
    seconds, whole = time.monotonic() - began, made(folder)
    rng, out = random.Random(seed), []
    for n in range(times):
        (folder := base / f"{kind}-{n}").mkdir()
        work, moment = start(kind, folder), rng.uniform(0, seconds)
        time.sleep(moment)
        kill(work)
        before = written(folder)
        finish(kind, folder)
        found = compare(folder, whole, before)
        print(f"{kind} {n + 1}/{times}: killed after {moment:.1f} of {seconds:.1f} s, "
              f"{len(before)} files done, {len(found)} faults", flush=True)  # fmt: skip
        out += [f"{kind}, killed after {moment:.1f} s: {line}" for line in found]
        shutil.rmtree(folder)
    return out


def main() -> int:
    """Kill the kinds of work that are named, or all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kinds", nargs="*", default=list(WORK), help=", ".join(WORK))
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    given, faults = parser.parse_args(), []
    with tempfile.TemporaryDirectory(prefix="kill") as base:
        for kind in given.kinds:
            faults += rounds(kind, Path(base), given.times, given.seed)
    print("\n".join([*faults, f"{len(faults)} faults"]))
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
