"""Messages over a stream socket between two processes of one node, whole and in order."""

from __future__ import annotations

import select
import socket
import struct
from typing import Final

from psframe.errors import MessageError

__all__ = ["Frames"]

_LENGTH = struct.Struct("<I")
_READ_BYTES: Final = 1 << 16


class Frames:
    """One end; nothing of it waits but `wait`.

    Args:
        end: a connected stream socket, which belongs to this from now on.
        bytes_max: of the longest message that can come.

    Attributes:
        ended: whether the other end is closed, and all that came of it has been taken.
    """

    def __init__(self, end: socket.socket, bytes_max: int) -> None:
        end.setblocking(False)
        self.ended = False
        self._socket = end
        self._bytes_max = bytes_max
        self._coming = bytearray()
        self._leaving = bytearray()
        self._poll = select.poll()

    def send(self, message: bytes) -> None:
        """Send a message, or keep it until there is room; to an end that is closed, drop it."""
        self._leaving += _LENGTH.pack(len(message)) + message
        self.flush()

    def flush(self) -> bool:
        """Send what is kept, as far as there is room; True if nothing is left."""
        try:
            while self._leaving:
                del self._leaving[: self._socket.send(self._leaving)]
        except BlockingIOError:
            return False
        except OSError:  # the other end is closed, as `take` will say when it has read the rest
            self._leaving.clear()
        return True

    def take(self) -> bytearray | None:
        """Take the next message; None if there is no whole one.

        Raises:
            MessageError: it is longer than any can be; nothing more can be taken.
        """
        if self._leaving:
            self.flush()
        while (message := self._cut()) is None and not self.ended:
            try:
                data = self._socket.recv(_READ_BYTES)
            except BlockingIOError:
                return None
            except OSError:  # reset: it was closed before it had read all
                data = b""
            self._coming += data
            self.ended = not data
        return message

    def wait(self, timeout_s: float) -> None:
        """Wait until something comes, what is kept can leave, or the time is over."""
        out = select.POLLOUT if self._leaving else 0
        self._poll.register(self._socket, select.POLLIN | out)
        self._poll.poll(1000 * timeout_s)

    def close(self) -> None:
        """Close this end."""
        self.ended = True
        self._socket.close()

    def _cut(self) -> bytearray | None:
        """Cut the first message off what has come, if it is whole."""
        coming = self._coming
        if len(coming) < _LENGTH.size:
            return None
        (n_bytes,) = _LENGTH.unpack_from(coming)
        if n_bytes > self._bytes_max:
            raise MessageError(f"a message of {n_bytes} bytes is longer than any of ours")
        end = _LENGTH.size + n_bytes
        if len(coming) < end:
            return None
        message = coming[_LENGTH.size : end]
        del coming[:end]
        return message
