"""Hot loops of hand-written machine code: what is counted, what changes the reading, and what is not claimed."""

from pathlib import Path

import pytest

from benchmarks import hot_loop
from benchmarks.hot_loop import Loop, read_loops, table
from tests.benchmarks.machine_code import listing

# A forward of 128 queries by 64 keys at head dim 128, with two groups of four warps: 64 rows each.
SCORES = [*["HGMMA.64x64x16.F32.BF16 R88, gdesc[UR16], R88"] * 7, "HGMMA.64x64x16.F32.BF16 R88, gdesc[UR16], R88, gsb0"]
ARRIVE, WAIT = ["WARPGROUP.ARRIVE"], ["WARPGROUP.DEPBAR.LE gsb0, 0x0"]
SOFTMAX = ["MUFU.EX2 R1, R2"] * 34
SUMS = ["HGMMA.64x128x16.F32.BF16 R24, R120, gdesc[UR16].tnspB, R24"] * 4
BARRIER = ["BAR.SYNC.DEFER_BLOCKING 0x0"]
FLOPS = 4 * 128 * 64 * 128


def _read(*body: str, asked: tuple[int, ...] = ()) -> Loop:
    (loop,) = read_loops(listing("MOV R1, R2", *body, "@P0 BRA ->1", "EXIT"), warps=8, target="sm_90", asked=asked)
    return loop


def test_a_forward_pass_by_hand() -> None:
    loop = _read(*ARRIVE, *SCORES, *WAIT, *SOFTMAX, *SUMS, *BARRIER, "BAR.ARV R4, 0x100", asked=(FLOPS,))
    assert (loop.flops, loop.done, loop.instructions, loop.sometimes) == (FLOPS, 1, 1 + 8 + 1 + 34 + 4 + 2 + 1, 0)
    assert loop.products == {"HGMMA 64x64x16": 8, "HGMMA 64x128x16": 4}
    assert (loop.waits, loop.barriers) == (1, 1)
    # 4,096 FLOPs a cycle; 8 warps of 34 exponentials, 16 a cycle; A and B, then B, of two groups at 128 bytes a cycle.
    expected = {"tensor": FLOPS // 4096, "mufu": 34 * 8 * 32 // 16, "shared": 2 * (8 * 4096 + 4 * 4096) // 128}
    assert expected.items() <= loop.cycles.items()
    assert (loop.bound, loop.binding) == (1, "tensor")
    # Half of the products beside the exponentials of one group, 8 cycles each, which wait for the scores.
    assert loop.alone == pytest.approx(512 / (512 + 34 * 8), rel=0.03)
    assert loop.per_megaflop == pytest.approx(51 * 8 / 4.194304)


def test_planted_changes_change_the_reading() -> None:
    good = _read(*SCORES, *WAIT, *SOFTMAX, *SUMS, *BARRIER)
    eager = _read(*SCORES, *SOFTMAX, *SUMS, *BARRIER)
    halting = _read(*SCORES, *WAIT, *BARRIER, *SOFTMAX, *SUMS, *BARRIER)
    assert (eager.waits, eager.instructions) == (good.waits - 1, good.instructions - 1)
    assert (halting.barriers, halting.instructions) == (good.barriers + 1, good.instructions + 1)
    slow = _read(*SCORES, *WAIT, *SOFTMAX * 3, *SUMS, *BARRIER)
    assert (slow.binding, slow.bound) == ("mufu", round(1024 / (3 * 544), 3))


def test_narrow_products_cost_their_operands() -> None:
    wide = _read(*SCORES)
    narrow = _read(*["HGMMA.64x8x16.F32.BF16 R88, gdesc[UR16], R88"] * 64)
    assert wide.flops == narrow.flops
    assert (wide.narrowest, wide.bound) == (64, 1)
    assert (narrow.narrowest, narrow.bound) == (8, round(4 / 18, 3))


def test_work_done_twice_is_not_rewarded() -> None:
    twice = _read(*SCORES, *SUMS, asked=(FLOPS // 2,))
    assert (twice.done, twice.bound, twice.flops) == (2, 0.5, FLOPS // 2)
    assert _read(*SCORES, *SUMS, asked=(1, 2)).done is None, "as many loops as in the source, or nothing is known"


def test_both_stretches_are_read() -> None:
    text = listing("MOV R1, R2", *SCORES, "@P0 BRA ->1", *BARRIER, *SCORES, "@P0 BRA ->10", "EXIT")
    first, second = read_loops(text, warps=8, target="sm_90")
    assert (first.barriers, second.barriers) == (0, 1)


def test_ampere_issues_by_the_warp() -> None:
    text = listing("MOV R1, R2", "HMMA.16816.F32.BF16 R4, R8, R12, R4", "@P0 BRA ->1", "EXIT")
    (loop,) = read_loops(text, warps=8, target="sm_80")
    assert (loop.flops, loop.cycles["tensor"], loop.products) == (8 * 4096, 16, {"HMMA 16x8x16": 1})


def test_blackwell_is_modelled_as_far_as_the_source_tells() -> None:
    text = listing("MOV R1, R2", "UTCHMMA gdesc[UR4], gdesc[UR30], tmem[UR62]", "@P0 BRA ->1", "EXIT")
    (blind,) = read_loops(text, warps=4, target="sm_100")
    assert (blind.flops, blind.bound, blind.binding, blind.done) == (0, None, "", None)
    assert "not modelled" in table([("blind", blind)])
    (told,) = read_loops(text, warps=4, target="sm_100", asked=(8192 * 100,))
    assert (told.cycles["tensor"], told.bound, told.binding, told.done) == (100, 1, "tensor", None)


def test_loads_under_way() -> None:
    """A load is under way until an instruction names one of its registers."""
    loads = ["LDG.E.128 R4, [R2.64]", "LDG.E.128 R8, [R2.64+0x10]"]
    use = ["FADD R20, R5, R9", "STG.E.128 [R16.64], R20", "BAR.SYNC 0x0"]
    together = _read(*loads, *use)
    assert (together.loaded, together.stored, together.in_flight, together.barriers) == (32, 16, 32, 1)
    assert (together.behind, _read(*use, *loads).behind) == (0, 32)
    assert (together.bound, together.binding, together.products) == (None, "", {})
    behind = _read(loads[0], "FADD R20, R5, R5", loads[1], "FADD R20, R9, R20")
    assert behind.in_flight == 16
    ahead = _read(loads[0], "FADD R20, R5, R9", loads[1])
    assert ahead.in_flight == 32, "a step loads what the next one uses"


def test_a_kernel_without_a_loop_is_read_whole() -> None:
    text = listing("@P0 BRA ->2", "LDG.E.128 R4, [R2.64]", "STG.E.128 [R2.64], R4", "EXIT")
    (loop,) = read_loops(text, warps=4, target="sm_90")
    assert (loop.instructions, loop.loaded, loop.stored) == (4, 16, 16), "a load behind a test counts"


def test_text_without_code_and_unknown_targets_are_refused() -> None:
    with pytest.raises(ValueError, match="no instructions"):
        read_loops("cuobjdump info: no code", warps=4, target="sm_90")
    with pytest.raises(ValueError, match="'sm_75'; rates are known for sm_80"):
        read_loops(listing("EXIT"), warps=4, target="sm_75")


def test_the_command_reads_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "forward.sass"
    file.write_text(listing("MOV R1, R2", *SCORES, *SUMS, "@P0 BRA ->1", "EXIT"))
    assert hot_loop.main([str(file), "--warps", "8"]) == 0
    title, head, line = capsys.readouterr().out.splitlines()
    assert "not measured" in title
    assert head.split()[:5] == ["hot", "loop", "products", "binding", "bound"]
    assert line.split()[:7] == ["forward", "1", "8×64x64x16", "4×64x128x16", "tensor", "100%", "100%"]
    file.with_suffix(".ttir").write_text(
        "scf.for {\n%s = tt.dot %q, %k, %c : tensor<128x128xbf16> * tensor<128x128xbf16> -> tensor<128x128xf32>\n}\n"
    )
    hot_loop.main([str(file), "--warps", "8"])
    assert " ×1 " in capsys.readouterr().out
