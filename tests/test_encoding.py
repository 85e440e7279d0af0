"""Encoders on a GPU: the CPU's payloads and residuals, and what is ordered by what.

Their kernels run as C, thread by thread, on the streams of `fake_cupy`, which do nothing until
somebody waits for them or, `eager`, as soon as they may. Each order has been broken once by hand,
and a test here failed.
"""

from __future__ import annotations

import dataclasses
import logging
from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from fake_cupy import FakeCupy, ForeignArray, installed

from psframe.client import Worker
from psframe.codecs import QSGD, BFloat16, Float16, PowerSGD, Sign, TopK
from psframe.codecs.cuda import DeviceEncoder, encoder_for
from psframe.codecs.cuda.base import GRADIENT_BAD
from psframe.coders import choose_coder
from psframe.coding import PushCoder
from psframe.devices import CudaDevice, HostDevice
from psframe.events import Answer, Push
from psframe.layout import Layout

CODECS: dict[str, Any] = {
    "float16": Float16(),
    "bfloat16": BFloat16(),
    "top-k": TopK(0.1),
    "top-k, all": TopK(1.0),
    "top-k, momentum": TopK(0.05, momentum=0.9, warmup=4),
    "sign": Sign(),
    "fixed sign": Sign(0.5),
    "qsgd": QSGD(7),
    "qsgd5": QSGD(5),
    "qsgd127": QSGD(127),
    "qsgd most": QSGD(2**15 - 1),
}
CODECS |= {
    f"{name}, no feedback": dataclasses.replace(codec, error_feedback=False)
    for name, codec in CODECS.items()
    if not getattr(codec, "momentum", 0.0)
}
by_codec = pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
by_dtype = pytest.mark.parametrize("dtype", [np.float32, np.float64])

SHAPES = {"a": (13, 40), "b": (7,), "c": (), "d": (3, 5, 2, 20), "e": (0, 4), "f": (60, 50)}


def layout_of(dtype: Any, **shapes: tuple[int, ...]) -> Layout:
    return Layout.of({name: np.zeros(s, dtype) for name, s in (shapes or SHAPES).items()})


SIZE = layout_of(np.float32).size
# Whole, empty, one element, and ranges that cut tensors.
SHARDS = [(0, SIZE), (16, 16), (527, 528), (0, 512), (512, SIZE), (16, 1040)]


@pytest.fixture
def late() -> Iterator[FakeCupy]:
    with installed(FakeCupy()) as fake:
        yield fake


# ---- one encoder ------------------------------------------------------------------------------


class Ends:
    """The encoders of one shard, on the CPU and on the device, which are given the same."""

    def __init__(self, cupy: FakeCupy, codec: Any, layout: Layout, begin: int, end: int) -> None:
        self.cupy, self.size, self.dtype = cupy, end - begin, layout.dtype
        self.host = codec.encoder(layout, begin, end, [5, 1])
        device = encoder_for(cupy, codec, layout, begin, end, [5, 1])
        assert isinstance(device, DeviceEncoder)
        self.device = device
        assert device.bytes_max == self.host.bytes_max
        self.grad = cupy.empty(self.size, layout.dtype)
        self.out = cupy.empty(device.bytes_max + 16, np.uint8)
        self.verdict = cupy.zeros(2, np.int32)

    def encode(self, grad: Any) -> tuple[bytes, bytes, int]:
        """Code a gradient here and there: both payloads, and the verdict."""
        grad = np.ascontiguousarray(grad, self.dtype)
        out = np.empty(-(-self.host.bytes_max // 8), np.uint64).view(np.uint8)
        length = self.host.encode(grad, out)
        self.cupy.cuda.default.synchronize()
        self.grad.memory[:] = grad
        self.out.memory[:] = 0xA5
        self.verdict.memory[:] = 0
        pointers = [array.data.ptr for array in (self.grad, self.out, self.verdict)]
        coded = self.device.encode(*pointers)
        self.cupy.cuda.default.synchronize()
        verdict = int(self.verdict.memory[0])
        if verdict and self.device.residual is not None:
            if not verdict & GRADIENT_BAD:
                self.grad.memory[:] = np.nan
            coded = self.device.encode(*pointers, plain=True)
            self.cupy.cuda.default.synchronize()
        self.device.settle(not verdict)
        assert coded == length
        assert (self.out.memory[length:] == 0xA5).all(), "written behind the payload"
        return out[:length].tobytes(), self.out.memory[:coded].tobytes(), verdict

    def residuals(self) -> tuple[Any, Any]:
        here = self.device.residual
        return self.host.residual, None if here is None else here.memory

    def agree(self, grad: Any) -> int:
        on_host, on_device, verdict = self.encode(grad)
        assert on_host == on_device
        host, device = self.residuals()
        if host is None:
            assert device is None
        else:
            bits = f"u{self.dtype.itemsize}"
            np.testing.assert_array_equal(host.view(bits), device.view(bits))
        return verdict


def numbers(dtype: Any, size: int, seed: int) -> Any:
    """Numbers of all sizes, subnormals, zeros of both signs and equal magnitudes among them."""
    rng = np.random.default_rng(seed)
    with np.errstate(all="ignore"):
        some = rng.standard_normal(size) * 10.0 ** rng.integers(-3, 2, size)
        rare = rng.random(size)
        tiny, most = float(np.finfo(dtype).tiny), float(np.finfo(dtype).max)
        some = np.where(rare < 0.2, rng.choice([0.0, -0.0, 0.5, -0.5, 1.0, 65504.0], size), some)
        some = np.where(rare < 0.1, rng.standard_normal(size) * tiny, some)
        wide = rng.standard_normal(size) * 10.0 ** rng.integers(-12, 6, size)
        some = np.where(rare < 0.05, wide, some)
        some = np.where(rare < 0.01, rng.choice([most / 4, -most / 4, 7e4, 6e-8], size), some)
        return some.astype(dtype)


@by_dtype
@by_codec
def test_payloads_and_residuals_are_the_cpu_s(late: FakeCupy, codec: Any, dtype: Any) -> None:
    layout = layout_of(dtype)
    for begin, end in SHARDS:
        ends = Ends(late, codec, layout, begin, end)
        for push in range(6):
            scale = dtype(0.0 if push == 3 else 1.0)
            assert ends.agree(scale * numbers(dtype, end - begin, push)) == 0


@by_dtype
@by_codec
def test_lengths_around_those_of_blocks(late: FakeCupy, codec: Any, dtype: Any) -> None:
    for around in (2, 8, 64, 512, 1024, 4096, 8192):
        for size in (around - 1, around, around + 1):
            ends = Ends(late, codec, layout_of(dtype, w=(size,)), 0, size)
            for push in range(2):
                assert ends.agree(numbers(dtype, size, size + push)) == 0


@by_codec
def test_vectors_of_many_blocks(late: FakeCupy, codec: Any) -> None:
    """More than a million elements, so that sums of blocks are of several blocks themselves."""
    size = (1 << 20) + 3000
    ends = Ends(late, codec, layout_of(np.float32, w=(size,)), 0, size)
    grad = numbers(np.float32, size, 1)
    for _ in range(2):
        assert ends.agree(grad) == 0


def test_clipping_to_a_norm_that_is_exact(late: FakeCupy) -> None:
    """Sums of small integers are the same in any order and precision."""
    codec = TopK(0.05, momentum=0.9, clip_norm=3.0, warmup=4)
    ends = Ends(late, codec, layout_of(np.float32), 0, SIZE)
    rng = np.random.default_rng(0)
    for push in range(6):
        grad = np.zeros(SIZE) if push == 2 else rng.integers(-9, 10, SIZE)
        if push == 3:
            grad = np.eye(1, SIZE, 5)[0]  # below the limit
        assert ends.agree(grad) == 0


def test_clipping_agrees_with_the_cpu_s_to_its_norm(late: FakeCupy) -> None:
    codec = TopK(0.05, clip_norm=3.0, error_feedback=False)
    layout = layout_of(np.float32)
    ends = Ends(late, codec, layout, 0, SIZE)
    grad = numbers(np.float32, SIZE, 3)
    grad[np.abs(grad) > 1e6] = 1.0
    decoder, found = codec.decoder(layout, 0, SIZE), []
    for payload in ends.encode(grad)[:2]:
        out = np.empty(SIZE, np.float32)
        decoder.decode(np.frombuffer(payload, np.uint8), out)
        found.append(out)
    np.testing.assert_array_equal(found[0] != 0, found[1] != 0)
    np.testing.assert_allclose(found[0], found[1], rtol=2e-6)
    assert np.linalg.norm(found[1]) < 3.0


LOW_RANK = {"low": PowerSGD(1), "rank 2": PowerSGD(2), "rank 7": PowerSGD(7)}


@by_dtype
@pytest.mark.parametrize("feedback", [True, False])
@pytest.mark.parametrize("codec", LOW_RANK.values(), ids=LOW_RANK)
def test_powersgd_is_the_cpu_s_but_for_rounding(
    late: FakeCupy, codec: Any, feedback: bool, dtype: Any
) -> None:
    """And what the residual lacks is what is decoded, to the bit."""
    codec = dataclasses.replace(codec, error_feedback=feedback)
    shapes = {"a": (300, 520), "b": (7,), "c": (40, 3, 5), "d": (3, 400), "e": (0, 4)}
    layout, rng = layout_of(dtype, **shapes), np.random.default_rng(0)
    for begin, end in ((0, layout.size), (300 * 520, layout.size), (9, 50_000), (8, 8)):
        ends = Ends(late, codec, layout, begin, end)
        decoder, before = codec.decoder(layout, begin, end), np.zeros(end - begin, dtype)
        for _ in range(5):
            grad = rng.standard_normal(end - begin).astype(dtype)
            grad[: 300 * 13] *= 8  # directions that stand out
            payloads, decoded = ends.encode(grad), []
            assert payloads[2] == 0
            for payload in payloads[:2]:
                out = np.empty(end - begin, dtype)
                decoder.decode(np.frombuffer(payload, np.uint8), out)
                decoded.append(out)
            size = np.linalg.norm(decoded[0])
            tolerance = 2e-3 if dtype == np.float32 else 1e-9
            assert np.linalg.norm(decoded[0] - decoded[1]) <= tolerance * size
            if feedback:
                whole = np.add(before, grad)
                np.testing.assert_array_equal(ends.residuals()[1], whole - decoded[1])
                before = ends.residuals()[1].copy()


@by_dtype
@pytest.mark.parametrize("feedback", [True, False])
def test_powersgd_and_what_is_not_finite(late: FakeCupy, dtype: Any, feedback: bool) -> None:
    codec = PowerSGD(2, error_feedback=feedback)
    layout, rng = layout_of(dtype, w=(60, 50), b=(9,)), np.random.default_rng(0)
    ends, decoder = Ends(late, codec, layout, 0, layout.size), codec.decoder(layout, 0, layout.size)
    for special in (None, np.nan, None, np.inf, None):
        grad, starts = rng.standard_normal(layout.size).astype(dtype), ends.device._starts  # type: ignore[attr-defined]
        if special is not None:
            grad[70] = special
        payload, verdict = ends.encode(grad)[1:]
        assert verdict == (0 if special is None else 3)
        assert (ends.device._starts is starts) == (special is not None)  # type: ignore[attr-defined]
        out = np.empty(layout.size, dtype)
        decoder.decode(np.frombuffer(payload, np.uint8), out)
        assert np.isfinite(out).all() == (special is None)
        host, device = ends.residuals()
        if feedback:
            np.testing.assert_allclose(host, device, atol=1e-4)


@by_dtype
def test_powersgd_of_what_has_no_direction_and_of_what_is_too_large(
    late: FakeCupy, dtype: Any
) -> None:
    """A column that is lost begins anew; a product above the dtype's range stays where it is."""
    layout = layout_of(dtype, w=(60, 50), b=(9,))
    ends = Ends(late, PowerSGD(2), layout, 0, layout.size)
    decoder, out = PowerSGD(2).decoder(layout, 0, layout.size), np.empty(layout.size, dtype)
    ends.encode(np.zeros(layout.size))
    starts = ends.device._starts.memory.reshape(2, 50)  # type: ignore[attr-defined]
    assert np.isfinite(starts).all()
    assert (np.abs(starts) > 0).any(axis=1).all()
    line = np.outer(np.arange(60.0), np.arange(50.0))  # of rank 1
    for _ in range(2):
        payload = ends.encode(np.append(line, np.ones(9)))[1]
        decoder.decode(np.frombuffer(payload, np.uint8), out)
    np.testing.assert_allclose(out[:3000], line.reshape(-1), rtol=1e-4, atol=1e-3)
    huge = np.full(layout.size, np.finfo(dtype).max / 2)
    payload, verdict = ends.encode(huge)[1:]
    decoder.decode(np.frombuffer(payload, np.uint8), out)
    assert verdict == 0
    assert (out[:3000] == 0).all()
    assert (ends.residuals()[1][:3000] > np.finfo(dtype).max / 4).all()


@by_dtype
def test_powersgd_of_what_overflows_when_it_is_decoded(late: FakeCupy, dtype: Any) -> None:
    """Without a residual that has it the gradient is refused; and no residual becomes infinite."""
    layout = layout_of(dtype, w=(60, 50), b=(9,))
    grad = np.zeros(layout.size, dtype)
    grad[:3000] = np.finfo(dtype).max / 2
    ends = Ends(late, PowerSGD(2, error_feedback=False), layout, 0, layout.size)
    assert ends.encode(grad)[2] == 1
    assert ends.encode(np.ones(layout.size))[2] == 0
    ends = Ends(late, PowerSGD(2), layout, 0, layout.size)
    decoder, out = PowerSGD(2).decoder(layout, 0, layout.size), np.empty(layout.size, dtype)
    for part in (8.5, 9.0, 10.0, 12.0, 16.0):  # of rank 1; Q is about 55 of these
        grad[:3000] = np.finfo(dtype).max / dtype(part * 55)
        payload, verdict = ends.encode(grad)[1:]
        decoder.decode(np.frombuffer(payload, np.uint8), out)
        assert (verdict, np.isfinite(out).all()) == (0, True)
        assert np.isfinite(ends.residuals()[1]).all()


def test_what_has_no_encoder(late: FakeCupy) -> None:
    double, single = layout_of(np.float64), layout_of(np.float32)
    clipped = TopK(0.1, clip_norm=1.0)
    assert encoder_for(late, clipped, double, 0, SIZE, [1]) is None  # squares may overflow
    assert encoder_for(late, clipped, single, 0, SIZE, [1]) is not None
    assert encoder_for(late, PowerSGD(257), single, 0, SIZE, [1]) is None  # no block keeps as many


@by_dtype
@by_codec
@pytest.mark.parametrize("special", [np.nan, -np.nan, np.inf, -np.inf])
def test_what_is_not_finite_leaves_the_state_as_it_was(
    late: FakeCupy, codec: Any, dtype: Any, special: float
) -> None:
    layout = layout_of(dtype)
    ends = Ends(late, codec, layout, 0, SIZE)
    decoder = codec.decoder(layout, 0, SIZE)
    for push in range(6):
        grad = numbers(dtype, SIZE, push)
        bad = push in (2, 4)
        if bad:
            grad[100 * push] = special
        assert ends.agree(grad) == (1 | GRADIENT_BAD if bad else 0)
        if bad:
            decoded, (payload, *_) = np.empty(SIZE, dtype), ends.encode(grad)
            decoder.decode(np.frombuffer(payload, np.uint8), decoded)
            assert not np.isfinite(decoded).all()


@by_dtype
@by_codec
def test_a_sum_that_overflows_is_refused(late: FakeCupy, codec: Any, dtype: Any) -> None:
    """Finite gradients, of which the residual makes infinities."""
    if not codec.error_feedback:
        return
    layout, most = layout_of(dtype, w=(600,)), np.finfo(dtype).max
    ends = Ends(late, codec, layout, 0, 600)
    grad = numbers(dtype, 600, 1)
    grad[5:590] = most
    verdicts = [ends.agree(grad) for _ in range(4)]
    assert verdicts[0] in (0, 1)
    residual = ends.residuals()[1]
    assert np.isfinite(residual).all()
    if verdicts[0] == 0 and np.abs(residual).max() > most / 2:
        assert verdicts[1] == 1


# ---- a worker ---------------------------------------------------------------------------------

N = 300_000
LAYOUT = layout_of(np.float32, w=(N - 3,), b=(3,))
SMALL = layout_of(np.float32, w=(20, 30), b=(7,))


class Far:
    """A worker's end, to servers that share no memory with it, and which only answer pushes.

    They read a payload as late as they may: when the worker wants their answer.

    Attributes:
        payloads: by push, one for each server.
        finite: by push, what its header says.
    """

    def __init__(self, layout: Layout, servers: int = 1, *, near: bool = False) -> None:
        self.index, self.workers, self.servers = 0, 1, servers
        self.in_place, self.virtual_time, self.direct = [near] * servers, False, None
        self.weighs_codecs = True
        self.slots = [np.full(layout.size, np.nan, layout.dtype) for _ in range(2)]
        self.sent: deque[tuple[int, Push]] = deque()
        self.payloads: list[list[bytes]] = []
        self.finite: list[bool] = []

    def send(self, server: int, message: object) -> None:
        if isinstance(message, Push):
            self.sent.append((server, message))

    def receive(self, timeout_s: float | None) -> tuple[int, Answer]:
        server, push = self.sent.popleft()
        assert push.coded is not None
        if server == 0:
            self.payloads.append([])
            self.finite.append(push.finite)
        self.payloads[-1].append(push.coded.data.tobytes())
        return server, Answer(0, push.seq, False, True, push_version=len(self.payloads))

    def now(self) -> float:
        return 0.0

    def slot(self, index: int) -> np.ndarray:
        return self.slots[index]

    def snapshot(self, server: int, buffer: int) -> np.ndarray:
        raise AssertionError("nobody pulls")


class Job:
    """A worker on the device, and what its payloads should be."""

    def __init__(self, codec: Any, layout: Layout, servers: int = 1, **options: Any) -> None:
        self.far, self.device = Far(layout, servers), CudaDevice(0, layout)
        coder = choose_coder(codec, layout, 7, self.far, self.device, normed=False)  # type: ignore[arg-type]
        assert not isinstance(coder, PushCoder)
        self.worker = Worker(
            self.far,  # type: ignore[arg-type]
            layout,
            self.device,
            0,
            coder=coder,
            **options,
        )
        self.on_host = PushCoder(codec, layout, servers, 7, 0, 2)

    def expected(self, grads: list[Any]) -> list[list[bytes]]:
        """Code on the host."""
        found = []
        for flat in grads:
            coded = self.on_host.encode(0, flat.copy())
            found.append([one.data.tobytes() for one in coded])
        return found

    def check(self, grads: list[Any]) -> None:
        assert self.far.payloads == self.expected(grads)
        assert all(np.isnan(slot).all() for slot in self.far.slots), "the dense gradient came, too"
        self.device.close()


def pushed(cupy: FakeCupy, layout: Layout, flat: Any) -> dict[str, Any]:
    """Arrays that kernels on the current stream will fill."""
    grads = {}
    for name, part in layout.views(flat).items():
        grads[name] = cupy.empty(part.size, layout.dtype).reshape(part.shape)
        grads[name][...] = part.copy()
    return grads


def spoil(cupy: FakeCupy, grads: Any) -> None:
    """Write to what has been pushed, as soon as the order allows."""
    for array in grads.values():
        array[...] = np.full(array.shape, 3.0)
    cupy.cuda.default.synchronize()


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("servers", [1, 3])
@by_codec
def test_a_worker_sends_the_payloads_of_the_cpu(
    cupy: FakeCupy, codec: Any, servers: int, own: bool
) -> None:
    """Two pushes are under way at a time; what was pushed is overwritten at once."""
    job, before = Job(codec, SMALL, servers), None
    worker = job.worker
    given = [numbers(np.float32, SMALL.size, step) for step in range(7)]
    for flat in given:
        if own:
            grads = worker.gradients()
            for name, part in SMALL.views(flat).items():
                grads[name][...] = part
        else:
            grads = pushed(cupy, SMALL, flat)
        pending = worker.push(None if own else grads)
        if not own:
            spoil(cupy, grads)
        if before is not None:
            before.wait()
        before = pending
    before.wait()
    job.check(given)


def test_only_the_payload_crosses_the_bus(cupy: FakeCupy) -> None:
    job = Job(Float16(), LAYOUT)
    flat = numbers(np.float32, N, 1)
    for own in (True, False):
        grads: Any = job.worker.gradients() if own else pushed(cupy, LAYOUT, flat)
        if own:
            for name, part in LAYOUT.views(flat).items():
                grads[name][...] = part
        cupy.cuda.runtime.copies.clear()
        job.worker.push(None if own else grads).wait()
        between = [] if own else [(3, 4 * (N - 3)), (3, 12)]
        assert cupy.cuda.runtime.copies == [*between, (2, 8), (2, 2 * N)]
    assert cupy.cuda.runtime.registrations == 0
    job.check([flat, flat])


@pytest.mark.parametrize("protocol", ["dlpack", "interface"])
def test_another_library_s_kernels_come_first(cupy: FakeCupy, protocol: str) -> None:
    job, torch = Job(Float16(), SMALL), cupy.cuda.Stream(non_blocking=True)
    flat = numbers(np.float32, SMALL.size, 2)
    with torch:
        arrays = pushed(cupy, SMALL, flat)
    job.worker.push({name: ForeignArray(a, torch, protocol) for name, a in arrays.items()})
    with torch:
        for array in arrays.values():
            array[...] = np.zeros(array.shape, np.float32)
    torch.synchronize()
    job.worker.push(pushed(cupy, SMALL, flat)).wait()
    job.check([flat, flat])


@pytest.mark.parametrize("layout", [SMALL, LAYOUT], ids=["bounced", "registered"])
def test_arrays_that_are_on_the_host_or_need_a_cast(cupy: FakeCupy, layout: Layout) -> None:
    job = Job(Float16(), layout)
    flats = [numbers(np.float32, layout.size, step) for step in range(3)]
    for step, flat in enumerate(flats):
        grads = pushed(cupy, layout, flat)
        if step == 1:
            grads["b"] = layout.views(flat)["b"].astype(np.float64)
        if step == 2:
            grads["w"] = grads["w"].astype(np.float64)
        job.worker.push(grads).wait()
    assert job.far.payloads == job.expected(flats)
    job.device.close()


@pytest.mark.parametrize("judges", [False, True])
@pytest.mark.parametrize("servers", [1, 3])
@by_codec
def test_what_is_not_finite_is_refused_whole(
    cupy: FakeCupy, codec: Any, servers: int, judges: bool
) -> None:
    job = Job(codec, SMALL, servers, judges=judges)
    given = [numbers(np.float32, SMALL.size, step) for step in range(5)]
    given[2][40] = np.inf
    for flat in given:
        job.worker.push(pushed(cupy, SMALL, flat)).wait()
    assert job.far.finite == [True, True, not judges, True, True]
    job.check(given)


def test_a_residual_that_overflows_in_one_shard_leaves_those_of_the_others(late: FakeCupy) -> None:
    """The host would code the other shards; the push is refused here as there."""
    job = Job(Float16(), SMALL, 2)
    huge = np.full(SMALL.size, 1.0, np.float32)
    huge[:3] = np.finfo(np.float32).max
    for flat in (huge, huge, np.ones_like(huge)):
        job.worker.push(pushed(late, SMALL, flat)).wait()
    assert job.far.finite == [True, False, True]
    halves = np.frombuffer(job.far.payloads[1][1], np.float16)
    assert np.isnan(halves).all()
    job.device.close()


def test_the_time_of_the_device_is_what_coding_costs(
    late: FakeCupy, caplog: pytest.LogCaptureFixture
) -> None:
    late.cuda.elapsed_ms = 12.5
    job = Job(Float16(), SMALL)
    assert job.worker._worth is not None
    job.worker._worth.pulled(10**9, 1.0)
    with caplog.at_level(logging.WARNING, "psframe"):
        for _ in range(20):
            job.worker.push(pushed(late, SMALL, np.ones(SMALL.size, np.float32))).wait()
    (line,) = caplog.messages
    assert "costs more time than it saves: it takes 12.5 ms a gradient" in line
    job.device.close()


@pytest.mark.parametrize(
    ("codec", "near", "normed", "why"),
    [
        (Float16(), True, False, "a server reads them in this node's memory"),
        (Float16(), False, True, "their norm is needed"),
        (PowerSGD(300), False, False, "this codec has no encoder for GPUs"),
    ],
)
def test_what_is_coded_on_the_host(
    late: FakeCupy,
    caplog: pytest.LogCaptureFixture,
    codec: Any,
    near: bool,
    normed: bool,
    why: str,
) -> None:
    for device in (CudaDevice(0, SMALL), HostDevice()):
        caplog.clear()
        with caplog.at_level(logging.INFO, "psframe"):
            coder = choose_coder(codec, SMALL, 7, Far(SMALL, near=near), device, normed=normed)  # type: ignore[arg-type]
        assert isinstance(coder, PushCoder)
        lines = [line for line in caplog.messages if "codes its gradients on the host" in line]
        assert len(lines) == (device.name != "cpu")
        assert all(line.endswith(why) for line in lines)
        device.close()
