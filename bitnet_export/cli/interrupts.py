"""Ctrl-C and SIGTERM as exceptions that cannot get lost.

Python raises them wherever it happens to be, and a library that catches everything around one of
its own calls swallows them there. What was asked for is therefore remembered, and raised again at
the next sign of progress.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

_received: list[int] = []


@contextmanager
def signals_raise() -> Iterator[None]:
    """While it lasts SIGINT raises KeyboardInterrupt and SIGTERM SystemExit, as a cancelled CI job
    needs it: clean up as for Ctrl-C, exit as the shell would. An ignored SIGINT stays ignored."""
    previous = {signal.SIGTERM: signal.signal(signal.SIGTERM, _raise)}
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        previous[signal.SIGINT] = signal.signal(signal.SIGINT, _raise)
    _received.clear()
    try:
        yield
    finally:
        _received.clear()
        for number, handler in previous.items():
            signal.signal(number, handler)


def check() -> None:
    """Raise what a signal asked for, if it did and the program is still going on."""
    if _received:
        raise _error(_received[-1])


def _raise(number: int, frame: object) -> None:
    _received.append(number)
    raise _error(number)


def _error(number: int) -> BaseException:
    return KeyboardInterrupt() if number == signal.SIGINT else SystemExit(128 + number)
