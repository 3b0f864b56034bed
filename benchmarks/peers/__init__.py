"""Who else can do the work of an op: each peer set up as its own documentation recommends.

A peer is a function from a case to an `Entrant`; it raises `Absent` with the reason where it cannot take part. To add
one, write it into the op's module and list it here.
"""

from collections.abc import Mapping

from benchmarks.cases import Case
from benchmarks.entrants import Entrant
from benchmarks.peers import activation, attention, block, modulation, patches, rope, segments
from benchmarks.peers.compiling import ours_compiled
from benchmarks.rows import OURS, Maker, ours
from sora_fast.ops import _library

PEERS: Mapping[str, Mapping[str, Maker]] = {
    "adaln": {**modulation.PEERS, "Liger": modulation.liger},
    "gated_residual": modulation.PEERS,
    "gated_residual_adaln": {**modulation.PEERS, "Liger": modulation.liger},
    "qk_norm_rope": {
        "eager": rope.eager,
        "compiled": rope.compiled,
        "compiled, tables made": rope.compiled_with_tables,
        "Liger": rope.liger,
    },
    "schedule": {},
    "packed_attention": {
        "SDPA": attention.sdpa,
        "SDPA flash": attention.sdpa_flash,
        "SDPA cuDNN": attention.sdpa_cudnn,
        "SDPA padded": attention.sdpa_padded,
        "varlen": attention.varlen,
        "FlexAttention": attention.flex,
        "FlexAttention, mask built": attention.flex_built,
        "flash-attn": attention.flash_attn,
        "flash-attn 3": attention.flash_attn_3,
        "xformers": attention.xformers,
    },
    "patch_embed": {"eager": patches.embed, "compiled": patches.embed_compiled},
    "unpatchify": {"eager": patches.assemble, "compiled": patches.assemble_compiled},
    "linear_unpatchify": {
        "eager": patches.product_then_assemble,
        "compiled": patches.product_then_assemble_compiled,
        "product, then ours": patches.product_then_ours,
    },
    "mlp_activation": {"eager": activation.eager, "compiled": activation.compiled},
    "dit_block": {"eager": block.eager, "compiled": block.compiled},
    "segment_mean": {"eager": segments.eager, "compiled": segments.compiled},
}


def everyone(op: str) -> Mapping[str, Maker]:
    """Ours on every backend, our own op inside a compiled graph, and all peers of `op`."""
    compiled = {"torch, compiled": ours_compiled} if op in _FUSED else {}
    compiled |= {"cpu, compiled": _compiled_on_cpu} if op in _library.OPS else {}
    return {**ours(op), **compiled, **PEERS[op]}


def _compiled_on_cpu(case: Case) -> Entrant:
    OURS["cpu"](case)  # Absent, where it is
    return ours_compiled(case, "cpu")


# Ops whose torch backend is written for Inductor to fuse.
_FUSED = (
    "adaln",
    "gated_residual",
    "gated_residual_adaln",
    "qk_norm_rope",
    "patch_embed",
    "unpatchify",
    "linear_unpatchify",
    "mlp_activation",
    "dit_block",
    "segment_mean",
)
