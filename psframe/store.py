"""Versioned snapshots of one shard: pulls are whole and never wait, nor do updates.

The store keeps a few parameter buffers. An update reads the current one and writes the next,
then the current pointer moves. A pull answers from the current buffer and *holds* it; a held
buffer is never written. With W + 2 buffers and one hold a worker, two buffers are always free
of holds: the update's target is one that is neither held nor current. One buffer a worker more is
there for rules that need what it had read, one for the pin of an evaluation, and two for a
checkpoint that is being written: its own, and that of the evaluation that is in it. Buffers are
taken lowest index first, so that no more of them are ever touched than were needed at once.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np

from psframe.consistency import Batch
from psframe.layout import Array

__all__ = [
    "Buffers",
    "Fill",
    "HeapBuffers",
    "MarkableRule",
    "Marked",
    "STEP",
    "Store",
    "UpdateRule",
    "buffer_count",
    "is_finite",
]

Fill = Callable[[str, Array], None]  # writes the array of that name

_PINS = 3
# Elements of an arriving gradient that are applied at once, 2 MiB of float32: a pull that comes
# meanwhile waits no longer than that takes.
STEP = 512 << 10


def buffer_count(workers: int) -> int:
    """Count the buffers that a store needs: two a worker, two for updates, three for pins."""
    return 2 * workers + 2 + _PINS


def is_finite(grad: Array) -> bool:
    """Say whether all of a gradient is finite."""
    return bool(np.isfinite(grad).all())


class Buffers(Protocol):
    """The memory of a store: equally long arrays, by index."""

    def __len__(self) -> int:
        """Count the buffers."""

    def __getitem__(self, index: int) -> Array:
        """Give buffer `index`; always the same memory for the same index."""


class HeapBuffers:
    """Buffers in this process's own memory, allocated when first used."""

    def __init__(self, count: int, size: int, dtype: np.dtype[Any]) -> None:
        self._make: Callable[[], Array] = lambda: np.empty(size, dtype)
        self._arrays: list[Array | None] = [None] * count

    def __len__(self) -> int:
        return len(self._arrays)

    def __getitem__(self, index: int) -> Array:
        array = self._arrays[index]
        if array is None:
            array = self._arrays[index] = self._make()
        return array


class UpdateRule(Protocol):
    """An optimizer bound to one shard."""

    def update(self, step: int, params: Array, grad: Array, out: Array, scale: float = 1.0) -> bool:
        """Write the parameters after update `step` to `out`; False, and nothing else has
        changed, if a result is not finite."""

    def begin(self, step: int, params: Array, scale: float = 1.0) -> None:
        """Begin an update that is made in parts; one that was begun before is forgotten."""

    def extend(self, params: Array, grad: Array, out: Array, begin: int, end: int) -> bool:
        """Write [begin, end) of it to `out`; False if a result is not finite."""

    def follow(
        self, params: Array, grad: Array, out: Array, begin: int, limit: int, words: Array
    ) -> tuple[int, bool]:
        """As `extend`, from `begin` to where words[0] says that the gradient is, or to `limit`,
        perhaps waiting a little for more: gives the end, and False if a result is not finite."""

    def finish(self) -> None:
        """Make the parts, which cover the shard and are all finite, the rule's new state."""


@runtime_checkable
class MarkableRule(Protocol):
    """A rule whose state can be kept for a checkpoint and taken up again."""

    @property
    def slot_names(self) -> tuple[str, ...]:
        """The names of the arrays that it keeps, each as long as the shard; equal in all shards."""

    @property
    def slots(self) -> Mapping[str, Any]:
        """Those arrays as they are now; none before the first update."""

    def mark(self) -> None:
        """Let nobody write the present `slots` until `unmark`; updates go on beside them."""

    def unmark(self) -> None:
        """Let them be written again."""

    def load(self, params: Array, fill: Callable[[str, Array], None]) -> None:
        """Have `fill` write into each slot, by its name, what it was when a mark was made."""


@dataclass(frozen=True, slots=True)
class Marked:
    """A version of a shard that is not written until it is unmarked.

    Attributes:
        version: which.
        params: the parameters.
        slots: the rule's slots by name; none if there has been no update.
    """

    version: int
    params: Array
    slots: Mapping[str, Any]


class Store:
    """The snapshots of one shard and the only way to change them.

    Args:
        buffers: the memory; `buffer_count(workers)` of them.
        initial: the parameters at version 0, copied.
        rule: the optimizer bound to this shard.
        unscaled: the runs [begin, end) of the shard that are no gradients, but observations to be
            averaged: clipping does not scale them.
        batch: where gradients are gathered, if they are.

    Attributes:
        per_worker: whether the rule tells workers apart.
        n_bytes: of one snapshot.
    """

    def __init__(
        self,
        buffers: Buffers,
        initial: Array,
        rule: UpdateRule,
        unscaled: Sequence[tuple[int, int]] = (),
        batch: Batch | None = None,
    ) -> None:
        self._buffers = buffers
        self._batch = batch
        self._scaled: Array | None = None
        self._unscaled = unscaled
        self._rule = rule
        self.per_worker: bool = getattr(rule, "per_worker", False)
        self._holds = [0] * len(buffers)
        self._n_held = 0  # distinct buffers that are held
        self._free = list(range(1, len(buffers)))  # a heap: neither held nor current
        self._mean: Array | None = None
        # The target of an update that is being made in parts, how far it is, and whether all of
        # that is finite. It is neither held nor current nor free, and never seen unless published.
        self._early: int | None = None
        self._done, self._finite = 0, True
        self.current = 0
        self.version = 0
        self._marked: int | None = None
        self.n_bytes = initial.nbytes
        self._to_fill(0)[:] = initial

    @property
    def params(self) -> Array:
        """The current snapshot; valid until the next update."""
        return self._buffers[self.current]

    @property
    def held(self) -> int:
        """Distinct buffers that are held."""
        return self._n_held

    def hold(self, on_host: bool = True) -> int | None:
        """Hold the current buffer; None if that would leave updates fewer than two.

        Args:
            on_host: whether it is to be read there; of use where a store is on a device.
        """
        index = self.current
        if not self._holds[index]:
            if self._n_held >= len(self._holds) - 2:
                return None
            self._n_held += 1
        self._holds[index] += 1
        return index

    def hold_again(self, index: int, on_host: bool = True) -> int:
        """Take one more hold of a buffer that is held already; `on_host` as for `hold`."""
        assert self._holds[index] > 0, f"buffer {index} is not held"
        self._holds[index] += 1
        return index

    def buffer(self, index: int) -> Array:
        """The memory of buffer `index`."""
        return self._buffers[index]

    def _to_fill(self, index: int) -> Array:
        """The memory of buffer `index`, about to be written from outside."""
        return self._buffers[index]

    def release(self, index: int) -> None:
        """Give one hold of a buffer back."""
        holds = self._holds[index]
        assert holds > 0, f"buffer {index} is not held"
        self._holds[index] = holds - 1
        if holds == 1:
            self._n_held -= 1
            if index != self.current:
                heapq.heappush(self._free, index)

    # ---- checkpoints -------------------------------------------------------------------------

    def mark(self, workers: int = 0) -> Marked:
        """Keep the present version as it is until `unmark`, while updates go on.

        Args:
            workers: W, for rules that keep something for each: all shards have the same then.
        """
        assert self._marked is None, "there is a mark already"
        index = self.hold()
        assert index is not None, "two buffers are there for a mark"
        rule = self._markable()
        if self.per_worker:
            rule.adopt(self.params, range(workers))  # type: ignore[attr-defined]
        rule.mark()
        self._marked = index
        return Marked(self.version, self._buffers[index], rule.slots)

    def unmark(self) -> None:
        """Let the marked version go."""
        assert self._marked is not None, "there is no mark"
        self.release(self._marked)
        self._marked = None
        self._markable().unmark()

    def _markable(self) -> MarkableRule:
        rule = self._rule
        assert isinstance(rule, MarkableRule), "this rule's state cannot be kept"
        return rule

    def restore(self, version: int, names: Collection[str], fill: Fill) -> None:
        """Go on from a version that was marked; nothing else has happened here.

        Args:
            version: which.
            names: the slots that were marked.
            fill: (name, array) -> writes the slot of that name, or "params", into the array.

        Raises:
            ValueError: the slots are not those of the rule; nothing has been changed.
        """
        assert not self.version, "there have been updates"
        rule = self._markable()
        expected = rule.slot_names
        accepts = getattr(rule, "accepts", lambda names: set(names) == set(expected))
        if not accepts(names) and (version or names):
            raise ValueError(
                f"slots are {sorted(names)}, expected {sorted(expected)}; has the optimizer been"
                " another one?"
            )
        fill("params", self._to_fill(self.current))
        if names:
            if self.per_worker:
                rule.load(self.params, fill, names)  # type: ignore[call-arg]
            else:
                rule.load(self.params, fill)
        self.version = version

    def hold_copy(self, fill: Callable[[Array], None]) -> int:
        """Have `fill` write a buffer of an earlier version, and hold it."""
        index = heapq.heappop(self._free)
        fill(self._to_fill(index))
        self._holds[index] = 1
        self._n_held += 1
        return index

    # ---- updates -----------------------------------------------------------------------------

    def update(self, grad: Array, scale: float = 1.0, worker: int = 0) -> bool:
        """Apply one gradient and publish the result as the next version.

        Args:
            grad: this shard's part of it; only read.
            scale: factor on the gradient.
            worker: whose it is, for rules that tell workers apart.

        Returns:
            False if a result is not finite: then nothing has been published or changed.
        """
        if self._early is not None:
            self.abandon()
        if self.per_worker:
            self._rule.select(worker)  # type: ignore[attr-defined]  # such rules have it
        free, buffers, current = self._free, self._buffers, self.current
        assert free, "every buffer is held: two must stay free for updates"
        target = heapq.heappop(free)
        if not self._rule.update(self.version, buffers[current], grad, buffers[target], scale):
            heapq.heappush(free, target)
            return False
        self._publish(target)
        return True

    def replace(self, held: int, grad: Array) -> int:
        """Give one hold back, apply a gradient as `update`, and hold the result: all at once.

        Returns:
            The buffer held; -1 if a result is not finite: then only the hold has been given back.
        """
        holds, free, buffers, current = self._holds, self._free, self._buffers, self.current
        if self._early is not None:
            self.abandon()
        count = holds[held]
        assert count > 0, f"buffer {held} is not held"
        holds[held] = count - 1
        if count == 1:
            self._n_held -= 1
        if count == 1 and held != current:
            target = heapq.heappushpop(free, held)
        else:
            target = heapq.heappop(free)
        if not self._rule.update(self.version, buffers[current], grad, buffers[target]):
            heapq.heappush(free, target)
            return -1
        if not holds[current]:
            heapq.heappush(free, current)
        self.current = target
        self.version += 1
        holds[target] = 1
        self._n_held += 1
        return target

    def _publish(self, target: int) -> None:
        if not self._holds[self.current]:
            heapq.heappush(self._free, self.current)
        self.current = target
        self.version += 1

    def is_finite(self, grad: Array) -> bool:
        """Say whether all of a gradient is finite."""
        return is_finite(grad)

    # ---- an update whose gradient is still arriving ----------------------------------------

    def begin(self) -> None:
        """Begin the next update in parts, beside the current snapshot; one begun is abandoned."""
        self.abandon()
        self._rule.begin(self.version, self.params)
        self._early = heapq.heappop(self._free)
        self._done, self._finite = 0, True

    def extend(self, grad: Array, end: int) -> None:
        """Apply [.., end) of the gradient, from where the last part ended."""
        assert self._early is not None, "no update has begun"
        if end <= self._done:
            return  # it has been followed so far
        if self._finite:
            target = self._buffers[self._early]
            self._finite = self._rule.extend(self.params, grad, target, self._done, end)
        self._done = end

    def follow(self, grad: Array, words: Array) -> int:
        """Apply what words[0] says is there of the gradient, a step at most; gives the end."""
        assert self._early is not None, "no update has begun"
        target, limit = self._buffers[self._early], self._done + STEP
        self._done, good = self._rule.follow(self.params, grad, target, self._done, limit, words)
        self._finite = self._finite and good
        return self._done

    def commit(self) -> bool:
        """Publish the update made in parts, now whole; as `update`."""
        target = self._early
        assert target is not None, "no update has begun"
        assert self._done == len(self.params), "a part is missing"
        if not self._finite:
            self.abandon()
            return False
        self._early = None
        self._rule.finish()
        self._publish(target)
        return True

    def commit_and_hold(self) -> int:
        """Commit, and hold the result; as `replace`."""
        if not self.commit():
            return -1
        index = self.hold()
        assert index is not None, "a buffer a worker, two for updates and one for a pin"
        return index

    def abandon(self) -> None:
        """Forget the update made in parts, if there is one; nothing of it has happened."""
        if self._early is not None:
            heapq.heappush(self._free, self._early)
            self._early = None

    # ---- batches -----------------------------------------------------------------------------

    @property
    def pending(self) -> int:
        """Gradients that have been gathered, and are in no update yet."""
        return 0 if self._batch is None else self._batch.pending

    def gather(self, worker: int, grad: Array, scale: float = 1.0) -> None:
        """Take a gradient into the batch."""
        assert self._batch is not None, "gradients are applied one by one"
        if scale != 1.0:
            if self._scaled is None:
                self._scaled = np.empty_like(grad)
            with np.errstate(over="ignore", invalid="ignore"):  # judged by the rule
                grad = self._scale(grad, scale, self._scaled)
        self._batch.add(worker, grad)

    def step(self) -> bool:
        """Apply what the batch gives, if there is anything; as `update`."""
        assert self._batch is not None, "gradients are applied one by one"
        if self._batch.empty:
            return True  # what was to be in it has not come
        with np.errstate(over="ignore", invalid="ignore"):  # judged by the rule
            mean = self._batch.mean()
        good = self.update(mean)
        if not good:
            self._batch.refused()
        return good

    def drop_batch(self) -> None:
        """Forget what has been gathered for the next step."""
        if self.pending:
            assert self._batch is not None, "it has something"
            self._batch.mean()

    def forget(self, worker: int) -> None:
        """Have the batch leave a worker out from now on."""
        if self._batch is not None:
            self._batch.forget(worker)

    # ---- rounds ------------------------------------------------------------------------------

    def update_mean(self, grads: Sequence[Array], scales: Sequence[float]) -> bool:
        """Apply the mean of some gradients, summed in the order given; as `update`."""
        if len(grads) == 1:
            return self.update(grads[0], scales[0])
        if self._mean is None:
            self._mean = np.empty_like(grads[0])
        mean = self._mean
        with np.errstate(over="ignore", invalid="ignore"):  # judged by the rule
            self._scale(grads[0], scales[0], mean)
            for grad, scale in zip(grads[1:], scales[1:], strict=True):
                mean += grad if scale == 1.0 else self._scale(grad, scale, np.empty_like(grad))
            mean /= len(grads)
        return self.update(mean)

    def _scale(self, grad: Array, scale: float, out: Array) -> Array:
        if scale == 1.0:
            np.copyto(out, grad)
            return out
        np.multiply(grad, grad.dtype.type(scale), out=out)
        for begin, end in self._unscaled:
            out[begin:end] = grad[begin:end]
        return out
