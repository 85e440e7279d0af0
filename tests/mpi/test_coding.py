"""Codecs between processes: what travels in a message, in a range, and what shared memory needs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

import psframe
from psframe import codecs
from psframe.codecs import Codec
from psframe.layout import Layout

SIZE = MPI.COMM_WORLD.size


def coded(n: int, servers: int, shared_memory: bool, **more: Any) -> psframe.Result:
    params = {"w": np.ones((n, 30), np.float32), "b": np.ones(7, np.float32)}

    def work(worker: psframe.Worker) -> None:
        params = worker.pull()
        for step in range(12 if worker.index == 0 else 0):
            noise = worker.rng.standard_normal((n, 30)).astype(np.float32)
            grads = {"w": params["w"] + np.float32(0.01) * noise, "b": params["b"]}
            if step % 5 == 2:
                worker.push(grads)
                params = worker.pull()
            else:
                params = worker.push_pull(grads)

    optimizer = psframe.optim.SGD(0.05)
    return psframe.run(
        work, params, optimizer=optimizer, servers=servers, shared_memory=shared_memory, **more
    )


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("n", [20, 3000])  # inside a message; behind it
@pytest.mark.parametrize(
    "codec", [codecs.Float16(), codecs.TopK(0.05), codecs.Sign(), codecs.PowerSGD(2)]
)
def test_the_bits_are_those_of_shared_memory(codec: Codec, n: int) -> None:
    """One worker pushes; the others leave at once."""
    for servers in {1, min(2, SIZE - 1)}:
        for pull_codec in (None, codecs.Float16()):
            more = {"codec": codec, "pull_codec": pull_codec}
            near = coded(n, servers, True, **more)
            far = coded(n, servers, False, **more)
            if near.params is None or far.params is None:
                continue
            layout = Layout.of(near.params)
            assert layout.flatten(near.params).tobytes() == layout.flatten(far.params).tobytes()
            dense = 12 * 4 * layout.size
            assert far.traffic.pushed_dense == dense >= far.traffic.pushed > 0
            if pull_codec is not None:
                assert far.traffic.pulled < far.traffic.pulled_dense
