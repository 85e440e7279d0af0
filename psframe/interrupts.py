"""Signals: SIGTERM and SIGINT interrupt, SIGUSR1 and SIGUSR2 ask for a checkpoint and an end.

Of the former, first the verdict, then KeyboardInterrupt where it does no harm. What is rank 0's to
do is passed on to it.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Collection, Iterator
from types import FrameType, TracebackType
from typing import Any

__all__ = ["Interrupts", "interrupting", "noting_requests"]

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_REQUESTS = (signal.SIGUSR1, signal.SIGUSR2)
_HERE = "this one"

# The first request that came where no `Interrupts` was entered, inside of `noting_requests`.
_noted: list[str] = []


@contextlib.contextmanager
def noting_requests() -> Iterator[None]:
    """Keep SIGUSR1 and SIGUSR2 for the next `Interrupts`; they would end the process."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def note(number: int, frame: FrameType | None) -> None:
        _noted.append(signal.Signals(number).name)

    before = {number: signal.signal(number, note) for number in _REQUESTS}
    try:
        yield
    finally:
        _noted.clear()
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


@contextlib.contextmanager
def interrupting() -> Iterator[None]:
    """Raise KeyboardInterrupt at SIGTERM and SIGINT, where no `Interrupts` is entered."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt(signal.Signals(number).name)

    before = {number: signal.signal(number, interrupt) for number in _heeded()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def _heeded() -> list[signal.Signals]:
    """The signals that interrupt, but for those that this process was started to ignore.

    A shell does so with SIGINT in the background, where Ctrl-C is meant for somebody else.
    """
    return [number for number in _SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]


class Interrupts:
    """Handles the signals while it is entered; does nothing outside of the main thread.

    The verdict is written at once, because Open MPI leaves a rank 0.3 s between SIGTERM and
    SIGKILL. Then KeyboardInterrupt is raised where the program is; while the signals are `held`
    it waits for the next `check`, so that no state machine is left in the middle of a step. A
    second signal does not wait; what other ranks tell of, before or after it came here, is the
    same signal.

    Args:
        verdict: called with the reason at the first signal.

    SIGUSR1 and SIGUSR2 are noted, once, for who looks: schedulers send them before they take a
    job's nodes away.

    Attributes:
        pending: the name of the signal that waits, or empty.
        asked: the name of the first signal that asks for an end in good order, or empty.
        pass_on: called with every signal that does not raise here, for whom it concerns.
    """

    def __init__(self, verdict: Callable[[str], None]) -> None:
        self._verdict = verdict
        self._before: dict[signal.Signals, Any] = {}
        self._held = False
        self._delicate: Collection[str] = ()
        # Who was the first to be interrupted: threads and handlers agree by `setdefault`.
        self._first: dict[str, object] = {}
        self._came = False  # a signal, here
        self.pass_on: Callable[[int], None] = _nothing
        self.pending = ""
        self.asked = ""

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():  # Python allows no other
            self._before = {n: signal.signal(n, self._handle) for n in _heeded()}
            self._before |= {n: signal.signal(n, self._ask) for n in _REQUESTS}
            self.asked = _noted[0] if _noted else ""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            # None: a handler that C code has set, and that only C code could set again.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._before = {}
        # They refer to a run, whose memory goes with its last reference.
        self._verdict = self.pass_on = _nothing

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Let the first signal wait for `check`."""
        before, self._held = self._held, True
        try:
            yield
        finally:
            self._held = before

    @contextlib.contextmanager
    def released(self, delicate: Collection[str] = ()) -> Iterator[None]:
        """Raise at once, inside of `held`; also what waits.

        Args:
            delicate: names of modules; while a function of theirs runs, the first signal waits.

        Raises:
            KeyboardInterrupt: one waits.
        """
        self._held, self._delicate = False, delicate
        try:
            self.check()
            yield
        finally:
            self._held, self._delicate = True, ()

    def take(self, number: int) -> None:
        """Take a signal that has come to another rank; the first that interrupts waits for `check`.

        It comes to every rank, as a rule, and at another moment to each.
        """
        teller = object()
        if number in _REQUESTS:
            self._ask(number, None)
        elif self._first.setdefault("rank", teller) is teller:
            self.pending = signal.Signals(number).name
            self._verdict(f"{self.pending} received")

    def check(self) -> None:
        """Raise the KeyboardInterrupt that waits, if one does."""
        if self.pending:
            name, self.pending = self.pending, ""
            raise KeyboardInterrupt(name)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = self.asked or signal.Signals(number).name
        self.pass_on(number)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        self._verdict(f"{name} received")
        again, self._came = self._came, True
        told = self._first.setdefault("rank", _HERE) is not _HERE and not again
        if self._held or self._is_delicate(frame):
            if told:
                return  # by another rank
            if not self.pending:
                self.pending = name
                self.pass_on(number)
                return
        raise KeyboardInterrupt(name)

    def _is_delicate(self, frame: FrameType | None) -> bool:
        while frame is not None and self._delicate:
            if frame.f_globals.get("__name__") in self._delicate:
                return True
            frame = frame.f_back
        return False


def _nothing(what: object) -> None:
    pass
