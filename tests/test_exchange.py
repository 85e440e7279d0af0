"""Waiting for answers, where they make no sense."""

from __future__ import annotations

from collections import deque
from typing import Any

import pytest

from psframe.errors import MessageError, Stopped
from psframe.events import NO_BUFFER, Answer
from psframe.exchange import Exchange


class Line:
    """A worker's end on which the given answers arrive; nobody waits for more."""

    index, workers, servers, in_place = 0, 1, 1, (True,)

    def __init__(self, *answers: Answer | MessageError) -> None:
        self.answers = deque(answers)

    def receive(self, timeout_s: float | None) -> tuple[int, Any] | None:
        if not self.answers and timeout_s == 0.0:
            return None
        answer = self.answers.popleft()  # an IndexError where this would hang
        if isinstance(answer, MessageError):
            raise answer
        return 0, answer

    def now(self) -> float:
        return 0.0


@pytest.mark.parametrize("timeout_s", [None, 1.0])
@pytest.mark.parametrize("lie", [Answer(0, 7), MessageError("what is no message")])
def test_after_what_makes_no_sense_nothing_is_waited_for(
    lie: Answer | MessageError, timeout_s: float | None
) -> None:
    exchange = Exchange(Line(lie))  # type: ignore[arg-type]
    request, _ = exchange.protocol.push(0, True, 1.0, False)
    what = "no message" if isinstance(lie, MessageError) else "no request: 7"
    with pytest.raises(MessageError, match=what):
        exchange.wait(request, timeout_s)
    exchange.drain()
    for again in (exchange.poll, exchange.check_running, lambda: exchange.wait(request)):
        with pytest.raises(MessageError, match=what):
            again()


def test_what_had_been_answered_before_is() -> None:
    answered = Answer(0, 0, False, True, buffer=NO_BUFFER)
    exchange = Exchange(Line(answered, MessageError("what is no message")))  # type: ignore[arg-type]
    first, _ = exchange.protocol.push(0, True, 1.0, False)
    second, _ = exchange.protocol.push(1, True, 1.0, False)
    with pytest.raises(MessageError):
        exchange.wait(second)
    exchange.wait(first)
    assert first.receipt is answered


def test_stopped_is_no_lie() -> None:
    exchange = Exchange(Line(Answer(0, 0, stopped=True)))  # type: ignore[arg-type]
    request, _ = exchange.protocol.pull()
    exchange.wait(request)
    with pytest.raises(Stopped):
        exchange.check_running()
