"""Parameters named in the servers' snapshots."""

import numpy as np
import pytest

from psframe.events import Answer
from psframe.layout import Layout
from psframe.snapshots import Snapshots


def layout_of(*shapes, dtype=np.float32):
    return Layout.of({f"t{i}": np.zeros(shape, dtype) for i, shape in enumerate(shapes)})


def answers(buffers: list[int]) -> list[Answer]:
    return [Answer(0, 0, buffer=buffer) for buffer in buffers]


class Shards:
    """Snapshot buffers of some servers, each filled with numbers that name its place."""

    def __init__(self, layout, servers, buffers=3):
        self.flats = [np.arange(layout.size, dtype=layout.dtype) + 1000 * b for b in range(buffers)]
        self.shards = layout.shards(servers)

    def __call__(self, server, buffer):
        begin, end = self.shards[server]
        return self.flats[buffer][begin:end]


@pytest.mark.parametrize("servers", [1, 2, 3, 5, 40])
@pytest.mark.parametrize(
    "shapes",
    [
        [(400,)],
        [(16,), (16,), (16,), (16,), (16,)],
        [(3, 5), (0,), (20, 7), (), (1,), (0, 4), (90,), (2,)],
        [(0,), (7,), (0,)],
    ],
)
def test_snapshots_name_every_tensor_whatever_the_servers(shapes, servers):
    layout = layout_of(*shapes)
    shards = Shards(layout, servers)
    snapshots = Snapshots(layout, servers, shards)
    rng = np.random.default_rng(servers)
    before = None
    for _ in range(6):
        buffers = rng.integers(0, 3, servers).tolist()
        arrays = snapshots.arrays(answers(buffers))
        assert tuple(arrays) == layout.names
        expected = np.concatenate([shards(s, b) for s, b in enumerate(buffers)])
        for name, view in layout.views(expected).items():
            np.testing.assert_array_equal(arrays[name], view)
            assert arrays[name].shape == view.shape
            assert not arrays[name].flags.writeable
        if before is not None:  # a prefetch has arrived: what is computed on has not changed
            for name, view in layout.views(before[0]).items():
                np.testing.assert_array_equal(before[1][name], view)
        before = expected, arrays


def test_snapshots_copy_only_what_lies_in_several_shards():
    layout = layout_of((16,), (20,), (12,))  # shards [0, 16), [16, 48) or thirds of 16
    for servers, copied in ((1, []), (2, []), (3, ["t1"])):
        shards = Shards(layout, servers)
        arrays = Snapshots(layout, servers, shards).arrays(answers([0] * servers))
        apart = [n for n, a in arrays.items() if not np.shares_memory(a, shards.flats[0])]
        assert apart == copied, servers
