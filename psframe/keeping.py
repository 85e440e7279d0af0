"""What one server keeps as it is while a checkpoint of it is being written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from psframe.events import NO_BUFFER
from psframe.layout import Array
from psframe.store import Store

__all__ = ["SLOT", "Keeper"]

SLOT = "slot."  # before the name of a slot, in the names of a checkpoint's arrays


class Keeper:
    """Keeps one version of a shard, with whatever belongs to it.

    Attributes:
        number: of the mark that is kept; None if there is none.
        arrays: by name, what is kept; they are written by nobody until they are let go.
    """

    def __init__(self, store: Store, workers: int) -> None:
        self.number: int | None = None
        self.arrays: Mapping[str, Any] = {}
        self._store = store
        self._workers = workers
        self._pinned = NO_BUFFER

    def keep(self, number: int, pinned: int, kept: Array | None) -> None:
        """Keep the present version.

        Args:
            number: of the mark.
            pinned: the buffer that is pinned for an evaluation, or NO_BUFFER.
            kept: the best parameters so far; whoever replaces them asks `has` first.
        """
        assert self.number is None, f"mark {self.number} is kept"
        store, self.number, self._pinned = self._store, number, pinned
        marked = store.mark(self._workers)
        arrays = {"params": marked.params}
        arrays |= {SLOT + name: slot for name, slot in marked.slots.items()}
        if pinned != NO_BUFFER:
            arrays["pinned"] = store.buffer(store.hold_again(pinned))
        if kept is not None:
            arrays["kept"] = kept
        self.arrays = arrays

    def has(self, kept: Array) -> bool:
        """Whether these are the best parameters that are kept."""
        return self.arrays.get("kept") is kept

    def let_go(self, number: int) -> None:
        """Keep them no longer."""
        assert self.number == number, f"mark {number} is let go, {self.number} is kept"
        self._store.unmark()
        if self._pinned != NO_BUFFER:
            self._store.release(self._pinned)
        self.number, self.arrays, self._pinned = None, {}, NO_BUFFER
