"""Image sets: the one decoder, a reader for each layout, the group sampler, `check`."""

from lcco.data.check import check
from lcco.data.load import known_sets, load_data
from lcco.data.sampler import Draw, GroupSampler
from lcco.data.sets import LOOKS, CoSegData

__all__ = ["LOOKS", "CoSegData", "Draw", "GroupSampler", "check", "known_sets", "load_data"]
