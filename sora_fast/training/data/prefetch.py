"""Items made ahead, in a thread."""

import queue
import threading
from collections.abc import Iterator
from typing import TypeVar

Item = TypeVar("Item")


def prefetch(items: Iterator[Item], depth: int = 2, *, in_step: bool = False) -> Iterator[Item]:
    """The same items in the same order, made up to `depth` ahead in a thread that ends with the generator; with the
    process, if waiting for an item was given up (by Ctrl-C, or `Stopped`).

    in_step: making them takes exchanges with other workers, of whom each is to make the same number: `depth` more than
        were taken, also where the generator ends before.
    """
    made: queue.SimpleQueue[tuple[Item | None, BaseException | None]] = queue.SimpleQueue()
    wanted: queue.SimpleQueue[bool] = queue.SimpleQueue()

    def work() -> None:
        try:
            while wanted.get() and (in_step or not ending.is_set()):
                made.put((next(items), None))
        except BaseException as error:
            made.put((None, error))
        finally:
            if hasattr(items, "close"):  # a generator may have processes to end
                items.close()

    ending = threading.Event()
    for _ in range(depth):
        wanted.put(True)
    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    left_alone = False
    try:
        while True:
            item, error = made.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            wanted.put(True)
            yield item
    except KeyboardInterrupt:
        left_alone = True  # it may be stuck in the very item that was waited for
        raise
    finally:
        ending.set()
        wanted.put(False)
        if not left_alone:
            thread.join()
