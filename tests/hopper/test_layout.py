"""The index facts of csrc/hopper/layout.h against Triton's own: its linear layouts, and the PTX that it makes."""

import ctypes
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend

from tests.hopper.emulated import shared_library
from tests.hopper.two_products import KEYS, ROWS

SM_90 = GPUTarget("cuda", 90, 32)
WARPS, LANES = range(4), range(32)


@cache
def layout() -> ctypes.CDLL:
    library = shared_library("layout", [Path(__file__).parent / "layout.cpp"])
    library.descriptor.restype = library.moved.restype = ctypes.c_uint64
    library.moved.argtypes = ctypes.c_uint64, ctypes.c_uint32
    return library


@pytest.fixture(scope="module")
def linear() -> Iterator[Callable[[Any, tuple[int, ...]], Any]]:
    """Of a Gluon layout and a shape, Triton's linear layout."""
    try:
        from triton._C.libtriton import gluon_ir, ir

        context = ir.context()
        ir.load_dialects(context)
        make_backend(SM_90).load_dialects(context)
        builder = gluon_ir.GluonOpBuilder(context)
        to_linear = builder.to_linear_layout
    except (ImportError, AttributeError, TypeError) as error:
        pytest.skip(f"Triton {triton.__version__} does not tell its linear layouts: {error}")
    # The builder does not keep its context alive.
    yield lambda layout, shape: to_linear(layout._to_ir(builder), list(shape))
    del context


def apply(groups: list[list[list[int]]], numbers: tuple[int, ...]) -> tuple[int, int]:
    """(row, column) of a linear layout: the bases of the bits that are set, XORed."""
    row = column = 0
    for bases, number in zip(groups, numbers, strict=True):
        for bit, base in enumerate(bases):
            if number >> bit & 1:
                row, column = row ^ base[0], column ^ base[1]
    return row, column


def mma(columns: int) -> Any:
    from triton.experimental.gluon.language._layouts import NVMMADistributedLayout

    return NVMMADistributedLayout([3, 0], [4, 1], [16, columns, 16])


@pytest.mark.parametrize("columns", [64, 128])
def test_accumulators(linear: Callable, columns: int) -> None:
    bases = linear(mma(columns), (64, columns))
    for warp, lane, i in ((w, t, i) for w in WARPS for t in LANES for i in range(columns // 2)):
        thread = 32 * warp + lane
        mine = layout().fragment_row(thread, i), layout().fragment_column(thread, i)
        assert mine == apply([bases.reg_bases, bases.lane_bases, bases.warp_bases], (i, lane, warp))


def test_two_blocks_of_an_accumulator_are_an_operand(linear: Callable) -> None:
    from triton.experimental.gluon.language._layouts import DotOperandLayout

    bases = linear(DotOperandLayout(0, mma(128), 2), (64, 128))
    for warp, lane, i in ((w, t, i) for w in WARPS for t in LANES for i in range(64)):
        thread = 32 * warp + lane
        mine = layout().fragment_row(thread, i), layout().fragment_column(thread, i)
        assert mine == apply([bases.reg_bases, bases.lane_bases, bases.warp_bases], (i, lane, warp))


@pytest.mark.parametrize("halves", [1, 2])
def test_swizzle(linear: Callable, halves: int) -> None:
    """Of 128 rows; columns from 64 on lie behind all rows of the others."""
    from triton.experimental.gluon.language._layouts import NVMMASharedLayout

    bases = linear(NVMMASharedLayout(128, 16, rank=2), (128, 64 * halves))
    for offset in range(128 * 64 * halves):
        row, column = apply([bases.offset_bases], (offset,))
        place = column // 64 * 128 * 128 + layout().swizzled(row, column % 64 // 8) + column % 8 * 2
        assert place == 2 * offset


def test_descriptors(tmp_path: Path) -> None:
    """Those of a small attention that Triton compiles: the same numbers, but for a distance that nobody reads."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    command = [sys.executable, str(Path(__file__).with_name("two_products.py"))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    ptx = done.stdout
    constants = {int(x) for x in re.findall(r"\b(\d{19})\b", ptx)}
    if not constants:
        pytest.skip(f"Triton {triton.__version__} does not write descriptors as constants")

    make, move = layout().descriptor, layout().moved
    # Rows of k, swizzled: the leading distance is not read; Triton leaves it 0.
    by_row = {move(make(0, 0, 1024), step // 4 * n * 128 + step % 4 * 32) for n in (ROWS, KEYS) for step in range(8)}
    by_column = {move(make(0, KEYS * 128, 1024), step * 16 * 128) for step in range(KEYS // 16)}
    assert constants == by_row | by_column
