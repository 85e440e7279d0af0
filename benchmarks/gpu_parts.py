"""Measures one part of `make bench-gpu`, and prints what came of it as an object of JSON.

Usage: gpu_parts.py kernels|bus
       mpirun -n 2 gpu_parts.py step         (without mpirun: server and worker in one process)
       mpirun -n 5 gpu_parts.py workers      (without mpirun: threads of one process)

Ways are measured in turn, with synchronised wall clocks, after a warm-up; figures are medians of
the ratios of each round. What is computed is checked: a wrong buffer is an error, and no row.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

import psframe
from psframe import optim
from psframe.benchmarks.apply import RULES
from psframe.benchmarks.job import Part, WrongAnswer, open_job, take_turns
from psframe.benchmarks.report import Spread
from psframe.benchmarks.ways import rate_of
from psframe.client import Worker
from psframe.devices import CudaDevice
from psframe.launcher import find_launcher
from psframe.layout import Array, Layout
from psframe.models import MLP
from psframe.optim.cuda import Incoming
from psframe.packing import GradientSlot
from psframe.server_device import Card
from psframe.transports.shared_memory import Segment

_OPTIMIZER = optim.SGD(lr=0.01, momentum=0.9)
_SAMPLE = 1000  # elements of an update that are computed on the CPU, too
_WARM_UP = 6
_MEET_S = 60.0


def _row(row: str, ratios: Sequence[float], detail: str) -> dict[str, Any]:
    return {"row": row, **Spread(ratios, 3).fields("figure"), "detail": detail}


def _in_turn(ways: Sequence[Callable[[], float]], rounds: int) -> list[list[float]]:
    """Call some functions in turn, once for nothing; give what each returned, by function."""
    found: list[list[float]] = [[] for _ in ways]
    for number in range(rounds + 1):
        for way, mine in zip(ways, found, strict=True):
            seconds = way()
            if number:
                mine.append(seconds)
    return found


# ---- update kernels ------------------------------------------------------------------------------


class Update:
    """Updates of one rule on a card, and copies there of as many bytes.

    Args:
        name: of the rule.
        size: parameters.
        repeat: updates, or copies, that are timed together.
    """

    def __init__(self, name: str, size: int, repeat: int) -> None:
        import cupy

        self._cupy, self._size, self._repeat = cupy, size, repeat
        rule = RULES[name]
        # Parameters and gradient in, parameters out; each slot in and out.
        self.bytes = size * 4 * (3 + 2 * len(rule.slots))
        self._updater = rule.updater(Layout.of({"w": np.zeros(size, np.float32)}), 0, size)
        self._sample = rule.updater(Layout.of({"w": np.zeros(_SAMPLE, np.float32)}), 0, _SAMPLE)
        self._host: Array = np.random.default_rng(3).standard_normal(size, np.float32)
        self._card = Card(0)
        self._done = 0
        with self._card as card:
            dtype = np.dtype(np.float32)
            self._buffers = [card.zeros(size, dtype), card.empty(size, dtype)]
            self._grad = card.empty(size, dtype)
            card.reuse()  # what its memory was before may still be used
            card.send(self._host, self._grad)
            self._updater.prepare(self._buffers[0])
            half = self.bytes // 8
            self._copied = [card.zeros(half, dtype), card.empty(half, dtype)]
            card.settle()

    def update(self) -> float:
        """Give the seconds of an update."""
        return self._timed(self._apply)

    def copy(self) -> float:
        """Give the seconds of a copy on the card that reads and writes as many bytes together."""
        return self._timed(self._copy)

    def _timed(self, once: Callable[[], None]) -> float:
        with self._card as card:
            card.settle()
            begin = time.perf_counter()
            for _ in range(self._repeat):
                once()
            card.settle()
            return (time.perf_counter() - begin) / self._repeat

    def _apply(self) -> None:
        old, new = self._buffers
        self._updater.begin(self._done, old)
        incoming: Any = Incoming(self._grad, self._card.bad)
        self._updater.extend(old, incoming, new, 0, self._size)
        self._updater.finish()
        self._buffers.reverse()
        self._done += 1

    def _copy(self) -> None:
        runtime, (source, target) = self._cupy.cuda.runtime, self._copied
        stream = self._cupy.cuda.get_current_stream().ptr
        kind = runtime.memcpyDeviceToDevice
        runtime.memcpyAsync(target.data.ptr, source.data.ptr, self.bytes // 2, kind, stream)

    def check(self) -> None:
        """Compare ends and middle of the parameters with the CPU's.

        Raises:
            WrongAnswer: they differ.
        """
        found = np.empty(self._size, np.float32)
        with self._card as card:
            if not card.verdict():
                raise WrongAnswer("an update is not finite")
            card.fetch(self._buffers[0], found)
            card.fetched()
        third = _SAMPLE // 3
        middle = self._size // 2
        parts = [
            slice(0, third),
            slice(middle, middle + third),
            slice(-(_SAMPLE - 2 * third), None),
        ]
        grad = np.concatenate([self._host[part] for part in parts])
        buffers = [np.zeros(_SAMPLE, np.float32), np.zeros(_SAMPLE, np.float32)]
        for step in range(self._done):
            if not self._sample.update(step, buffers[step & 1], grad, buffers[1 - (step & 1)]):
                raise WrongAnswer("an update on the CPU is not finite")
        expected = buffers[self._done & 1]
        np.testing.assert_allclose(
            np.concatenate([found[part] for part in parts]), expected, rtol=1e-6, atol=1e-30
        )


def kernels(settings: argparse.Namespace) -> dict[str, Any]:
    """Measure update kernels over whole shards; the figure is that of the slowest rule."""
    rows, details = [], []
    for name in ("sgd", "momentum", "adam"):
        update = Update(name, settings.size, settings.repeat)
        mine, copies = _in_turn((update.update, update.copy), settings.rounds)
        update.check()
        ratios = [copy / own for own, copy in zip(mine, copies, strict=True)]
        rate = update.bytes / Spread(mine).median / 1e9
        details.append(f"{name} {Spread(ratios, 3).median:g} at {rate:,.0f} GB/s")
        rows.append(ratios)
    slowest = min(rows, key=lambda ratios: Spread(ratios).median)
    return _row("kernels", slowest, f"{', '.join(details)}; {settings.size:,} parameters")


# ---- the bus -------------------------------------------------------------------------------------


class Bus:
    """A gradient to the buffer that server and worker share, parameters back, and bare copies.

    Args:
        size: elements.
    """

    def __init__(self, size: int) -> None:
        import cupy

        self._cuda: Any = cupy.cuda
        layout = Layout.of({"w": np.zeros(size, np.float32)})
        self._segment = Segment.create(2, size, np.float32)
        self._slot = GradientSlot(layout, self._segment.array(0))
        self._snapshot = self._segment.array(1)
        self._snapshot[:] = 0.0
        self._device = CudaDevice(0, layout)
        self._grads = self._device.staging(0, {})
        self._pinned = np.frombuffer(cupy.cuda.alloc_pinned_memory(4 * size), np.float32, size)
        self._bare = cupy.empty(size, np.float32)
        self._bare[:] = 0.0
        self._stream = cupy.cuda.Stream(non_blocking=True)
        self._value = 0.0
        self.bytes = 4 * size

    def psframe(self) -> float:
        """Give the seconds that gradient and parameters take, the one after the other."""
        self._value += 1.0
        self._snapshot[:] = -self._value
        self._grads["w"][:] = self._value
        self._cuda.get_current_stream().synchronize()
        begin = time.perf_counter()
        # Told in pieces, as a server follows them.
        self._device.fetch(0, self._grads, self._slot, False, lambda end: None)
        params = self._device.params([self._snapshot])
        self._device.copied(waits=True)
        seconds = time.perf_counter() - begin
        if not (self._slot.flat == self._value).all():
            raise WrongAnswer("another gradient has arrived than was sent")
        if not (params["w"].get() == -self._value).all():
            raise WrongAnswer("other parameters have arrived than were sent")
        return seconds

    def bare(self) -> float:
        """Give the seconds of a copy from the card to pinned memory, and one back."""
        runtime, host, card = self._cuda.runtime, self._pinned.ctypes.data, self._bare.data.ptr
        self._cuda.get_current_stream().synchronize()
        begin = time.perf_counter()
        for target, source, kind in (
            (host, card, runtime.memcpyDeviceToHost),
            (card, host, runtime.memcpyHostToDevice),
        ):
            runtime.memcpyAsync(target, source, self.bytes, kind, self._stream.ptr)
            self._stream.synchronize()
        return time.perf_counter() - begin

    def close(self) -> None:
        """Unregister the memory."""
        self._device.close()
        self._segment.close_file()


def bus(settings: argparse.Namespace) -> dict[str, Any]:
    """Measure the way between a card and the buffers that server and worker share."""
    both = Bus(settings.size)
    try:
        mine, bare = _in_turn((both.psframe, both.bare), settings.rounds)
    finally:
        both.close()
    ratios = [copy / own for own, copy in zip(mine, bare, strict=True)]
    rates = [2 * both.bytes / Spread(one).median / 1e9 for one in (mine, bare)]
    detail = (
        f"{rates[0]:.1f} GB/s against {rates[1]:.1f}, {both.bytes / 2**20:.0f} MiB there and back"
    )
    return _row("bus", ratios, detail)


# ---- training steps ------------------------------------------------------------------------------


class Problem:
    """A model, and a batch of random samples on a device.

    Args:
        widths: of the MLP, input and classes included.
        batch: samples.
    """

    def __init__(self, widths: Sequence[int], batch: int) -> None:
        self._widths, self._batch = tuple(widths), batch
        self.params: Mapping[str, Any] = self.model().init(np.random.default_rng(0))

    def model(self) -> MLP:
        return MLP((self._widths[0],), self._widths[-1], self._widths[1:-1])

    def samples(self, xp: Any, seed: int) -> tuple[Any, Any]:
        rng = np.random.default_rng(1 + seed)
        x = rng.standard_normal((self._batch, self._widths[0]), np.float32)
        return xp.asarray(x), xp.asarray(rng.integers(0, self._widths[-1], self._batch))


class Alone:
    """Training steps in one process without psframe: gradients, and the kernel that applies them.

    Nothing is waited for in a step.
    """

    def __init__(self, problem: Problem, xp: Any) -> None:
        self._xp, self._model = xp, problem.model()
        self._x, self._y = problem.samples(xp, 0)
        self._layout = Layout.of(problem.params)
        size = self._size = self._layout.size
        first = xp.asarray(self._layout.flatten(problem.params))
        self._buffers = [first, xp.empty_like(first)]
        self._views = [self._layout.views(one) for one in self._buffers]
        self._flat = xp.empty_like(first)
        self._grads = self._layout.views(self._flat)
        self._updater = _OPTIMIZER.updater(self._layout, 0, size)
        self._updater.prepare(first)
        self._bad = xp.zeros(1, np.int32)
        self._done = 0

    def steps(self, count: int) -> None:
        """Take so many, and wait until they are done."""
        incoming: Any = self._flat if self._xp is np else Incoming(self._flat, self._bad)
        for _ in range(count):
            self._model.loss_and_gradients(self._views[0], self._x, self._y, out=self._grads)
            old, new = self._buffers
            self._updater.begin(self._done, old)
            self._updater.extend(old, incoming, new, 0, self._size)
            self._updater.finish()
            self._buffers.reverse()
            self._views.reverse()
            self._done += 1
        _wait(self._xp)

    @property
    def params(self) -> Mapping[str, Any]:
        return self._views[0]


class Steps:
    """Training steps of a worker: what is pulled ahead lacks its own last gradient."""

    def __init__(self, problem: Problem, worker: Worker) -> None:
        self._worker, self._model = worker, problem.model()
        self._x, self._y = problem.samples(worker.xp, worker.index)
        self.params: Mapping[str, Any] = worker.pull()
        self._ahead: Any = None
        self.pushed = 0

    def one_by_one(self, count: int) -> None:
        """Take steps, each on the parameters that the one before has made."""
        for _ in range(count):
            self._compute()
            self.params = self._worker.push_pull(None)
            self.pushed += 1

    def steps(self, count: int) -> None:
        """Take so many, and wait until the last one's gradient has been applied."""
        if self._ahead is None:
            self._ahead = self._worker.pull_async()
        receipt = None
        for _ in range(count):
            self._compute()
            pending = self._worker.push(None)
            self.params = self._ahead.wait()
            self._ahead = self._worker.pull_async()
            self.pushed += 1
            receipt = pending
        if receipt is not None and not receipt.wait().applied:
            raise WrongAnswer("a gradient was not applied")
        _wait(self._worker.xp)

    def _compute(self) -> None:
        grads = self._worker.gradients()
        self._model.loss_and_gradients(self.params, self._x, self._y, out=grads)

    def close(self) -> None:
        """Take the answer that is still to come."""
        if self._ahead is not None:
            self.params = self._ahead.wait()


def _wait(xp: Any) -> None:
    if xp is not np:
        xp.cuda.get_current_stream().synchronize()


def _seconds(act: Callable[[], None]) -> float:
    begin = time.perf_counter()
    act()
    return time.perf_counter() - begin


def _same(found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    for name, array in expected.items():
        one, other = (a if isinstance(a, np.ndarray) else a.get() for a in (found[name], array))
        # Products may be summed in another order.
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-5, err_msg=name)


def _both_ways(
    problem: Problem, worker: Worker, settings: argparse.Namespace
) -> tuple[list[float], list[float]]:
    """Give the seconds of a step through psframe and alone, by round."""
    mine, alone = Steps(problem, worker), Alone(problem, worker.xp)
    mine.one_by_one(3)
    alone.steps(3)
    _same(mine.params, alone.params)
    mine.steps(_WARM_UP)
    alone.steps(_WARM_UP)
    one_s = _seconds(lambda: alone.steps(_WARM_UP)) / _WARM_UP
    count = min(max(3, round(settings.seconds / one_s)), 500)
    ways = (lambda: mine.steps(count), lambda: alone.steps(count))
    ours, others = _in_turn([functools.partial(_seconds, way) for way in ways], settings.rounds)
    mine.close()
    if worker.pull().version != mine.pushed:
        raise WrongAnswer("there are not as many updates as pushes")
    return [s / count for s in ours], [s / count for s in others]


def step(settings: argparse.Namespace) -> dict[str, Any] | None:
    """Measure a worker's training step; the figure is with the server where it is faster.

    Returns:
        The row; None where no worker runs.
    """
    problem = Problem(settings.widths, settings.batch)
    rows: list[tuple[float, list[float]]] = []
    details = []
    for place in settings.server_devices:
        found: list[tuple[list[float], list[float]]] = []

        def work(worker: Worker, found: Any = found) -> None:
            found.append(_both_ways(problem, worker, settings))

        psframe.run(
            work,
            problem.params,
            optimizer=_OPTIMIZER,
            workers=None if find_launcher() else 1,
            device=settings.device,
            server_device=place,
        )
        if not found:
            continue
        mine, alone = found[0]
        ratios = [a / b for a, b in zip(mine, alone, strict=True)]
        ratio = Spread(ratios, 3).median
        times = [1e3 * Spread(one).median for one in (mine, alone)]
        rows.append((ratio, ratios))
        details.append(f"server on {place} {ratio:g} ({times[0]:.2f} ms against {times[1]:.2f})")
    if not rows:
        return None
    return _row("step", min(rows)[1], ", ".join([*details, _how()]))


def _how() -> str:
    return "under mpirun" if find_launcher() else "in one process: no mpirun"


# ---- several workers on one card -----------------------------------------------------------------


def _push(problem: Problem, worker: Worker, count: int, meet: Callable[[], object]) -> float:
    steps = Steps(problem, worker)
    steps.steps(_WARM_UP)
    meet()
    seconds = _seconds(lambda: steps.steps(count))
    steps.close()
    return seconds


def _check_end(result: psframe.Result, updates: int) -> None:
    if result.params is None:
        return
    if result.version != updates:
        raise WrongAnswer(f"{result.version} updates, expected {updates}")
    if not all(np.isfinite(array).all() for array in result.params.values()):
        raise WrongAnswer("the parameters are not finite")


def _ranks(problem: Problem, settings: argparse.Namespace, part: Part, count: int) -> float:
    """Give the seconds of this rank's steps; every rank of the part calls it."""
    seconds = 0.0
    if not part.inside:
        return seconds

    def work(worker: Worker) -> None:
        nonlocal seconds
        with part.meetings() as meet:
            seconds = _push(problem, worker, count, meet)

    result = psframe.run(
        work,
        problem.params,
        optimizer=_OPTIMIZER,
        device=settings.device,
        server_device=settings.server_devices[-1],
        comm=part.comm,
    )
    _check_end(result, part.workers * (_WARM_UP + count))
    return seconds


def _threads(problem: Problem, settings: argparse.Namespace, workers: int, count: int) -> float:
    """Give the updates a second of so many workers of this process."""
    times: list[float] = []
    together = threading.Barrier(workers)

    def work(worker: Worker) -> None:
        times.append(_push(problem, worker, count, lambda: together.wait(_MEET_S)))

    result = psframe.run(
        work,
        problem.params,
        optimizer=_OPTIMIZER,
        workers=workers,
        device=settings.device,
        server_device=settings.server_devices[-1],
    )
    _check_end(result, workers * (_WARM_UP + count))
    return workers * count / max(times)


def workers(settings: argparse.Namespace) -> dict[str, Any] | None:
    """Measure updates a second of four workers on one card over one worker's."""
    problem, many = Problem(settings.widths, settings.batch), settings.workers
    counts = {1: many * settings.steps, many: settings.steps}  # updates in all are as many
    if find_launcher() is None:
        ways = [functools.partial(_threads, problem, settings, *one) for one in counts.items()]
        one, all_ = _in_turn(ways, settings.rounds)
        return _several(one, all_, many)
    with open_job("gpu_parts.py workers", many + 1) as job:
        timed = []
        for number, count in counts.items():
            part = job.part(1, number)

            def rate(part: Part = part, count: int = count) -> float:
                seconds = job.together(lambda: _ranks(problem, settings, part, count))
                return rate_of(job, part, seconds, count)

            timed.append(rate)
        one, all_ = take_turns(job, timed, settings.rounds)
        return _several(one, all_, many) if job.rank == 0 else None


def _several(one: Sequence[float], all_: Sequence[float], many: int) -> dict[str, Any]:
    ratios = [a / b for a, b in zip(all_, one, strict=True)]
    rates = [Spread(found).median for found in (all_, one)]
    detail = f"{rates[0]:,.0f} updates a second of {many} workers, {rates[1]:,.0f} of one, {_how()}"
    return _row("workers", ratios, detail)


PARTS: dict[str, Callable[[argparse.Namespace], dict[str, Any] | None]] = {
    "kernels": kernels,
    "bus": bus,
    "step": step,
    "workers": workers,
}


def read_settings(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the flags."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("part", choices=tuple(PARTS))
    parser.add_argument("--rounds", type=int, help="measurements of each way, in turn")
    parser.add_argument("--size", type=int, help="elements, of kernels and bus")
    parser.add_argument("--repeat", type=int, default=10, help="updates that are timed together")
    parser.add_argument("--widths", type=int, nargs="+", default=(4096, 4096, 4096, 1000))
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--seconds", type=float, default=1.0, help="of a round of steps, roughly")
    parser.add_argument("--steps", type=int, default=40, help="of each of several workers")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--server-devices", nargs="+", default=("cpu", "cuda"))
    settings = parser.parse_args(argv)
    if settings.rounds is None:
        settings.rounds = {"kernels": 7, "bus": 15, "step": 5, "workers": 3}[settings.part]
    if settings.size is None:
        # Far more than a card's second cache; and what a large layer's gradient takes.
        settings.size = {"kernels": 64 << 20, "bus": 16 << 20}.get(settings.part, 0)
    return settings


def main(argv: Sequence[str] | None = None) -> int:
    settings = read_settings(argv)
    row = PARTS[settings.part](settings)
    if row is not None:
        print(json.dumps(row), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
