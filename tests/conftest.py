"""Every test has its own cache and runs; photographs are used where LCCO_DATA names them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

FIRST = ("test_notebooks", "test_workflow")  # minutes each: no worker may be left with them


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.stem not in FIRST)


@pytest.fixture(autouse=True)
def _own_places(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tmp_path_factory.mktemp("places")
    monkeypatch.setenv("LCCO_CACHE", str(base / "cache"))
    monkeypatch.setenv("LCCO_RUNS", str(base / "runs"))


@pytest.fixture
def real() -> Path:
    """The folder of real photographs, or a skip."""
    folder = os.environ.get("LCCO_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("real photographs: set LCCO_DATA to the folder that holds them")
    return Path(folder)
