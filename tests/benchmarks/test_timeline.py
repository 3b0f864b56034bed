"""What a warpgroup's own waits cost, reckoned by hand: the two ways to order an attention loop, and a planted wait."""

import pytest

from benchmarks.pipes import RATES
from benchmarks.sass import Instruction
from benchmarks.timeline import cycles_alone

# 128 keys at head dim 128: 8 × 64 cycles each. 64 exponentials: 8 cycles each for a group of four warps.
_PRODUCT = "HGMMA.64x128x16.F32.BF16 R88, gdesc[UR16], R88"
SCORES = [*[_PRODUCT] * 7, f"{_PRODUCT}, gsb0"]
SUMS = [line.replace("gdesc", "R120, gdesc") for line in SCORES]
SOFTMAX = ["MUFU.EX2 R1, R2"] * 64
WAIT, WAIT_BUT_ONE = "WARPGROUP.DEPBAR.LE gsb0, 0x0", "WARPGROUP.DEPBAR.LE gsb0, 0x1"


def _alone(*lines: str) -> float | None:
    return cycles_alone([Instruction(0, "", *line.partition(" ")[::2]) for line in lines], RATES["sm_90"])


def test_softmax_between_the_products() -> None:
    """FlashAttention-2: 512 + 512 of products, and 512 of exponentials that nothing runs beside."""
    assert _alone(*SCORES, WAIT, *SOFTMAX, *SUMS) == pytest.approx(1536, abs=20)


def test_softmax_beside_the_products() -> None:
    """FlashAttention-3: the last block's sums run under this block's exponentials."""
    assert _alone(*SCORES, *SUMS, WAIT_BUT_ONE, *SOFTMAX, WAIT) == pytest.approx(1024, abs=60)


def test_a_wait_that_the_compiler_hoists_is_seen() -> None:
    hoisted = _alone(*SCORES, *SUMS, WAIT_BUT_ONE, WAIT, *SOFTMAX)
    assert hoisted == pytest.approx(1536, abs=20)


def test_a_loop_that_waits_for_nothing_takes_its_products_time() -> None:
    assert _alone(*SCORES, *SUMS) == pytest.approx(1024)


def test_only_hoppers_products_are_timed() -> None:
    assert _alone("HMMA.16816.F32.BF16 R4, R8, R12, R4") is None
    assert _alone(*SCORES, "HMMA.16816.F32.BF16 R4, R8, R12, R4") is None
    assert _alone(*SOFTMAX) is None
