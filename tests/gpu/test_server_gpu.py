"""Servers on a real GPU against servers on the CPU.

The bits are the same but for float32 subnormals, which CuPy flushes to zero: a number below 1.2e-38
may be 0 instead, and what is computed from it differs by less than that. Sums over a shard
(GapAware's distances) are made in another order: a few units in the last place of a float64, of the
factor on the gradient.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from test_server_device import PARAMS, RULES, STALE, Pair, both, work

import psframe
from psframe import device_store, optim, stale

pytestmark = pytest.mark.gpu


@pytest.fixture(params=[16, 512 << 10])
def step(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """In pieces, and whole."""
    monkeypatch.setattr(device_store, "STEP", request.param)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("against", [None, "fixed", "adaptive", "both"])
@pytest.mark.parametrize("name", RULES)
def test_a_rule_has_the_bits_of_the_cpu(
    name: str, against: str | None, dtype: Any, step: None
) -> None:
    pair = Pair(RULES[name], dtype, against=STALE[against] if against else None)
    for correcting in pair.correcting:
        correcting.granted(0, alone=True)
    for number in range(6):
        on_card = number > 3
        assert pair.update(pair.draw(), 0, 0.5 if number % 2 else 1.0, on_card=on_card)
        pair.check()
    bad = pair.draw()
    bad[-1] = np.nan
    assert not pair.update(bad)
    pair.check()


def test_subnormals_may_be_flushed_and_nothing_else(step: None) -> None:
    pair = Pair(optim.Adam(0.01))
    for _ in range(4):
        assert pair.update(pair.draw() * np.float32(1e-22))  # squares are subnormal
        tiny = np.finfo(np.float32).tiny
        for name, slot in pair.rules[0].slots.items():
            found = pair.rules[1].slots[name].get()
            np.testing.assert_allclose(found, slot, rtol=0, atol=4 * tiny, err_msg=name)


def test_the_gap_within_its_last_places(step: None) -> None:
    pair = Pair(optim.SGD(0.1), np.float64, against=stale.GapAware())
    for correcting in pair.correcting:
        correcting.granted(0, alone=True)
    for _ in range(6):
        assert pair.update(pair.draw(), 0)
        np.testing.assert_allclose(pair.gpu.params, pair.cpu.params, rtol=1e-13)


@pytest.mark.parametrize("kind", ["float16", "uint16"])
def test_two_bytes_an_element(kind: str, step: None) -> None:
    pair = Pair(optim.Adam(0.01))
    whole = pair.draw()
    payload: Any = whole.astype(np.float16)
    wide = payload.astype(np.float32)
    if kind == "uint16":
        payload = (whole.view(np.uint32) >> 16).astype(np.uint16)
        wide = (payload.astype(np.uint32) << 16).view(np.float32)
    assert pair.gpu.update(payload)
    assert pair.cpu.update(wide)
    pair.check()


@pytest.mark.parametrize("servers", [1, 2])
@pytest.mark.parametrize("mode", [psframe.Async(), psframe.SSP(staleness=1), psframe.BSP()])
def test_a_run_has_the_bits_of_the_cpu(mode: Any, servers: int, step: None) -> None:
    workers = 3 if isinstance(mode, psframe.BSP) else 1
    for name in ("sgd", "momentum", "adam"):
        both(work, optimizer=RULES[name], mode=mode, workers=workers, servers=servers)


def test_a_large_shard_with_many_workers(step: None) -> None:
    if device_store.STEP == 16:
        pytest.skip("that would be a million pieces")
    params = {"w": np.zeros(3_000_001, np.float32), **PARAMS}

    def push(worker: Any) -> None:
        pulled = worker.pull()
        for _ in range(5):
            pulled = worker.push_pull({n: np.ones_like(p) for n, p in pulled.items()})

    result = psframe.run(
        push,
        params,
        optimizer=optim.SGD(0.5),
        workers=4,
        device="cpu",
        server_device="cuda",
    )
    assert result.params is not None
    assert result.version == 20
    assert (result.params["w"] == -10.0).all()
