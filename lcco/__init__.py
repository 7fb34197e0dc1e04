"""LCCo: lending CLIP to co-segmentation. `import lcco` loads nothing heavy."""

from importlib import import_module
from typing import Any

__version__ = "0.2.0"

_HOME = {  # public name → its module, loaded at first use
    "LCCo": "model", "LCCoError": "common", "Missing": "common", "Experiment": "config",
    "load_profile": "config", "load_data": "data", "make_tower": "semantics",
    "get_run": "experiment.runs", "open_run": "experiment.runs", "cosegment": "cosegmentation",
    "cosegment_folder": "cosegmentation", "load_segmenter": "cosegmentation",
    "Result": "cosegmentation"}  # fmt: skip
__all__ = ["__version__", *_HOME]
__dir__ = __all__.copy


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'lcco' has no attribute {name!r}")
    return getattr(import_module(f"lcco.{_HOME[name]}"), name)
