"""What a parent makes of what its children say, and of what they do not say."""

import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path

from sora_fast.proof.children import NO_TIME, Limits, Verdict, judged
from sora_fast.proof.telling import place

LIMITS = Limits(start=60, plan=60, total=120)


@dataclass(frozen=True)
class Talk:
    names: tuple[str, ...]
    program: str = "tests.proof.talker"
    title: str = "talk"

    def written(self) -> str:
        return json.dumps(self.names)


def _judged(*names: str, limits: Limits = LIMITS, logs: Path | None = None) -> list[Verdict]:
    return list(judged([Talk(names)], limits, os.environ, logs=logs))


def test_what_a_child_found_stands_beside_its_verdict() -> None:
    assert _judged("good") == [Verdict("good", "passed", "", {"length": 4})]


def test_garbage_is_passed_over() -> None:
    """Bytes that are no text, JSON that is no line of ours, an end without a verdict, or of a plan that is not its."""
    assert [(v.plan, v.verdict) for v in _judged("garbage", "good")] == [("garbage", "passed"), ("good", "passed")]


def test_after_a_crash_the_next_plan_is_judged_and_both_processes_have_a_log(tmp_path: Path) -> None:
    crash, good = _judged("segfault", "good", logs=tmp_path / "logs")
    assert crash == Verdict("segfault", "failed", "crashed: SIGSEGV: the last words") and crash.lost_its_process
    assert good.verdict == "passed" and not good.lost_its_process
    logs = {file.name: file.read_text() for file in (tmp_path / "logs").iterdir()}
    assert logs == {
        "00-talk.log": "a log of segfault good\nthe last words\n",
        "01-talk.log": "a log of good\n",
    }


def test_a_beat_is_no_progress_and_says_where_it_hung() -> None:
    stuck, good = _judged("alive, but stuck", "good", limits=replace(LIMITS, plan=1.5))
    assert stuck.reason.startswith("hung: it was stopped after ") and stuck.lost_its_process
    assert stuck.reason.endswith(" s, at kernels/loop.py:7 (spin)")
    assert good.verdict == "passed"


def test_who_gives_no_sign_of_life_is_not_waited_for() -> None:
    began = time.monotonic()
    silent, good = _judged("silent", "good", limits=replace(LIMITS, silence=2))
    assert silent.reason.endswith(" s of silence") and silent.verdict == "failed"
    assert good.verdict == "passed" and time.monotonic() - began < 30


def test_out_of_time_everything_ends_at_once() -> None:
    began = time.monotonic()
    tasks = [Talk(("silent", "good")) for _ in range(4)]
    verdicts = list(judged(tasks, Limits(start=60, plan=60, total=1, workers=4), os.environ))
    assert time.monotonic() - began < 10
    assert {(v.verdict, v.reason) for v in verdicts} == {("unjudged", NO_TIME)} and len(verdicts) == 8


def test_a_program_that_is_not_there_is_no_verdict() -> None:
    (verdict,) = judged([replace(Talk(("good",)), program="tests.proof.nobody")], LIMITS, os.environ)
    assert verdict.verdict == "unjudged" and "nobody" in verdict.reason and not verdict.lost_its_process


def test_telling_beats_says_where_it_is_and_keeps_the_lines_clean() -> None:
    code = (
        "import time\n"
        "from sora_fast.proof.telling import telling\n"
        "with telling() as say:\n"
        "    print('noise')\n"
        "    say({'begins': 'x'})\n"
        "    time.sleep(2.5)\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    lines = [json.loads(line) for line in ran.stdout.splitlines()]
    assert lines[0] == {"begins": "x"} and [line.keys() for line in lines[1:]] == [{"beats"}] * len(lines[1:])
    assert len(lines) >= 3 and "noise" in ran.stderr


def test_place_is_our_innermost_line() -> None:
    ready = threading.Event()

    def waits() -> None:
        ready.wait()

    thread = threading.Thread(target=waits)
    thread.start()
    found = place(thread.ident)
    ready.set()
    thread.join()
    assert found.startswith("tests.proof.test_children:") and found.endswith("(waits)")
    assert place(-1) == "foreign code"
