"""What has been found out, and what is said of it; facts are plain JSON, as they travel."""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from psframe.throwaway import Unknown

__all__ = ["Case", "Facts", "Finding", "Node", "Unknown", "Verdict", "gather"]

# Names of groups to what was found; a group that could not be found out is {"unknown": reason}.
Facts: TypeAlias = Mapping[str, Any]

_UNKNOWN = "unknown"


class Verdict(enum.Enum):
    """What a check comes to."""

    OK = "ok"
    WARNING = "warning"
    ERROR = "error"
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class Finding:
    """What a check says.

    Attributes:
        verdict: error means that runs fail, or are not what they seem; warning that they are slow
            or at risk.
        found: what was found.
        remedy: what to do about it; "" for nothing.
    """

    verdict: Verdict
    found: str
    remedy: str = ""


@dataclass(frozen=True)
class Node:
    """Ranks that can open each other's memory.

    Attributes:
        host: its name.
        ranks: in order.
    """

    host: str
    ranks: tuple[int, ...]


@dataclass(frozen=True)
class Case:
    """All that was found out.

    Attributes:
        ranks: of each rank its facts; this process's only, if the ranks have not met.
        launched: the launcher's name, rank and size as the environment tells, or None.
        met: whether MPI has started and the ranks have found each other.
        trouble: why they have not.
        lone: what is wrong if the launcher's processes are no ranks of one job; "" if they are.
        here: what only this process has looked for, such as the run directory.
    """

    ranks: tuple[Facts, ...]
    launched: Facts | None = None
    met: bool = True
    trouble: str = ""
    lone: str = ""
    here: Facts = field(default_factory=dict)

    def of(self, rank: int, group: str) -> Any:
        """Give a group of one rank's facts.

        Raises:
            Unknown: it could not be found out.
        """
        if group not in self.ranks[rank] and not self.met:
            raise Unknown("the ranks did not meet, or MPI did not start")
        return _known(self.ranks[rank], group, f"rank {rank}: " if len(self.ranks) > 1 else "")

    def every(self, group: str) -> list[Any]:
        """Give a group of each rank's facts, by rank.

        Raises:
            Unknown: it could not be found out on one of them.
        """
        return [self.of(rank, group) for rank in range(len(self.ranks))]

    def own(self, group: str) -> Any:
        """Give a group of what only this process has looked for; None if it was not asked.

        Raises:
            Unknown: it could not be found out.
        """
        return None if group not in self.here else _known(self.here, group, "")

    def together(self) -> None:
        """Return if the facts of all ranks that were started are there.

        Raises:
            Unknown: they are not.
        """
        if self.launched is not None and not self.met:
            raise Unknown("the ranks did not meet")

    def nodes(self) -> list[Node]:
        """Give the nodes, in the order of their first ranks."""
        members: dict[str, list[int]] = {}
        for rank, node in enumerate(self.every("node")):
            members.setdefault(node["id"], []).append(rank)
        return [Node(self.of(ranks[0], "node")["host"], tuple(ranks)) for ranks in members.values()]


def _known(facts: Facts, group: str, whose: str) -> Any:
    if group not in facts:
        raise Unknown(f"{whose}it was not looked for")
    value = facts[group]
    if isinstance(value, Mapping) and _UNKNOWN in value:
        raise Unknown(f"{whose}{value[_UNKNOWN]}")
    return value


def gather(probes: Mapping[str, Callable[[], Any]]) -> dict[str, Any]:
    """Call each probe; what it cannot find out becomes {"unknown": the reason}."""
    facts: dict[str, Any] = {}
    for name, probe in probes.items():
        try:
            facts[name] = probe()
        except Unknown as error:
            facts[name] = {_UNKNOWN: str(error)}
        except Exception as error:  # a strange machine: the other checks are worth having
            facts[name] = {_UNKNOWN: f"{type(error).__name__}: {error}"}
    return facts
