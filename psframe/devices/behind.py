"""A thread that waits for copies, so that the worker need not: one job after the other."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

__all__ = ["Behind", "Job"]


class Job:
    """Something that is done behind the worker.

    Attributes:
        error: what went wrong, once it is over.
    """

    def __init__(self, do: Callable[[], None]) -> None:
        self._do = do
        self._over = threading.Event()
        self.error: BaseException | None = None

    def run(self) -> None:
        """Do it; it raises nothing."""
        try:
            self._do()
        except BaseException as error:  # whoever waits raises it
            self.error = error
        self._over.set()

    def fail(self, error: BaseException) -> None:
        """Have it count as over, without doing it."""
        self.error = error
        self._over.set()

    def wait(self) -> None:
        """Wait until it is over.

        Raises:
            Exception: what went wrong.
        """
        self._over.wait()
        if self.error is not None:
            raise self.error


class Behind:
    """The thread; it begins with the first job.

    Args:
        begin: called in it, first of all.
    """

    def __init__(self, begin: Callable[[], None]) -> None:
        self._begin = begin
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def start(self, do: Callable[[], None]) -> Job:
        """Have something done."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="psframe-gradients", daemon=True)
            self._thread.start()
        job = Job(do)
        self._jobs.put(job)
        return job

    def close(self) -> None:
        """Wait until everything is done, and end the thread."""
        if self._thread is not None:
            self._jobs.put(None)
            self._thread.join()
            self._thread = None

    def _run(self) -> None:
        begin = Job(self._begin)
        begin.run()
        while (job := self._jobs.get()) is not None:
            if begin.error is None:
                job.run()
            else:
                job.fail(begin.error)
