"""The folder that a run leaves behind: config.toml, metrics.jsonl, status.json, checkpoints/.

Files only: no MPI. One process writes it, rank 0 or, should that be lost, the lowest survivor.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import math
import os
import time
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from psframe import toml
from psframe.checkpoint import checkpoint_name, remove_all, versions
from psframe.errors import CheckpointError, RunDirError

__all__ = ["CHECKPOINTS", "STATES", "RunDir"]

STATES = ("running", "completed", "failed", "interrupted")
CONFIG, METRICS, STATUS, CHECKPOINTS = "config.toml", "metrics.jsonl", "status.json", "checkpoints"
# Lines of metrics that a later attempt has taken back.
UNDONE = "metrics.undone.jsonl"
# What a run may write beside them (`psframe.train` does).
_OF_ONE_ATTEMPT = ("timeline.jsonl", "summary.json", "trace.json")
_OWN = (CONFIG, METRICS, STATUS, UNDONE, *_OF_ONE_ATTEMPT)
# What a run writes into checkpoints/ beside the folders of `psframe.checkpoint`. Overwriting
# removes these and those, and nothing else.
CHECKPOINT_PATTERNS = ("*.safetensors", "*.safetensors.tmp")
# A run claims a fresh name for "{time}" in at most this many tries.
_NAMES_MAX = 10_000

_REMEDIES = {
    errno.EACCES: "choose a folder that you may write",
    errno.EROFS: "choose a folder that you may write",
    errno.EEXIST: "a file is in the way; choose another folder",
    errno.ENOTDIR: "a file is in the way; choose another folder",
    errno.ENOSPC: "free some space, or choose a folder on another disk",
    errno.EDQUOT: "free some space, or choose a folder on another disk",
}

_log = logging.getLogger("psframe")


class RunDir:
    """One run's folder, open for writing.

    Attributes:
        path: the folder, with "{time}" replaced; absolute, wherever the program goes meanwhile.
        metrics_lost: lines of metrics that could not be written, 0 in all but bad days.
        unlock: to be called when the run is over: others may write here.
    """

    def __init__(self, path: str | Path) -> None:
        """Attach to the folder of a run that exists (`create` makes one)."""
        self.path = Path(path).absolute()
        self._given = str(path)  # as it stands in messages
        self.metrics_lost = 0
        self.unlock: Callable[[], Any] = lambda: None
        self._metrics_error = ""
        self._metrics_fd = -1
        self._troubles: list[str] = []

    @classmethod
    def create(
        cls,
        path: str | Path,
        *,
        overwrite: bool = False,
        config: Mapping[str, Any] | None = None,
    ) -> RunDir:
        """Make the folder, write its configuration, and say in it that a run is running.

        Args:
            path: the folder; "{time}" in it becomes YYYYmmdd-HHMMSS, with "-2", "-3", ... after
                it where that is taken.
            overwrite: remove what an earlier run wrote there (config.toml, metrics.jsonl,
                status.json, timeline.jsonl, summary.json, trace.json, metrics.undone.jsonl and the
                checkpoints); other files are never touched.
            config: mapping for config.toml.

        Raises:
            RunDirError: it holds another run, is not a folder, or cannot be written.
        """
        with _explained(path):
            folder = _claim(str(path)) if "{time}" in str(path) else Path(path)
            run_dir = cls._hold(folder)
            _make_room(folder, overwrite)
            run_dir._begin(config or {}, 0)
        return run_dir

    @classmethod
    def reopen(cls, path: str | Path) -> RunDir:
        """Hold the folder of a run that is to go on, or to begin; what is there stays as it is.

        Raises:
            RunDirError: another run writes there, it is not a folder, or cannot be written.
        """
        with _explained(path):
            return cls._hold(Path(path))

    @classmethod
    def _hold(cls, folder: Path) -> RunDir:
        folder.mkdir(parents=True, exist_ok=True)
        run_dir = cls(folder)
        run_dir._lock()
        for name in _OWN:
            _check_regular(folder / name)
        return run_dir

    def go_on(self, config: Mapping[str, Any], updates: int, metrics_bytes: int) -> None:
        """Begin again where a checkpoint has left: take back what came after it.

        Lines of metrics.jsonl that were written later, whose updates are done again, go to the end
        of metrics.undone.jsonl. What tells of one attempt only goes: timeline.jsonl, summary.json,
        trace.json.

        Args:
            config: mapping for config.toml.
            updates: those of the checkpoint; 0 if there is none.
            metrics_bytes: of metrics.jsonl, the length that stays; a line stays whole, and one of
                a later update does not.

        Raises:
            RunDirError: it cannot be written.
        """
        with _explained(self.path):
            for name in _OF_ONE_ATTEMPT:
                (self.path / name).unlink(missing_ok=True)
            self._begin(config, updates)
            self._take_back(updates, metrics_bytes)

    def _take_back(self, updates: int, metrics_bytes: int) -> None:
        file = self.path / METRICS
        content = file.read_bytes()
        length = content[:metrics_bytes].rfind(b"\n") + 1
        kept, undone = list[bytes](), list[bytes]()
        for line in content[:length].splitlines(keepends=True):
            (undone if _update_of(line) > updates else kept).append(line)
        inside = bool(undone)  # of an attempt that has gone on from this checkpoint before
        undone += content[length:].splitlines(keepends=True)
        if not undone:
            return
        with (self.path / UNDONE).open("ab") as stream:  # first: a death leaves them twice at worst
            stream.write(b"".join(undone).rstrip(b"\n") + b"\n")
            stream.flush()
            os.fsync(stream.fileno())
        if inside:
            _replace(file, b"".join(kept))
            self.close()  # of the file that has gone
        else:
            os.ftruncate(self._metrics_fd, length)
        again = any(_update_of(line) > updates for line in undone)
        _log.log(  # the others had only been written before their time
            logging.WARNING if again else logging.INFO,
            "%s: %d lines that came after the checkpoint of version %d are now in %s",
            file,
            len(undone),
            updates,
            UNDONE,
        )

    def _begin(self, config: Mapping[str, Any], updates: int) -> None:
        (self.path / CHECKPOINTS).mkdir(exist_ok=True)
        _replace(self.path / CONFIG, toml.dumps(config))
        self._open_metrics()
        _replace(self.path / STATUS, _status("running", updates, None, ""))

    @staticmethod
    def read_status(path: str | Path) -> dict[str, Any] | None:
        """Read the status of the run in a folder; None if there is none.

        Raises:
            RunDirError: there is a status.json, but it cannot be read or is not a run's.
        """
        file = Path(path) / STATUS
        try:
            _check_regular(file)
            status = json.loads(file.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise RunDirError(f"{file}: cannot be read: {error.strerror}") from error
        except (ValueError, RecursionError) as error:
            raise RunDirError(f"{file}: is not a run's status: {error}") from error
        _check_status(status, file)
        return dict(status)

    def status(
        self,
        state: str,
        *,
        updates: int,
        test_accuracy: float | None = None,
        reason: str = "",
        lost: Collection[int] = (),
        replaced: Collection[int] = (),
    ) -> bool:
        """Replace status.json; a reader sees the old one or the new one, whole.

        Should no new file fit on the disk, the old one is written over, for it has room. A status
        that cannot be written at all is logged as an error: a finished run is worth more than its
        label, so that is no exception.

        Args:
            state: one of `STATES`.
            updates: updates applied.
            test_accuracy: in [0, 1], where known.
            reason: why it failed or was interrupted. Lost lines of metrics are added to it, and the
                first and the last trouble.
            lost: workers that have been lost; the status has them if there are any.
            replaced: those of them in whose place another has joined, likewise.

        Returns:
            True if it was written.
        """
        if state not in STATES:
            raise ValueError(f"status: expected a state of {STATES}, got {state!r}")
        if self.metrics_lost:
            lacking = f"{METRICS} lacks {self.metrics_lost} lines: {self._metrics_error}"
            reason = f"{reason}; {lacking}" if reason else lacking
        if self._troubles and state != "running":
            reason = "; ".join(filter(None, (reason, *self._troubles)))
        text = _status(state, updates, test_accuracy, reason, lost=lost, replaced=replaced)
        try:
            try:
                _replace(self.path / STATUS, text)
            except OSError:
                (self.path / STATUS).write_text(text, encoding="utf-8")
        except OSError as error:
            _log.error("%s", _explain(self.path / STATUS, error))
            return False
        return True

    def metrics(self, **fields: Any) -> bool:
        """Append one JSON object to metrics.jsonl and flush it; NaN and infinities become null.

        A line that the disk refuses is taken back whole, counted, and warned of once; the run
        goes on, the next line is tried again, and the last status tells how many are missing.

        Returns:
            True if the line was written.
        """
        line = json.dumps({key: _plain(value) for key, value in fields.items()}, allow_nan=False)
        data = line.encode() + b"\n"
        try:
            if self._metrics_fd < 0:
                self._open_metrics()
            size = os.fstat(self._metrics_fd).st_size
            written = os.write(self._metrics_fd, data)
            if written < len(data):
                os.ftruncate(self._metrics_fd, size)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            self._metrics_error = error.strerror or str(error)
            if not self.metrics_lost:
                _log.warning("%s", _explain(self.path / METRICS, error) + "; the run goes on")
            self.metrics_lost += 1
            return False
        return True

    @property
    def metrics_bytes(self) -> int:
        """The present length of metrics.jsonl; 0 if that is not to be had."""
        try:
            return (self.path / METRICS).stat().st_size
        except OSError:
            return 0

    def trouble(self, what: str) -> None:
        """Warn of something that went wrong and does not end the run; the last status says it."""
        _log.warning("%s; the run goes on", what)
        self._troubles = [what] if not self._troubles else [self._troubles[0], what]

    def close(self) -> None:
        """Close metrics.jsonl; a later line opens it again."""
        if self._metrics_fd >= 0:
            os.close(self._metrics_fd)
            self._metrics_fd = -1

    def _lock(self) -> None:
        """See that no other run writes here; the lock goes with `unlock`, or the process.

        Raises:
            RunDirError: another one does.
        """
        fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self.unlock = weakref.finalize(self, os.close, fd)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunDirError(
                f"run directory {self._given!r}: another run is writing there; wait for its end,"
                " or choose another folder"
            ) from None
        except OSError as error:
            _log.debug("%s cannot be locked: %s", self.path, error)  # some network file systems

    def _open_metrics(self) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        self._metrics_fd = os.open(self.path / METRICS, flags, 0o666)


def _claim(pattern: str) -> Path:
    """Make a new folder for a pattern with "{time}" in it; two runs never get the same one."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    for number in range(1, _NAMES_MAX):
        name = stamp if number == 1 else f"{stamp}-{number}"
        folder = Path(pattern.replace("{time}", name))
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            folder.mkdir()
        except FileExistsError:
            continue
        return folder
    raise RunDirError(f"run directory {pattern!r}: {_NAMES_MAX} names are taken; choose another")


def _make_room(folder: Path, overwrite: bool) -> None:
    """Remove an earlier run's files, if `overwrite`; refuse to touch them otherwise."""
    found = [folder / name for name in _OWN if (folder / name).exists()]
    for pattern in CHECKPOINT_PATTERNS:
        found.extend(sorted((folder / CHECKPOINTS).glob(pattern)))
    names = [file.name for file in found]
    names += map(checkpoint_name, versions(folder / CHECKPOINTS))
    if names and not overwrite:
        raise RunDirError(
            f"run directory {str(folder)!r}: holds another run's {names[0]}; leave a "
            "completed run as it is, or go on with another, with --resume; replace it with "
            "--overwrite; or choose another folder with --run-dir"
        )
    remove_all(folder / CHECKPOINTS)
    for file in found:
        file.unlink()


@contextlib.contextmanager
def _explained(path: str | Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RunDirError(_explain(path, error)) from error
    except CheckpointError as error:
        raise RunDirError(f"run directory {str(path)!r}: {error}") from error


def _check_regular(file: Path) -> None:
    """See that a file, if it is there, is one: the opening of a pipe would wait for its writer."""
    if file.exists() and not file.is_file():
        raise RunDirError(f"{file}: is no regular file; remove it, or choose another folder")


def _check_status(status: object, file: Path) -> None:
    """See that it is what `_status` makes, as far as anybody reads it."""
    kinds: dict[str, Any] = {
        "state": str,
        "updates": int,
        "test_accuracy": (float, int, type(None)),
        "reason": str,
    }
    fields = status if isinstance(status, dict) else {}
    for name, kind in kinds.items():
        value = fields.get(name)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise RunDirError(f"{file}: is not a run's status: {name!r} is {value!r:.100}")
    if fields["state"] not in STATES:
        raise RunDirError(f"{file}: is not a run's status: expected a 'state' of {STATES}")


def _status(
    state: str,
    updates: int,
    test_accuracy: float | None,
    reason: str,
    **workers: Collection[int],
) -> str:
    accuracy = _plain(test_accuracy)
    fields: dict[str, Any] = {"state": state, "updates": int(updates)}
    fields |= {"test_accuracy": accuracy, "reason": reason}
    fields |= {name: sorted(those) for name, those in workers.items() if those}
    return json.dumps(fields, allow_nan=False) + "\n"


def _update_of(line: bytes) -> int:
    """Find the update that a line of metrics tells of; 0 if it tells of none."""
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError):
        return 0
    update = fields.get("update") if isinstance(fields, dict) else None
    return update if isinstance(update, int) else 0


def _replace(file: Path, text: str | bytes) -> None:
    """Write a file so that whoever reads it, and whenever the machine dies, finds it whole."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as stream:
            stream.write(text.encode() if isinstance(text, str) else text)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(file)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(file.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _plain(value: Any) -> Any:
    """Make a number fit for JSON: NumPy scalars become Python's, NaN and infinities None."""
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _explain(path: str | Path, error: OSError) -> str:
    remedy = _REMEDIES.get(error.errno or 0, "choose another folder")
    return f"run directory {str(path)!r}: {error.strerror or error}; {remedy}"
