"""Segments: shared between processes, proved by their nonce, gone with their last user."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from psframe.transports.shared_memory import Segment, SegmentBuffers, node_id


def reopen(segment: Segment, count: int = 3, size: int = 5, dtype: str = "f4") -> Segment | None:
    return Segment.open(os.getpid(), segment.fd, segment.nonce, count, size, dtype)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("size", [1, 5, 1024, 1025])
def test_what_one_writes_the_other_reads(size: int, dtype: str) -> None:
    segment = Segment.create(3, size, dtype)
    other = reopen(segment, 3, size, dtype)
    assert other is not None
    for index in range(3):
        segment.array(index)[:] = index + 1
    for index in range(3):
        array = other.array(index)
        assert (array.dtype, array.size) == (np.dtype(dtype), size)
        np.testing.assert_array_equal(array, index + 1)
        assert array.ctypes.data % 4096 == 0
    segment.close_file()


def test_an_array_of_nothing() -> None:
    """A shard may be empty: more servers than elements."""
    segment = Segment.create(2, 0, "f8")
    assert segment.array(1).size == 0
    segment.close_file()


def test_what_is_not_that_segment_is_not_opened(tmp_path: Path) -> None:
    segment = Segment.create(3, 5, "f4")
    assert Segment.open(os.getpid(), segment.fd, bytes(16), 3, 5, "f4") is None
    assert reopen(segment, 4) is None  # another length
    assert Segment.open(2**22 + 1, segment.fd, segment.nonce, 3, 5, "f4") is None
    with (tmp_path / "file").open("wb") as file:
        file.truncate(os.fstat(segment.fd).st_size)
        assert Segment.open(os.getpid(), file.fileno(), segment.nonce, 3, 5, "f4") is None
    fd = segment.fd
    segment.close_file()
    assert segment.fd == -1
    segment.close_file()
    assert Segment.open(os.getpid(), fd, segment.nonce, 3, 5, "f4") is None


def test_the_mapping_outlives_file_and_segment() -> None:
    segment = Segment.create(3, 5, "f4")
    array = segment.array(2)
    segment.close_file()
    del segment
    array[:] = 7
    np.testing.assert_array_equal(array, 7)


def test_no_file_and_no_descriptor_is_left() -> None:
    before = sorted(os.listdir("/proc/self/fd")), sorted(os.listdir("/dev/shm"))
    for _ in range(5):
        segment = Segment.create(3, 5, "f4")
        other = reopen(segment)
        segment.close_file()
        del segment, other
    assert (sorted(os.listdir("/proc/self/fd")), sorted(os.listdir("/dev/shm"))) == before


def test_another_process_can_open_it() -> None:
    segment = Segment.create(1, 4, "f8")
    program = (
        "import sys\nfrom psframe.transports.shared_memory import Segment\n"
        "pid, fd, nonce = sys.argv[1:]\n"
        "segment = Segment.open(int(pid), int(fd), bytes.fromhex(nonce), 1, 4, 'f8')\n"
        "segment.array(0)[:] += 2\n"
    )
    segment.array(0)[:] = 1
    arguments = [str(os.getpid()), str(segment.fd), segment.nonce.hex()]
    subprocess.run([sys.executable, "-c", program, *arguments], check=True, timeout=50)
    np.testing.assert_array_equal(segment.array(0), 3)
    segment.close_file()


def test_buffers_are_the_first_arrays() -> None:
    segment = Segment.create(3, 5, "f4")
    buffers = SegmentBuffers(segment, 2)
    assert len(buffers) == 2
    buffers[1][:] = 4
    np.testing.assert_array_equal(segment.array(1), 4)
    segment.close_file()


def test_a_node_has_one_name() -> None:
    program = "from psframe.transports.shared_memory import node_id; print(node_id().hex())"
    done = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True, timeout=50
    )
    assert bytes.fromhex(done.stdout.strip()) == node_id()
    assert len(node_id()) == 16
