"""How far plans and an evaluation have got, as plain data.

A block that some worker had in hand is one that came back: in a run that goes on from here nobody
has it.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from psframe.events import TaskSpec
from psframe.state import Fields, plain_number
from psframe.waves import PlanBook

__all__ = [
    "Evaluation",
    "evaluation_state",
    "plan_state",
    "read_evaluation",
    "read_plans",
    "read_wanted",
]

_PLANS_MAX = 1 << 20
_NAMES_MAX, _NAME_CHARS_MAX = 64, 256  # what a Report has room for


@dataclass(slots=True)
class Evaluation:
    """The evaluation under way: one snapshot is pinned for it."""

    plan: int
    epoch: int
    version: int
    blocks: int
    next_block: int = 0
    returned: list[int] = field(default_factory=list)  # a heap
    results: dict[int, dict[str, float]] = field(default_factory=dict)

    @property
    def has_blocks(self) -> bool:
        """Whether there are blocks that nobody has had, or that came back."""
        return bool(self.returned) or self.next_block < self.blocks

    def take(self) -> int | None:
        """Take the next block: one that came back, the lowest first, or a new one."""
        if self.returned:
            return heapq.heappop(self.returned)
        if self.next_block < self.blocks:
            self.next_block += 1
            return self.next_block - 1
        return None


# ---- plans -------------------------------------------------------------------------------------


def plan_state(plan: int, book: PlanBook, in_hand: Iterable[int]) -> dict[str, Any]:
    """Put a plan into plain data."""
    spec = book.spec
    return {
        "plan": plan,
        "n_samples": spec.n_samples,
        "batch_size": spec.batch_size,
        "epochs": spec.epochs,
        "shuffle": spec.shuffle,
        "eval_samples": spec.eval_samples,
        "eval_batch_size": spec.eval_batch_size,
        "next_block": book.next_block,
        "returned": sorted([*book.returned, *in_hand]),
    }


def read_plans(fields: Fields) -> dict[int, PlanBook]:
    """Read the list `plans`.

    Raises:
        ValueError: a field is wrong.
    """
    plans: dict[int, PlanBook] = {}
    for one in fields.parts("plans", _PLANS_MAX):
        plan = one.count("plan")
        if plan in plans:
            raise one.bad("plan", "each plan once")
        plans[plan] = _read_plan(one)
    return plans


def _read_plan(fields: Fields) -> PlanBook:
    spec = TaskSpec(
        fields.count("n_samples", least=1),
        fields.count("batch_size", least=1),
        fields.count("epochs"),
        fields.flag("shuffle"),
        fields.count("eval_samples"),
        fields.count("eval_batch_size", least=1),
    )
    book = PlanBook(spec)
    book.next_block = next_block = fields.count("next_block", book.blocks * spec.epochs)
    book.returned = fields.increasing("returned", next_block - 1).copy()  # sorted, so a heap
    missing = Counter(block // book.blocks for block in book.returned)
    for epoch in {*missing, next_block // book.blocks}:
        issued = min(next_block - epoch * book.blocks, book.blocks)
        if issued > missing[epoch]:
            book.done[epoch] = issued - missing[epoch]
    return book


def _is_done(book: PlanBook, epoch: int) -> bool:
    begin, end = epoch * book.blocks, (epoch + 1) * book.blocks
    return end <= book.next_block and not any(begin <= block < end for block in book.returned)


# ---- evaluations -------------------------------------------------------------------------------


def read_wanted(fields: Fields, plans: Mapping[int, PlanBook]) -> list[tuple[int, int]]:
    """Read the list `wanted` of (plan, epoch) to be evaluated, and count them in their plans.

    Raises:
        ValueError: a field is wrong.
    """
    wanted: dict[tuple[int, int], None] = {}
    for plan, epoch in fields.rows("wanted", 2):
        _want(fields, "wanted", plans, plan, epoch)
        if (plan, epoch) in wanted:
            raise fields.bad("wanted", "each epoch once")
        wanted[plan, epoch] = None
    return list(wanted)


def _want(
    fields: Fields, name: str, plans: Mapping[int, PlanBook], plan: int, epoch: int
) -> PlanBook:
    book = plans.get(plan)
    if book is None or not book.spec.eval_samples or not _is_done(book, epoch):
        raise fields.bad(name, "epochs that are done, of plans with an evaluation")
    book.evaluations += 1
    return book


def evaluation_state(evaluation: Evaluation, in_hand: Iterable[int]) -> dict[str, Any]:
    """Put an evaluation into plain data."""
    results = [
        [block, {name: plain_number(value) for name, value in sums.items()}]
        for block, sums in sorted(evaluation.results.items())
    ]
    return {
        "plan": evaluation.plan,
        "epoch": evaluation.epoch,
        "version": evaluation.version,
        "next_block": evaluation.next_block,
        "returned": sorted([*evaluation.returned, *in_hand]),
        "results": results,
    }


def read_evaluation(fields: Fields, plans: Mapping[int, PlanBook], version: int) -> Evaluation:
    """Read an evaluation, and count it in its plan.

    Args:
        fields: it.
        plans: those that there are.
        version: the run's; that of the evaluation is not later.

    Raises:
        ValueError: a field is wrong.
    """
    plan, epoch = fields.count("plan"), fields.count("epoch")
    spec = _want(fields, "epoch", plans, plan, epoch).spec
    blocks = -(-spec.eval_samples // spec.eval_batch_size)
    evaluation = Evaluation(plan, epoch, fields.count("version", version), blocks)
    evaluation.next_block = next_block = fields.count("next_block", blocks)
    evaluation.returned = fields.increasing("returned", next_block - 1).copy()
    for row in fields.items("results"):
        if not isinstance(row, list) or len(row) != 2:
            raise fields.bad("results", "a list of blocks with their sums")
        one = Fields({"block": row[0], "sums": row[1]}, f"{fields.where}.results")
        block = one.count("block", next_block - 1)
        if block in evaluation.results:
            raise one.bad("block", "each block once")
        evaluation.results[block] = _read_sums(one)
    returned = set(evaluation.returned)
    expected = next_block - len(returned)
    if len(evaluation.results) != expected or returned & evaluation.results.keys():
        raise fields.bad("results", f"those of {expected} blocks, that have not come back")
    if expected == blocks:
        raise fields.bad("results", "fewer than all blocks: it would be over")
    return evaluation


def _read_sums(fields: Fields) -> dict[str, float]:
    sums = fields.part("sums")
    names = fields.names("sums")
    if len(names) > _NAMES_MAX or any(len(name) > _NAME_CHARS_MAX for name in names):
        raise fields.bad("sums", f"at most {_NAMES_MAX} names")
    return {name: sums.number(name) for name in names}
