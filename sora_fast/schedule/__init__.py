"""Which tiles of a packed sequence meet which, from its layout and a mask.

The kernels of kernels/schedule.py give the same numbers on a device.
"""

from sora_fast.schedule.tile_schedule import Filler, TileSchedule, offer_filler
from sora_fast.schedule.tiles import TileLists, TokenRanges

__all__ = ["Filler", "TileLists", "TileSchedule", "TokenRanges", "offer_filler"]
