from benchmarks.phases import PHASES
from benchmarks.timetable import RESERVE, SECONDS, ends


def test_nine_minutes_are_what_they_are_planned_to_be() -> None:
    found = ends(list(SECONDS), 540)
    first = {
        name: round(end) for name, end in found.items() if name in ("versions", "smoke", "headline", "tuning", "model")
    }
    assert first == {"versions": 20, "smoke": 105, "headline": 220, "tuning": 315, "model": 440}
    assert list(found.values())[-1] == 540 - RESERVE


def test_a_phase_alone_has_all_the_time_but_for_the_end() -> None:
    found = ends(["versions", "tuning"], 125)
    assert found == {"versions": 20, "tuning": 115}


def test_every_phase_has_its_time_and_its_work() -> None:
    assert list(SECONDS) == list(PHASES)
