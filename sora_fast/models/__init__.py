"""The diffusion transformer, and what turns text and pixels into its inputs."""

from sora_fast.models.sora_dit import SoraDiT, SoraDiTConfig
from sora_fast.models.text import PackedText

__all__ = ["PackedText", "SoraDiT", "SoraDiTConfig"]
