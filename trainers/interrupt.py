"""SIGINT and SIGTERM as a wish to stop at the next good place, not a stop in the middle."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass
class Stop:
    """Whether someone asked to stop."""

    requested: bool = False


@contextmanager
def interruptible() -> Iterator[Stop]:
    """Turn the first SIGINT or SIGTERM into `stop.requested`; a second one acts as it always did.

    Outside the main thread, where Python allows no handlers, signals act as they always did. One
    that the process was told to ignore, as a script's background jobs are, it goes on ignoring.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    before = {number: handler for number, handler in before.items() if handler != signal.SIG_IGN}

    def restore() -> None:
        for number, handler in before.items():
            # None: a handler that wasn't installed from Python can't be put back from Python.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def ask(number: int, frame: object) -> None:
        stop.requested = True
        restore()

    for number in before:
        signal.signal(number, ask)
    try:
        yield stop
    finally:
        restore()
