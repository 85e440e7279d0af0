"""Preparing the next block's data in a thread while the present one is computed."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any

from psframe.tasks import Task

if TYPE_CHECKING:
    from concurrent.futures import ThreadPoolExecutor

__all__ = ["Preparation"]


class Preparation:
    """Calls `prepare` with tasks, one after the other, in a thread of its own.

    A context: at its end what has not begun is dropped.

    Args:
        prepare: function of a task.
        in_line: call it at once, in the caller's thread.
    """

    def __init__(self, prepare: Callable[[Task], Any], *, in_line: bool) -> None:
        self._prepare = prepare
        self._pool: ThreadPoolExecutor | None = None
        if not in_line:
            from concurrent.futures import ThreadPoolExecutor

            self._pool = ThreadPoolExecutor(1, thread_name_prefix="psframe-prefetch")

    def __enter__(self) -> Preparation:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._pool is not None:
            # Not waited for: a disk that hangs must not keep the run from ending.
            self._pool.shutdown(wait=False, cancel_futures=True)

    def start(self, task: Task) -> Callable[[], Any]:
        """Begin to prepare a training task.

        Returns:
            A function that waits for the result, and raises what `prepare` has raised.
        """
        if task.kind != "train":
            return lambda: None
        if self._pool is not None:
            return self._pool.submit(self._prepare, task).result
        result = self._prepare(task)
        return lambda: result
