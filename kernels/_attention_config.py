"""Launch configurations of packed attention, apart from the kernels.

Chosen by what the compiler makes of them (Triton 3.7.1 and 3.6.0; `benchmarks.aot` prints it), none by measurement yet:
few instructions a product in the loop that counts, matrix instructions at their full rate, and no register spilled in
that loop. (A few bytes around it, once a block, cost nothing to speak of.) What is said of other blocks on sm_80 and
sm_100 was found before the programs were persistent, and not looked at again; what is in use there was.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch

from sora_fast.kernels._attention_measured import MEASURED, ONE_PASS_UP_TO
from sora_fast.kernels._attention_walk import Blocking
from sora_fast.kernels._launch import cdiv


@dataclass(frozen=True)
class BlockSizes:
    """own, other: tokens in a program's block, and in each of the blocks that it walks over.

    per_multiprocessor: programs that a multiprocessor holds at once.
    """

    own: int
    other: int
    num_warps: int
    num_stages: int
    per_multiprocessor: int = 1

    @lru_cache  # noqa: B019  (a few, which are equal if their numbers are)
    def blocking(self, own_tile: int, other_tile: int, *, causal: bool, described: bool) -> Blocking:
        """Blocks no larger than a tile: more would only be masked away."""
        own, other = min(self.own, own_tile), min(self.other, other_tile)
        return Blocking(own, other, cdiv(own_tile, own), cdiv(other_tile, other), causal, described)

    def options(self) -> dict[str, int]:
        """For a launch."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


@dataclass(frozen=True)
class _Entry:
    """For heads up to `widest`. full: of full masks, whose loop has nothing to ask and room for larger blocks."""

    widest: int
    blocks: BlockSizes
    full: BlockSizes | None = None


# Products of float32 run on the ordinary units, whose code holds whole rows in registers: larger blocks spill. They are
# small enough that two programs fit.
_FLOAT32 = BlockSizes(16, 16, 8, 1, per_multiprocessor=2)

# pass → major compute capability → what fits the head dim, the first that is wide enough.
#
# Hopper's matrix instructions take 64 rows a warpgroup and N columns. With both operands in shared memory, of which a
# cycle reads 128 bytes, they reach their full rate from N = 64 on, and two thirds of it at 32. So 8 warps own 128 rows
# (on 64, N is split between the warpgroups), and walk over blocks of 64 or 128. A block of keys that 64 rows share is
# read from the L2 cache twice as often as its bandwidth allows.
#
# Three stages double-buffer K and V where the load of a tile's index, from a list, takes one. Numbers in comments:
# instructions in the loop over whole blocks, of sm_90.
_TABLES: dict[str, dict[int, tuple[_Entry, ...]]] = {
    "forward": {
        # 128×64 spills at head dim 96, and needs all registers at any other. 64×32 spills at 192, and not at 256; 64×16
        # with two stages there spills under a frame-causal mask.
        8: (
            _Entry(128, BlockSizes(128, 32, 8, 3)),
            _Entry(192, BlockSizes(64, 16, 8, 3)),
            _Entry(256, BlockSizes(64, 32, 8, 2)),
        ),
        # At head dim 128: 128×128: 498 for 128 keys, 128×64: 346 for 64. With masks to test, 128×128 spills past 64.
        # At 256 and a window, 128×64: 618, N = 64, some bytes spilled around the loops; 128×32: 447 for half, N = 32.
        9: (
            _Entry(64, BlockSizes(128, 128, 8, 3)),
            _Entry(128, BlockSizes(128, 64, 8, 3), full=BlockSizes(128, 128, 8, 2)),
            _Entry(256, BlockSizes(128, 64, 8, 2)),
        ),
        # 128×128 spills at every head dim.
        10: (_Entry(128, BlockSizes(128, 64, 8, 3)), _Entry(256, BlockSizes(128, 32, 8, 2))),
    },
    "grad_query": {
        # 128×32 spills at head dim 72, and at 128 under a full mask; 64×32 spills at 192.
        8: (
            _Entry(64, BlockSizes(128, 32, 8, 2)),
            _Entry(80, BlockSizes(64, 32, 8, 2)),
            _Entry(96, BlockSizes(128, 32, 8, 2)),
            _Entry(128, BlockSizes(64, 64, 8, 2)),
            _Entry(192, BlockSizes(64, 16, 8, 2)),
            _Entry(256, BlockSizes(64, 32, 8, 2)),
        ),
        # At head dim 128: 128×128: 439, 128×64: 287. At 192, 128×64 with masks to test spills; 128×32, as at 256, where
        # shared memory holds no more, is of N = 32.
        9: (
            _Entry(128, BlockSizes(128, 64, 8, 2), full=BlockSizes(128, 128, 8, 2)),
            _Entry(192, BlockSizes(128, 32, 8, 2), full=BlockSizes(128, 64, 8, 2)),
            _Entry(256, BlockSizes(128, 32, 8, 2)),
        ),
        # 128×64 needs some 160, and spills where the compiler aims at 128 all the same: with two stages at head dim 64
        # and a window, with two or three at 72 and at 128 under a frame-causal mask; so does 64×32 at 192. 128×32: 116
        # registers at 128, 172 at 192.
        10: (
            _Entry(64, BlockSizes(128, 64, 8, 3)),
            _Entry(192, BlockSizes(128, 32, 8, 2)),
            _Entry(256, BlockSizes(64, 32, 8, 2)),
        ),
    },
    # Two accumulators: half the room of the other passes.
    "grad_key_value": {
        # 64×32 spills at head dim 96 and a window.
        8: (
            _Entry(64, BlockSizes(128, 32, 8, 2)),
            _Entry(80, BlockSizes(64, 32, 8, 2)),
            _Entry(96, BlockSizes(64, 16, 8, 2)),
            _Entry(128, BlockSizes(64, 32, 8, 2)),
            _Entry(256, BlockSizes(32, 32, 8, 2)),
        ),
        # At head dim 128: 128×64: 356; 128×32, of N = 32: 260. Masks to test spill there, some 8 accesses in a loop of
        # 517 or 729 instructions: fewer than the 326 and 435 of 128×32 for half the work. Past 128, 128 rows of both
        # sums are too many: 64 rows, of which the scores, N = 32, are computed twice (half the peak at best). There
        # 64×16, which spills nothing, is of N = 8, and 32×32 of Ampere's instructions: a fifth and a sixth.
        9: (_Entry(128, BlockSizes(128, 64, 8, 2)), _Entry(256, BlockSizes(64, 64, 8, 2))),
        # 128×64 spills at head dims 64 and 128.
        10: (_Entry(128, BlockSizes(128, 32, 8, 2)), _Entry(256, BlockSizes(32, 32, 8, 2))),
    },
    "one_pass": {
        # 128×32 spills at head dim 64. 64×32 takes all 255 registers at 72, and spills with two stages; at 80, with
        # three, 184 bytes a thread. 128×16: 255 at 80, and 8 bytes spilled at 72. Of the 72 forms that were tried no
        # other does not spill at one of them, but for some of 16 or fewer queries. 64×16: 217 at 128, where 64×32
        # spills under a window. 32×16: 226 at 192; 32×32 spills with two stages.
        8: (
            _Entry(64, BlockSizes(64, 32, 8, 2)),
            _Entry(72, BlockSizes(64, 32, 8, 3)),
            _Entry(80, BlockSizes(128, 16, 8, 3)),
            _Entry(128, BlockSizes(64, 16, 8, 2)),
            _Entry(256, BlockSizes(32, 16, 8, 2)),
        ),
        # dQ is a product of 64 rows or of Ampere's instructions: blocks of 64. 128×64 spills at 128, 42 accesses in a
        # loop of 600. Past 128 everything of 64 rows spills in its loop, 64×64 by 84 accesses at 192; of 64×32, 704
        # instructions at 192, only dQ is Ampere's. It spills at 256 and a window; 32×16, all Ampere's, does not.
        9: (
            _Entry(96, BlockSizes(128, 64, 8, 2)),
            _Entry(128, BlockSizes(64, 64, 8, 2)),
            _Entry(192, BlockSizes(64, 32, 8, 2)),
            _Entry(256, BlockSizes(32, 16, 8, 2), full=BlockSizes(64, 32, 8, 2)),
        ),
        # 128×64 spills at head dim 64, 64×64 at 72 and 80, 64×32 at 96 and 192, 32×32 at 256. 32×16: 190 there.
        10: (
            _Entry(64, BlockSizes(128, 32, 8, 2)),
            _Entry(96, BlockSizes(128, 16, 8, 2)),
            _Entry(128, BlockSizes(64, 32, 8, 2)),
            _Entry(192, BlockSizes(32, 32, 8, 2)),
            _Entry(256, BlockSizes(32, 16, 8, 2)),
        ),
    },
}


# major compute capability → the widest head at which the backward pass in one (five products, and atomics in fp32)
# beats the two passes (seven, no atomics). Where it is not measured: two passes, whose bits are equal in every run.
ONE_PASS: dict[int, int] = {8: 0, 9: 0, 10: 0} | {major: widest for major, (widest, _) in ONE_PASS_UP_TO.items()}


def is_one_pass_faster(head_dim: int, arch: tuple[int, int]) -> bool:
    """Which backward form is taken where the bits may differ from run to run; head_dim, arch: as for `block_sizes`."""
    return head_dim <= ONE_PASS.get(arch[0], ONE_PASS[8])


def block_sizes(kernel: str, dtype: torch.dtype, head_dim: int, arch: tuple[int, int], mask: str) -> BlockSizes:
    """kernel: one of the table's keys; arch: (9, 0); mask: its kind, see `mask_kind`."""
    if dtype is torch.float32:
        return _FLOAT32
    if (measured := MEASURED.get((arch[0], kernel, head_dim, mask))) is not None:
        return BlockSizes(*measured[0])
    # Other GPUs have less shared memory: Ampere's configurations need the least.
    table = _TABLES[kernel].get(arch[0], _TABLES[kernel][8])
    entry = next(entry for entry in table if head_dim <= entry.widest)
    return entry.full if mask == "full" and entry.full is not None else entry.blocks
