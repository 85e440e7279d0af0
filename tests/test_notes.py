"""What a worker tells beside its work: names must fit into a message, and numbers go in several."""

import numpy as np
import pytest

import psframe
from psframe.events import Evaluated, Logged
from psframe.wire import NAME_BYTES_MAX, NAMES_MAX, encode


def events_of(work):
    """The leader's events of a run with one worker; each would fit into a message."""
    events = []
    psframe.simulate(
        work,
        {"w": np.zeros(1)},
        optimizer=psframe.optim.SGD(lr=0.0),
        workers=1,
        compute_time_s=lambda rng, worker, clock: 0.0,
        observer=events.append,
    )
    return events


@pytest.mark.parametrize("name", ["x" * NAME_BYTES_MAX, "é" * (NAME_BYTES_MAX // 2)])
def test_names_may_be_so_long(name):
    def work(worker):
        worker.log(**{name: 1.0})
        with pytest.raises(ValueError, match=f"expected a name of at most {NAME_BYTES_MAX} bytes"):
            worker.log(loss=2.0, **{name + "x": 1.0})
        with pytest.raises(ValueError, match="surrogates"):
            worker.log(**{"\ud800": 1.0})

    (event,) = (event for event in events_of(work) if isinstance(event, Logged))
    assert event.sums == {name: (1.0, 1)}, "of a wrong call nothing is logged"


def test_more_names_than_a_message_has_room_for_go_in_several():
    numbers = {f"n{i}": float(i) for i in range(2 * NAMES_MAX + 3)}

    def work(worker):
        worker.log(**numbers)
        for name, value in numbers.items():
            worker.log(**{name: value})

    sums = {}
    for event in events_of(work):
        assert isinstance(event, Logged)
        encode(psframe.events.Log(0, event.sums))
        for name, (total, count) in event.sums.items():
            old = sums.get(name, (0.0, 0))
            sums[name] = old[0] + total, old[1] + count
    assert sums == {name: (2 * value, 2) for name, value in numbers.items()}


def test_a_report_is_one_message():
    def work(worker):
        for task in worker.tasks(1, 1, evaluate=(1, 1)):
            if task.kind == "evaluate":
                with pytest.raises(ValueError, match=f"at most {NAMES_MAX} names, got 65"):
                    task.report(**{f"n{i}": 1.0 for i in range(NAMES_MAX + 1)})
                with pytest.raises(ValueError, match="expected a name of at most"):
                    task.report(**{"x" * (NAME_BYTES_MAX + 1): 1.0})
                task.report(**{f"n{i}": 1.0 for i in range(NAMES_MAX)})

    (evaluated,) = (event for event in events_of(work) if isinstance(event, Evaluated))
    assert len(evaluated.sums) == NAMES_MAX
