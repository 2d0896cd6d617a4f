"""Ctrl-C and SIGTERM as a request to save and stop."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Self

from patchgd_jax.errors import Interrupted

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_ONE_REQUEST = 0.2
"""Seconds in which the same signal again is part of the first one's request."""


class StopRequest:
    """A context manager that turns the first SIGINT or SIGTERM into a request.

    The training loop polls `signal_number`; within `immediate()`, where there is nothing to save,
    the signal raises `Interrupted` at once. A second signal ends the process without saving, unless
    it is the same within a fifth of a second: `timeout` sends one to the process and to its group.
    """

    def __init__(self) -> None:
        self.signal_number: int | None = None
        self._asked = 0.0
        self._immediate = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        # Only the main thread may set handlers; in others, the caller handles signals.
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal_number is not None:
            again = number == self.signal_number
            if again and time.monotonic() - self._asked < _ONE_REQUEST:
                return
            os._exit(128 + number)
        self.signal_number, self._asked = number, time.monotonic()
        if self._immediate:
            self._stop_now()

    def _stop_now(self) -> None:
        raise interrupted(self.signal_number or 0, "while preparing; there was nothing to save")

    @contextmanager
    def immediate(self) -> Iterator[None]:
        """Makes a signal within the body raise `Interrupted` at once."""
        self._immediate = True
        try:
            yield
        finally:
            self._immediate = False
        if self.signal_number is not None:
            # The signal came where Python drops exceptions, in a finalizer or a callback from C.
            self._stop_now()


def interrupted(number: int, when: str) -> Interrupted:
    """Makes the error of a run stopped by signal `number`."""
    return Interrupted(number, f"stopped by {signal.Signals(number).name} {when}")
