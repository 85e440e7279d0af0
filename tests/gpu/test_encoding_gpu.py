"""Encoders on a real GPU: the payloads of the CPU, to the bit where their sums have one order.

The same kernels run as C in `test_encoding`; here NVRTC compiles them, and threads are real ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from psframe.codecs import QSGD, BFloat16, Float16, PowerSGD, Sign, TopK
from psframe.coding import PushCoder, push_seed
from psframe.devices import CudaDevice
from psframe.layout import Layout
from psframe.packing import GradientSlot

pytestmark = pytest.mark.gpu

CODECS: dict[str, Any] = {
    "float16": Float16(),
    "bfloat16": BFloat16(),
    "float16, no feedback": Float16(error_feedback=False),
    "top-k": TopK(0.01),
    "top-k, no feedback": TopK(0.01, error_feedback=False),
    "top-k, momentum": TopK(0.001, momentum=0.9, warmup=4),
    "sign": Sign(),
    "fixed sign": Sign(0.5),
    "qsgd": QSGD(127),
    "qsgd5, no feedback": QSGD(5, error_feedback=False),
}


def numbers(dtype: Any, size: int, seed: int) -> Any:
    """Numbers of all sizes, subnormals, zeros of both signs and equal magnitudes among them."""
    rng = np.random.default_rng(seed)
    tiny = float(np.finfo(dtype).tiny)
    some = rng.standard_normal(size) * 10.0 ** rng.integers(-3, 2, size)
    rare = rng.random(size)
    some = np.where(rare < 0.2, rng.choice([0.0, -0.0, 0.5, -0.5, 1.0, 65504.0], size), some)
    return np.where(rare < 0.1, rng.standard_normal(size) * tiny, some).astype(dtype)


@pytest.mark.parametrize("servers", [1, 3])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
def test_payloads_are_the_cpu_s(
    cupy: Any, slow: Callable[[], None], codec: Any, dtype: Any, servers: int
) -> None:
    """Of gradients that late kernels make, and that are overwritten at once; one is not finite."""
    layout = Layout.of({"w": np.zeros((1500, 1000), dtype), "b": np.zeros(1003, dtype)})
    device, shards = CudaDevice(0, layout), layout.shards(servers)
    coder = device.coder(codec, shards, [push_seed(7, 0, server) for server in range(servers)])
    assert coder is not None
    on_host = PushCoder(codec, layout, servers, 7, 0, 2)
    slot = GradientSlot(layout, np.zeros(layout.size, dtype))
    source = cupy.empty(layout.size, dtype)
    for push in range(6):
        flat = numbers(dtype, layout.size, push)
        if push == 3:
            flat[1234] = np.inf
        ready = cupy.asarray(flat)
        source.fill(np.nan)
        slow()
        source[...] = ready
        grads = layout.views(source)
        if push % 2:  # arrays that lie anywhere
            grads = {name: array.copy() for name, array in grads.items()}
        coded, finite, seconds = coder.encode(push % 2, grads, slot)
        source.fill(3.0)
        expected = on_host.encode(0, flat.copy())
        assert finite == (push != 3)
        assert seconds > 0.0
        for here, there in zip(coded, expected, strict=True):
            assert here.data.tobytes() == there.data.tobytes()
    device.close()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    "codec",
    [PowerSGD(1), PowerSGD(6), TopK(0.01, clip_norm=3.0, error_feedback=False)],
    ids=["rank 1", "rank 6", "clipped top-k"],
)
def test_what_is_the_cpu_s_but_for_rounding(cupy: Any, codec: Any, dtype: Any) -> None:
    layout = Layout.of({"w": np.zeros((700, 1100), dtype), "b": np.zeros(1003, dtype)})
    device, size = CudaDevice(0, layout), layout.size
    coder = device.coder(codec, [(0, size)], [push_seed(7, 0, 0)])
    if coder is None:
        device.close()
        assert isinstance(codec, TopK)
        assert dtype == np.float64
        return
    on_host, slot = (
        PushCoder(codec, layout, 1, 7, 0, 2),
        GradientSlot(layout, np.zeros(size, dtype)),
    )
    decoder, rng = codec.decoder(layout, 0, size), np.random.default_rng(0)
    for push in range(5):
        flat = rng.standard_normal(size).astype(dtype)
        (coded,), finite, _ = coder.encode(push % 2, layout.views(cupy.asarray(flat)), slot)
        assert finite
        found, expected = np.empty(size, dtype), flat.copy()
        decoder.decode(coded.data, found)
        on_host.encode(0, expected)
        tolerance = 1e-4 if dtype == np.float32 else 1e-11
        assert np.linalg.norm(found - expected) <= tolerance * np.linalg.norm(expected)
    device.close()
