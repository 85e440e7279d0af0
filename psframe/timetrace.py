"""A timeline of all ranks as a Chrome trace, for Perfetto or chrome://tracing."""

from __future__ import annotations

import json
import logging
import time
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path

from psframe.events import NOBODY, HostEvent, SpanKind, Spans

__all__ = ["TRACE", "TimeTrace"]

TRACE = "trace.json"

# 21 bytes each in memory, about 90 in the file.
_SPANS_MAX = 400_000
# Two clocks nearer than this are one: ranks on a node share it, and what is seen is the message's
# time under way.
_SAME_CLOCK_S = 0.01

_log = logging.getLogger("psframe")


class TimeTrace:
    """Gathers what ranks were at, and writes it as `trace.json` at the end.

    One track a rank. A rank's clock is aligned by the message that took the shortest time: its
    offset to this process's clock is the least (time of arrival - time of sending), which is too
    large by that message's time under way. After 400,000 spans no more are taken, which the file
    says.

    Args:
        clock: this process's seconds, the clock of its own spans.

    Attributes:
        dropped: spans that were not taken.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.dropped = 0
        self._clock = clock
        self._who, self._kind = array("i"), array("B")  # a worker, or -1 - server
        self._begin, self._end = array("d"), array("d")
        self._offset: dict[int, float] = {}

    def __call__(self, event: HostEvent) -> None:
        """Take one event; only spans concern it."""
        if not isinstance(event, Spans):
            return
        who = event.worker if event.worker != NOBODY else -1 - event.server
        offset = self._clock() - event.now_s
        self._offset[who] = min(offset, self._offset.get(who, offset))
        room = _SPANS_MAX - len(self._kind)
        self.dropped += max(len(event.spans) - room, 0)
        for kind, begin, end in event.spans[: max(room, 0)]:
            self._who.append(who)
            self._kind.append(kind)
            self._begin.append(begin)
            self._end.append(end)

    def write(self, folder: Path, servers: int, line: Sequence[int] = ()) -> Path | None:
        """Write trace.json by rename; a disk that refuses it is warned of, and None returned.

        Args:
            folder: the run directory.
            servers: S.
            line: the ranks in the order servers, workers; as they are numbered if empty.
        """
        file = folder / TRACE
        temporary = file.with_name(f".{TRACE}.tmp")
        try:
            try:
                with temporary.open("w", encoding="utf-8") as stream:
                    stream.write('{"displayTimeUnit": "ms", "traceEvents": [\n')
                    stream.write(",\n".join(self._tracks(servers, line)))
                    for span in self._lines(servers, line):
                        stream.write(",\n" + span)
                    stream.write(f'\n], "otherData": {{"spans_dropped": {self.dropped}}}}}\n')
                temporary.replace(file)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
        except OSError as error:
            _log.warning("%s: %s; the run has no trace", file, error.strerror or error)
            return None
        return file

    def _tracks(self, servers: int, line: Sequence[int]) -> list[str]:
        names = {_rank(who, servers, line): who for who in self._offset}
        lines = ['{"name": "process_name", "ph": "M", "pid": 0, "args": {"name": "psframe"}}']
        for rank, who in sorted(names.items()):
            role = f"server {-1 - who}" if who < 0 else f"worker {who}"
            name = json.dumps({"name": f"rank {rank} ({role})"})
            lines.append(
                f'{{"name": "thread_name", "ph": "M", "pid": 0, "tid": {rank}, "args": {name}}}'
            )
        return lines

    def _lines(self, servers: int, line: Sequence[int]):  # type: ignore[no-untyped-def]
        """Give one line a span; times in microseconds from the first one on."""
        names = [kind.name.lower() for kind in SpanKind]
        offset = {w: 0.0 if 0 <= o < _SAME_CLOCK_S else o for w, o in self._offset.items()}
        columns = list(zip(self._who, self._kind, self._begin, self._end, strict=True))
        start = min((begin + offset[who] for who, _, begin, _ in columns), default=0.0)
        for who, kind, begin, end in columns:
            ts = (begin + offset[who] - start) * 1e6
            yield (
                f'{{"name": "{names[kind]}", "ph": "X", "pid": 0,'
                f' "tid": {_rank(who, servers, line)}, "ts": {ts:.3f},'
                f' "dur": {(end - begin) * 1e6:.3f}}}'
            )


def _rank(who: int, servers: int, line: Sequence[int]) -> int:
    place = -1 - who if who < 0 else servers + who
    return line[place] if line else place
