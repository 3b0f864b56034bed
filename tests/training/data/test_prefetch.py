import itertools
import signal
import threading
import time
from collections.abc import Iterator

import pytest

from sora_fast.training.data.prefetch import prefetch


def test_prefetch_keeps_order_and_ends_its_thread() -> None:
    before = threading.active_count()
    items = prefetch(iter(range(100)), depth=3)
    assert list(itertools.islice(items, 50)) == list(range(50))
    items.close()
    assert threading.active_count() == before


def test_prefetch_ends_with_its_items() -> None:
    assert list(prefetch(iter(range(7)), depth=3)) == list(range(7))


def test_prefetch_in_step_makes_as_many_wherever_it_is_stopped() -> None:
    """Two workers, of which one is slow; each item takes an exchange with the other."""
    meeting, made = threading.Barrier(2, timeout=60), [[], []]

    def items(worker: int) -> Iterator[int]:
        for number in itertools.count():
            if worker:
                time.sleep(0.01)
            meeting.wait()
            made[worker].append(number)
            yield number

    ahead = [prefetch(items(worker), depth=2, in_step=True) for worker in range(2)]
    threads = [threading.Thread(target=lambda one=one: (list(itertools.islice(one, 5)), one.close())) for one in ahead]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert made[0] == made[1] == list(range(7)), "two more than were taken"


def test_prefetch_hands_on_errors() -> None:
    def broken() -> Iterator[int]:
        yield 1
        raise OSError("the disk is gone")

    items = prefetch(broken())
    assert next(items) == 1
    with pytest.raises(OSError, match="the disk is gone"):
        next(items)


def test_prefetch_is_left_at_once() -> None:
    """By the second Ctrl-C too, which is none that a run waits for: the item may never come."""
    never = threading.Event()

    def stuck() -> Iterator[int]:
        yield 1
        never.wait(20)

    items = prefetch(stuck())
    assert next(items) == 1
    began = time.monotonic()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # another test may have left one of its own
    threading.Timer(0.2, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT)).start()
    try:
        with pytest.raises(KeyboardInterrupt):
            next(items)
        assert time.monotonic() - began < 10
    finally:
        never.set()
        signal.signal(signal.SIGINT, before)
