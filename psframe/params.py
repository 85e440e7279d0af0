"""What a pull gives and what a push gets: the parameters, and the receipt."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from psframe.events import Answer, Reason

__all__ = ["Params", "Receipt", "receipt_of"]


@dataclass(frozen=True)
class Receipt:
    """What became of a push.

    Attributes:
        applied: whether it is part of the parameters.
        version: server 0's version after handling it.
        staleness: the version just before handling it minus the version it was computed on.
        reason: why it was not applied; empty if it was.
    """

    applied: bool
    version: int
    staleness: int
    reason: str


def receipt_of(answer: Answer | None) -> Receipt:
    """Read the receipt in a server's answer; None stands for the end of the run."""
    if answer is None:
        return Receipt(False, 0, 0, Reason.STOPPED.text)
    return Receipt(answer.applied, answer.push_version, answer.staleness, answer.reason.text)


class Params(Mapping[str, Any]):
    """The parameters of one pull: names to arrays on the worker's device, not to be written.

    Valid until this worker's next pull or push_pull (with `pull_async`: until its `wait`).
    """

    __slots__ = ("_arrays", "_push", "_versions")

    def __init__(
        self,
        arrays: Mapping[str, Any],
        versions: tuple[int, ...],
        push: Answer | tuple[int, int] | None,
    ) -> None:
        self._arrays = arrays  # shared with other pulls of the same buffer: never given out
        self._versions = versions
        self._push = push  # the answer to one, or version and staleness of one that was applied

    @property
    def version(self) -> int:
        """Updates that server 0's shard had seen."""
        return self._versions[0]

    @property
    def versions(self) -> tuple[int, ...]:
        """The same, of every shard; each shard is one consistent version."""
        return self._versions

    @property
    def receipt(self) -> Receipt | None:
        """What became of the push in a `push_pull`; None of a pull."""
        push = self._push
        if isinstance(push, tuple):
            return Receipt(True, push[0], push[1], "")
        return None if push is None else receipt_of(push)

    def __getitem__(self, name: str) -> Any:
        return self._arrays[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)

    def copy(self) -> dict[str, Any]:
        """Copy the arrays; the copies are the caller's and stay."""
        return {name: array.copy() for name, array in self._arrays.items()}
