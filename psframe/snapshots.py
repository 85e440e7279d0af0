"""A worker's named parameters in the servers' flat snapshots."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from psframe.layout import Array, Layout

__all__ = ["Snapshots"]

_Shape = tuple[int, ...]


@dataclass(frozen=True)
class _Whole:
    """Tensors that lie one after the other in one shard: name -> (begin, end, shape) in it."""

    server: int
    places: dict[str, tuple[int, int, _Shape]]


@dataclass(frozen=True)
class _Spanning:
    """A tensor in several shards.

    Attributes:
        pieces: (server, begin, end) in the server's shard, in order.
        copies: where it is put together, two in turn.
    """

    name: str
    pieces: list[tuple[int, int, int]]
    copies: tuple[Array, Array]


class Place(Protocol):
    """What says in which buffer a snapshot is, such as a server's answer."""

    @property
    def buffer(self) -> int:
        """The buffer's index."""


class Snapshots:
    """Names the parameters in the snapshots that a worker's pulls bring, one a server.

    Nothing is copied but tensors that lie in more than one shard.

    Args:
        layout: the parameters.
        servers: S.
        snapshot: (server, buffer) -> the flat shard; always the same memory for the same buffer.
    """

    def __init__(self, layout: Layout, servers: int, snapshot: Callable[[int, int], Array]) -> None:
        self._layout = layout
        self._snapshot = snapshot
        self._servers = servers
        self._parts: list[_Whole | _Spanning] | None = None
        self._views: dict[tuple[int, int], dict[str, Array]] = {}
        self._turn = 0

    def arrays(self, answers: Sequence[Place]) -> dict[str, Array]:
        """Name the parameters.

        Args:
            answers: by server, the answer that says in which buffer its snapshot is.

        Returns:
            Names to read-only views, in the parameters' order. The dict is kept: it is not to
            be changed. What was copied is overwritten by the call after the next.
        """
        if self._servers == 1:
            buffer = answers[0].buffer
            views = self._views.get((0, buffer))
            return self._name_all(buffer) if views is None else views
        buffers = [answer.buffer for answer in answers]
        if self._parts is None:
            self._parts = _parts(self._layout, self._layout.shards(self._servers))
        self._turn = 1 - self._turn  # the other copies may still be computed on
        arrays: dict[str, Array] = {}
        for number, part in enumerate(self._parts):
            if isinstance(part, _Whole):
                buffer = buffers[part.server]
                views = self._views.get((number, buffer))
                arrays.update(self._name(number, part, buffer) if views is None else views)
            else:
                arrays[part.name] = self._put_together(part, buffers)
        return arrays

    def _name_all(self, buffer: int) -> dict[str, Array]:
        views = self._layout.views(_read_only(self._snapshot(0, buffer)))
        self._views[0, buffer] = views
        return views

    def _name(self, number: int, part: _Whole, buffer: int) -> dict[str, Array]:
        flat = _read_only(self._snapshot(part.server, buffer))
        views = {
            name: flat[begin:end].reshape(shape)
            for name, (begin, end, shape) in part.places.items()
        }
        self._views[number, buffer] = views
        return views

    def _put_together(self, part: _Spanning, buffers: Sequence[int]) -> Array:
        copy = part.copies[self._turn]
        flat = copy.reshape(-1)
        done = 0
        for server, begin, end in part.pieces:
            flat[done : done + end - begin] = self._snapshot(server, buffers[server])[begin:end]
            done += end - begin
        return _read_only(copy)


def _read_only(array: Array) -> Array:
    view: Array = array.view()
    view.flags.writeable = False
    return view


def _parts(layout: Layout, shards: list[tuple[int, int]]) -> list[_Whole | _Spanning]:
    """Cut the list of tensors into runs that lie in one shard, and those that lie in several."""
    parts: list[_Whole | _Spanning] = []
    for name, offset, size, shape in zip(
        layout.names, layout.offsets, layout.sizes, layout.shapes, strict=True
    ):
        pieces = [
            (server, max(offset, begin) - begin, min(offset + size, end) - begin)
            for server, (begin, end) in enumerate(shards)
            if max(offset, begin) < min(offset + size, end)
        ]
        if len(pieces) > 1:
            copies = np.empty(shape, layout.dtype), np.empty(shape, layout.dtype)
            parts.append(_Spanning(name, pieces, copies))
            continue
        server, begin, end = pieces[0] if pieces else (0, 0, 0)  # an empty tensor lies anywhere
        last = parts[-1] if parts else None
        if not (isinstance(last, _Whole) and last.server == server):
            last = _Whole(server, {})
            parts.append(last)
        last.places[name] = (begin, end, shape)
    return parts
