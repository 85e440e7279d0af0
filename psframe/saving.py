"""Checkpoints of a run that goes on: each server's process writes what its machine has marked.

A thread of its own writes and commits, so that serving goes on; what comes of it, `poll` hands to
the machine. Whatever fails is told of, and the run goes on with the checkpoints that it has.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from psframe.checkpoint import Shard, abandon, commit, prune, write_shard
from psframe.errors import CheckpointError
from psframe.events import HostEvent, Marked, Saved, ShardsSaved
from psframe.layout import Layout
from psframe.plan import to_numpy
from psframe.server import Server

__all__ = ["RunSaver", "Saver", "ShardSaver"]

# After the end of a run nobody waits longer for a disk that does not answer.
_END_BOUND_S = 600.0
# A checkpoint that is under way for so long is told of: meanwhile there are no others.
_SLOW_S = 60.0
# Of an error, in what one server tells another.
_ERROR_CHARS_MAX = 1000

_log = logging.getLogger("psframe")


class Saver(Protocol):
    """What a server's loop asks now and then."""

    @property
    def busy(self) -> bool:
        """Whether `poll` will give something before long."""

    def poll(self) -> Saved | None:
        """Give what the machine is to be told: that what it has marked is written, or given up."""


class _Job:
    """A function that runs in a thread; what it raises is kept."""

    def __init__(self, function: Callable[[], Any], name: str) -> None:
        self.result: Any = None
        self.error = ""
        self._function = function
        # A daemon: a disk that hangs does not keep the process.
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    @property
    def done(self) -> bool:
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            self.result = self._function()
        except CheckpointError as error:
            self.error = str(error)
        except Exception as error:  # nobody else would hear of it, and the server wait for ever
            _log.exception("a checkpoint could not be written")
            self.error = f"{type(error).__name__}: {error}"


class ShardSaver:
    """Writes one server's shard.

    Args:
        folder: the run's checkpoints/.
        machine: whose marks they are.
        layout: of the parameters.
        servers: S.
    """

    def __init__(self, folder: Path, machine: Server, layout: Layout, servers: int) -> None:
        self._folder = folder
        self._machine = machine
        self._servers = servers
        self._layout = layout
        self._begin, self._end = layout.shards(servers)[machine.index]
        self._mark: Marked | None = None
        self._job: _Job | None = None
        self._since = 0.0  # the end of the run, once it has been seen

    def observe(self, event: HostEvent) -> None:
        """Take an event of the machine; those that are no marks are ignored."""
        if isinstance(event, Marked):
            self._mark = event
            self._start(self._write, "shard")

    @property
    def busy(self) -> bool:
        """Whether something is being written."""
        return self._mark is not None

    def poll(self) -> Saved | None:
        """Give what the machine is to be told, once the shard is written or given up."""
        job, mark = self._job, self._mark
        if job is None or mark is None or not self._is_over(job):
            return None
        self._mark = self._job = None
        told = {"error": job.error[:_ERROR_CHARS_MAX]} if job.error else job.result.fields()
        return Saved(mark.number, json.dumps(told, separators=(",", ":")))

    def _start(self, function: Callable[[], Any], what: str) -> None:
        self._job = _Job(function, f"psframe-checkpoint-{what}")

    def _write(self) -> Shard:
        assert self._mark is not None, "there is something to write"
        marked = self._machine.marked  # which nobody writes before the machine is told
        arrays = {name: to_numpy(array) for name, array in marked.items()}
        return write_shard(
            self._folder,
            self._mark.version,
            self._machine.index,
            self._servers,
            arrays,
            begin=self._begin,
            end=self._end,
        )

    def _is_over(self, job: _Job) -> bool:
        if job.done:
            return True
        if not self._machine.stopped:
            return False
        now = time.monotonic()
        if not self._since:
            self._since = now
        if now - self._since < _END_BOUND_S:
            return False
        job.error = f"it was not written within {_END_BOUND_S:g} s after the end of the run"
        return True


class RunSaver(ShardSaver):
    """Writes the first server's shard, and commits the checkpoint when all shards are written.

    Args:
        folder, machine, layout, servers: as for `ShardSaver`.
        more: gives, at a mark, what the run's host has to say of it, fit for JSON.
        keep: how many checkpoints stay, beside the best one.
        failed: called with what went wrong, each time.
        version: of the checkpoint that the run goes on from, if it does.

    Attributes:
        version: of the last checkpoint that there is, or None.
    """

    def __init__(
        self,
        folder: Path,
        machine: Server,
        layout: Layout,
        servers: int,
        *,
        more: Callable[[], Mapping[str, Any]],
        keep: int,
        failed: Callable[[str], None],
        version: int | None = None,
    ) -> None:
        super().__init__(folder, machine, layout, servers)
        self.version = version
        self._more = more
        self._keep = keep
        self._failed = failed
        self._state: dict[str, Any] = {}
        self._own: Shard | None = None
        self._errors: list[str] = []
        self._entries: list[str] | None = None
        self._committing = False
        self._began = 0.0  # when the last one was marked
        self._slow_s = _SLOW_S

    def observe(self, event: HostEvent) -> None:
        """Take an event of the machine."""
        if isinstance(event, Marked):
            self._state = {**event.state, "run": dict(self._more())}
            self._own, self._errors, self._committing = None, [], False
            self._slow_s, self._began = _SLOW_S, time.monotonic()
            self._entries = [] if self._servers == 1 else None
        elif isinstance(event, ShardsSaved):
            self._entries = list(event.entries)
        super().observe(event)

    def poll(self) -> Saved | None:
        """Go on with the checkpoint under way; what the machine is to be told once it is there."""
        job, mark = self._job, self._mark
        if mark is None:
            return None
        self._tell_if_slow(mark)
        if job is not None:
            if not self._is_over(job):
                return None
            self._job = None
            if job.error:
                self._errors.append(job.error)
            elif not self._committing:
                self._own = job.result
        if self._committing:
            return self._close(mark)
        if self._entries is None:
            return None  # until all shards are written
        shards = self._shards(self._entries, mark.version)
        self._committing = True
        if self._errors:
            self._start(lambda: abandon(self._folder, mark.version), "abandon")
        else:
            self._start(lambda: self._commit(mark.version, shards), "commit")
        return None

    def _tell_if_slow(self, mark: Marked) -> None:
        seconds = time.monotonic() - self._began
        if seconds >= self._slow_s:
            self._slow_s *= 4.0
            _log.warning(
                "the checkpoint at version %d is not written after %.0f s: is the disk slow or"
                " gone? There is no newer one meanwhile, and the run goes on",
                mark.version,
                seconds,
            )

    def _close(self, mark: Marked) -> Saved:
        self._mark = None
        if self._errors:
            self._failed(f"the checkpoint at version {mark.version} failed: {self._errors[0]}")
        else:
            self.version = mark.version
        return Saved(mark.number)

    def _shards(self, entries: list[str], version: int) -> list[Shard]:
        shards = [] if self._own is None else [self._own]
        for entry in entries:
            told = json.loads(entry)
            if "error" in told:
                self._errors.append(str(told["error"]))
                continue
            try:
                shards.append(Shard.parse(told, version))
            except CheckpointError as error:
                self._errors.append(str(error))
        return shards

    def _commit(self, version: int, shards: list[Shard]) -> None:
        commit(self._folder, version, shards, self._state, self._layout)
        best = self._state.get("kept_version")
        try:
            prune(self._folder, self._keep, best, current=version)
        except CheckpointError as error:  # there are more than there need be, and that is all
            _log.warning("%s", error)
