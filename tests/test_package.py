"""The wheel: what is in it, and that it works from another folder than the repository."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
USE = """
import sys
from pathlib import Path
import numpy as np
import lcco
from lcco.config import profile_names
from lcco.data import load_data
from lcco.experiment.tables import paper_table
from lcco.semantics import vocabulary
assert Path(lcco.__file__).is_relative_to(sys.argv[1]), lcco.__file__
assert len(vocabulary("coco80")) == 80 and len(paper_table("table1_main"))
data = load_data("glyphworld_test", counts={"glyphworld_test": 3})
pictures = [data.image(i) for i in data.groups["umbrella"]]
results = lcco.cosegment(pictures)
assert [r.mask.shape for r in results] == [(128, 128)] * 3
assert all(r.error is None and r.cutout().mode == "RGBA" for r in results)
assert results[0].words and np.isfinite(results[0].confidence)
print("fine", profile_names())
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The wheel, built from a copy and unpacked."""
    base = tmp_path_factory.mktemp("wheel")
    source = base / "source"
    shutil.copytree(ROOT / "lcco", source / "lcco", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    words = ["-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    words += ["--wheel-dir", str(base), str(source)]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    (wheel,) = base.glob("lcco-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(base / "site")
    return base / "site"


def test_the_wheel_holds_every_room_and_its_data(site):
    def files(folder: Path) -> set[str]:
        found = {f.relative_to(folder).as_posix() for f in folder.rglob("*") if f.is_file()}
        return {f for f in found if "__pycache__" not in f}

    assert files(site / "lcco") == files(ROOT / "lcco")
    assert {"data/sets.py", "experiment/runs.py", "vocab/coco80.txt", "paper/table1_main.csv",
            "weights/lite.safetensors"} <= files(site / "lcco")  # fmt: skip
    assert (next(site.glob("*.dist-info")) / "entry_points.txt").read_text().count("lcco.cli:main")


def test_the_wheel_works_from_another_folder(site, tmp_path):
    env = {k: v for k, v in os.environ.items() if not k.startswith("LCCO_")}
    env |= {"PYTHONPATH": str(site), "LCCO_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-c", USE, str(site)]
    done = subprocess.run(
        words, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr
    assert "fine []" in done.stdout  # no profile: there is no repository above
