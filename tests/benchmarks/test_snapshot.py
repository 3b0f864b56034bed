"""The snapshot of the ahead-of-time table: what changed is named, and an intended change is one command."""

import json
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from benchmarks import aot
from benchmarks.hot_loop import Loop
from benchmarks.snapshot import SHARED_LIMIT, Row, Selection, Snapshot
from sora_fast.report.loops import hot_loops

ALL = Selection(tuple(SHARED_LIMIT))
PRODUCTS, CYCLES = {"HGMMA 64x64x16": 8}, {"tensor": 1024, "mufu": 544}
LOOP = Loop(8, 370, 65, 1 << 22, 1.0, PRODUCTS, 1, 2, 0, 0, 0, 0, 0, CYCLES, 1.0, "tensor", 0.6)
FORWARD = Row("adaln[C64]/_forward", "sm_90", 40, 0, 1024, 300, 0, 6, 2, (LOOP, LOOP))
BACKWARD = replace(FORWARD, kernel="adaln[C64]/_backward", registers=64)
AMPERE = replace(FORWARD, target="sm_80")
KNOWN = Snapshot(aot.triton.__version__, (FORWARD, BACKWARD, AMPERE))


def _named(rows: Iterable[Row]) -> dict[tuple[str, str], Row]:
    return {(row.kernel, row.target): row for row in rows}


def test_changed_new_and_vanished_rows_are_named() -> None:
    new = replace(FORWARD, kernel="unpatchify[K64]/_gather")
    lines = list(KNOWN.differences([replace(FORWARD, registers=48, hgmma=2), AMPERE, new], ALL))
    assert lines == [
        "adaln[C64]/_backward on sm_90: vanished",
        "adaln[C64]/_forward on sm_90: registers 40 → 48, hgmma 0 → 2",
        "unpatchify[K64]/_gather on sm_90: new",
    ]


def test_what_changed_in_a_loop_is_named() -> None:
    slower = replace(LOOP, waits=2, products={"HGMMA 64x32x16": 16}, cycles={**LOOP.cycles, "mufu": 600}, bound=0.8)
    lines = list(KNOWN.differences([replace(FORWARD, loops=(LOOP, slower)), BACKWARD, AMPERE], ALL))
    assert lines == [
        "adaln[C64]/_forward on sm_90: loop 2: mufu 544 → 600, loop 2: HGMMA 64x64x16 8 → none, loop 2: waits 1 → 2, "
        "loop 2: bound 1.0 → 0.8, loop 2: HGMMA 64x32x16 none → 16"
    ]


def test_a_file_from_before_loops_were_read_is_compared_without(tmp_path: Path) -> None:
    content = json.loads(json.dumps(asdict(FORWARD)))
    del content["loops"]
    file = tmp_path / "aot.json"
    file.write_text(json.dumps({"triton": KNOWN.triton, "rows": [content]}))
    old = Snapshot.read(file)
    assert old is not None and list(old.differences([FORWARD], ALL)) == []
    assert list(old.differences([replace(FORWARD, registers=41)], ALL)) == [
        "adaln[C64]/_forward on sm_90: registers 40 → 41"
    ]


def test_what_is_not_selected_is_neither_compared_nor_replaced() -> None:
    one = Selection(["sm_90"], ["_forward"])
    changed = replace(FORWARD, spills=8)
    assert list(KNOWN.differences([FORWARD], one)) == []
    assert list(KNOWN.differences([], one)) == ["adaln[C64]/_forward on sm_90: vanished"]
    assert _named(KNOWN.with_rows([changed], one).rows) == _named([changed, BACKWARD, AMPERE])
    assert _named(KNOWN.with_rows([], Selection(["sm_90"])).rows) == _named([AMPERE])


def test_a_row_is_a_line_and_the_order_is_fixed(tmp_path: Path) -> None:
    first, second = tmp_path / "deep" / "first.json", tmp_path / "second.json"
    KNOWN.write(first)
    replace(KNOWN, rows=KNOWN.rows[::-1]).write(second)
    assert first.read_bytes() == second.read_bytes()
    assert len(first.read_text().splitlines()) == len(KNOWN.rows) + 2
    read = Snapshot.read(first)
    assert read is not None and read.triton == KNOWN.triton and _named(read.rows) == _named(KNOWN.rows)
    assert Snapshot.read(tmp_path / "absent.json") is None


def test_the_report_reads_the_loops(tmp_path: Path) -> None:
    KNOWN.write(tmp_path / "aot.json")
    rows = hot_loops(tmp_path / "aot.json").rows
    assert len(rows) == 2 * len(KNOWN.rows)
    assert ("adaln[C64]/_forward", "sm_80", 2, "8×HGMMA 64x64x16", "tensor", 100.0, 60.0) in {row[:7] for row in rows}


@pytest.mark.parametrize("text", ["", "[]", '{"triton": "3", "rows": [{"kernel": "a"}]}'])
def test_another_file_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "aot.json").write_text(text)
    with pytest.raises(ValueError, match="is no snapshot"):
        Snapshot.read(tmp_path / "aot.json")


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A snapshot of KNOWN, which is also what compiling gives."""

    def compile_all(target: str, selection: Selection) -> tuple[list[Row], list[str]]:
        return [row for row in KNOWN.rows if row.target == target and row in selection], []

    monkeypatch.setattr(aot, "compile_all", compile_all)
    monkeypatch.setattr(aot.triton.knobs.runtime, "interpret", False)
    KNOWN.write(tmp_path / "aot.json")
    return tmp_path / "aot.json"


def test_check_finds_a_change_and_update_accepts_it(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--snapshot", str(file)]
    assert aot.main([*command, "--check"]) == 0
    good = file.read_bytes()
    KNOWN.with_rows([replace(AMPERE, registers=9)], Selection(["sm_80"])).write(file)
    assert aot.main([*command, "--check", "--target", "sm_90"]) == 0
    assert aot.main([*command, "--check"]) == 1
    assert "adaln[C64]/_forward on sm_80: registers 9 → 40" in capsys.readouterr().out
    assert aot.main([*command, "--update"]) == 0
    assert file.read_bytes() == good


def test_update_keeps_what_does_not_compile(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = file.read_bytes()
    monkeypatch.setattr(aot, "compile_all", lambda *_: ([], ["does not compile"]))
    assert aot.main(["--snapshot", str(file), "--update"]) == 1
    assert file.read_bytes() == good


def test_another_triton_is_not_compared(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    replace(KNOWN, triton="2.0", rows=(AMPERE,)).write(file)
    command = ["--snapshot", str(file)]
    assert aot.main([*command, "--check"]) == 0
    assert "not compared: the snapshot is of Triton 2.0" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        aot.main([*command, "--update", "--target", "sm_90"])
    assert "update all of it" in capsys.readouterr().err
    assert aot.main([*command, "--update"]) == 0
    assert _named(Snapshot.read(file).rows) == _named(KNOWN.rows)


def test_there_must_be_one_to_compare_with(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for spoil, complaint in ((lambda: file.write_text("{"), "is no snapshot"), (file.unlink, "--update writes it")):
        spoil()
        with pytest.raises(SystemExit):
            aot.main(["--check", "--snapshot", str(file)])
        assert complaint in capsys.readouterr().err


@pytest.mark.parametrize("options", [["--json", "/proc/new/a.json"], ["--update", "--snapshot", "/proc/new/a.json"]])
def test_where_it_cannot_write_it_does_not_begin(
    file: Path, options: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(aot, "compile_all", lambda *_: pytest.fail("the work has begun"))
    with pytest.raises(SystemExit):
        aot.main(["--snapshot", str(file), *options])
    assert "nothing can be written to /proc" in capsys.readouterr().err


def test_registers_may_spill_around_a_hot_loop_but_not_in_it() -> None:
    spilled = replace(FORWARD, spills=24, loops=(LOOP, replace(LOOP, local=LOOP.instructions // 20)))
    assert spilled.problem == ""
    assert "24 bytes" in replace(spilled, loops=(LOOP, replace(LOOP, local=LOOP.instructions // 10))).problem
    # Without products, nothing is known to take the time.
    assert "24 bytes" in replace(spilled, loops=(replace(LOOP, products={}),)).problem
    assert "24 bytes" in replace(spilled, loops=None).problem
