"""A server on a GPU has the bits of one on the CPU: on a device made of NumPy, late as may be."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from fake_cuda import FakeCuda

import psframe
from psframe import device_store, optim, stale
from psframe.device_store import DeviceStore
from psframe.layout import Layout
from psframe.optim import Average, Grouped, cuda
from psframe.paired import BorrowedArray
from psframe.plan import Plan
from psframe.reads import DeviceCorrecting, HostCorrecting
from psframe.server_device import Card, check_server_device, choose_server_device
from psframe.stale.on_device import as_device_correction
from psframe.store import HeapBuffers, Store, buffer_count
from psframe.transports.shared_memory import Segment, SegmentBuffers

RULES: dict[str, Any] = {
    "sgd": optim.SGD(0.1, weight_decay=0.02),
    "momentum": optim.SGD(0.1, momentum=0.9, weight_decay=0.02, no_decay=("b",)),
    "nesterov": optim.SGD(optim.schedules.Cosine(0.1, 9), momentum=0.9, nesterov=True),
    "delayed": optim.DelayedNesterov(0.1, 3, 0.9, 0.2),
    "adagrad": optim.Adagrad(0.1),
    "rmsprop": optim.RMSProp(0.01),
    "adam": optim.Adam(0.01),
    "adamw": optim.AdamW(0.01, weight_decay=0.1),
    "workers": optim.WorkerMomentum(0.1),
    "dana": optim.DANAZero(0.1),
    "grouped": Grouped(optim.SGD(0.1, momentum=0.9), {"b": optim.Adam(0.1), "c": Average(0.5)}),
    "averaged": Grouped(optim.WorkerMomentum(0.1), {"b": Average(0.5)}),
}
STALE: dict[str, Any] = {
    "accept": stale.Accept(),
    "inverse": stale.Inverse(),
    "fixed": stale.DelayCompensation(2.0, adaptive=False),
    "adaptive": stale.DelayCompensation(2.0),
    "both": stale.chain(stale.DelayCompensation(2.0), stale.DelayCompensation(0.5, adaptive=False)),
}
SHAPES = {"a": (7, 5), "b": (11,), "c": (3,)}


@pytest.fixture(params=["late", "early"])
def cupy(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCuda]:
    fake = FakeCuda(gpus=2, copies=request.param)
    monkeypatch.setitem(sys.modules, "cupy", fake)
    monkeypatch.setattr(device_store, "STEP", 16)  # several pieces, the last a shorter one
    cuda.compile_kernel.cache_clear()
    cuda.compile_distance.cache_clear()
    yield fake
    cuda.compile_kernel.cache_clear()
    cuda.compile_distance.cache_clear()


def layout_of(dtype: Any) -> Layout:
    return Layout.of({name: np.zeros(shape, dtype) for name, shape in SHAPES.items()})


class Pair:
    """A store on the host and one on the device, which are treated alike."""

    def __init__(
        self, rule: Any, dtype: Any = np.float32, workers: int = 2, against: Any = None
    ) -> None:
        layout = layout_of(dtype)
        self.size, self.dtype = layout.size, np.dtype(dtype)
        self.rng = np.random.default_rng(5)
        initial = self.draw()
        averages = getattr(rule, "averages", lambda name: False)
        ends = np.cumsum(layout.sizes).tolist()
        runs = [
            (end - size, end)
            for name, size, end in zip(layout.names, layout.sizes, ends, strict=True)
            if averages(name)
        ]
        count = buffer_count(workers)
        self.memory = [HeapBuffers(count, self.size, self.dtype) for _ in range(2)]
        rules = [rule.updater(layout, 0, self.size) for _ in range(2)]
        self.cpu = Store(self.memory[0], initial, rules[0], runs)
        self.gpu = DeviceStore(self.memory[1], initial, rules[1], runs, card=Card(0))
        self.rules = rules
        self.correcting: list[Any] = []
        if against is not None:
            made = [against.correction(layout, 0, self.size, workers) for _ in range(2)]
            on_device = as_device_correction(made[1])
            assert on_device is not None
            self.correcting = [
                HostCorrecting(self.cpu, made[0], workers, against.needs_read, runs),
                DeviceCorrecting(self.gpu, on_device, workers, against.needs_read),
            ]

    @property
    def stores(self) -> tuple[Store, DeviceStore]:
        return self.cpu, self.gpu

    def draw(self) -> Any:
        return self.rng.standard_normal(self.size).astype(self.dtype)

    def each(self, action: Callable[[Any], Any]) -> Any:
        one, other = (action(store) for store in self.stores)
        assert one == other
        return one

    def check(self) -> None:
        """All that is to be seen of them is the same."""
        assert self.cpu.version == self.gpu.version
        assert self.cpu.current == self.gpu.current
        index = self.each(lambda store: store.hold())
        assert self.memory[1][index].tobytes() == self.memory[0][index].tobytes()
        self.each(lambda store: store.release(index))
        one, other = (rule.slots for rule in self.rules)
        assert one.keys() == other.keys()
        for name, slot in one.items():
            assert np.asarray(other[name].get()).tobytes() == slot.tobytes(), name

    def on_card(self, grad: Any) -> Any:
        """Give a gradient as MPI leaves it on the device."""
        with self.gpu.card:
            return sys.modules["cupy"].asarray(grad)

    def update(
        self,
        grad: Any,
        worker: int = 0,
        scale: float = 1.0,
        read: int = 0,
        *,
        on_card: bool = False,
    ) -> bool:
        """Apply a gradient, perhaps corrected for what the worker had read."""
        results = []
        for k, store in enumerate(self.stores):
            one = self.on_card(grad) if k and on_card else grad
            if self.correcting:
                one = self.correcting[k].correct(worker, read, one)
            results.append(store.update(one, scale, worker))
            if self.correcting:
                self.correcting[k].settled(good=results[-1])
        assert results[0] == results[1]
        return results[0]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", RULES)
def test_a_rule_has_the_same_bits_on_the_device(name: str, dtype: Any, cupy: FakeCuda) -> None:
    pair = Pair(RULES[name], dtype)
    for step in range(7):
        on_card = step in (2, 3)
        assert pair.update(pair.draw(), step % 2, 0.5 if step % 3 else 1.0, on_card=on_card)
        if step % 3:
            pair.check()
        if step == 3:
            bad = pair.draw()
            bad[-1] = np.nan
            assert not pair.update(bad, step % 2)
            assert not pair.update(bad, step % 2, on_card=True)
            pair.check()
    pair.check()


def test_a_gradient_that_is_on_the_device_crosses_no_bus_and_the_host_says_if_it_is_finite(
    cupy: FakeCuda,
) -> None:
    pair = Pair(optim.Adam(0.01))
    before = list(cupy.copied)
    grads = [pair.on_card(pair.draw()) for _ in range(3)]
    assert pair.gpu.update(grads[0])
    assert pair.gpu.update_mean(grads, [1.0, 0.5, 1.0])
    pair.gpu.begin()
    for end in (20, pair.size):
        pair.gpu.extend(grads[1], end)
    assert pair.gpu.commit()
    assert cupy.copied == [before[0], before[1] + 3 * 4], "but for three verdicts"
    assert pair.gpu.is_finite(grads[0])
    grads[0].memory[5] = np.inf
    assert not pair.gpu.is_finite(grads[0])


def test_a_snapshot_stays_on_the_device_until_it_is_read(cupy: FakeCuda) -> None:
    pair = Pair(optim.SGD(0.1))
    assert pair.update(pair.draw())
    index = pair.gpu.hold(False)
    assert index is not None
    to_host = cupy.copied[1]
    half = pair.gpu.device_half(index)
    assert half.memory.tobytes() == pair.cpu.params.tobytes()
    assert cupy.copied[1] == to_host
    assert pair.gpu.buffer(index).tobytes() == pair.cpu.params.tobytes()
    assert cupy.copied[1] > to_host
    pair.gpu.release(index)
    filled = pair.gpu.hold_copy(lambda out: out.fill(1.0))
    assert pair.gpu.device_half(filled) is None, "it is on the host only"
    pair.gpu.hold_again(filled, on_host=False)
    assert (pair.gpu.device_half(filled).memory == 1.0).all(), "somebody reads it on the device"


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("mean", [False, True])
def test_a_gradient_in_memory_that_is_lent_is_copied_from_card_to_card(
    dtype: Any, mean: bool, cupy: FakeCuda
) -> None:
    pair = Pair(optim.SGD(0.1, momentum=0.9), dtype)
    grads = [pair.draw() for _ in range(3)]
    lent = []
    for grad in grads:
        array = pair.on_card(grad)
        lent.append(BorrowedArray(array.data.ptr, array.size, array.dtype))
    to_device = cupy.copied[0]
    if mean:
        pair.cpu.update_mean(grads, [1.0, 0.5, 0.25])
        assert pair.gpu.update_mean(lent, [1.0, 0.5, 0.25])
    else:
        for grad, one in zip(grads, lent, strict=True):
            assert pair.cpu.update(grad)
            assert pair.gpu.update(one)
    assert cupy.copied[0] == to_device
    assert cupy.between == sum(grad.nbytes for grad in grads)
    pair.check()
    bad = pair.draw()
    bad[-1] = np.nan
    array = pair.on_card(bad)
    borrowed = BorrowedArray(array.data.ptr, array.size, array.dtype)
    assert not pair.gpu.update(borrowed)
    assert not pair.gpu.is_finite(borrowed)
    assert pair.gpu.is_finite(lent[0])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("against", ["fixed", "adaptive", "both"])
def test_stale_gradients_are_corrected_in_the_same_kernel(
    against: str, name: str, dtype: Any, cupy: FakeCuda
) -> None:
    pair = Pair(RULES[name], dtype, against=STALE[against])
    read = [0, 0]

    def grant(worker: int) -> None:
        for store, correcting in zip(pair.stores, pair.correcting, strict=True):
            index = store.hold()
            correcting.granted(worker, alone=True)
            store.release(index)
        read[worker] = pair.cpu.version

    grant(0), grant(1)
    for step, worker in enumerate((0, 0, 1, 0, 1, 1, 0)):
        if step == 4:
            bad = pair.draw()
            bad[3] = np.inf
            assert not pair.update(bad, worker, read=read[worker])
        assert pair.update(pair.draw(), worker, 0.75, read[worker])
        pair.check()
        if step % 2:
            grant(worker)
    rules = {"workers": "momentum", "dana": "momentum"}
    assert any("fixed" in one or "adaptive" in one for one in cupy.kernels), rules


def test_the_gap_is_that_of_the_cpu(cupy: FakeCuda) -> None:
    pair = Pair(optim.SGD(0.1), np.float64, against=stale.GapAware())
    for correcting in pair.correcting:
        correcting.granted(0, alone=True)
    for _ in range(5):
        assert pair.update(pair.draw(), 0, read=0)
        np.testing.assert_allclose(pair.gpu.params, pair.cpu.params, rtol=1e-13)
    assert cupy.kernels.count("psframe_scaled_sgd") == 4 * -(-pair.size // 16)


@pytest.mark.parametrize("name", ["sgd", "adam", "averaged"])
def test_rounds_are_added_up_on_the_device_in_their_order(name: str, cupy: FakeCuda) -> None:
    pair = Pair(RULES[name])
    for scales in ([1.0, 1.0, 1.0], [0.5, 1.0], [2.0]):
        grads = [pair.draw() for _ in scales]
        pair.each(lambda store, g=grads, s=scales: (store.release(store.hold()), 0)[1])
        assert pair.each(lambda store, g=grads, s=scales: store.update_mean(g, s))
        pair.check()
    grads = [np.full(pair.size, np.float32(3e38)) for _ in range(2)]
    assert not pair.each(lambda store: store.update_mean(grads, [1.0, 1.0]))
    assert pair.update(pair.draw())
    pair.check()


def test_pieces_that_arrive_and_those_that_were_in_vain(cupy: FakeCuda) -> None:
    pair = Pair(RULES["momentum"])
    for ends in ([5, 20, pair.size], [pair.size], [1, 2, 47, pair.size]):
        grad = pair.draw()
        arriving = np.full(pair.size, np.nan, np.float32)
        pair.each(lambda store: store.begin())
        for end in ends:
            arriving[:end] = grad[:end]
            pair.each(lambda store, g=arriving, e=end: store.extend(g, e))
        if len(ends) == 3:  # another one is first
            assert pair.update(pair.draw())
            pair.each(lambda store: store.begin())
            pair.each(lambda store, g=arriving: store.extend(g, pair.size))
        assert pair.each(lambda store: store.commit())
        pair.check()


def test_a_gradient_that_is_being_written_is_followed(cupy: FakeCuda) -> None:
    pair = Pair(RULES["adam"])
    grad, words = pair.draw(), np.zeros(8, np.int64)
    pair.each(lambda store: store.begin())
    assert pair.gpu.follow(grad, words) == 0
    words[0] = 10
    assert pair.gpu.follow(grad, words) == 10
    words[0] = pair.size
    while pair.gpu.follow(grad, words) < pair.size:
        pass
    pair.cpu.extend(grad, pair.size)
    assert pair.each(lambda store: store.commit())
    pair.check()


@pytest.mark.parametrize("kind", ["float16", "uint16"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_payload_of_two_bytes_an_element_is_widened_by_the_kernel(
    kind: str, dtype: Any, cupy: FakeCuda
) -> None:
    pair = Pair(optim.Adam(0.01), dtype)
    whole = pair.draw().astype(np.float32)
    if kind == "float16":
        payload: Any = whole.astype(np.float16)
        wide = payload.astype(dtype)
    else:
        payload = (whole.view(np.uint32) >> 16).astype(np.uint16)
        wide = (payload.astype(np.uint32) << 16).view(np.float32).astype(dtype)
    sent = cupy.copied[0]
    assert pair.gpu.update(payload)
    assert cupy.copied[0] - sent == payload.nbytes
    assert pair.cpu.update(wide)
    pair.check()


def test_a_version_comes_to_the_host_once_and_only_if_it_is_read(cupy: FakeCuda) -> None:
    pair = Pair(optim.SGD(0.1))
    store, n_bytes = pair.gpu, pair.size * 4
    for _ in range(4):
        assert store.update(pair.draw())
    first = cupy.copied[1]
    assert first == 4 * 4  # the verdicts
    assert store.update(pair.draw())
    before = cupy.copied[1]
    index = store.hold()
    assert cupy.copied[1] == before + n_bytes
    store.hold()
    assert cupy.copied[1] == before + n_bytes
    assert store.update(pair.draw())  # most likely read, too
    assert cupy.copied[1] == before + 2 * n_bytes + 4
    store.hold()
    assert cupy.copied[1] == before + 2 * n_bytes + 4
    assert index is not None
    for _ in range(5):  # the first of these is copied in vain
        assert store.update(pair.draw())
    assert cupy.copied[1] == before + 3 * n_bytes + 6 * 4


def test_what_is_abandoned_writes_nothing_any_more(cupy: FakeCuda) -> None:
    pair = Pair(optim.SGD(0.1))
    store, copy = pair.gpu, pair.draw()
    store.hold()
    store.begin()
    store.extend(pair.draw(), 40)
    store.abandon()
    index = store.hold_copy(lambda out: np.copyto(out, copy))
    assert store.update(pair.draw())
    assert pair.memory[1][index].tobytes() == copy.tobytes()


def test_one_small_update_waits_once(cupy: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_store, "STEP", 1 << 20)
    pair = Pair(optim.SGD(0.1))
    held = pair.gpu.hold()
    for _ in range(4):
        held = pair.gpu.replace(held, pair.draw())
        waits = cupy.waits
    assert pair.gpu.replace(held, pair.draw()) >= 0
    assert cupy.waits == waits + 1  # and the answer may leave


@pytest.mark.parametrize("name", ["momentum", "adam", "workers", "grouped"])
def test_a_mark_stays_as_it_is_and_a_store_goes_on_from_it(name: str, cupy: FakeCuda) -> None:
    pair = Pair(RULES[name])
    for step in range(3):
        assert pair.update(pair.draw(), step % 2)
    marks = [store.mark(2) for store in pair.stores]
    kept = {"params": marks[0].params.copy()}
    kept |= {slot: array.copy() for slot, array in marks[0].slots.items()}
    for step in range(4):
        assert pair.update(pair.draw(), step % 2)
        pair.check()
    assert marks[1].params.tobytes() == kept["params"].tobytes()
    for slot, array in marks[1].slots.items():
        assert array.get().tobytes() == kept[slot].tobytes(), slot
    pair.each(lambda store: store.unmark())
    other = Pair(RULES[name])

    def fill(slot: str, out: Any) -> None:
        assert isinstance(out, np.ndarray)
        out[:] = kept[slot]

    names = [slot for slot in kept if slot != "params"]
    other.each(lambda store: store.restore(3, names, fill))
    other.check()
    assert other.update(other.draw(), 1)
    other.check()


def test_a_buffer_that_was_filled_from_outside_is_read_by_corrections(cupy: FakeCuda) -> None:
    pair = Pair(optim.SGD(0.1), against=STALE["fixed"])
    decoded = pair.draw()
    for store, correcting in zip(pair.stores, pair.correcting, strict=True):
        index = store.hold_copy(lambda out: np.copyto(out, decoded))
        correcting.granted(0, alone=True, copied=index)
        store.release(index)
    assert pair.update(pair.draw(), 0, read=0)
    pair.check()


def test_memory_in_pages_of_its_own_is_registered_and_given_back(cupy: FakeCuda) -> None:
    segment = Segment.create(8, 40, np.dtype(np.float32))
    buffers = SegmentBuffers(segment, 7)
    layout = Layout.of({"a": np.zeros(40, np.float32)})
    card = Card(0)
    rule = optim.SGD(0.1).updater(layout, 0, 40)
    store = DeviceStore(buffers, np.zeros(40, np.float32), rule, card=card)
    slot = segment.array(7)
    assert store.update(slot)
    assert slot.ctypes.data in cupy.registered
    assert buffers[0].ctypes.data in cupy.registered
    heap = np.ones(41, np.float32)[1:]
    assert store.update(heap)
    assert heap.ctypes.data not in cupy.registered
    card._unregister()
    assert not cupy.registered


def test_memory_of_the_heap_is_not_registered_where_it_begins_a_page(cupy: FakeCuda) -> None:
    card, kept = Card(0), []
    while not kept or kept[-1].ctypes.data % 4096:
        assert len(kept) < 100_000
        kept.append(np.empty(260, np.float32))
    card.register(kept[-1])
    assert not cupy.registered


def test_memory_that_cannot_be_registered_is_tried_once_and_told_of_once(
    cupy: FakeCuda, caplog: pytest.LogCaptureFixture
) -> None:
    """Though a gradient is sent in pieces, each at an address of its own."""
    cupy.refuses = True
    segment = Segment.create(8, 40, np.dtype(np.float32))
    layout = Layout.of({"a": np.zeros(40, np.float32)})
    rule = optim.SGD(0.1).updater(layout, 0, 40)
    buffers = SegmentBuffers(segment, 7)
    store = DeviceStore(buffers, np.zeros(40, np.float32), rule, card=Card(0))
    before = cupy.refused
    for _ in range(3):
        assert store.update(segment.array(7))
    assert cupy.refused == before + 1
    assert len(caplog.messages) == 1
    assert "copied to the GPU slowly" in caplog.messages[0]


# ---- whole runs ----------------------------------------------------------------------------------

PARAMS = {
    name: np.random.default_rng(k).normal(size=shape).astype(np.float32)
    for k, (name, shape) in enumerate(SHAPES.items())
}


def work(worker: Any, steps: int = 6, poison: int = -1) -> None:
    params = worker.pull()
    for step in range(steps):
        grads = {
            name: (params[name] * 0.5 + worker.rng.normal(size=params[name].shape)).astype("f4")
            for name in params
        }
        if step == poison:
            grads["b"][0] = np.inf
        params = worker.push_pull(grads)
        assert params.receipt.applied == (step != poison)


def both(work: Any, **arguments: Any) -> None:
    """Run on the CPU and on the device, and compare."""
    cpu = psframe.run(work, PARAMS, device="cpu", **arguments)
    gpu = psframe.run(work, PARAMS, device="cpu", server_device="cuda", **arguments)
    assert cpu.params is not None
    assert gpu.params is not None
    assert (gpu.version, gpu.ledger) == (cpu.version, cpu.ledger)
    assert gpu.staleness.tolist() == cpu.staleness.tolist()
    for name, value in cpu.params.items():
        assert gpu.params[name].tobytes() == value.tobytes(), name


MODES = {
    "async": (psframe.Async(), 1),
    "ssp": (psframe.SSP(staleness=1), 1),
    "bsp": (psframe.BSP(), 3),
    "buffered": (psframe.Buffered(2), 1),
}


@pytest.mark.parametrize("servers", [1, 3])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["sgd", "momentum", "adam"])
def test_a_run_has_the_bits_of_the_cpu(name: str, mode: str, servers: int, cupy: FakeCuda) -> None:
    chosen, workers = MODES[mode]
    both(work, optimizer=RULES[name], mode=chosen, workers=workers, servers=servers)
    assert cupy.used == ({0} if servers == 1 else {0, 1})  # the GPUs in turn


@pytest.mark.parametrize("rule", STALE)
def test_a_run_against_staleness(rule: str, cupy: FakeCuda) -> None:
    both(work, optimizer=RULES["momentum"], stale=STALE[rule], clip_norm=3.0)
    with_codec = psframe.codecs.Float16()
    both(work, optimizer=RULES["adam"], stale=STALE[rule], codec=with_codec, pull_codec=with_codec)


def test_a_correction_of_a_users_own_is_made_on_the_host(cupy: FakeCuda) -> None:
    class Halve:
        def correct(self, worker: int, grad: Any, params: Any, read: Any, out: Any) -> Any:
            np.multiply(grad, np.float32(0.5), out=out)
            out += 0.0 * (params - read)
            return out

        def applied(self, before: Any, after: Any) -> None:
            assert (before != after).any()

        def rejected(self) -> None:
            raise AssertionError("all are good")

    class Half(stale.Rule):
        needs_read = True

        def factor(self, push: Any) -> float:
            return 1.0

        def correction(self, layout: Any, begin: int, end: int, workers: int) -> Any:
            return Halve()

    both(work, optimizer=RULES["adam"], stale=Half())
    both(work, optimizer=RULES["adam"], stale=STALE["adaptive"], mode=psframe.Buffered(2))


@pytest.mark.parametrize("mode", ["async", "ssp", "bsp"])
def test_a_push_that_is_not_finite_is_refused(mode: str, cupy: FakeCuda) -> None:
    chosen, _ = MODES[mode]
    poisoned = functools.partial(work, poison=2)
    both(poisoned, optimizer=RULES["momentum"], mode=chosen, servers=2)
    both(poisoned, optimizer=RULES["momentum"], mode=chosen)


def test_a_run_goes_on_from_a_checkpoint(cupy: FakeCuda, tmp_path: Any) -> None:
    def part(folder: str, device: str, updates: int, *, resume: bool) -> Any:
        return psframe.run(
            work_for_long,
            PARAMS,
            optimizer=RULES["adam"],
            device="cpu",
            server_device=device,
            run_dir=tmp_path / folder,
            checkpoint_every=3,
            max_updates=updates,
            resume=resume,
        )

    part("cpu", "cpu", 5, resume=False)
    part("gpu", "cuda", 5, resume=False)
    # And each goes on where the other was.
    of_gpu, of_cpu = part("cpu", "cuda", 9, resume=True), part("gpu", "cpu", 9, resume=True)
    for name in PARAMS:
        assert of_gpu.params[name].tobytes() == of_cpu.params[name].tobytes()


def work_for_long(worker: Any) -> None:
    params = worker.pull()
    while True:
        params = worker.push_pull({n: p * np.float32(0.5) for n, p in params.items()})


# ---- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["gpu", "auto", "cuda:", "cuda:²", ""])
def test_what_is_no_device_of_a_server(device: str) -> None:
    with pytest.raises(ValueError, match="server_device: expected 'cpu', 'cuda' or 'cuda:k'"):
        check_server_device(device)
    with pytest.raises(TypeError, match="server_device: expected"):
        check_server_device(None)


def test_the_gpu_that_is_chosen(cupy: FakeCuda) -> None:
    assert [choose_server_device("cuda", k) for k in range(3)] == [0, 1, 0]
    assert choose_server_device("cuda:1", 0) == 1
    assert choose_server_device("cpu", 0) is None
    with pytest.raises(ValueError, match="the visible GPUs are cuda:0 to cuda:1"):
        choose_server_device("cuda:2", 0)


def test_without_a_gpu_nothing_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", FakeCuda(gpus=0))

    def never(worker: Any) -> None:
        raise AssertionError("it has started")

    with pytest.raises(ValueError, match="server_device: 'cuda' needs a GPU"):
        psframe.run(never, PARAMS, optimizer=optim.SGD(0.1), device="cpu", server_device="cuda")


def test_an_optimizer_without_a_formula_is_refused() -> None:
    class Own:
        def updater(self, layout: Any, begin: int, end: int) -> Any:
            raise AssertionError("it is not asked")

    with pytest.raises(TypeError, match=r"server_device: .* has no formula"):
        Plan.check(
            work,
            PARAMS,
            optimizer=Own(),
            mode=None,
            servers=1,
            server_device="cuda",
        )


def test_ranks_agree_on_it() -> None:
    plans = [
        Plan.check(
            work, PARAMS, optimizer=optim.SGD(0.1), mode=None, servers=1, server_device=device
        ).digests()
        for device in ("cpu", "cuda")
    ]
    assert {name for name in plans[0] if plans[0][name] != plans[1][name]} == {"server_device"}
