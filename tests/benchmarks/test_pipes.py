"""Cycles that pipes need at least, beside what one reckons by hand."""

import pytest

from benchmarks.pipes import RATES, Product, access_bytes, cycles
from benchmarks.sass import Instruction

HOPPER = RATES["sm_90"]


def _instruction(line: str) -> Instruction:
    name, _, operands = line.partition(" ")
    return Instruction(0, "", name, operands)


def _product(line: str) -> Product:
    product = Product.of(_instruction(line))
    assert product is not None
    return product


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("HGMMA.64x256x16.F32.BF16 R88, gdesc[UR16], R88", 128),
        ("HGMMA.64x64x16.F32.BF16 R88, gdesc[UR16], RZ, !UPT", 32),
        # A is 2 KiB and B 1 KiB, at 128 bytes a cycle: more than the 16 cycles of the work.
        ("HGMMA.64x32x16.F32.BF16 R88, gdesc[UR16], R88", 24),
        ("HGMMA.64x8x16.F32 R88, gdesc[UR16], R88", 18),
        ("HGMMA.64x32x16.F32.BF16 R88, R120, gdesc[UR16].tnspB, R88", 16),
        ("HGMMA.64x64x8.F32.TF32 R88, R120, gdesc[UR16], R88", 32),
        ("HMMA.16816.F32.BF16 R4, R8, R12, R4", 1 / 0.629),
    ],
)
def test_cycles_of_a_product(line: str, expected: float) -> None:
    assert _product(line).cycles(HOPPER) == pytest.approx(expected)


def test_shapes_of_products() -> None:
    group, warp = (
        _product("HGMMA.64x64x16.F32.BF16 R88, gdesc[UR16], R88"),
        _product("HMMA.1688.F32.TF32 R4, R8, R12, R4"),
    )
    assert (group.shape, group.flops, group.warps) == ("64x64x16", 2 * 64 * 64 * 16, 4)
    assert (warp.shape, warp.flops, warp.warps) == ("16x8x8", 2 * 16 * 8 * 8, 1)
    assert Product.of(_instruction("UTCHMMA gdesc[UR4], gdesc[UR30], tmem[UR62]")) is None
    assert Product.of(_instruction("FFMA R4, R8, R12, R4")) is None


def test_full_rates_are_those_of_the_data_sheets() -> None:
    for target, multiprocessors, gigahertz, teraflops in (
        ("sm_80", 108, 1.41, 312),
        ("sm_90", 132, 1.83, 989.4),
        ("sm_100", 148, 1.85, 2250),
    ):
        rate = RATES[target].flops * multiprocessors * gigahertz / 1e3
        assert rate == pytest.approx(teraflops, rel=0.01)


def test_every_pipe_counts_its_own() -> None:
    lines = [
        "MUFU.EX2 R1, R2",
        "FFMA R1, R2, R3, R4",
        "LOP3.LUT R1, R2, R3, RZ, 0xc0, !PT",
        "UIADD3 UR4, UR4, 0x1, URZ",
    ]
    lines += ["LDS.128 R4, [R1]", "LDSM.16.M88.4 R4, [R1]", "SHFL.BFLY PT, R1, R2, 0x1, 0x1f"]
    found = cycles(map(_instruction, lines), warps=8, rates=HOPPER)
    assert found == {
        "tensor": 0,
        "shared": 8 * (4 + 4),  # 512 bytes each
        "mufu": 8 * 2,
        "fp32": 8 / 4,
        "alu": 8 / 2,
        "lsu": 8 * 3,
        "issue": 8 * 7 / 4,
    }


def test_a_predicated_instruction_may_be_off() -> None:
    off = Instruction(0, "@P0", "MUFU.EX2", "R1, R2")
    found = cycles([off], warps=4, rates=HOPPER)
    assert (found["mufu"], found["issue"]) == (0, 1)


def test_what_is_not_known_is_not_there() -> None:
    rates = RATES["sm_100"]
    assert "tensor" not in cycles([_instruction("UTCHMMA gdesc[UR4], gdesc[UR30]")], warps=4, rates=rates)
    assert "tensor" not in cycles([_instruction("HMMA.16816.F32 R4, R8, R12, R4")], warps=4, rates=rates)
    with pytest.raises(ValueError, match="not known"):
        _product("HMMA.16816.F32 R4, R8, R12, R4").cycles(rates)


def test_widths_of_loads() -> None:
    names = ("LDG.E.128", "LDG.E.64", "LDG.E", "LDG.E.U16", "LDGSTS.E.BYPASS.128", "STG.E.U8")
    assert [access_bytes(_instruction(name)) for name in names] == [16, 8, 4, 2, 16, 1]
