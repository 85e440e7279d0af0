"""The history: what becomes of the leader's events, and when an epoch is complete."""

from __future__ import annotations

from psframe.events import EpochDone, Evaluated, Logged
from psframe.history import EpochSummary, History


def test_history_of_a_run_that_was_stopped_has_what_is_known() -> None:
    seen: list[EpochSummary] = []
    history = History(True, seen.append)
    history(Logged(0, {"loss": (6.0, 2)}))
    history(EpochDone(0, 10, 90, 1.0))
    history(EpochDone(1, 20, 90, 2.0))
    history(Evaluated(0, 10, {"loss": 4.0, "correct": 1.0, "count": 2.0}))
    assert [summary.epoch for summary in seen] == [0]
    history.close()
    assert history.epochs == [
        EpochSummary(0, 10, 90, 3.0, 1.0, 2.0, 0.5),
        EpochSummary(1, 20, 90, None, 2.0, None, None),
    ]
