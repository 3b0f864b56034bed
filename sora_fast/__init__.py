"""Fast kernels for video diffusion transformers, and a thin PyTorch model on them."""

from sora_fast.masks import SpacetimeMask
from sora_fast.ops._dispatch import explain, use_backend
from sora_fast.packing import Conditioning, PackedLayout, RaggedLatents
from sora_fast.proof import prove
from sora_fast.schedule import TileSchedule

__version__ = "0.1.0"

__all__ = [
    "Conditioning",
    "PackedLayout",
    "RaggedLatents",
    "SpacetimeMask",
    "TileSchedule",
    "explain",
    "prove",
    "use_backend",
]
