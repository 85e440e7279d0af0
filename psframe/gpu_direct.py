"""Whether arrays that are on GPUs are given to MPI as they are, without a copy on the host.

An MPI that is not CUDA-aware dies of a device pointer, so each rank on a GPU asks its own: first
the standard's info key `mpi_memory_alloc_kinds`, then `MPIX_Query_cuda_support`; where neither
answers, a process of its own tries, one on each node. All ranks hear all answers, and all decide
alike.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from psframe.errors import ArgumentError
from psframe.throwaway import Unknown, takes_device_pointers

__all__ = ["Answer", "Decision", "Gatherer", "check_gpu_direct", "decide", "explain"]

_WAYS = ("auto", "on", "off")
_TEXT_BYTES_MAX = 400
_TOLD = struct.Struct(f"<bH{_TEXT_BYTES_MAX}s")
_NOT_ASKED, _NO, _YES, _UNKNOWN = -1, 0, 1, 2
_VALUES: dict[bool | None, int] = {True: _YES, False: _NO, None: _UNKNOWN}
_WHAT = "whether MPI takes device pointers"

# Of what MPI says of itself: {"value": true, false or null, "by": how that is known}.
Answer = dict[str, Any]


class Gatherer(Protocol):
    """What is needed of the ranks; `psframe.transports.mpi.Mesh` is them.

    Attributes:
        rank: this process's place.
        names: of each place the rank, for messages.
        nodes: of each place what is equal on one node.
    """

    rank: int
    names: tuple[int, ...]
    nodes: tuple[Any, ...]

    def all_gather(self, data: bytes, what: str) -> list[bytes]:
        """Gather equally many bytes of every rank, in rank order."""


@dataclass(frozen=True)
class Decision:
    """What the ranks have decided.

    Attributes:
        direct: whether device pointers are given to MPI.
        why: how that is known, for the log; "" if there is nothing to be said.
        error: what every rank must raise in place of beginning.
    """

    direct: bool
    why: str = ""
    error: ArgumentError | None = None


def check_gpu_direct(value: object) -> str:
    """Return what `run(gpu_direct=...)` is given.

    Raises:
        TypeError, ValueError: it is none of "auto", "on", "off".
    """
    if not isinstance(value, str):
        raise TypeError(f"gpu_direct: expected 'auto', 'on' or 'off', got {value!r}")
    if value not in _WAYS:
        raise ValueError(f"gpu_direct: expected 'auto', 'on' or 'off', got {value!r}")
    return value


def decide(
    mesh: Gatherer,
    way: str,
    *,
    on_gpu: bool,
    apart: bool,
    ask: Callable[[], Answer],
    probe: Callable[[], Answer] = takes_device_pointers,
) -> Decision:
    """Decide for all ranks, each of which calls it, with the same `way`.

    Args:
        mesh: the ranks.
        way: as checked.
        on_gpu: whether this rank computes on a GPU, as a worker or a server.
        apart: whether it exchanges arrays with a rank with which it shares no memory.
        ask: what this rank's MPI says of itself; it is called only if the answer matters.
        probe: tries, if it says nothing.
    """
    if way == "off":
        return Decision(False)
    mine: Answer | None = None
    if on_gpu and (apart or way == "on"):
        mine = ask()
    answers = _gather(mesh, mine)
    if not any(code != _NOT_ASKED for code, _ in answers):
        if way == "on":
            return Decision(False, error=ArgumentError(_no_gpu()))
        return Decision(False)
    if any(code == _UNKNOWN for code, _ in answers):
        answers = _probed(mesh, answers, probe)
    return _concluded(mesh, way, answers)


def _concluded(mesh: Gatherer, way: str, answers: Sequence[tuple[int, str]]) -> Decision:
    """Make of all ranks' answers, of which one at least was asked for, what they come to."""
    refused = [place for place, (code, _) in enumerate(answers) if code in (_NO, _UNKNOWN)]
    if not refused:
        by = next(text for code, text in answers if code == _YES)
        return Decision(True, f"MPI takes them, as {by} says")
    code, by = answers[refused[0]]
    rank = mesh.names[refused[0]]
    why = f"on rank {rank} MPI does not take device pointers, as {by} says"
    if code == _UNKNOWN:
        why = f"on rank {rank} it is not known whether MPI takes device pointers: {by}"
    error = ArgumentError(
        f"gpu_direct: 'on', but {why}; take an MPI that is built with CUDA, or gpu_direct='auto'"
    )
    return Decision(False, why, error if way == "on" else None)


def explain(decision: Decision, *, gradients: bool, parameters: bool) -> str:
    """Say in one line which way arrays on GPUs take between ranks that share no memory, and why.

    Args:
        decision: of the ranks.
        gradients, parameters: whether these would be given to MPI on a worker's GPU; codecs take
            or leave them on the host, and what measures a part of a gradient reads it there.
    """
    if not decision.direct:
        return f"what is on GPUs goes to MPI through the host: {decision.why}"
    direct = {"gradients": gradients, "parameters": parameters}
    host = [what for what, is_direct in direct.items() if not is_direct]
    but = f"; but not workers' {' and '.join(host)}: they are coded, or read on the host, first"
    return f"MPI is given what is on GPUs as it is: {decision.why}{but if host else ''}"


def _no_gpu() -> str:
    return (
        "gpu_direct: 'on' gives arrays on GPUs to MPI, and no rank computes on a GPU;"
        " take gpu_direct='auto', or device='cuda'"
    )


def _gather(mesh: Gatherer, answer: Answer | None) -> list[tuple[int, str]]:
    """Give every rank's answer, as a code and how it is known."""
    code, text = _NOT_ASKED, b""
    if answer is not None:
        code = _VALUES[answer["value"]]
        text = str(answer["by"]).encode("utf-8", "backslashreplace")[:_TEXT_BYTES_MAX]
    told = mesh.all_gather(_TOLD.pack(code, len(text), text), _WHAT)
    answers = [_TOLD.unpack(one) for one in told]
    return [(code, text[:length].decode("utf-8", "replace")) for code, length, text in answers]


def _probed(
    mesh: Gatherer, answers: Sequence[tuple[int, str]], probe: Callable[[], Answer]
) -> list[tuple[int, str]]:
    """Have the first of those on each node who do not know try it, for the others, too."""
    first: dict[Hashable, int] = {}
    for place, (code, _) in enumerate(answers):
        if code == _UNKNOWN:
            first.setdefault(mesh.nodes[place], place)
    mine: Answer | None = None
    if mesh.rank in first.values():
        try:
            mine = probe()
        except Unknown as error:
            mine = {"value": None, "by": f"{answers[mesh.rank][1]}, and {error}"}
    found = _gather(mesh, mine)
    return [
        found[first[mesh.nodes[place]]] if answer[0] == _UNKNOWN else answer
        for place, answer in enumerate(answers)
    ]
