"""Preparing the next block's data in a thread while the present one is computed."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any

from psframe.tasks import Task

if TYPE_CHECKING:
    from concurrent.futures import Future

__all__ = ["Preparation"]


class Preparation:
    """Calls `prepare` with tasks, one after the other, in a thread of its own.

    A context: at its end what has not begun is dropped. The thread is a daemon and is not waited
    for (as a ThreadPoolExecutor's is, at the end of the process): a disk that hangs must not
    keep a rank from ending.

    Args:
        prepare: function of a task.
        in_line: call it at once, in the caller's thread.
    """

    def __init__(self, prepare: Callable[[Task], Any], *, in_line: bool) -> None:
        self._prepare = prepare
        self._in_line = in_line
        self._queue: queue.SimpleQueue[tuple[Task, Future[Any]] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._over = False

    def __enter__(self) -> Preparation:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._over = True
        self._queue.put(None)

    def start(self, task: Task) -> Callable[[], Any]:
        """Begin to prepare a training task.

        Returns:
            A function that waits for the result, and raises what `prepare` has raised.
        """
        if task.kind != "train":
            return lambda: None
        if self._in_line:
            result = self._prepare(task)
            return lambda: result
        from concurrent.futures import Future

        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="psframe-prefetch", daemon=True)
            self._thread.start()
        future: Future[Any] = Future()
        self._queue.put((task, future))
        return future.result

    def _run(self) -> None:
        while (item := self._queue.get()) is not None and not self._over:
            task, future = item
            try:
                future.set_result(self._prepare(task))
            except BaseException as error:  # whoever waits for the result raises it
                future.set_exception(error)
