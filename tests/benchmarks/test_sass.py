"""Loops are found in machine code as the compiler lays it out: nested, left early, with rare paths behind the end."""

import pytest

from benchmarks.sass import Code, Flow, Instruction, functions
from tests.benchmarks.machine_code import listing

OPS = frozenset({"HGMMA"})


def _loops(*lines: str) -> list[Code]:
    (code,) = functions(listing(*lines))
    return list(Flow(code).innermost(OPS))


def _lines(code: tuple[Instruction, ...]) -> list[int]:
    return [instruction.address // 16 for instruction in code]


def test_instructions_are_read() -> None:
    text = listing("@!P0 LDG.E.128 R4, desc[UR4][R2.64]", "BRA.U !UP0, ->0", "@P1 EXIT", "EXIT", "NOP")
    (code,) = functions(text)
    assert code[0] == Instruction(0, "@!P0", "LDG.E.128", "R4, desc[UR4][R2.64]")
    assert [i.op for i in code] == ["LDG", "BRA", "EXIT", "EXIT", "NOP"]
    assert [i.target for i in code] == [None, 0, None, None, None]
    assert [i.falls_through for i in code] == [True, True, True, False, True]


def test_each_function_has_addresses_of_its_own() -> None:
    first, second = functions(listing("MOV R1, R2", "EXIT", name="one") + listing("EXIT", name="two"))
    assert [i.address for i in first] == [0, 16]
    assert [i.address for i in second] == [0]


def test_only_the_innermost_loop_with_products_counts() -> None:
    # 1 to 6: a persistent loop over tiles; 3 to 4: the products; 5: a loop that only waits; 8: nothing leads there.
    lines = ["MOV R1, R2", "FADD", "FMUL", "HGMMA", "@P0 BRA ->3", "@P1 BRA ->5", "@P2 BRA ->1", "EXIT", "BRA ->8"]
    loops = _loops(*lines)
    assert [_lines(loop.always) for loop in loops] == [[3, 4]]


def test_a_wait_within_does_not_hide_the_loop_around_it() -> None:
    (loop,) = _loops("MOV R1, R2", "SYNCS", "@!P0 BRA ->1", "HGMMA", "@P1 BRA ->1", "EXIT")
    assert _lines(loop.always) == [1, 2, 3, 4]


def test_stretches_come_in_the_order_of_the_code() -> None:
    loops = _loops("MOV R1, R2", "HGMMA", "@P0 BRA ->1", "FADD", "HGMMA", "FADD", "@P0 BRA ->4", "EXIT")
    assert [_lines(loop.always) for loop in loops] == [[1, 2], [4, 5, 6]]


def test_code_that_runs_first_may_stand_last() -> None:
    loops = _loops("BRA ->4", "HGMMA", "@P0 BRA ->1", "EXIT", "HGMMA", "@P0 BRA ->4", "BRA ->1")
    assert [_lines(loop.always) for loop in loops] == [[1, 2], [4, 5]]


def test_the_form_with_an_exit_and_a_jump_back() -> None:
    """The jump out is a call that never returns: only by it is the second loop reached."""
    loops = _loops("MOV R1, R2", "HGMMA", "@!P0 CALL.REL.NOINC ->4", "BRA ->1", "HGMMA", "@P0 BRA ->4", "EXIT")
    assert [_lines(loop.always) for loop in loops] == [[1, 2, 3], [4, 5]]


def test_paths_that_may_be_left_out_stand_apart() -> None:
    (loop,) = _loops("MOV R1, R2", "HGMMA", "@P0 BRA ->4", "FSEL", "FADD", "@P1 BRA ->1", "EXIT")
    assert (_lines(loop.always), _lines(loop.sometimes)) == ([1, 2, 4, 5], [3])


def test_a_loop_that_is_left_early() -> None:
    (loop,) = _loops("MOV R1, R2", "FADD", "@P0 BRA ->5", "HGMMA", "@P1 BRA ->1", "EXIT")
    assert (_lines(loop.always), _lines(loop.sometimes)) == ([1, 2, 3, 4], [])


def test_products_behind_a_test_count_as_what_always_runs() -> None:
    (loop,) = _loops("MOV R1, R2", "FADD", "@P0 BRA ->5", "FMUL", "HGMMA", "@P1 BRA ->1", "EXIT")
    assert (_lines(loop.always), _lines(loop.sometimes)) == ([1, 2, 3, 4, 5], [])


def test_a_rare_path_behind_the_end_is_no_loop_around_everything() -> None:
    # 2 jumps to 6, which tries again and comes back to 3: a branch backwards, yet no loop from 3 to 7.
    (loop,) = _loops("MOV R1, R2", "FADD", "@P0 BRA ->6", "HGMMA", "@P1 BRA ->1", "EXIT", "SYNCS", "BRA ->3", "NOP")
    assert (_lines(loop.always), _lines(loop.sometimes)) == ([1, 2, 3, 4], [6, 7])


def test_groups_of_warps_with_loops_of_their_own() -> None:
    loops = _loops("@P0 BRA ->4", "UTMALDG", "@P1 BRA ->1", "EXIT", "HGMMA", "@P1 BRA ->4", "EXIT")
    assert [_lines(loop.always) for loop in loops] == [[4, 5]]


def test_a_function_without_a_loop_is_read_as_a_whole() -> None:
    (code,) = functions(listing("@P0 EXIT", "@P1 BRA ->3", "LDG.E R2, [R4]", "STG.E [R4], R2", "EXIT", "BRA ->5"))
    whole = Flow(code).whole(frozenset({"LDG"}))
    assert (_lines(whole.always), _lines(whole.sometimes)) == ([0, 1, 2, 3, 4], [])


def test_a_function_that_may_end_early_is_read_to_its_far_end() -> None:
    (code,) = functions(listing("LDG.E R2, [R4]", "@P0 BRA ->4", "LDG.E R3, [R4]", "EXIT", "EXIT"))
    whole = Flow(code).whole(frozenset({"LDG"}))
    assert (_lines(whole.always), _lines(whole.sometimes)) == ([0, 1, 2, 3], [4])


def test_no_instructions_are_refused() -> None:
    assert list(functions("nothing")) == []
    with pytest.raises(ValueError, match="instructions is empty"):
        Flow(())
