"""What a process lends of its GPU memory, and when it lets it go; `fake_ipc` is the driver."""

from __future__ import annotations

import gc
import itertools
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from fake_cupy import FakeCupy, installed

from psframe.devices import identify
from psframe.devices.opening import Lent, Opened, check_reach, lent_bytes
from psframe.paired import BorrowedArray
from psframe.transports import borrowing
from psframe.transports.borrowing import Borrowing, card_words
from psframe.transports.shared_memory import Segment

CHILD = """
import sys
import numpy as np
from fake_ipc import FakeIpc
ipc, handle = FakeIpc(), bytes.fromhex(sys.argv[1])
address = ipc.ipcOpenMemHandle(handle, 1)
try:
    ipc.ipcOpenMemHandle(handle, 1)
except RuntimeError as error:
    print(error)
if sys.argv[2] == "leave":  # without closing
    sys.stdout.flush()
    import os
    os._exit(0)
ipc.ipcCloseMemHandle(address)
"""
PROVER = """
import sys
from fake_cupy import FakeCupy, installed
from psframe.devices.opening import Opened
with installed(FakeCupy()) as cupy:
    cupy.cuda.runtime.garbles = sys.argv[2] == "garbled"
    opened = Opened("cuda:0", bytes.fromhex(sys.argv[1]), 1001, "f8")
    try:
        opened.prove(int(sys.argv[3]), bytes.fromhex(sys.argv[4]))
        print("proved")
    except RuntimeError as error:
        print(error)
    opened.close()
"""


@pytest.fixture
def cupy() -> Iterator[FakeCupy]:
    with installed(FakeCupy(gpus=2)) as fake:
        yield fake


def opened_by_another(handle: bytes, how: str, *more: str, code: str = CHILD) -> str:
    path = os.pathsep.join(sys.path)
    return subprocess.run(
        [sys.executable, "-c", code, handle.hex(), how, *more],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    ).stdout


def test_the_arrays_of_an_allocation_lie_apart_and_keep_it_alive(cupy: FakeCupy) -> None:
    lent = Lent("cuda:1", 3, 1001, np.float64)
    arrays = [lent.array(index) for index in range(3)]
    addresses = [array.data.ptr for array in arrays]
    assert [b - a for a, b in itertools.pairwise(addresses)] == [1024 * 8] * 2
    assert all(array.shape == (1001,) for array in arrays)
    assert arrays[0].device.id == 1
    assert cupy.cuda.current_device() == 0
    runtime = cupy.cuda.runtime
    assert len(runtime.files) == 1
    del lent, arrays[1:]
    gc.collect()
    assert len(runtime.files) == 1
    arrays.clear()
    gc.collect()
    assert (runtime.files, runtime.wrong) == ({}, [])


def test_memory_that_the_pool_keeps_is_asked_back_once(cupy: FakeCupy) -> None:
    runtime = cupy.cuda.runtime
    runtime.free, runtime.kept = 1 << 20, 4 << 20
    lent = Lent("cuda:0", 1, 10, np.float32)
    assert (runtime.free, runtime.kept, runtime.lent) == (5 << 20, 0, 1)
    with pytest.raises(RuntimeError, match="out of memory"):
        Lent("cuda:0", 3, 1 << 20, np.float64)
    assert (len(runtime.files), runtime.lent) == (1, 1)
    del lent


@pytest.mark.parametrize(
    ("count", "size", "whole"), [(0, 5, 0), (1, 1, 2), (4, 1 << 17, 2), (4, 1 + (1 << 17), 4)]
)
def test_what_is_lent_is_counted_as_it_is_allocated(
    cupy: FakeCupy, count: int, size: int, whole: int
) -> None:
    assert lent_bytes(count, size, np.float32) == whole << 20
    if count:
        lent = Lent("cuda:0", count, size, np.float32)
        assert lent.array(0).memory.base.nbytes == whole << 20


def test_what_cannot_be_opened(cupy: FakeCupy) -> None:
    runtime = cupy.cuda.runtime
    lent = Lent("cuda:0", 1, 10, np.float32)
    with pytest.raises(RuntimeError, match="open in this process"):
        Opened("cuda:0", lent.handle, 10, np.float32)
    with pytest.raises(RuntimeError, match="no whole allocation"):
        runtime.ipcGetMemHandle(lent.array(0).data.ptr + 512)
    with pytest.raises(RuntimeError, match="no whole allocation"):
        runtime.ipcGetMemHandle(cupy.empty(10, np.float32).data.ptr)
    assert "open in this process" in opened_by_another(lent.handle, "close")
    handle = lent.handle
    del lent
    gc.collect()
    assert runtime.wrong == []
    with pytest.raises(RuntimeError, match="cudaErrorInvalidResourceHandle"):
        Opened("cuda:0", handle, 10, np.float32)


@pytest.mark.parametrize("count", [1, 300])
def test_what_is_opened_is_proved_by_what_is_in_it(cupy: FakeCupy, count: int) -> None:
    """The fake's device does nothing before it is waited for."""
    lent, other = (Lent("cuda:1", count, 1001, np.float64) for _ in range(2))
    assert len({lent.nonce, other.nonce, bytes(16)}) == 3

    for how, nonce, said in (
        ("plain", lent.nonce, "proved"),
        ("plain", other.nonce, "other bytes"),
        ("garbled", lent.nonce, "other bytes"),
    ):
        assert said in opened_by_another(lent.handle, how, str(count), nonce.hex(), code=PROVER)
    del lent, other
    gc.collect()
    assert (cupy.cuda.runtime.files, cupy.cuda.runtime.wrong) == ({}, [])


def test_the_fake_notes_what_is_freed_while_it_is_open(cupy: FakeCupy) -> None:
    lent = Lent("cuda:0", 1, 10, np.float32)
    opened_by_another(lent.handle, "leave")
    del lent
    gc.collect()
    assert cupy.cuda.runtime.wrong == ["it is freed while others have it open"]


def test_a_borrowed_array_is_cut_like_any() -> None:
    array = BorrowedArray(1000, 10, np.float64)
    assert (len(array), array.nbytes, array.itemsize) == (10, 80, 8)
    part = array[2:]
    assert (part.data.ptr, part.size, part[3:5].data.ptr, part[3:50].size) == (1016, 8, 1040, 5)
    assert array[7:3].size == 0


def test_a_card_that_is_seen_is_asked_for_and_another_is_tried(cupy: FakeCupy) -> None:
    check_reach("cuda:0", identify("cuda:1"))
    cupy.cuda.runtime.peers = False
    check_reach("cuda:0", identify("cuda:0"))
    check_reach("cuda:0", b"elsewhere" + bytes(7))
    with pytest.raises(RuntimeError, match="cuda:0 does not reach the memory of cuda:1"):
        check_reach("cuda:0", identify("cuda:1"))


class Stuck:
    """Memory that is open; CUDA closes it, or does not."""

    def __init__(self, why: str = "") -> None:
        self.why = why
        self.tries = 0

    def close(self) -> None:
        self.tries += 1
        if self.why:
            raise RuntimeError(self.why)


@pytest.mark.parametrize("why", ["", "cudaErrorIllegalAddress"])
def test_what_cuda_does_not_close_is_told_to_the_owners(
    why: str, caplog: pytest.LogCaptureFixture
) -> None:
    own = Segment.create(1, 10, np.float32)
    opened = {0: Stuck(why), 1: Stuck()}
    mine = Borrowing(opened=dict(opened), own=own)  # type: ignore[arg-type]
    mine.close()
    mine.close()  # of nothing
    assert [one.tries for one in opened.values()] == [1, 1]
    assert card_words(own)[2] == (2 if why else 1)
    assert [(record.levelname, why in record.getMessage()) for record in caplog.records] == (
        [("WARNING", True)] if why else []
    )
    own.close_file()


class Gathered:
    """The ranks of a run: two servers, of which the first could not open what the worker lends."""

    rank, names = 2, (0, 1, 2)

    def all_gather(self, data: bytes, what: str) -> list[bytes]:
        other = bytearray(len(data))
        if what == "who has opened it":
            return [bytes([0, 0, said]) + bytes(other[3:]) for said in (1, 2)] + [data]
        return [bytes(other), bytes(other), data]


def test_what_cuda_does_not_close_of_a_pair_that_does_not_use_it_ends_no_run(
    cupy: FakeCupy, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    opened = [Stuck("cudaErrorIllegalAddress"), Stuck()]
    ones = iter(opened)
    monkeypatch.setattr(borrowing, "_open", lambda *_: next(ones))
    segments = {rank: Segment.create(1, 10, np.float32) for rank in (0, 1)}
    ids = [identify("cuda:0")] * 3
    own = Segment.create(1, 10, np.float32)
    mine = borrowing.lend_and_open(
        Gathered(), own, segments, gpu="cuda:0", ids=ids, shape=lambda _: (1, 10), dtype=np.float32
    )
    assert [one.tries for one in opened] == [1, 0]
    assert (set(mine.opened), mine.partners, set(mine.theirs)) == ({1}, {1}, {1})
    assert "cudaErrorIllegalAddress" in caplog.text
    mine.close()
    assert card_words(own)[2] == 2, "the owners keep it"
    for segment in (own, *segments.values()):
        segment.close_file()


def test_what_one_rank_has_lent_is_closed_alone() -> None:
    opened = {3: Stuck(), 4: Stuck()}
    mine = Borrowing(opened=dict(opened))  # type: ignore[arg-type]
    for rank in (4, 4, 7):
        mine.drop(rank)
    assert [one.tries for one in opened.values()] == [0, 1]
    assert list(mine.opened) == [3]


@pytest.mark.parametrize("how", ["closed", "open", "lost", "stuck", "broken"])
def test_the_owner_frees_when_all_have_closed_and_never_if_one_does_not(
    cupy: FakeCupy, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    kept: list[Any] = []
    monkeypatch.setattr(borrowing, "_never_freed", kept)
    # Who has been told otherwise does not wait.
    monkeypatch.setattr(borrowing, "_CLOSE_BOUND_S", 0.01 if how == "open" else 1e9)
    lent = Lent("cuda:0", 1, 10, np.float32)
    theirs = {rank: Segment.create(1, 10, np.float32) for rank in (1, 2)}
    mine = Borrowing(lent, {}, frozenset(theirs), Segment.create(1, 10, np.float32), theirs)
    del lent
    for rank, segment in theirs.items():
        if rank == 1 and how in ("closed", "open"):
            Borrowing(own=segment).close()
        elif rank == 2 and how in ("closed", "stuck"):
            Borrowing(own=segment, failed=how == "stuck").close()
    mine.close()
    mine.failed = how == "broken"
    mine.free({2} if how == "lost" else {7})
    gc.collect()
    freed = how == "closed"
    assert len(kept) == (not freed)
    assert len(cupy.cuda.runtime.files) == (not freed)
    assert mine.lent is None
    assert struct.unpack("<q", bytes(card_words(mine.own)[2:3])) == (1,)  # type: ignore[arg-type]
    kept.clear()
    for segment in (mine.own, *theirs.values()):
        assert segment is not None
        segment.close_file()
