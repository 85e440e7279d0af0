"""Whether a codec saves more time than it costs, as one worker measures it."""

from __future__ import annotations

import logging
import statistics

from psframe.codecs import Codec

__all__ = ["Worth"]

# Gradients that are coded before it is said.
_JUDGED_AT = 20
# Said by one worker, whose rank the commands else keep quiet.
_log = logging.getLogger("psframe.worth")
_log.setLevel(logging.WARNING)


class Worth:
    """Compares what coding takes with what the bytes that it leaves out would take.

    Args:
        codec: which.
    """

    def __init__(self, codec: Codec) -> None:
        self._codec = codec
        self._rate: float | None = None  # bytes a second, of the first parameters that came
        self._times: list[float] = []

    def pulled(self, n_bytes: int, seconds: float) -> None:
        """Take note of how long parameters have taken that were not coded: the first count.

        Args:
            n_bytes: that have travelled; 0 if all was read in shared memory.
            seconds: from the question to the answer.
        """
        if self._rate is None:
            self._rate = n_bytes / max(seconds, 1e-9)

    def coded(self, saved_bytes: int, seconds: float) -> None:
        """Take note of a gradient; after some, warn if coding them does not pay.

        Args:
            saved_bytes: by how much less travels; 0 if nothing does.
            seconds: that coding took.
        """
        if len(self._times) == _JUDGED_AT or self._rate is None:
            return
        self._times.append(seconds)
        if len(self._times) < _JUDGED_AT:
            return
        costs_s = statistics.median(self._times)
        if not self._rate:
            _log.warning(
                "codec %r only costs here: it takes %.3g ms a gradient, and on one node nothing"
                " travels that it could make less of; leave it out",
                self._codec,
                costs_s * 1e3,
            )
            return
        saves_s = saved_bytes / self._rate
        if costs_s > saves_s:
            _log.warning(
                "codec %r costs more time than it saves: it takes %.3g ms a gradient, and what it"
                " leaves out would take %.3g ms at the %.3g MB/s of this worker's first pull",
                self._codec,
                costs_s * 1e3,
                saves_s * 1e3,
                self._rate / 1e6,
            )
