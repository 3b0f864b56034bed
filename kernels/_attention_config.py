"""Launch configurations of packed attention, apart from the kernels.

Chosen so that no kernel spills a register for any mask (compiled ahead of time with Triton 3.7.1; `benchmarks.aot`
prints the numbers); none is tuned by measurement yet. Of Triton 3.6.0 only sm_90 was looked at: nothing spills there up
to head dim 192.
"""

from dataclasses import dataclass

import torch

from sora_fast.kernels._attention_walk import Blocking


@dataclass(frozen=True)
class BlockSizes:
    """own, other: tokens in a program's block, and in each of the blocks that it walks over."""

    own: int
    other: int
    num_warps: int
    num_stages: int
    per_multiprocessor: int = 1

    def blocking(self, own_tile: int, other_tile: int, *, causal: bool) -> Blocking:
        """Blocks no larger than a tile: more would only be masked away."""
        own, other = min(self.own, own_tile), min(self.other, other_tile)
        return Blocking(own, other, -(-own_tile // own), -(-other_tile // other), causal)

    def options(self) -> dict[str, int]:
        """For a launch."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


# Products of float32 run on the ordinary units, whose code holds whole rows in registers: larger blocks spill.
_FLOAT32 = BlockSizes(16, 16, 8, 1)

# pass → major compute capability → (widest head, configuration), by head dim. Three stages double-buffer K and V, since
# the load of the tile's index takes one. Numbers in comments: registers a thread, of 255.
_TABLES: dict[str, dict[int, list[tuple[int, BlockSizes]]]] = {
    "forward": {
        # 128×64 spills at head dim 96, and needs all registers at any other. 64×32 spills at 192, and not at 256; 64×16
        # with two stages there spills under a frame-causal mask.
        8: [
            (128, BlockSizes(128, 32, 8, 3)),
            (192, BlockSizes(64, 16, 8, 3)),
            (256, BlockSizes(64, 32, 8, 2)),
        ],
        # 128×128: 250 at head dim 64; it spills at 72. 128×64: 232 at 128.
        9: [(64, BlockSizes(128, 128, 8, 3)), (128, BlockSizes(128, 64, 8, 3)), (256, BlockSizes(128, 32, 8, 2))],
        # 128×128 spills at every head dim.
        10: [(128, BlockSizes(128, 64, 8, 3)), (256, BlockSizes(128, 32, 8, 2))],
    },
    "grad_query": {
        # 128×32 spills at head dim 72, and at 128 under a full mask; 64×32 spills at 192.
        8: [
            (64, BlockSizes(128, 32, 8, 2)),
            (80, BlockSizes(64, 32, 8, 2)),
            (96, BlockSizes(128, 32, 8, 2)),
            (128, BlockSizes(64, 64, 8, 2)),
            (192, BlockSizes(64, 16, 8, 2)),
            (256, BlockSizes(64, 32, 8, 2)),
        ],
        # 128×64: 238 at head dim 128. 64×32: 251 at 256; 64×64 spills there. Hopper's matrix instructions want 64 rows.
        9: [(128, BlockSizes(128, 64, 8, 2)), (256, BlockSizes(64, 32, 8, 2))],
        # 128×64 needs some 160, and spills where the compiler aims at 128 all the same: with two stages at head dim 64
        # and a window, with two or three at 72 and at 128 under a frame-causal mask; so does 64×32 at 192. 128×32: 116
        # at 128, 172 at 192.
        10: [(64, BlockSizes(128, 64, 8, 3)), (192, BlockSizes(128, 32, 8, 2)), (256, BlockSizes(64, 32, 8, 2))],
    },
    # Two accumulators: half the room of the other passes.
    "grad_key_value": {
        # 64×32 spills at head dim 96 and a window.
        8: [
            (64, BlockSizes(128, 32, 8, 2)),
            (80, BlockSizes(64, 32, 8, 2)),
            (96, BlockSizes(64, 16, 8, 2)),
            (128, BlockSizes(64, 32, 8, 2)),
            (256, BlockSizes(32, 32, 8, 2)),
        ],
        # 128×64: 238 at head dim 64; it spills at 72 and a window. 128×32: 254 at 128. 64×16: 250 at 192. At 256 all of
        # 64 rows, which Hopper's matrix instructions want, spill: 64×16 with one stage 760 bytes a thread; with 16
        # warps, of 128 registers a thread, 64×32 376 and 64×64 2,128. Those of Ampere do its work.
        9: [
            (64, BlockSizes(128, 64, 8, 2)),
            (128, BlockSizes(128, 32, 8, 2)),
            (192, BlockSizes(64, 16, 8, 2)),
            (256, BlockSizes(32, 32, 8, 2)),
        ],
        # 128×64 spills at head dims 64 and 128.
        10: [(128, BlockSizes(128, 32, 8, 2)), (256, BlockSizes(32, 32, 8, 2))],
    },
    "one_pass": {
        # 128×32 spills at head dim 64. 64×32 takes all 255 at 72, and spills with two stages; at 80, with three, 184
        # bytes a thread. 128×16: 255 at 80, and 8 bytes spilled at 72. Of the 72 forms that were tried no other does
        # not spill at one of them, but for some of 16 or fewer queries. 64×16: 217 at 128, where 64×32 spills under a
        # window. 32×16: 226 at 192; 32×32 spills with two stages.
        8: [
            (64, BlockSizes(64, 32, 8, 2)),
            (72, BlockSizes(64, 32, 8, 3)),
            (80, BlockSizes(128, 16, 8, 3)),
            (128, BlockSizes(64, 16, 8, 2)),
            (256, BlockSizes(32, 16, 8, 2)),
        ],
        # 64×64: 255 at head dim 72 and 80, where two stages spill 8 bytes a thread under Triton 3.6.0 (72, window) and
        # three under 3.7.1 (80, full); it spills at 96 and 128, and at 96 64×32 too. 128×16: 222 at 96. 64×16: 224 at
        # 128, where 64×32 takes 255 and spills 8 bytes under 3.6.0, with either two or three stages. Past 128 all of 64
        # rows spill: at 192, 64×16 with one stage 320 bytes, 64×32 with 16 warps 296; at 256, with 16 warps, 64×16 344
        # and 64×32 496; 32×32 there 16, and 32×16: 191.
        9: [
            (64, BlockSizes(128, 64, 8, 2)),
            (80, BlockSizes(64, 64, 8, 4)),
            (96, BlockSizes(128, 16, 8, 2)),
            (128, BlockSizes(64, 16, 8, 2)),
            (192, BlockSizes(32, 32, 8, 2)),
            (256, BlockSizes(32, 16, 8, 2)),
        ],
        # 128×64 spills at head dim 64, 64×64 at 72 and 80, 64×32 at 96 and 192, 32×32 at 256. 32×16: 190 there.
        10: [
            (64, BlockSizes(128, 32, 8, 2)),
            (96, BlockSizes(128, 16, 8, 2)),
            (128, BlockSizes(64, 32, 8, 2)),
            (192, BlockSizes(32, 32, 8, 2)),
            (256, BlockSizes(32, 16, 8, 2)),
        ],
    },
}


# major compute capability → the widest head at which the backward pass in one (five products, and atomics in fp32)
# beats the two passes (seven, no atomics). Not measured on any yet: two passes, whose bits are equal in every run.
ONE_PASS: dict[int, int] = {8: 0, 9: 0, 10: 0}


def is_one_pass_faster(head_dim: int, arch: tuple[int, int]) -> bool:
    """Which backward form is taken where the bits may differ from run to run; head_dim, arch: as for `block_sizes`."""
    return head_dim <= ONE_PASS.get(arch[0], ONE_PASS[8])


def block_sizes(kernel: str, dtype: torch.dtype, head_dim: int, arch: tuple[int, int], mask: str) -> BlockSizes:
    """kernel: one of the table's keys; arch: (9, 0)."""
    if dtype is torch.float32:
        return _FLOAT32
    # Other GPUs have less shared memory: Ampere's configurations need the least.
    table = _TABLES[kernel].get(arch[0], _TABLES[kernel][8])
    return next(blocks for widest, blocks in table if head_dim <= widest)
