"""Checkpoints of simulated runs, in memory: taken when machines mark themselves, and begun from."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from psframe.events import Marked
from psframe.layout import Array
from psframe.server import Server
from psframe.state import Resume

__all__ = ["Arrays", "Checkpoint", "Saver"]


@dataclass
class Checkpoint:
    """What all servers had marked: the arrays of each, and the leader's state as a file has it.

    Attributes:
        number: the mark's.
        shards: server -> name -> a copy of its array.
        versions: server -> its version.
        state: the leader's, there and back through JSON.
    """

    number: int
    shards: dict[int, dict[str, Array]] = field(default_factory=dict)
    versions: dict[int, int] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)

    @property
    def version(self) -> int:
        return self.versions[0]

    def joined(self) -> dict[str, Array]:
        """Each array over all parameters."""
        shards = [self.shards[server] for server in sorted(self.shards)]
        names = set(shards[0])
        assert all(set(shard) == names for shard in shards), "shards have different arrays"
        return {name: np.concatenate([shard[name] for shard in shards]) for name in names}

    def resume(self) -> Resume:
        return Resume(self.state, Arrays(self.joined()))


class Arrays:
    """Arrays in memory, as `psframe.state.Arrays`."""

    def __init__(self, arrays: dict[str, Array]) -> None:
        self._arrays = arrays
        self.names: Collection[str] = arrays.keys()

    def read(self, name: str, begin: int, end: int, out: Array) -> None:
        assert out.shape == (end - begin,)
        out[:] = self._arrays[name][begin:end]


class Saver:
    """Takes the marks of one run; `Simulation(save=...)`.

    Args:
        servers: S.
        seconds: how long the next shard takes to be written.

    Attributes:
        checkpoints: by number; those that all servers have marked are whole.
    """

    def __init__(self, servers: int = 1, seconds: Callable[[], float] = lambda: 0.0) -> None:
        self.checkpoints: dict[int, Checkpoint] = {}
        self._servers = servers
        self._seconds = seconds
        self._writing: dict[int, tuple[int, Any, dict[str, bytes]]] = {}

    def __call__(self, machine: Server, mark: Marked) -> float:
        self.check()
        one = self.checkpoints.setdefault(mark.number, Checkpoint(mark.number))
        assert machine.index not in one.shards, "a server marks itself twice"
        assert not getattr(machine, "_told", False), "it has said that it has finished"
        one.versions[machine.index] = mark.version
        one.shards[machine.index] = {name: np.array(a) for name, a in machine.marked.items()}
        if machine.index == 0:
            one.state = json.loads(json.dumps(mark.state, allow_nan=False))
        data = {name: array.tobytes() for name, array in machine.marked.items()}
        self._writing[machine.index] = mark.number, machine, data
        return self._seconds()

    def check(self) -> None:
        """What is being written has not changed."""
        for server, (number, machine, data) in list(self._writing.items()):
            if machine._keeper.number != number:
                del self._writing[server]
                continue
            for name, array in machine.marked.items():
                assert np.array(array).tobytes() == data[name], f"{name} has changed"

    @property
    def whole(self) -> list[Checkpoint]:
        """The checkpoints of which all shards are there."""
        every = self.checkpoints.values()
        return [one for one in every if len(one.shards) == self._servers]
