"""A batch: what a training step takes."""

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sora_fast.packing import BetaDrop, ConstantDrop, PackedLayout, RaggedLatents, ResolutionDrop, SigmoidDrop
from sora_fast.packing._bundle import TensorBundle

# Most of a sample's tokens that may be dropped: a batch then has room for the pixels of ten times its tokens.
MOST_DROPPED = 0.9


@dataclass(frozen=True, eq=False)
class Prompts(TensorBundle):
    """What a text encoder takes: ids [Nt], and their layout of S segments."""

    ids: Tensor
    layout: PackedLayout


@dataclass(frozen=True, eq=False)
class Batch(TensorBundle):
    """Packed samples. The tensors' shapes never change from batch to batch.

    latents, layout: S segments in N tokens. prompts: the captions, tokenized; None: there are none.
    useful: tokens that are no padding. skipped: samples longer than the capacity, so far, and files left out.
    resume: what `Batches.load_state_dict` takes to go on after this batch; JSON-able.
    """

    latents: RaggedLatents
    layout: PackedLayout
    prompts: Prompts | None
    useful: int
    skipped: int
    resume: dict[str, Any]


@dataclass(frozen=True)
class BatchConfig:
    """How samples become batches.

    capacity: tokens in a batch. max_segments: samples in a batch, at most.
    text_capacity: text tokens in a batch; where captions are longer together, the longest are cut, and the log says
        so once.
    look_ahead: samples a worker that the packer chooses from: more of it, less padding, and packs of more equal cost
        (of 8 or 64 workers' time 5% goes by in waiting for the slowest with 16, 2% with 32, 0.4% with 128).
    order: "tiled" or "raster", the token order.
    caption_dropout: share of the samples whose caption is left out, for classifier-free guidance.
    drop: which share of its tokens each sample loses, drawn for its position in the stream; None: none. A rule that
        goes by the step goes by that at which the sample was planned.
    oversized: "raise" an error for a sample longer than the capacity, or "skip" and count it.
    """

    capacity: int = 4096
    max_segments: int = 32
    text_capacity: int = 2048
    look_ahead: int = 128
    order: str = "tiled"
    caption_dropout: float = 0.1
    oversized: str = "raise"
    drop: ConstantDrop | BetaDrop | ResolutionDrop | SigmoidDrop | None = None

    def __post_init__(self) -> None:
        if self.drop is not None and self.drop.most > MOST_DROPPED:
            raise ValueError(
                f"drop: {self.drop} may drop {self.drop.most:g} of the tokens; {MOST_DROPPED} is the most, since the "
                "pixels of all of them have their place in a batch"
            )

    @property
    def pixel_capacity(self) -> int:
        """Tokens of which a batch holds the pixels, dropped ones included."""
        if self.drop is None:
            return self.capacity
        # What a sample keeps is rounded, by half a token at most.
        return math.ceil((self.capacity + self.max_segments / 2) / (1 - self.drop.most))
