"""An MPI that takes device pointers, and is as late with them as may be.

Under the real one, at the level of its requests: a send reads its buffer only when it has been
tested some times, and a receive's buffer is NaN until it is complete, but for its first half, which
comes earlier. It says that a send is complete some tests after it is, and looks whether the buffer
has been the same from the beginning until then: it is MPI's. No copy of `fake_cupy` may be under
way to or from a buffer that MPI is given. The order between two ranks stays. Device memory is that
of `fake_cupy` or `fake_cuda`, which is the host's, so that what travels is what was there then.
"""

from __future__ import annotations

import ctypes
import sys
from collections import deque
from typing import Any

import numpy as np

__all__ = ["AwareMesh"]

_TESTS = 3  # of a request, before it does anything; a send's, unless the test says otherwise
_MORE_TESTS = 40  # of a send that is complete, before it says so


class AwareMesh:
    """A `Mesh` whose arrays travel late.

    Args:
        mesh: the real one.
        tests: of a send, before it reads.

    Attributes:
        sent, received: by kind of memory, "host" or "device", how many arrays.
    """

    def __init__(self, mesh: Any, tests: int = _TESTS) -> None:
        self._mesh = mesh
        self._tests = tests
        self._late: dict[int, deque[_Send]] = {}
        self.sent = {"host": 0, "device": 0}
        self.received = {"host": 0, "device": 0}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._mesh, name)

    def start_send(self, array: Any, target: int) -> list[Any]:
        self.sent[_kind(array)] += 1
        queue = self._late.setdefault(target, deque())
        sends = [_Send(self._mesh, part, target, queue, self._tests) for part in _pieces(array)]
        queue.extend(sends)
        return sends

    def start_receive(self, array: Any, source: int) -> list[Any]:
        self.received[_kind(array)] += 1
        return [_Receive(self._mesh, part, source) for part in _pieces(array)]


class _Send:
    def __init__(self, mesh: Any, part: Any, target: int, queue: deque[_Send], late: int) -> None:
        self.mesh, self.part, self.target, self.queue = mesh, part, target, queue
        self.late = late
        self.tests = 0
        self.requests: list[Any] | None = None
        self.read = _bytes_of(part)
        check_quiet(part)

    def Test(self) -> bool:
        self.tests += 1
        while self.requests is None and self.tests > self.late:
            first = self.queue.popleft()  # perhaps one before it
            first.check()
            first.requests = first.mesh.start_send(first.part, first.target)
        if self.requests is None or not all(request.Test() for request in self.requests):
            return False
        if self.tests <= self.late + _MORE_TESTS:
            return False
        self.check()
        return True

    def check(self) -> None:
        assert _bytes_of(self.part) == self.read, "it was overwritten while it was MPI's"


class _Receive:
    def __init__(self, mesh: Any, part: Any, source: int) -> None:
        address, self.n_bytes = _address(part), part.nbytes
        self.part, self.address = part, address
        check_quiet(part)
        ctypes.memset(address, 0xFF, self.n_bytes)
        self.came = np.empty(self.n_bytes, np.uint8)
        self.requests = mesh.start_receive(self.came, source)
        self.tests = 0

    def Test(self) -> bool:
        if not all(request.Test() for request in self.requests):
            return False
        self.tests += 1
        whole = self.tests > _TESTS
        length = self.n_bytes if whole else self.n_bytes // 2
        ctypes.memmove(self.address, self.came.ctypes.data, length)
        return whole


def check_quiet(part: Any) -> None:
    """Raise if the device has still to read or write what MPI is given."""
    cuda = getattr(sys.modules.get("cupy"), "cuda", None)
    begin = _address(part)
    for address, n_bytes in tuple(getattr(cuda, "under_way", ())):
        disjoint = address + n_bytes <= begin or begin + part.nbytes <= address
        assert disjoint, "the device has still to copy it"


def _bytes_of(part: Any) -> bytes:
    return ctypes.string_at(_address(part), part.nbytes)


def _kind(array: Any) -> str:
    return "host" if isinstance(array, np.ndarray) else "device"


def _address(array: Any) -> int:
    return int(array.ctypes.data if isinstance(array, np.ndarray) else array.data.ptr)


def _pieces(array: Any) -> list[Any]:
    from psframe.transports import mpi

    length = mpi.piece_elements(array)
    return [array[b : b + length] for b in range(0, array.size, length)]
