"""Image sets: the one decoder, a reader for each layout, the group sampler, `check`."""

from lcco.data.check import check
from lcco.data.load import KNOWN_SETS, load_data
from lcco.data.sampler import Draw, GroupSampler
from lcco.data.sets import LOOKS, CoSegData

__all__ = ["KNOWN_SETS", "LOOKS", "CoSegData", "Draw", "GroupSampler", "check", "load_data"]
