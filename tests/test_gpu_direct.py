"""Who decides whether MPI is given device pointers, and of what; without MPI, in threads."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import psframe
from psframe import gpu_direct
from psframe.errors import ArgumentError
from psframe.gpu_direct import Answer, Decision, check_gpu_direct, decide, explain
from psframe.settings import Settings
from psframe.throwaway import Unknown

BOUND_S = 20.0
START = {"w": np.zeros(2)}
YES: Answer = {"value": True, "by": "mpi_memory_alloc_kinds"}
NO: Answer = {"value": False, "by": "MPIX_Query_cuda_support"}
SILENT: Answer = {"value": None, "by": "it has no query"}


class Ranks:
    """Threads that gather from each other."""

    def __init__(self, nodes: str) -> None:
        self.nodes = tuple(nodes)
        self.size = len(nodes)
        self._barrier = threading.Barrier(self.size, timeout=BOUND_S)
        self._data = [b""] * self.size
        self.gathered = 0

    def gather(self, rank: int, data: bytes) -> list[bytes]:
        self._data[rank] = data
        self._barrier.wait()
        everyone = list(self._data)
        self._barrier.wait()
        self.gathered += rank == 0
        assert len({len(one) for one in everyone}) == 1
        return everyone


class Rank:
    def __init__(self, ranks: Ranks, rank: int) -> None:
        self.ranks, self.rank, self.nodes = ranks, rank, ranks.nodes
        self.names = tuple(10 + place for place in range(ranks.size))

    def all_gather(self, data: bytes, what: str) -> list[bytes]:
        return self.ranks.gather(self.rank, data)


def decided(
    says: list[Answer | None],
    *,
    way: str = "auto",
    nodes: str = "",
    apart: str = "",
    probe: Callable[[int], Answer] | None = None,
) -> tuple[Decision, list[int], list[int]]:
    """Have ranks decide; None is a rank without a GPU. Gives who was asked, and who has probed."""
    ranks = Ranks(nodes or "a" * len(says))
    decisions: list[Any] = [None] * ranks.size
    asked, probed = list[int](), list[int]()

    def run(rank: int) -> None:
        def ask() -> Answer:
            asked.append(rank)
            answer = says[rank]
            assert answer is not None
            return answer

        def tried() -> Answer:
            probed.append(rank)
            assert probe is not None, "it is known"
            return probe(rank)

        decisions[rank] = decide(
            Rank(ranks, rank),
            way,
            on_gpu=says[rank] is not None,
            apart=(apart or "y" * ranks.size)[rank] == "y",
            ask=ask,
            probe=tried,
        )

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(ranks.size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(BOUND_S)
    first = decisions[0]
    for other in decisions:
        assert (other.direct, other.why, str(other.error)) == (
            first.direct,
            first.why,
            str(first.error),
        )
    return first, sorted(asked), sorted(probed)


def test_all_say_yes() -> None:
    decision, asked, probed = decided([None, YES, YES])
    assert decision == Decision(True, "MPI takes them, as mpi_memory_alloc_kinds says")
    assert (asked, probed) == ([1, 2], [])


def test_one_no_is_a_no_for_all_and_is_not_tried() -> None:
    decision, _, probed = decided([None, YES, NO])
    assert not decision.direct
    assert decision.error is None
    assert decision.why.startswith("on rank 12 MPI does not take device pointers, as MPIX_Query")
    assert probed == []
    assert "rank 12" in str(decided([None, YES, NO], way="on")[0].error)


def test_off_asks_nobody_and_gathers_nothing() -> None:
    assert decided([YES, YES], way="off") == (Decision(False), [], [])


def test_who_shares_all_memory_is_asked_only_if_it_must_be() -> None:
    assert decided([None, NO, YES], apart="yny")[0].direct
    assert decided([None, NO, YES], apart="nnn") == (Decision(False), [], [])
    assert decided([None, NO, YES], apart="nnn", way="on")[1] == [1, 2]


def test_on_without_a_gpu() -> None:
    decision, _, _ = decided([None, None], way="on")
    assert "no rank computes on a GPU" in str(decision.error)
    assert decided([None, None])[0] == Decision(False)


def test_the_first_of_a_node_that_does_not_know_tries_it_for_the_others() -> None:
    says = [None, YES, SILENT, SILENT, SILENT, SILENT]
    tried = {"value": True, "by": "a device pointer that it was given"}
    decision, _, probed = decided(says, nodes="aaabbb", probe=lambda rank: tried)
    assert decision.direct
    assert probed == [2, 3]
    failed = {"value": False, "by": "a device pointer that it was given"}
    for rank, name in ((2, 12), (3, 13)):
        decision, _, _ = decided(
            says, nodes="aaabbb", probe=lambda r, bad=rank: failed if r == bad else tried
        )
        assert f"on rank {name} MPI does not take" in decision.why


def test_a_probe_without_an_answer_is_no_proof() -> None:
    def lost(rank: int) -> Answer:
        raise Unknown("no answer within 90 s: it said nothing")

    decision, _, _ = decided([None, SILENT], probe=lost)
    assert not decision.direct
    assert decision.why == (
        "on rank 11 it is not known whether MPI takes device pointers: it has no query, and no"
        " answer within 90 s: it said nothing"
    )
    assert isinstance(decided([None, SILENT], probe=lost, way="on")[0].error, ArgumentError)


def test_long_reasons_are_cut() -> None:
    answer = {"value": False, "by": "ä" * 1000}
    assert len(decided([answer])[0].why) < gpu_direct._TEXT_BYTES_MAX + 100


def test_one_line_says_which_way_and_why() -> None:
    yes, no = Decision(True, "for so it is"), Decision(False, "it is not")
    assert explain(yes, gradients=True, parameters=True) == (
        "MPI is given what is on GPUs as it is: for so it is"
    )
    assert explain(yes, gradients=False, parameters=True).endswith(
        "; but not workers' gradients: they are coded, or read on the host, first"
    )
    assert "gradients and parameters: they" in explain(yes, gradients=False, parameters=False)
    assert explain(no, gradients=True, parameters=False) == (
        "what is on GPUs goes to MPI through the host: it is not"
    )


# ---- arguments ----------------------------------------------------------------------------------


def test_what_is_no_way() -> None:
    with pytest.raises(ValueError, match="gpu_direct: expected 'auto', 'on' or 'off', got 'yes'"):
        check_gpu_direct("yes")
    with pytest.raises(TypeError, match="gpu_direct: expected 'auto', 'on' or 'off', got True"):
        check_gpu_direct(True)
    assert [check_gpu_direct(way) for way in ("auto", "on", "off")] == ["auto", "on", "off"]
    assert Settings().gpu_direct == "auto"


@pytest.mark.parametrize(
    ("way", "kind", "said"),
    [("on", ArgumentError, "one process without it"), ("always", ValueError, "got 'always'")],
)
def test_a_run_in_one_process_refuses(way: str, kind: type, said: str) -> None:
    with pytest.raises(kind, match=said):
        psframe.run(lambda worker: None, START, optimizer=psframe.optim.SGD(0.1), gpu_direct=way)


def test_a_run_in_one_process_may_say_off() -> None:
    result = psframe.run(
        lambda worker: None, START, optimizer=psframe.optim.SGD(0.1), gpu_direct="off"
    )
    assert result.version == 0
