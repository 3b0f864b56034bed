"""A batch: what a training step takes."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sora_fast.packing import PackedLayout, RaggedLatents
from sora_fast.packing._bundle import TensorBundle


@dataclass(frozen=True, eq=False)
class Prompts(TensorBundle):
    """What a text encoder takes: ids [Nt], and their layout of S segments."""

    ids: Tensor
    layout: PackedLayout


@dataclass(frozen=True, eq=False)
class Batch(TensorBundle):
    """Packed samples. The tensors' shapes never change from batch to batch.

    latents, layout: S segments in N tokens. prompts: the captions, tokenized; None without a text encoder.
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
    oversized: "raise" an error for a sample longer than the capacity, or "skip" and count it.
    """

    capacity: int = 4096
    max_segments: int = 32
    text_capacity: int = 2048
    look_ahead: int = 128
    order: str = "tiled"
    caption_dropout: float = 0.1
    oversized: str = "raise"
