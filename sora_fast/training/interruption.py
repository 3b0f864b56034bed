"""Ctrl-C and SIGTERM: a run stops between two steps, and is saved."""

import contextlib
import signal
from collections.abc import Iterator
from typing import Any

from tqdm import tqdm


class Stopped(KeyboardInterrupt):
    """A request to stop, raised where waiting for the step's end would only be waiting."""


class Interruption:
    """Turns the first Ctrl-C (or SIGTERM) into a request to stop after the step; the second one stops at once."""

    def __init__(self) -> None:
        self.requested = False
        self._interruptible = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Interruption":
        with contextlib.suppress(ValueError):  # signals belong to the main thread; elsewhere there is nothing to do
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._request)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def at_once(self, *, when: bool = True) -> Iterator[None]:
        """Inside, a request raises `Stopped`, an earlier one too: for what changes nothing and may take minutes (data,
        compilation)."""
        self._interruptible = when
        try:
            if when and self.requested:
                raise Stopped
            yield
        finally:
            self._interruptible = False

    def _request(self, number: int, frame: object) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        when = "" if self._interruptible else " after this step"
        # Ctrl-C ends the reader of a pipe too, and a signal may come in the middle of another line: still it is saved.
        with contextlib.suppress(OSError, RuntimeError):
            tqdm.write(f"Stopping{when}, and saving. (Again: stop at once, without.)")
        if self._interruptible:
            raise Stopped
