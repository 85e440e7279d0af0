"""What the ranks of a run know of its checkpoints: where they go, and which one it goes on from."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from psframe.checkpoint import Reader, open_checkpoint
from psframe.draws import Numbers, read_draws
from psframe.errors import CheckpointError
from psframe.layout import Layout
from psframe.rundir import CHECKPOINTS
from psframe.state import Fields, Resume

__all__ = ["Restart", "explained_state"]


@dataclass
class Restart:
    """How a run begins, as far as checkpoints go.

    Attributes:
        folder: the run's checkpoints/; None if there is no run directory.
        version, digest: of the checkpoint to go on from; None if it begins.
        random: by worker, how far its random numbers had got.
        reader: the same checkpoint, open, on the ranks that need it.
    """

    folder: Path | None = None
    version: int | None = None
    digest: str | None = None
    random: dict[int, Numbers] | None = None
    reader: Reader | None = None

    @classmethod
    def of(cls, run_dir: Path | None, reader: Reader | None) -> Restart:
        """Make it on the first server.

        Raises:
            CheckpointError: the checkpoint does not hold what it should.
        """
        if run_dir is None:
            return cls()
        folder = run_dir.absolute() / CHECKPOINTS
        if reader is None:
            return cls(folder)
        with explained_state(reader):
            random = read_draws(Fields(reader.state))
        return cls(folder, reader.version, reader.digest, random, reader)

    def encode(self) -> bytes:
        """Give what the other ranks need to know."""
        random = [[worker, *map(str, numbers)] for worker, numbers in (self.random or {}).items()]
        folder = None if self.folder is None else str(self.folder)
        return json.dumps([folder, self.version, self.digest, random]).encode()

    @classmethod
    def decode(cls, data: bytes) -> Restart:
        """Take it on another rank; it comes from the first server, which has checked it."""
        folder, version, digest, random = json.loads(data)
        draws: dict[int, Numbers] = {}
        for worker, *numbers in random:
            state, increment, has_half, half = map(int, numbers)
            draws[worker] = (state, increment, has_half, half)
        return cls(None if folder is None else Path(folder), version, digest, draws)

    def open(
        self, layout: Layout, begin: int, end: int, alive: Callable[[], None] | None = None
    ) -> None:
        """Open the part of the checkpoint that a server needs which is not the first.

        `alive` is called now and then while it is verified.

        Raises:
            CheckpointError: it cannot be read here.
        """
        if self.version is None or self.folder is None or self.reader is not None:
            return
        try:
            self.reader = open_checkpoint(
                self.folder,
                self.version,
                layout,
                begin=begin,
                end=end,
                digest=self.digest,
                alive=alive,
            )
        except CheckpointError as error:
            raise CheckpointError(
                f"{error} (the first server has it: is the folder on a file system that all servers"
                " share?)"
            ) from error

    def close(self) -> None:
        """Close the checkpoint."""
        if self.reader is not None:
            self.reader.close()

    @property
    def resume(self) -> Resume | None:
        """What a server's machine begins with."""
        return None if self.reader is None else Resume(self.reader.state, self.reader)


@contextlib.contextmanager
def explained_state(reader: Reader | None) -> Iterator[None]:
    """Say of which checkpoint it is that something does not fit.

    Raises:
        CheckpointError: in place of a ValueError, where there is a checkpoint.
    """
    try:
        yield
    except ValueError as error:
        if reader is None:
            raise
        raise CheckpointError(f"{reader.path}: {error}") from error
