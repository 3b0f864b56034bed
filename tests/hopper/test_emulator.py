"""The emulator itself: tiny kernels that each commit one crime (crimes.cpp) are accused, in the right words."""

import ctypes
import re
import resource
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from tests.hopper.emulated import shared_library

SEEDS = range(8)
INNOCENT = ("nothing wrong", "store, barrier, load", "past the tensor's end", "accumulator read in flight", "sums")
UNORDERED = "(load reads|store overwrites) what warp . (stores|stored|has read), without synchronization"
CRIMES = {
    "load beside a store": UNORDERED,
    "store beside a store": "store overwrites what warp . stored, without synchronization",
    "store past a named barrier of others": UNORDERED,
    "store misaligned": "shared store not aligned",
    "load misaligned": "shared load not aligned",
    "store below shared memory": "outside of shared memory",
    "store past shared memory": "outside of shared memory",
    "mbarrier misaligned": "mbarrier not aligned",
    "mbarrier twice": "mbarrier initialized twice",
    "no mbarrier there": "no mbarrier at 0x",
    "mbarrier before its init is known": "mbarrier used without synchronization after its init|no mbarrier at 0x",
    "mbarrier not fenced for TMA": "mbarrier given to TMA: no fence.proxy.async since its init",
    "too many arrivals": "more arrivals than 1 in a phase of mbarrier at .* .number 0.",
    "parity of 2": "parity is neither 0 nor 1",
    "an arrival too few": "deadlock: 128 threads .0 ... 127. wait for mbarrier at .* "
    r"\[phase 0, 1 of 2 arrivals and 0 bytes missing\] at crimes.cpp:\d+",
    "wrong parity": "wgmma reads a TMA load that was not waited for|deadlock: 128 threads .* wait for mbarrier",
    "load where TMA does": "load reads (where a TMA load is in flight|a TMA load that was not waited for)"
    "|TMA load overwrites what warp 1 has read",
    "TMA over a tile in use": "TMA load overwrites what an operation in flight of warp . reads",
    "TMA over a tile that others have read": "TMA load overwrites what (warp .|an operation in flight of warp .)",
    "TMA over a store that is not fenced": "TMA load overwrites what warp . stored, without proxy fence",
    "TMA misaligned": "not a multiple of 1,024",
    "tensor misaligned": "tensor map: an address that is not a multiple of 16",
    "rows of a tensor misaligned": "tensor map: a stride that is not a multiple of 16",
    "too few bytes expected": "TMA load arrives in phase 1 .* too few bytes expected|reads|more arrivals",
    "too many bytes expected": "deadlock: .* 0 of 1 arrivals and 16 bytes missing",
    "bytes expected at the end": "block ends with bytes expected at mbarrier",
    "wgmma before any fence": "no wgmma.fence has named the accumulator registers",
    "accumulator written after the fence": "accumulator registers of a wgmma were written after the last wgmma.fence",
    "fence of other registers": "no wgmma.fence has named the accumulator registers",
    "fence before the last product": "no wgmma.fence has named the accumulator registers",
    "accumulator written in flight": "accumulator written while a wgmma owns it",
    "operand written in flight": "A registers written while a wgmma reads them",
    "operand written after the fence": "A registers of a wgmma were written after the last wgmma.fence",
    "wait for one group too few": "a product still owns these registers",
    "not committed": "a product still owns these registers",
    "product in flight at the end": "thread ends with wgmma in flight",
    "product by three warps": "deadlock: 96 threads .0 ... 95. wait for wgmma",
    "descriptors differ": "descriptors or options differ between the threads",
    "product of a store that is not fenced": "wgmma reads what warp . stored: no fence.proxy.async",
    "product of a store, fenced by one thread": "wgmma reads what warp . stored: no fence.proxy.async",
    "product past shared memory": "outside of shared memory",
    "bulk store of a store that is not fenced": "TMA store reads what warp . stored: no fence.proxy.async",
    "bulk store not committed": "thread ends with a bulk store not committed",
    "bulk store not waited for": "thread ends without a wait for its bulk stores",
    "store over a bulk store": "store overwrites what an operation in flight of warp 0 reads",
    "global load past the end": "global access to elements 10 ... of 10",
    "global load before the start": "global access to elements -1 ... of 10",
    "global store past the end": "global access to elements 8589934592 ... of 10",
    "global chunk past the end": "global access to elements 8 ... of 10",
    "global chunk misaligned": "global access not aligned to 16 bytes",
    "named barriers of two sizes": "named barrier 1: (64|128) threads expected, (64|128) by others",
    "named barrier half full": "block ends with named barrier 3 half full",
    "named barrier without some lanes": "not all lanes of a warp take part",
    "no such named barrier": "no such named barrier",
    "registers: more than there are": "deadlock: 128 threads .0 ... 127. wait for registers",
    "registers: not a multiple of 8": "setmaxnreg: not a multiple of 8",
    "registers: the wrong way": "setmaxnreg: from 168 to 240 is the wrong way",
    "a warp apart": "deadlock: 124 threads .* wait for its warp",
    "no end": "too many steps",
}


@cache
def kernels() -> ctypes.CDLL:
    library = shared_library("crimes", [Path(__file__).parent / "crimes.cpp"])
    library.run_kernel.restype = ctypes.c_char_p
    library.run_kernel.argtypes = ctypes.c_char_p, ctypes.c_uint64
    library.results.restype = library.global_sums.restype = ctypes.POINTER(ctypes.c_float)
    library.error_of_product.restype = ctypes.c_float
    return library


def run(name: str, seed: int = 0) -> str:
    message = kernels().run_kernel(name.encode(), seed)
    assert message is not None, f"no kernel {name!r} in crimes.cpp"
    return message.decode()


@pytest.mark.parametrize("crime", CRIMES)
def test_a_crime_is_accused_in_the_right_words(crime: str) -> None:
    for seed in SEEDS:
        message = run(crime, seed)
        assert re.search(CRIMES[crime], message), f"seed {seed}: {message!r}"


@pytest.mark.parametrize("name", [*INNOCENT, "registers: given and taken"])
def test_what_is_right_is_not_accused(name: str) -> None:
    assert [run(name, seed) for seed in SEEDS] == [""] * len(SEEDS)


def test_an_accumulator_in_flight_is_poison() -> None:
    run("accumulator read in flight")
    assert np.isnan(np.ctypeslib.as_array(kernels().results(), (128,))).all()


def test_past_the_end_of_a_tensor_come_zeros() -> None:
    """24 of 64 rows exist, and of each the columns from 8 on."""
    run("past the tensor's end")
    tile = np.ctypeslib.as_array(kernels().results(), (64, 8, 4)).copy()
    rows = np.arange(64)
    plain = np.stack([tile[rows, chunk ^ rows % 8] for chunk in range(8)], axis=1)
    assert (
        (plain[24:] == 0).all() and (plain[:, 7] == 0).all() and (plain[:24, :7].reshape(24, -1) != 0).any(axis=1).all()
    )


def test_bulk_sums_are_right() -> None:
    sums = np.ctypeslib.as_array(kernels().global_sums(), (64, 32))
    sums[:] = 1
    assert run("sums", 5) == ""
    assert (sums == 1 + 3 * (np.arange(64)[:, None] + np.arange(32))).all()


@pytest.mark.parametrize("n", [64, 80, 96, 128])
@pytest.mark.parametrize("b_rows_are_k", [0, 1])
def test_products_by_descriptors_are_products(n: int, b_rows_are_k: int) -> None:
    assert kernels().error_of_product(n, b_rows_are_k) == 0


def test_memory_does_not_grow_with_the_number_of_tiles() -> None:
    def peak(tiles: int) -> int:
        assert kernels().run_many_tiles(tiles)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    few, many = peak(100), peak(2000)
    assert many - few < 2048  # KB; a tile kept is 8 of them
