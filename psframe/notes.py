"""What a worker has to tell beside its work: numbers for the metrics, spans for a timeline."""

from __future__ import annotations

from collections.abc import Mapping

from psframe.events import Log, SpanKind, Spans
from psframe.exchange import Exchange
from psframe.tasks import real_number
from psframe.wire import NAMES_MAX

__all__ = ["Notes"]

# Calls of `log` after which the sums are sent even if no lease is asked for.
_LOG_EVERY = 64
# Spans in a message.
_SPANS_EVERY = 256


class Notes:
    """Sums what is logged and gathers spans; both are sent to server 0 now and then."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange
        self._sums: dict[str, tuple[float, int]] = {}
        self._calls = 0
        self._spans: list[tuple[int, float, float]] = []

    def log(self, numbers: Mapping[str, float]) -> None:
        """Add numbers to the sums; see `Worker.log`."""
        checked = [(name, real_number(name, value)) for name, value in numbers.items()]
        for name, value in checked:
            if name not in self._sums and len(self._sums) == NAMES_MAX:
                self.flush_log()  # a message has room for no more
            total, count = self._sums.get(name, (0.0, 0))
            self._sums[name] = (total + value, count + 1)
        self._calls += 1
        if self._calls >= _LOG_EVERY:
            self.flush_log()

    def span(self, kind: SpanKind, begin_s: float, end_s: float) -> None:
        """Note a span; see `Worker.span`."""
        self._spans.append((kind, begin_s, end_s))
        if len(self._spans) >= _SPANS_EVERY:
            self.flush_spans()

    def flush_log(self) -> None:
        """Send the sums."""
        if self._sums:
            self._exchange.send(0, Log(self._exchange.endpoint.index, self._sums))
            self._sums = {}
        self._calls = 0

    def flush_spans(self) -> None:
        """Send the spans."""
        if self._spans:
            endpoint = self._exchange.endpoint
            self._exchange.send(0, Spans(endpoint.index, endpoint.now(), self._spans))
            self._spans = []
