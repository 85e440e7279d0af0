"""Messages in the order of their senders, those included whose arrays arrive after them."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Generic, TypeVar

__all__ = ["InOrder"]

_Item = TypeVar("_Item")


@dataclass(slots=True, eq=False)
class _Held(Generic[_Item]):
    item: _Item
    waits: bool


class InOrder(Generic[_Item]):
    """Holds a message back until its array is there, and with it those that its sender sent later.

    Attributes:
        ready: messages that are whole, to be taken from the left.
        held: those held back, by sender; while there are none, a whole one need not come here.
    """

    def __init__(self) -> None:
        self.ready: deque[_Item] = deque()
        self.held: dict[int, deque[_Held[_Item]]] = {}  # by sender; never an empty one

    def add(self, source: int, item: _Item) -> None:
        """Take a message that is whole."""
        held = self.held.get(source)
        if held is None:
            self.ready.append(item)
        else:
            held.append(_Held(item, waits=False))

    def hold(self, source: int, item: _Item) -> _Held[_Item]:
        """Take a message whose array is on its way; give what `arrived` is to be told."""
        entry = _Held(item, waits=True)
        self.held.setdefault(source, deque()).append(entry)
        return entry

    def drop(self, source: int) -> None:
        """Forget what is held back of a sender whose arrays will not arrive."""
        self.held.pop(source, None)

    def arrived(self, source: int, entry: _Held[_Item]) -> None:
        """Note that a message's array is there.

        MPI promises that the arrays of one sender are matched in order, not that they are
        complete in order.
        """
        entry.waits = False
        held = self.held.get(source)
        if held is None:
            return  # what was held back has been dropped
        while held and not held[0].waits:
            self.ready.append(held.popleft().item)
        if not held:
            del self.held[source]
