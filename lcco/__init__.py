"""LCCo: lending CLIP to co-segmentation. `import lcco` loads nothing heavy; names below load on first use."""

from typing import Any

__version__ = "0.1.0"

_HOME = {  # public name -> the room it lives in
    "LCCo": "model",
    "LCCoError": "common",
    "Experiment": "config",
    "load_profile": "config",
    "load_data": "data",
    "make_tower": "semantics",
    "get_run": "runs",
    "cosegment": "predict",
    "cosegment_folder": "predict",
}
__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name not in _HOME:
        raise AttributeError(f"module 'lcco' has no attribute {name!r}")
    return getattr(import_module(f"lcco.{_HOME[name]}"), name)
