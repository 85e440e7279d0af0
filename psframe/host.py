"""What the leader's process does for the outside world: records, observers, and the verdict."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from psframe.checkpoint import Reader, newest
from psframe.errors import ArgumentError, CheckpointError, RunDirError
from psframe.events import HostEvent
from psframe.layout import Layout
from psframe.plan import Observer, Plan
from psframe.recorder import Recorder
from psframe.rundir import CHECKPOINTS, RunDir
from psframe.saving import RunSaver
from psframe.server import Server
from psframe.state import Fields
from psframe.witness import Witness

__all__ = ["Host"]

# A reason is for reading; an exception's message may be megabytes.
_REASON_CHARS_MAX = 4000

_log = logging.getLogger("psframe")


class Host:
    """Takes the leader's events and keeps the run directory, if there is one.

    Args:
        run_dir: the folder, already created, or None.
        observer: the caller's own observer.

    Attributes:
        ending: whether the observer has asked for the end of the run.
        tick: the observer's method of that name, if it has one; to be called now and then.
    """

    def __init__(self, run_dir: RunDir | None, observer: Observer | None) -> None:
        self.run_dir = run_dir
        self._observer = observer
        self._recorder = None if run_dir is None else Recorder(run_dir)
        self._witness: Witness | None = None
        self._version: Callable[[], int] = lambda: 0
        self._losses: Callable[[], tuple[Collection[int], Collection[int]]] = lambda: ((), ())
        self._closed = False
        self._begun = False
        self._config: Mapping[str, Any] = {}
        self._metrics_bytes = 0  # those that the run goes on with
        self.ending = False
        self.tick: Callable[[], Any] = getattr(observer, "tick", lambda: None)

    @classmethod
    def open(
        cls,
        run_dir: str | Path | None,
        *,
        overwrite: bool,
        resume: bool = False,
        config: Mapping[str, Any],
        observer: Observer | None,
    ) -> Host:
        """Create the run directory, or hold the one to go on in, and the host.

        Raises:
            RunDirError: the directory cannot be used.
        """
        if run_dir is None:
            return cls(None, observer)
        if resume:
            host = cls(RunDir.reopen(run_dir), observer)
            host._config = config
        else:
            host = cls(RunDir.create(run_dir, overwrite=overwrite, config=config), observer)
            host._opened()
        return host

    def begin(self) -> None:
        """Let a run that goes on begin, now that it fits what it goes on from.

        Up to here its folder is as the attempt before has left it.

        Raises:
            RunDirError: it cannot be written.
        """
        if self.run_dir is None or self._begun:
            return
        self.run_dir.go_on(self._config, self._version(), self._metrics_bytes)
        getattr(self._observer, "goes_on", lambda version: None)(self._version())
        self._opened()

    def _opened(self) -> None:
        assert self.run_dir is not None, "it has been opened"
        self._begun = True
        self._witness = Witness(self.run_dir.path)
        getattr(self._observer, "opened", lambda folder: None)(self.run_dir.path)

    def resume(
        self, layout: Layout, seed: int, alive: Callable[[], None] | None = None
    ) -> Reader | None:
        """Find the checkpoint to go on from, and let records and observer go on from it.

        Nothing is written yet, if there is one: that is for `begin`.

        Args:
            layout, seed: of the run.
            alive: called now and then while a checkpoint is verified.

        Returns:
            The newest one that verifies, which the caller closes; None if there is none yet.

        Raises:
            CheckpointError: there are some, and none can be used.
            ArgumentError: it is of a run with another seed.
        """
        assert self.run_dir is not None, "there is a folder to go on in"
        folder = self.run_dir.path / CHECKPOINTS
        reader = newest(folder, layout, alive)
        if reader is None:
            _log.warning("%s: there is no checkpoint yet; the run begins anew", folder)
            self.begin()
            return None
        try:
            fields = Fields(reader.state).part("run")
            if fields.count("seed") != seed:
                raise ArgumentError(
                    f"seed: the run to go on with has seed {fields.count('seed')}, not {seed}"
                )
            assert self._recorder is not None, "it comes with the folder"
            self._metrics_bytes = self._recorder.restore(fields.part("records"))
            observed = fields.part_or_none("observer")
            if observed is not None:
                getattr(self._observer, "restore", lambda fields: None)(observed)
        except (ArgumentError, RunDirError):
            reader.close()
            raise
        except ValueError as error:
            reader.close()
            raise CheckpointError(f"{reader.path}: {error}") from error
        self._version = lambda: reader.version
        _log.info("going on from %s", reader.path)
        return reader

    def saver(self, plan: Plan, machine: Server) -> RunSaver | None:
        """Make what writes the checkpoints of the run; None if there can be none."""
        if self.run_dir is None or plan.marks is None:
            return None
        return RunSaver(
            self.run_dir.path / CHECKPOINTS,
            machine,
            plan.layout,
            plan.servers,
            more=lambda: self._state(plan.seed),
            keep=plan.keep_checkpoints,
            failed=self.run_dir.trouble,
            version=machine.store.version if plan.resumes and machine.store.version else None,
        )

    def _state(self, seed: int) -> dict[str, Any]:
        assert self._recorder is not None, "it comes with the folder"
        state = getattr(self._observer, "state", lambda: None)
        return {"seed": seed, "records": self._recorder.state(), "observer": state()}

    @property
    def path(self) -> Path | None:
        """The run directory's path."""
        return None if self.run_dir is None else self.run_dir.path

    def watch(
        self,
        version: Callable[[], int],
        losses: Callable[[], tuple[Collection[int], Collection[int]]] = lambda: ((), ()),
    ) -> None:
        """Learn where to ask what a verdict tells, which may come early.

        Args:
            version: gives the updates applied so far.
            losses: gives the workers lost so far, and those of them that were replaced.
        """
        self._version, self._losses = version, losses

    def __call__(self, event: HostEvent) -> None:
        """Take one event of the leader."""
        if self._recorder is not None:
            self._recorder(event)
        if self._observer is not None and self._observer(event) is True:
            self.ending = True

    def verdict(self, state: str, *, updates: int | None = None, reason: str = "") -> None:
        """Write how the run ended; only the first verdict counts.

        Args:
            state: completed, failed or interrupted.
            updates: updates applied; as many as by now if None.
            reason: why, if it was not completed.
        """
        if self._closed or self.run_dir is None or self._recorder is None:
            return
        self._closed = True
        if not self._begun:  # what the attempt before has left tells more
            self.run_dir.unlock()
            return
        lost, replaced = self._losses()
        try:
            self._recorder.close()  # a reader that waits for the verdict finds every line
        finally:
            self.run_dir.status(
                state,
                updates=self._version() if updates is None else updates,
                test_accuracy=self._recorder.test_accuracy,
                reason=reason[:_REASON_CHARS_MAX],
                lost=lost,
                replaced=replaced,
            )
        self.run_dir.unlock()
        if self._witness is not None:
            self._witness.dismiss()
