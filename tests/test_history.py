"""The history: what becomes of the leader's events, and when an epoch is complete."""

from __future__ import annotations

from psframe.events import EpochDone, Evaluated, Logged
from psframe.history import EpochSummary, EpochSums, History, evaluation_metrics, score
from psframe.state import Fields


def test_history_of_a_run_that_was_stopped_has_what_is_known() -> None:
    seen: list[EpochSummary] = []
    history = History(True, (seen.append,), clock=lambda: 0.0)
    history(Logged(0, {"loss": (6.0, 2)}))
    history(EpochDone(0, 10, 90, 1.0))
    history(EpochDone(1, 20, 90, 2.0))
    history(Evaluated(0, 10, {"loss": 4.0, "correct": 1.0, "count": 2.0}))
    assert [summary.epoch for summary in seen] == [0]
    history.close()
    assert history.epochs == [
        EpochSummary(0, 10, 90, 3.0, 1.0, 2.0, 0.5, evaluated_version=10),
        EpochSummary(1, 20, 90, None, 2.0, None, None),
    ]


def evaluated(epoch: int, correct: float, *, best: bool) -> Evaluated:
    sums = {"validation_correct": correct, "validation_count": 10.0, "validation_loss": 1.0}
    return Evaluated(epoch, epoch, sums, best)


def test_a_callback_that_returns_true_ends_the_run() -> None:
    calls: list[str] = []

    def first(summary: EpochSummary) -> bool:
        calls.append(f"first {summary.epoch}")
        return summary.epoch == 1

    def second(summary: EpochSummary) -> str:
        calls.append(f"second {summary.epoch}")
        return "not True"

    history = History(False, (first, second))
    assert history(EpochDone(0, 1, 1, 0.0)) is False
    assert history(EpochDone(1, 2, 1, 0.0)) is True
    assert calls == ["first 0", "second 0", "first 1", "second 1"]


def test_patience_runs_out_after_so_many_worse_epochs() -> None:
    history = History(True, (), patience=2)
    ends = []
    for epoch, correct in enumerate([5.0, 4.0, 6.0, 6.0, 3.0]):
        history(EpochDone(epoch, epoch, 1, 0.0))
        ends.append(history(evaluated(epoch, correct, best=epoch in (0, 2))))
    assert ends == [False, False, False, False, True]
    assert history.stopped_early
    assert history.best_epoch == 2


def test_patience_goes_by_accuracy_though_the_loss_falls() -> None:
    """What is kept goes by the loss among equals; whoever waits for accuracy has seen none."""
    history = History(True, (), patience=2)
    ends = []
    for epoch in range(3):
        history(EpochDone(epoch, epoch, 1, 0.0))
        ends.append(history(evaluated(epoch, 5.0, best=True)))
    assert ends == [False, False, True]
    assert history.best_epoch == 2


def test_patience_without_accuracies_goes_by_the_score() -> None:
    history = History(True, (), patience=1)
    for epoch, best in enumerate([True, True, False]):
        history(EpochDone(epoch, epoch, 1, 0.0))
        sums = {"validation_loss": 1.0, "validation_count": 10.0}
        assert history(Evaluated(epoch, epoch, sums, best)) is (not best)


def test_an_epoch_has_the_speed_and_the_times_of_its_steps() -> None:
    times = iter([0.0, 2.0, 4.0])
    history = History(False, clock=lambda: next(times))
    history(Logged(0, {"compute_s": (1.0, 2), "data_s": (0.25, 2)}))
    history(Logged(1, {"compute_s": (2.0, 2), "servers_s": (0.5, 2)}))
    history(EpochDone(0, 1, 10, 0.0))
    history(EpochDone(1, 2, 10, 0.0))
    first, second = history.epochs
    assert (first.samples_per_s, first.compute_s) == (5.0, 3.0)
    assert (first.servers_s, first.data_s) == (0.5, 0.25)
    assert (second.samples_per_s, second.compute_s) == (5.0, None)


def test_the_speed_of_an_epoch_that_goes_on_is_that_of_both_its_parts() -> None:
    """Its samples count on; the time between the two attempts is nobody's."""
    logged = Logged(0, {"compute_s": (1.0, 2)})
    now = [100.0]
    first = EpochSums(lambda: now[0])
    now[0] += 3.0
    first.add(logged)
    state = first.state()
    now[0] += 1000.0
    for told in (state, {**state, "seconds": 3.0}):
        second = EpochSums(lambda: now[0])
        second.restore(Fields(told))
        now[0] += 50.0  # the set-up
        assert second.state()["seconds"] == 3.0
        second.add(logged)
        now[0] += 2.0
        assert second.take(EpochDone(0, 1, 10, 0.0))["samples_per_s"] == 2.0
        now[0] += 5.0
        assert second.take(EpochDone(1, 2, 10, 0.0))["samples_per_s"] == 2.0
    third = EpochSums(lambda: now[0])
    third.restore(Fields({name: state[name] for name in ("loss", "losses", "times")}))
    now[0] += 1.0
    third.add(logged)
    assert "samples_per_s" not in third.take(EpochDone(0, 1, 10, 0.0))


def test_scores_go_by_accuracy_and_among_equals_by_loss() -> None:
    def sums(correct: float, loss: float) -> dict[str, float]:
        parts = {"validation_correct": correct, "validation_loss": loss, "validation_count": 10.0}
        return {**parts, "correct": 9.0, "count": 10.0, "loss": 0.0}

    ranked = [sums(4, 0.1), sums(5, 90.0), sums(5, 2.0), sums(6, 900.0)]
    assert sorted(ranked, key=score) == ranked


def test_metrics_of_an_evaluation_name_their_part() -> None:
    sums = {"loss": 4.0, "count": 2.0, "validation_correct": 3.0, "validation_count": 4.0}
    assert evaluation_metrics(sums) == {"test_loss": 2.0, "validation_accuracy": 0.75}
