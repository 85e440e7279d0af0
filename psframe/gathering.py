"""Bring what the workers find, block by block, to the first server.

A psframe run whose parameters are the rows of one block and the block's number. A worker "pushes"
the rows of a block; the "update rule" puts them into their place. So no memory grows with the
result but where it is gathered; a worker that is lost costs the block that it has in hand, which is
leased once more; and a block that comes twice is written twice.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from psframe.layout import Array, Layout

__all__ = ["AT", "ROWS", "Gather"]

# The names of the parameters: which block it is, and its rows.
AT, ROWS = "at", "rows"


class Gather:
    """What is given to `psframe.run` as the optimizer; there must be one server.

    Args:
        blocks: how many will come.
        take: called on the server with a block's number and its rows, which are good for the call
            alone; the last block's are followed by what fills them up.

    Attributes:
        missing: how many have not come, where the server is.
    """

    def __init__(self, blocks: int, take: Callable[[int, Array], None]) -> None:
        self.missing = blocks
        self._here = np.zeros(blocks, bool)
        self._take = take

    def updater(self, layout: Layout, begin: int, end: int) -> _Gatherer:
        """Bind it to the vector, which must be whole."""
        assert (begin, end) == (0, layout.size), "a block is gathered by one server"
        return _Gatherer(layout, self._put)

    def __repr__(self) -> str:  # compared among the ranks
        return f"Gather({len(self._here)})"

    def _put(self, found: dict[str, Any]) -> None:
        at = int(found[AT][0])
        self._take(at, found[ROWS])
        self.missing -= not self._here[at]
        self._here[at] = True


class _Gatherer:
    """The update rule: the parameters become what is pushed, and that is put into its place."""

    def __init__(self, layout: Layout, put: Callable[[dict[str, Any]], None]) -> None:
        self._layout = layout
        self._put = put
        self._written: Array | None = None

    def update(self, step: int, params: Array, grad: Array, out: Array, scale: float = 1.0) -> bool:
        self.begin(step, params, scale)
        if not self.extend(params, grad, out, 0, len(grad)):
            return False
        self.finish()
        return True

    def begin(self, step: int, params: Array, scale: float = 1.0) -> None:
        assert scale == 1.0, "nothing clips it"
        self._written = None

    def extend(self, params: Array, grad: Array, out: Array, begin: int, end: int) -> bool:
        out[begin:end] = grad[begin:end]
        self._written = out
        return bool(np.isfinite(out[begin:end]).all())

    def follow(
        self, params: Array, grad: Array, out: Array, begin: int, limit: int, words: Array
    ) -> tuple[int, bool]:
        end = min(int(words[0]), len(grad), limit)
        if end <= begin:
            return begin, True
        return end, self.extend(params, grad, out, begin, end)

    def finish(self) -> None:
        assert self._written is not None, "an update has begun"
        self._put(self._layout.views(self._written))
