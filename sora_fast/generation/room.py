"""Room for a pack whose steps are replayed as a graph: sizes that many packs share, since a graph has its own."""

import math
from dataclasses import dataclass

from sora_fast.models.sora_dit import SoraDiT

# Segments are rows of the modulation tables, which are small.
_SEGMENTS = 8
# A tile, and room for a short prompt.
_TOKENS = 128


@dataclass(frozen=True)
class Room:
    """tokens, segments: that the network sees. text: tokens of their prompts."""

    tokens: int
    segments: int
    text: int

    @staticmethod
    def fitting(*, tokens: int, segments: int, text: int) -> "Room":
        """The least for so much: at most a sixteenth more, or a tile, of what time is spent on."""
        return Room(_rounded(tokens, _TOKENS), _rounded(segments, _SEGMENTS), _rounded(text, _TOKENS))

    def elements(self, model: SoraDiT) -> int:
        """Of latents, as many as so many tokens can have."""
        return self.tokens * model.config.in_channels * math.prod(model.config.patch_size)


def _rounded(count: int, least: int) -> int:
    """To one of sixteen sizes between powers of two, a multiple of `least`."""
    step = max(least, (1 << max(count - 1, 0).bit_length()) // 32)
    return -(-max(count, 1) // step) * step
